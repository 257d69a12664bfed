"""Whatever a model folder's JSON files hold: a sentence, before any weight is loaded."""

import inspect
import json
import os
import shutil
import time

import diffusers
import pytest
import torch
from conftest import tiny_tokenizer
from safetensors.torch import load_file, save_file

from dmm.cli import main
from dmm.errors import UserError
from dmm.formats.building import building, check_config
from dmm.models.teachers import ModelSource, check_model
from dmm.pipeline.styled import load_pipeline, read_styles

NESTED = '{"a":' * 100_000
BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.fixture
def folder(merged, tmp_path):
    shutil.copytree(merged, tmp_path / "model")
    return tmp_path / "model"


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(folder):
    """The sentence by which a model is refused, in no time."""
    begun = time.perf_counter()
    with pytest.raises(UserError) as refused:
        read_styles(folder)
        check_model(ModelSource(folder))
    assert time.perf_counter() - begun < 10
    assert str(refused.value).isprintable()
    return str(refused.value)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("scheduler", ["os", "system"]),
        ("scheduler", ["diffusers", "NoSuchScheduler"]),
        ("scheduler", ["evil", "Evil"]),
        ("scheduler", "PNDMScheduler"),
        ("tokenizer", ["a"]),
        ("tokenizer", ["transformers", 7]),
        ("tokenizer", ["transformers", "pipeline"]),
        ("unet", ["diffusers", "AutoModel"]),
        ("unet", [None, None]),
        ("vae", [["diffusers"], "AutoencoderKL"]),
        ("text_encoder", None),
        ("../../elsewhere", ["diffusers", "UNet2DConditionModel"]),
        ("_class_name", ["StableDiffusionPipeline"]),
        ("_class_name", 7),
    ],
)
def test_classes_that_are_none_are_told_by_the_index(folder, part, value):
    edit(folder / "model_index.json", **{part: value})
    assert "model_index.json" in refusal(folder)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("scheduler/scheduler_config.json", "beta_schedule", "scaled_linea"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", "1000"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**12),
        ("scheduler/scheduler_config.json", "trained_betas", ["a", "b"]),
        ("scheduler/scheduler_config.json", "timestep_spacing", "nope"),
        ("scheduler/scheduler_config.json", "steps_offset", [1]),
        ("scheduler/scheduler_config.json", "prediction_type", {"a": 1}),
        ("scheduler/scheduler_config.json", "_class_name", None),
        ("text_encoder/config.json", "num_attention_heads", 3),
        ("text_encoder/config.json", "num_attention_heads", 0),
        ("text_encoder/config.json", "hidden_act", "nope"),
        ("text_encoder/config.json", "num_hidden_layers", 10**9),
        ("text_encoder/config.json", "num_hidden_layers", "2"),
        ("text_encoder/config.json", "hidden_size", -16),
        ("text_encoder/config.json", "vocab_size", 10**15),
        ("text_encoder/config.json", "vocab_size", 7),
        ("text_encoder/config.json", "layer_norm_eps", "small"),
        ("text_encoder/config.json", "dtype", "nope"),
        ("text_encoder/config.json", "quantization_config", BITSANDBYTES),
        ("unet/config.json", "act_fn", 7),
        ("unet/config.json", "act_fn", "nope"),
        ("unet/config.json", "norm_num_groups", 0),
        ("unet/config.json", "layers_per_block", 10**9),
        ("unet/config.json", "layers_per_block", [1, 10**6]),
        ("unet/config.json", "down_block_types", ["CrossAttnDownBlock2D"] * 10**5),
        ("unet/config.json", "down_block_types", ["NoSuchBlock"] * 2),
        ("unet/config.json", "block_out_channels", "wide"),
        ("unet/config.json", "sample_size", 10**9),
        ("unet/config.json", "norm_eps", "small"),
        ("unet/config.json", "attention_head_dim", float("nan")),
        ("unet/config.json", "quantization_config", BITSANDBYTES),
        ("vae/config.json", "scaling_factor", "0.18215"),
        ("vae/config.json", "scaling_factor", 0),
        ("vae/config.json", "latent_channels", [4]),
        ("vae/config.json", "latents_mean", {"a": 0.0}),
        ("styles/config.json", "dim", 10**15),
        ("styles/config.json", "dim", True),
        ("styles/config.json", "names", ["ink", "pho\nto", "clay"]),
        ("styles/config.json", "names", ["ink", "\ud800", "clay"]),
        ("styles/config.json", "quantization_config", BITSANDBYTES),
        ("tokenizer/tokenizer_config.json", "model_max_length", 10**30),
        ("tokenizer/tokenizer_config.json", "model_max_length", "24"),
        ("tokenizer/tokenizer_config.json", "model_max_length", 25),
    ],
)
def test_values_that_no_model_has_are_told_by_their_file(folder, file, key, value):
    edit(folder / file, **{key: value})
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize(
    "file",
    [
        *("model_index.json", "unet/config.json", "text_encoder/config.json", "styles/styles.json"),
        *("styles/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"),
    ],
)
@pytest.mark.parametrize("text", [NESTED, "[]", "", '{"a": NaN', b"\xff\xfe{}", "nothing at all"])
def test_files_that_are_no_json_objects_are_told(folder, file, text):
    (folder / file).unlink() if text == "nothing at all" else None
    if text != "nothing at all":
        (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    if (file, text) == ("styles/styles.json", "nothing at all"):
        check_model(ModelSource(folder))  # where styles came from need not be known
        return
    assert str(folder) in refusal(folder)


def test_tokenizers_that_cannot_be_opened_are_told(folder):
    tokenizer = folder / "tokenizer"
    whole = (tokenizer / "tokenizer.json").read_text()
    for text in ("{}", whole.replace('"type"', '"kind"'), whole[:-9], '{"model": {"vocab": 7}}'):
        (tokenizer / "tokenizer.json").write_text(text)
        assert "tokenizer" in refusal(folder)
    (tokenizer / "tokenizer.json").write_text(whole)
    (tokenizer / "tokenizer_config.json").unlink()
    assert "tokenizer_config.json: no such file" in refusal(folder)
    tiny_tokenizer().save_pretrained(tokenizer)
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (tokenizer / name).unlink(missing_ok=True)
    assert "holds neither tokenizer.json nor vocab.json" in refusal(folder)


def test_pipes_and_links_in_a_circle_are_not_waited_for(folder):
    weights = "unet/diffusion_pytorch_model.safetensors"
    for name in ("unet/config.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json", weights):
        kept = (folder / name).rename(folder.parent / "kept")
        os.mkfifo(folder / name)
        assert str(folder) in refusal(folder)
        (folder / name).unlink()
        if not name.endswith("merges.txt"):  # without which tokenizer.json does
            (folder / name).symlink_to((folder / name).name)
            assert str(folder) in refusal(folder)
            (folder / name).unlink()
        kept.rename(folder / name)


@pytest.mark.parametrize("name", ["/etc/passwd", "../elsewhere.safetensors", "..", 7, None, "a\x00.safetensors"])
def test_a_shard_is_in_its_own_folder(folder, name, tmp_path, capsys):
    unet = folder / "unet"
    weights = unet / "diffusion_pytorch_model.safetensors"
    names = list(load_file(weights))
    shutil.move(weights, folder / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert "no weight file in its own folder" in refusal(folder)
    recipe = tmp_path / "soup.yaml"
    recipe.write_text(f"method: soup\nteachers: [{{name: a, model: {folder}}}]\n")
    assert main(["soup", str(recipe), "--output", str(tmp_path / "s.safetensors")]) == 2
    assert "no weight file in its own folder" in capsys.readouterr().err


def test_an_index_of_shards_is_whole(folder):
    unet = folder / "unet"
    weights = unet / "diffusion_pytorch_model.safetensors"
    names = list(load_file(weights))
    weights.rename(unet / "diffusion_pytorch_model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(names, "diffusion_pytorch_model-00001-of-00001.safetensors")
    index = unet / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    check_model(ModelSource(folder))
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert "has no metadata beside its weight_map" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.uint8])
def test_style_prompts_are_numbers_of_any_size(folder, dtype):
    weights = folder / "styles" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "embeddings": tensors["embeddings"].to(dtype)}, weights, {"format": "pt"})
    assert "get another copy" in refusal(folder).lower() or "quantised" in refusal(folder)


