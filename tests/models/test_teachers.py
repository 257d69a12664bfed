"""Every form opens to the same weights; every bad input is one clear sentence, and nothing is loaded for it."""

import json
import re
import shutil
import time

import pytest
import torch
from conftest import tiny_pipeline, tiny_text_encoder
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from helpers import copy_folder, rewrite, same_weights
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import dmm.models.teachers
from dmm.errors import UserError
from dmm.families.sd1 import SD1
from dmm.formats.lora import save_kohya_lora
from dmm.formats.single_file import save_single_file
from dmm.models.teachers import ModelSource, freeze, open_pipeline

UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS = "text_encoder/model.safetensors"


def refused(source, match, **options):
    start = time.perf_counter()
    with pytest.raises(UserError) as caught:
        open_pipeline(source, **options)
    assert time.perf_counter() - start < 5
    assert re.search(match, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


# every form


def sample(pipeline):
    generator = torch.Generator().manual_seed(0)
    return pipeline("a cat", num_inference_steps=2, output_type="pt", generator=generator).images


def test_folder_and_single_file_open_alike_and_sample_alike(sd1_folder, sd1_file, pipeline):
    folder = open_pipeline(ModelSource(sd1_folder))
    file = open_pipeline(ModelSource(str(sd1_file), config=sd1_folder))
    assert same_weights(folder, pipeline)
    assert same_weights(file, pipeline)
    assert sample(folder).equal(sample(file))
    assert sample(folder).shape == (1, 3, 16, 16)
    assert type(file) is StableDiffusionPipeline
    assert file.safety_checker is None


def test_a_lora_is_fused_and_gone(sd1_folder, sd1_file, pipeline, tmp_path):
    adapted = tiny_pipeline()
    adapted.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "conv1"]))
    # diffusers, to compare with, recognises a text encoder's kohya LoRA only by its out_proj
    text_targets = ["q_proj", "out_proj"]
    adapted.text_encoder.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=text_targets))
    save_kohya_lora(tmp_path / "lora.safetensors", {"unet": adapted.unet, "text_encoder": adapted.text_encoder}, SD1)
    source = {"loras": ((tmp_path / "lora.safetensors", 0.5),)}
    folder = open_pipeline(ModelSource(sd1_folder, **source))
    file = open_pipeline(ModelSource(sd1_file, config=sd1_folder, **source))
    assert same_weights(folder, file)
    assert not same_weights(folder, pipeline)
    pipeline.load_lora_weights(str(tmp_path / "lora.safetensors"))
    pipeline.fuse_lora(lora_scale=0.5)
    pipeline.unload_lora_weights()
    torch.testing.assert_close(sample(folder), sample(pipeline), rtol=1e-4, atol=1e-4)
    assert folder.unet.state_dict().keys() == tiny_pipeline().unet.state_dict().keys()


def test_loras_add_up_each_at_its_scale(sd1_folder, tmp_path):
    paths = []
    for seed in (1, 2):
        adapted = tiny_pipeline()
        torch.manual_seed(seed)
        adapted.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]))
        paths.append(tmp_path / f"{seed}.safetensors")
        save_kohya_lora(paths[-1], {"unet": adapted.unet}, SD1)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"

    def weight(*loras):
        return open_pipeline(ModelSource(sd1_folder, loras=loras)).unet.get_parameter(name)

    plain, first, second = weight(), weight((paths[0], 1.0)), weight((paths[1], 1.0))
    both = weight((paths[0], 0.5), (paths[1], -2.0))
    torch.testing.assert_close(both - plain, 0.5 * (first - plain) - 2 * (second - plain))
    assert not torch.equal(both, plain)


@pytest.mark.parametrize("form", ["folder", "file"])
def test_half_precision_on_disk_opens_as_float32(sd1_folder, pipeline, tmp_path, form):
    pipeline.to(dtype=torch.float16)
    if form == "folder":
        pipeline.save_pretrained(tmp_path / "model")
        source = ModelSource(tmp_path / "model")
    else:
        save_single_file(pipeline, tmp_path / "model.safetensors")
        source = ModelSource(tmp_path / "model.safetensors", config=sd1_folder)
    opened = open_pipeline(source)
    assert {
        tensor.dtype for name in ("unet", "vae", "text_encoder") for tensor in getattr(opened, name).parameters()
    } == {torch.float32}
    assert same_weights(opened, pipeline.to(dtype=torch.float32))
    assert open_pipeline(source, torch_dtype=torch.bfloat16).unet.dtype == torch.bfloat16


