"""What is SD 3's own: a transformer, rectified flow, a text encoder that may be missing, LoRAs of diffusers' layout."""

import json

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from diffusers import StableDiffusion3Pipeline
from helpers import paint
from peft import LoraConfig, get_peft_model_state_dict
from tiny_families import tiny_sd3, tiny_sdxl
from transformers import T5Config, T5EncoderModel

import dmm
from dmm.cli import main
from dmm.errors import UserError
from dmm.families import ask
from dmm.families.anatomy import normed
from dmm.families.sd3 import SD3
from dmm.files.yaml import write_yaml
from dmm.formats.schedules import process_of
from dmm.models.conditioning import encode_tokens, tokenize
from dmm.models.discriminator import Discriminator
from dmm.models.features import BlockTap
from dmm.models.styles import StylePrompts
from dmm.models.teachers import ModelSource, check_model, open_pipeline
from dmm.pipeline.export import export_style
from dmm.pipeline.sampling import sample
from dmm.pipeline.styled import add_styles

WITHOUT_T5 = {"text_encoder_3": None, "tokenizer_3": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    at = tmp_path_factory.mktemp("sd3")
    tiny_sd3().save_pretrained(at / "model")
    return at / "model"


def noised(pipe, size=8):
    read = encode_tokens(pipe, tokenize(pipe, ["a cat", "a dog"]))
    x_t = torch.randn(2, 16, size, size, generator=torch.Generator().manual_seed(0))
    return x_t, torch.tensor([100.0, 900.0]), read


def test_t5_is_read_where_it_is_there():
    pipe = tiny_sd3()
    config = T5Config(vocab_size=len(pipe.tokenizer), d_model=40, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    pipe.register_modules(text_encoder_3=T5EncoderModel(config).eval(), tokenizer_3=pipe.tokenizer)
    with torch.no_grad():  # in which sums round otherwise
        theirs = pipe.encode_prompt(["a cat"], None, None, device="cpu", do_classifier_free_guidance=False)
    ours = encode_tokens(pipe, tokenize(pipe, ["a cat"]))
    assert ours["encoder_hidden_states"].equal(theirs[0])
    assert ours["encoder_hidden_states"][:, 24:].any()
    assert not encode_tokens(tiny_sd3(), tokenize(tiny_sd3(), ["a cat"]))["encoder_hidden_states"][:, 24:].any()


def test_the_picture_s_tokens_are_caught_and_not_the_text_s():
    pipe = tiny_sd3()
    x_t, timesteps, read = noised(pipe)
    kept = []
    pipe.transformer.transformer_blocks[2].register_forward_hook(lambda _, __, output: kept.append(output[1]))
    with BlockTap(pipe.transformer).catch() as features, torch.no_grad():
        ask(pipe.transformer, x_t, timesteps, read)
    assert {name: value.shape for name, value in features.items()} == {"transformer_blocks.2": (2, 16, 32)}
    assert features["transformer_blocks.2"].equal(normed(kept[0]))
    torch.testing.assert_close(features["transformer_blocks.2"].mean(-1), torch.zeros(2, 16), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (4, 8)])
def test_a_discriminator_looks_with_the_first_half(size):
    pipe = tiny_sd3()
    x_t, timesteps, read = noised(pipe)
    x_t = x_t[..., : size[0], : size[1]].clone().requires_grad_()
    seen = Discriminator(pipe.transformer, 2).look(x_t, timesteps, read)
    assert seen.shape == (2, 32, size[0] // 2, size[1] // 2)
    seen.sum().backward()
    assert x_t.grad.any()
    assert len(pipe.transformer.transformer_blocks) == 3


def test_sigmas_are_drawn_as_it_was_trained_and_shifted_as_its_scheduler_says():
    process = process_of(tiny_sd3().scheduler.config, SD3)
    assert len(process.levels) == 1000
    torch.testing.assert_close(process.levels.median(), torch.tensor(0.75), rtol=0, atol=1e-3)  # 1/2, shifted by 3
    assert process.timesteps.max() < 1000


def test_a_recipe_may_draw_them_otherwise():
    config = tiny_sd3().scheduler.config
    process = process_of(config, SD3, density="uniform", shift=1.0)
    torch.testing.assert_close(process.levels, (torch.arange(1000) + 0.5) / 1000)


def test_what_is_for_one_process_alone_is_refused_for_the_other(folder, tmp_path, capsys):
    recipe = {
        "teachers": [{"name": "one", "model": "model"}],
        "data": {"synthesize": {"prompts": "prompts.txt"}},
        "size": 16,
        "training": {"precision": "fp32", "timesteps": {"shift": 2}},
        "losses": {"noise_weighting": 0.5},
    }
    (tmp_path / "prompts.txt").write_text("a cat\n")
    tiny_pipeline().save_pretrained(tmp_path / "sd1")
    for base, said in (
        ("sd1", "timesteps is for models of rectified flow"),
        (folder, "this base predicts flow_prediction"),
    ):
        path = tmp_path / "recipe.yaml"
        path.write_text(write_yaml({"base": str(base), **recipe, "teachers": [{"name": "one", "model": str(base)}]}))
        assert main(["merge", str(path), "--output", str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "fast.yaml").write_text(write_yaml({"data": recipe["data"], "training": {"precision": "fp32"}}))
    assert main(["accelerate", str(folder), str(tmp_path / "fast.yaml"), "--output", str(tmp_path / "fast")]) == 2
    assert "no few-step model is distilled here" in capsys.readouterr().err


def test_it_is_painted_as_diffusers_paints_it(folder):
    plain = StableDiffusion3Pipeline.from_pretrained(folder, **WITHOUT_T5)
    plain.set_progress_bar_config(disable=True)
    (ours,) = sample(tiny_sd3(), ["a cat"], [0], steps=4, sampler="Euler", width=16, height=16, guidance_scale=3)
    theirs = plain(
        "a cat",
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=4,
        guidance_scale=3,
        width=16,
        height=16,
    ).images[0]
    assert np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int)).max() <= 1


@pytest.mark.parametrize("sampler", ["DPM++ 2M", "UniPC"])
def test_other_samplers_come_to_the_same_picture(sampler):
    pictures = [
        np.asarray(next(sample(tiny_sd3(), ["a cat"], [0], steps=60, sampler=one, width=16, height=16)), dtype=int)
        for one in ("Euler", sampler)
    ]
    assert np.abs(pictures[0] - pictures[1]).mean() < 3


def test_samplers_of_another_process_are_refused():
    with pytest.raises(
        UserError, match=r"The sampler LCM is not for flow models; choose from DPM\+\+ 2M, Euler, UniPC"
    ):
        sample(tiny_sd3(), ["a cat"], [0], sampler="LCM")


def test_an_exported_style_opens_in_plain_diffusers(tmp_path):
    pipe = tiny_sd3()
    torch.manual_seed(3)
    prompts = StylePrompts(["ink", "photo"], dim=32)
    torch.nn.init.normal_(prompts.linear_2.weight, std=2)
    add_styles(pipe, prompts)
    export_style(pipe, "ink", tmp_path / "ink")
    plain = StableDiffusion3Pipeline.from_pretrained(tmp_path / "ink", **WITHOUT_T5)
    dmm.set_style(pipe, "ink")
    prompted = paint(pipe)
    assert abs(paint(plain) - prompted).max() <= 2
    dmm.set_style(pipe, None)
    assert abs(paint(pipe) - prompted).max() > 5
    with pytest.raises(UserError, match="has no single file here"):
        export_style(pipe, "ink", tmp_path / "ink.safetensors")


def test_loras_of_diffusers_layout_are_fused_as_diffusers_fuses_them(folder, tmp_path):
    pipe = tiny_sd3()
    targets = ["to_q", "add_k_proj", "to_out.0", "ff.net.2", "norm1.linear"]
    pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
    pipe.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    file = tmp_path / "pytorch_lora_weights.safetensors"
    ours = open_pipeline(ModelSource(folder, loras=((file, 1.0),)))
    theirs = StableDiffusion3Pipeline.from_pretrained(folder, **WITHOUT_T5)
    theirs.load_lora_weights(file)
    theirs.fuse_lora()
    theirs.unload_lora_weights()
    plain = tiny_sd3().transformer.state_dict()
    changed = 0
    for name, tensor in theirs.transformer.state_dict().items():
        torch.testing.assert_close(ours.transformer.state_dict()[name], tensor, rtol=0, atol=1e-6)
        changed += not tensor.equal(plain[name])
    assert changed == 3 + 3 + 3 + 3 + 3


def test_what_is_noised_in_another_way_is_refused(folder, tmp_path):
    for pipe, other in ((tiny_sd3(), tiny_sdxl()), (tiny_sdxl(), tiny_sd3())):
        pipe.scheduler = other.scheduler
        pipe.save_pretrained(tmp_path / "mixed")
        with pytest.raises(UserError, match=r"for models that are trained in another way, .*this one is"):
            check_model(ModelSource(tmp_path / "mixed"))


def test_a_single_file_is_told_what_to_do(tmp_path):
    from safetensors.torch import save_file

    name = "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight"
    save_file({name: torch.zeros(2, 2)}, tmp_path / "sd3.safetensors")
    with pytest.raises(UserError, match=r"is a single file of SD 3, which opens as a folder only"):
        check_model(ModelSource(tmp_path / "sd3.safetensors"))


def test_the_index_names_no_t5_and_the_scheduler_says_what_it_is(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["text_encoder_3"] == [None, None]
    assert check_model(ModelSource(folder)).prediction_type == "flow_prediction"


def test_what_it_predicts_may_be_said_but_is_never_another(folder):
    assert check_model(ModelSource(folder, prediction_type="flow_prediction")).prediction_type == "flow_prediction"
    with pytest.raises(UserError, match="its prediction type is 'epsilon'; flow_prediction was expected of SD 3"):
        check_model(ModelSource(folder, prediction_type="epsilon"))