def test_what_libraries_save_of_themselves_passes():
    for kind in (diffusers.UNet2DConditionModel, diffusers.ControlNetModel, diffusers.FluxTransformer2DModel):
        parameters = inspect.signature(kind.__init__).parameters.items()
        defaults = {name: one.default for name, one in parameters if one.default is not inspect.Parameter.empty}
        check_config(json.loads(json.dumps(defaults)), kind, kind)
    for name in ("DDIM", "PNDM", "EulerDiscrete", "UniPCMultistep", "DPMSolverMultistep", "LCM", "HeunDiscrete"):
        kind = getattr(diffusers, f"{name}Scheduler")
        check_config(json.loads(kind().to_json_string()), kind, kind)


def test_what_a_library_raises_is_a_sentence_whatever_it_is(folder):
    for error, told in (
        (KeyError("x"), r"'x' \(KeyError\)"),
        (RecursionError(), "RecursionError"),
        (RuntimeError("\n\na\nb"), "a"),
        (RuntimeError("It says:\n  why.\nFor details see there."), "It says: why"),
    ):
        with pytest.raises(UserError, match=rf"^it is no model: {told}\.$"), building("it is no model"):
            raise error
    with pytest.raises(MemoryError), building("it is no model"):
        raise MemoryError
    assert load_pipeline(folder)