def test_folders_of_fp16_variants_open(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "model", variant="fp16")
    assert not (tmp_path / "model" / UNET_WEIGHTS).exists()
    assert same_weights(open_pipeline(ModelSource(tmp_path / "model")), pipeline)
    # and those where only some parts are
    pipeline.vae.save_pretrained(tmp_path / "model" / "vae")
    (tmp_path / "model/vae/diffusion_pytorch_model.fp16.safetensors").unlink()
    assert same_weights(open_pipeline(ModelSource(tmp_path / "model")), pipeline)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_folders_open(pipeline, tmp_path, variant):
    pipeline.save_pretrained(tmp_path / "model", max_shard_size="100KB", variant=variant)
    assert len(list((tmp_path / "model/unet").glob("*-of-*"))) > 1
    assert same_weights(open_pipeline(ModelSource(tmp_path / "model")), pipeline)
    next((tmp_path / "model/unet").glob("*-of-*")).unlink()
    refused(ModelSource(tmp_path / "model"), "-of-.*: no such file")


def test_text_encoders_of_both_ages_open(sd1_folder, pipeline, tmp_path):
    flat = {name.removeprefix("text_model."): tensor for name, tensor in load_file(sd1_folder / TEXT_WEIGHTS).items()}
    position_ids = {"text_model.embeddings.position_ids": torch.arange(24)[None]}
    old = {f"text_model.{name}": tensor for name, tensor in flat.items()} | position_ids
    folder = copy_folder(sd1_folder, tmp_path / "model")
    for tensors in (flat, old):
        save_file(tensors, folder / TEXT_WEIGHTS, {"format": "pt"})
        assert same_weights(open_pipeline(ModelSource(folder)), pipeline)


def test_the_published_vaes_older_names_open(sd1_folder, pipeline, tmp_path):
    folder = copy_folder(sd1_folder, tmp_path / "model")
    weights = folder / "vae/diffusion_pytorch_model.safetensors"

    def rename(tensors):
        for name in [name for name in tensors if ".attentions.0.to_" in name]:
            old = name
            for new, former in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
                old = old.replace(new, former)
            tensors[old] = tensors.pop(name)

    rewrite(weights, weights, rename)
    assert "encoder.mid_block.attentions.0.query.weight" in load_file(weights)
    assert same_weights(open_pipeline(ModelSource(folder)), pipeline)


def test_harmless_leftovers_of_original_files(sd1_folder, sd1_file, pipeline, tmp_path):
    def add(tensors):
        tensors["model_ema.diffusion_modelinput_blocks00weight"] = torch.zeros(2)
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(24)[None]
        tensors["cond_stage_model.logit_scale"] = torch.zeros(())
        tensors["sqrt_one_minus_alphas_cumprod"] = torch.zeros(1000)

    file = rewrite(sd1_file, tmp_path / "model.safetensors", add)
    assert same_weights(open_pipeline(ModelSource(file, config=sd1_folder)), pipeline)


# pickles


def as_pickles(folder):
    for weights in list(folder.glob("*/*.safetensors")):
        name = "pytorch_model.bin" if weights.stem == "model" else f"{weights.stem}.bin"
        torch.save(load_file(weights), weights.with_name(name))
        weights.unlink()
    return folder


def test_folders_of_pickles_open_only_when_allowed(sd1_folder, pipeline, tmp_path):
    folder = as_pickles(copy_folder(sd1_folder, tmp_path / "model"))
    refused(ModelSource(folder), r"unet has its weights only as a pickle \(diffusion_pytorch_model\.bin\).*allow")
    assert same_weights(open_pipeline(ModelSource(folder, allow_pickle=True)), pipeline)


def test_ckpts_open_only_when_allowed(sd1_folder, sd1_file, pipeline, tmp_path):
    torch.save({"state_dict": load_file(sd1_file), "global_step": 1}, tmp_path / "model.ckpt")
    source = ModelSource(tmp_path / "model.ckpt", config=sd1_folder)
    refused(source, r"model\.ckpt is a pickle, which can run code")
    allowed = ModelSource(tmp_path / "model.ckpt", config=sd1_folder, allow_pickle=True)
    assert same_weights(open_pipeline(allowed), pipeline)


# what the UNet predicts


def predicts(source) -> str:
    return open_pipeline(source).scheduler.config.prediction_type


def test_a_v_model_stays_one_in_every_form(tmp_path, sd1_folder):
    pipeline = tiny_pipeline(prediction_type="v_prediction")
    pipeline.save_pretrained(tmp_path / "folder")
    save_single_file(pipeline, tmp_path / "model.safetensors")
    assert predicts(ModelSource(tmp_path / "folder")) == "v_prediction"
    # whatever the folder whose configs it follows predicts
    assert predicts(ModelSource(tmp_path / "model.safetensors", config=sd1_folder)) == "v_prediction"


def test_the_order_of_who_says_what_a_file_predicts(sd1_folder, sd1_file, tmp_path):
    def mark(tensors):
        tensors["v_pred"] = torch.zeros(0)

    silent = rewrite(sd1_file, tmp_path / "silent.safetensors", lambda _: None, {"format": "pt"})
    marked = rewrite(sd1_file, tmp_path / "marked.safetensors", mark, {"format": "pt"})
    spec = {"modelspec.prediction_type": "v"}
    says_v = rewrite(sd1_file, tmp_path / "v.safetensors", lambda _: None, spec)
    for file, expected in ((silent, "epsilon"), (marked, "v_prediction"), (says_v, "v_prediction")):
        assert predicts(ModelSource(file, config=sd1_folder)) == expected
        assert predicts(ModelSource(file, config=sd1_folder, prediction_type="epsilon")) == "epsilon"
    assert predicts(ModelSource(sd1_folder, prediction_type="v_prediction")) == "v_prediction"
    v_folder = copy_folder(sd1_folder, tmp_path / "folder")
    config = v_folder / "scheduler/scheduler_config.json"
    config.write_text(config.read_text().replace("epsilon", "v_prediction"))
    assert predicts(ModelSource(silent, config=v_folder)) == "v_prediction"
    assert predicts(ModelSource(sd1_file, config=v_folder)) == "epsilon"


def test_an_unknown_prediction_type(sd1_folder, sd1_file, tmp_path):
    file = rewrite(sd1_file, tmp_path / "x.safetensors", lambda _: None, {"modelspec.prediction_type": "flow"})
    refused(ModelSource(file, config=sd1_folder), "names the prediction type 'flow'; one of epsilon, v")
    with pytest.raises(UserError, match="the prediction type is 'v'; one of epsilon, v_prediction"):
        ModelSource(sd1_folder, prediction_type="v")


def test_a_prediction_type_that_cannot_be_merged(sd1_folder, tmp_path):
    folder = copy_folder(sd1_folder, tmp_path / "x")
    config = folder / "scheduler/scheduler_config.json"
    config.write_text(config.read_text().replace("epsilon", "sample"))
    refused(ModelSource(folder), "prediction type is 'sample'; epsilon or v_prediction was expected of SD 1.x")


# bad input


def test_errors_carry_the_name_that_they_are_given(tmp_path):
    refused(ModelSource(tmp_path / "x"), r"^teacher 'noto': /.*/x: no such file", name="teacher 'noto'")


@pytest.mark.parametrize("path", ["x.safetensors", "models/x.safetensors", "./models/x", "/nowhere/x", "a/b/c", "x"])
def test_nothing_there(path):
    refused(ModelSource(path), f"^{re.escape(path)}: no such file or folder")


def test_an_id_that_the_hub_does_not_give(monkeypatch):
    def offline(*_args, **_kwargs):
        raise OSError("cannot reach the hub\nand more")

    monkeypatch.setattr(DiffusionPipeline, "download", offline)
    refused(ModelSource("owner/name"), "^owner/name: no such folder here, and the hub did not give it: cannot reach")


def test_an_id_that_the_hub_gives(monkeypatch, sd1_folder, pipeline):
    asked = {}

    def download(hub_id, **options):
        asked.update(options, id=hub_id)
        return str(sd1_folder)

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    monkeypatch.setattr(dmm.models.teachers, "snapshot_download", lambda *_, **__: None)  # a stock model has no styles/
    assert same_weights(open_pipeline(ModelSource("owner/name")), pipeline)
    assert (asked["id"], asked["use_safetensors"]) == ("owner/name", True)
    assert "safety_checker" in asked  # a component that is passed is not fetched: a gigabyte saved


def test_a_file_cut_short(sd1_folder, sd1_file, tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(sd1_file.read_bytes()[:-1000])
    size = sd1_file.stat().st_size
    refused(ModelSource(file, config=sd1_folder), f"cut short: .* declares {size} bytes, the file has {size - 1000}")


def test_a_part_of_a_folder_cut_short(sd1_folder, tmp_path):
    folder = copy_folder(sd1_folder, tmp_path / "x")
    (folder / UNET_WEIGHTS).write_bytes((sd1_folder / UNET_WEIGHTS).read_bytes()[:-7])
    refused(ModelSource(folder), f"{UNET_WEIGHTS} is cut short")


@pytest.mark.parametrize("form", ["folder", "file"])
def test_nan_weights(sd1_folder, sd1_file, tmp_path, form):
    def spoil(name):
        def change(tensors):
            tensors[name].view(-1)[:3] = float("nan")

        return change

    if form == "folder":
        folder = copy_folder(sd1_folder, tmp_path / "x")
        rewrite(sd1_folder / UNET_WEIGHTS, folder / UNET_WEIGHTS, spoil("conv_in.weight"))
        source = ModelSource(folder)
    else:
        name = "model.diffusion_model.input_blocks.0.0.weight"
        source = ModelSource(rewrite(sd1_file, tmp_path / "x.safetensors", spoil(name)), config=sd1_folder)
    refused(source, r"unet: 3 of the 288 values of 'conv_in\.weight' are NaN or infinite")


def test_weights_that_overflow_in_half_precision(sd1_folder, tmp_path):
    folder = copy_folder(sd1_folder, tmp_path / "x")
    rewrite(folder / UNET_WEIGHTS, folder / UNET_WEIGHTS, lambda tensors: tensors["conv_in.bias"].fill_(1e5))
    open_pipeline(ModelSource(folder))
    refused(ModelSource(folder), r"'conv_in\.bias' are NaN or infinite in torch\.float16", torch_dtype=torch.float16)


def test_keys_that_match_nothing(sd1_folder, tmp_path):
    save_file({"foo.bar": torch.zeros(2)}, tmp_path / "x.safetensors")
    refused(
        ModelSource(tmp_path / "x.safetensors", config=sd1_folder),
        r"none of its 1 tensors has a name that we know \(such as 'foo\.bar'\)\. SD 1\.x, SD 2\.x, .* was expected",
    )


def test_a_refiner_s_file(sd1_folder, sd1_file, tmp_path):
    def change(tensors):
        for name in [name for name in tensors if name.startswith("cond_stage_model.")]:
            tensors[name.replace("cond_stage_model.transformer", "conditioner.embedders.0.model")] = tensors.pop(name)

    file = rewrite(sd1_file, tmp_path / "x.safetensors", change)
    refused(
        ModelSource(file, config=sd1_folder),
        r"is the SDXL refiner \(it holds '.*embedders\..*SD 1\.x, SD 2\.x, .* was expected",
    )


@pytest.mark.parametrize(
    ("class_name", "linear", "title"),
    [
        ("QwenImagePipeline", True, "Qwen-Image"),
        ("StableDiffusionDMMPipeline", False, "a DMM merge in the authors' layout"),
        ("KandinskyPipeline", False, "KandinskyPipeline"),
    ],
)
def test_folders_of_other_families(sd1_folder, tmp_path, class_name, linear, title):
    folder = copy_folder(sd1_folder, tmp_path / "x")
    for path, key, value in (
        (folder / "model_index.json", "_class_name", class_name),
        (folder / "unet/config.json", "use_linear_projection", linear),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    refused(ModelSource(folder), rf"is {title} \(model_index\.json: {class_name}\); SD 1\.x, SD 2\.x, .* was expected")


def test_a_config_that_is_not_there(sd1_file, tmp_path):
    refused(ModelSource(sd1_file, config=tmp_path / "x"), "/x: no such folder")


def test_a_config_of_another_width(sd1_file, pipeline, tmp_path):
    pipeline.text_encoder = tiny_text_encoder(pipeline.tokenizer, hidden_size=32)
    pipeline.unet = type(pipeline.unet).from_config(pipeline.unet.config, cross_attention_dim=32)
    pipeline.save_pretrained(tmp_path / "config")
    refused(
        ModelSource(sd1_file, config=tmp_path / "config"),
        r"'model\.diffusion_model\..*attn2\.to_k\.weight' has shape \(8, 16\), the config's UNet2DConditionModel "
        r"\(8, 32\)",
    )


def test_parts_that_do_not_belong_together(sd1_folder, pipeline, tmp_path):
    folder = copy_folder(sd1_folder, tmp_path / "x")
    tiny_text_encoder(pipeline.tokenizer, hidden_size=32).save_pretrained(folder / "text_encoder")
    refused(ModelSource(folder), r"reads text of width \(cross_attention_dim\) 16, the folder's other parts give 32")


@pytest.mark.parametrize(
    ("prefix", "match"),
    [
        ("first_stage_model.", "has no vae: none of its"),
        ("cond_stage_model.", "has no text_encoder: none of its"),
        (
            "first_stage_model.decoder.",
            r"lacks \d+ of the \d+ tensors of its AutoencoderKL, the first of them 'first_s",
        ),
    ],
)
def test_an_incomplete_single_file(sd1_folder, sd1_file, tmp_path, prefix, match):
    def drop(tensors):
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]

    file = rewrite(sd1_file, tmp_path / "x.safetensors", drop)
    refused(ModelSource(file, config=sd1_folder), match)


def test_one_tensor_missing_or_left_over(sd1_folder, sd1_file, tmp_path):
    name = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    file = rewrite(sd1_file, tmp_path / "a.safetensors", lambda tensors: tensors.pop(name))
    refused(ModelSource(file, config=sd1_folder), f"lacks 1 of the .* the first of them '{re.escape(name)}'")
    extra = "model.diffusion_model.input_blocks.9.0.in_layers.2.weight"
    file = rewrite(sd1_file, tmp_path / "b.safetensors", lambda tensors: tensors.update({extra: torch.zeros(1)}))
    refused(ModelSource(file, config=sd1_folder), f"has no use for: 1, the first of them '{re.escape(extra)}'")


@pytest.mark.parametrize("weights", [UNET_WEIGHTS, TEXT_WEIGHTS])
def test_one_tensor_of_a_folder_missing_left_over_or_misshapen(sd1_folder, tmp_path, weights):
    folder = copy_folder(sd1_folder, tmp_path / "x")
    name = next(iter(load_file(folder / weights)))
    for change, match in (
        (lambda tensors: tensors.pop(name), "lacks 1 of the"),
        (
            lambda tensors: tensors.update(more=torch.zeros(1)),
            "that its .* has no use for: 1, the first of them 'more'",
        ),
        (lambda tensors: tensors.update({name: torch.zeros(7)}), r"has shape \(7,\), the config's"),
    ):
        rewrite(sd1_folder / weights, folder / weights, change)
        refused(ModelSource(folder), match)


@pytest.mark.parametrize(
    ("missing", "match"),
    [
        ("model_index.json", "holds no model_index.json"),
        ("unet/config.json", r"unet/config\.json: no such file"),
        (UNET_WEIGHTS, "unet holds no diffusion_pytorch_model.safetensors"),
        ("scheduler/scheduler_config.json", r"scheduler_config\.json: no such file"),
        ("tokenizer", "tokenizer holds neither"),
    ],
)
def test_an_incomplete_folder(sd1_folder, tmp_path, missing, match):
    folder = copy_folder(sd1_folder, tmp_path / "x")
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    refused(ModelSource(folder), match)


def test_broken_configs(sd1_folder, tmp_path):
    folder = copy_folder(sd1_folder, tmp_path / "x")
    config = folder / "unet/config.json"
    good = json.loads(config.read_text())
    config.write_text("{")
    refused(ModelSource(folder), r"unet/config\.json is not valid JSON")
    config.write_text(json.dumps(good | {"_class_name": "DMMUNet2DConditionModel"}))
    refused(ModelSource(folder), r"unet/config\.json describes a DMMUNet2DConditionModel")
    config.write_text(json.dumps(good | {"addition_embed_type": "model_merge"}))
    refused(ModelSource(folder), r"unet/config\.json describes no UNet2DConditionModel")
    config.write_text(json.dumps(good))
    index = folder / "model_index.json"
    unet = ["diffusers", "UNet2DConditionModel"]
    index.write_text(json.dumps({"_class_name": "StableDiffusionPipeline", "unet": unet}))
    refused(ModelSource(folder), r"model_index\.json names no vae")


def test_a_lora_as_the_model(sd1_folder, pipeline, tmp_path):
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_kohya_lora(path, {"unet": pipeline.unet}, SD1)
    refused(ModelSource(path, config=sd1_folder), "is a LoRA, not a full model. Pass it as the LoRA")
    refused(ModelSource(tmp_path), "holds a LoRA, not a full model. Pass it as the LoRA")


def test_a_model_as_the_lora(sd1_folder, sd1_file):
    refused(ModelSource(sd1_folder, loras=((sd1_file, 1.0),)), r"is a full checkpoint \(SD 1\.x; .*\), not a LoRA")
    refused(ModelSource(sd1_folder, loras=((sd1_folder, 1.0),)), "is the folder of a full model")
    refused(ModelSource(sd1_folder, loras=((sd1_folder / UNET_WEIGHTS, 1.0),)), "is no LoRA")


def test_one_part_of_a_folder_as_the_model(sd1_folder):
    refused(ModelSource(sd1_folder / UNET_WEIGHTS, config=sd1_folder), "is one part of a diffusers model")
    refused(ModelSource(sd1_folder / "unet"), "holds no model_index.json")


def test_a_frozen_module_asks_for_no_gradient_and_stays_in_eval(pipeline):
    unet = pipeline.unet.train()
    assert freeze(unet) is unet
    assert not unet.training
    assert not any(parameter.requires_grad for parameter in unet.parameters())
