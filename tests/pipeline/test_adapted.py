"""A merged pipeline whose styles are adapters: what it promises is what one with style prompts does, to the bit."""

import copy
import json
import threading

import pytest
import torch
from conftest import PROVENANCE, tiny_pipeline
from conftest import STYLE_NAMES as NAMES
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from helpers import copy_folder, paint, same_weights
from safetensors.torch import load_file, save_file

from dmm.errors import UserError
from dmm.files.digest import sha256
from dmm.models.adapters import parameters_by_name
from dmm.models.styles import StylePrompts
from dmm.pipeline.removal import remove_style
from dmm.pipeline.style_schedule import StyleSchedule
from dmm.pipeline.styled import (
    add_styles,
    load_pipeline,
    save_pipeline,
    set_style,
    share,
    stock_twin,
    style_over_time,
    temporary_style,
)

MIX = {"ink": 0.7, "clay": 0.3}


def weights_of(pipe):
    return {name: parameter.detach().clone() for name, parameter in parameters_by_name(pipe.unet).items()}


def test_styles_differ_and_none_is_the_stock_pipeline_bit_for_bit(adapted, pipeline):
    plain = paint(pipeline)
    assert (paint(adapted) == plain).all()
    painted = []
    for style in (*NAMES, MIX):
        set_style(adapted, style)
        painted.append(paint(adapted))
    for i, one in enumerate(painted):
        assert all(abs(one - other).max() > 20 for other in painted[:i])
    set_style(adapted, None)
    assert (paint(adapted) == plain).all()
    assert same_weights(adapted, pipeline)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.0])
def test_one_style_an_image_equals_each_style_alone(adapted, guidance_scale):
    styles = ["ink", "photo", MIX, None]
    set_style(adapted, styles)
    together = paint(adapted, ["a cat"] * 4, guidance_scale=guidance_scale)
    for i, style in enumerate(styles):
        set_style(adapted, style)
        alone = paint(adapted, ["a cat"] * 4, guidance_scale=guidance_scale)[i]
        assert abs(together[i] - alone).max() <= 1


def test_a_temporary_style_gives_back_the_one_before(adapted):
    set_style(adapted, "ink")
    before, painted = weights_of(adapted), paint(adapted)
    with temporary_style(adapted, ["photo"]):
        assert abs(paint(adapted) - painted).max() > 20
    assert (paint(adapted) == painted).all()
    assert all(torch.equal(before[name], one) for name, one in weights_of(adapted).items())


def test_a_style_over_time_paints_its_parts(adapted):
    set_style(adapted, "photo")
    alone = paint(adapted)
    set_style(adapted, None)
    with style_over_time(adapted, StyleSchedule([(0, 1, "photo")])) as callback:
        assert (paint(adapted, callback_on_step_end=callback) == alone).all()
    with style_over_time(adapted, StyleSchedule([(0, 0.5, "photo"), (0.5, 1, "ink")])) as callback:
        assert (paint(adapted, callback_on_step_end=callback) != alone).any()


def test_shared_pipelines_paint_each_in_its_style_at_once(adapted):
    expected = {}
    for style in ("ink", "photo"):
        set_style(adapted, style)
        expected[style] = paint(adapted)
    second = share(adapted)
    assert abs(paint(second) - expected["photo"]).max() <= 1  # as the first one has it
    set_style(adapted, "ink")
    painted = {}

    def work(style, pipe):
        painted[style] = paint(pipe)

    threads = [threading.Thread(target=work, args=job) for job in (("ink", adapted), ("photo", second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for style, pictures in painted.items():
        assert abs(pictures - expected[style]).max() <= 1
    one, other = adapted.unet.conv_in.weight, second.unet.conv_in.weight
    assert one.data_ptr() == other.data_ptr()
    second.unet.to(torch.bfloat16)
    assert adapted.unet.conv_in.weight.dtype == torch.bfloat16


def test_a_pipeline_made_of_it_and_a_copy_keep_the_styles(adapted):
    set_style(adapted, "ink")
    made = StableDiffusionImg2ImgPipeline.from_pipe(adapted)
    assert made.unet is adapted.unet
    twin = copy.deepcopy(adapted)
    painted = paint(adapted)
    set_style(twin, "photo")
    assert (paint(adapted) == painted).all()
    set_style(twin, None)
    assert same_weights(twin, tiny_pipeline())


def test_saved_and_loaded_it_paints_the_same_whatever_style_was_set(adapted, tmp_path):
    set_style(adapted, "ink")
    painted = paint(adapted)
    save_pipeline(adapted, tmp_path / "saved", provenance=PROVENANCE)
    again = load_pipeline(tmp_path / "saved")
    assert same_weights(again, tiny_pipeline())
    set_style(again, "ink")
    assert abs(paint(again) - painted).max() <= 1
    save_pipeline(again, tmp_path / "again")
    for file in (tmp_path / "saved" / "styles").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / "styles" / file.name).read_bytes(), file.name
    assert not (tmp_path / "saved" / "styles" / "diffusion_pytorch_model.safetensors").exists()


def test_plain_diffusers_loads_a_style_as_a_lora(merged_adapters):
    ours = load_pipeline(merged_adapters)
    # a LoRA carries the low-rank part
    adapter = ours.unet.time_embedding.linear_2.style_prompts.adapters["ink"]
    plain = StableDiffusionPipeline.from_pretrained(merged_adapters, safety_checker=None)
    plain.load_lora_weights(merged_adapters / "styles", weight_name="ink.safetensors")
    plain.fuse_lora()
    plain.unload_lora_weights()
    expected = parameters_by_name(tiny_pipeline().unet)
    found = parameters_by_name(plain.unet)
    for name in adapter.factors:
        torch.testing.assert_close(found[name], expected[name] + adapter.change(name), rtol=1e-4, atol=1e-5)


def test_a_stock_twin_is_the_style_whatever_is_set(adapted):
    set_style(adapted, "photo")
    photo = paint(adapted)
    twin = stock_twin(adapted, MIX)
    assert type(twin.unet.time_embedding).__name__ == "TimestepEmbedding"
    assert (paint(adapted) == photo).all()
    set_style(adapted, MIX)
    assert abs(paint(twin) - paint(adapted)).max() <= 1
    assert same_weights(stock_twin(adapted), tiny_pipeline())


def test_a_removed_style_leaves_what_would_be_had_it_never_been(adapted, merged_adapters, tmp_path):
    remove_style(merged_adapters, "photo", tmp_path / "without")
    # the same merge without it
    prompts = adapted.unet.time_embedding.linear_2.style_prompts
    never = tiny_pipeline()
    left = StylePrompts(["ink", "clay"], dim=0)
    left.adapters = {name: prompts.adapters[name] for name in left.names}
    add_styles(never, left)
    provenance = [one for one in PROVENANCE if one.name != "photo"]
    save_pipeline(never, tmp_path / "never", provenance=provenance)
    files = sorted(path.relative_to(tmp_path / "never") for path in (tmp_path / "never").rglob("*") if path.is_file())
    assert files == sorted(
        path.relative_to(tmp_path / "without") for path in (tmp_path / "without").rglob("*") if path.is_file()
    )
    for file in files:
        assert (tmp_path / "never" / file).read_bytes() == (tmp_path / "without" / file).read_bytes(), file


def test_a_damaged_style_is_told_by_its_file(merged_adapters, tmp_path):
    folder = copy_folder(merged_adapters, tmp_path / "damaged")
    file = folder / "styles" / "ink.safetensors"
    tensors = load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file)
    pipe = load_pipeline(folder)
    set_style(pipe, "clay")
    with pytest.raises(UserError, match=r"ink\.safetensors is damaged"):
        set_style(pipe, "ink")
    (folder / "styles" / "clay.diff.safetensors").unlink()
    with pytest.raises(UserError, match=r"clay\.diff\.safetensors is missing"):
        set_style(load_pipeline(folder), "clay")
    index = folder / "styles" / "adapters.json"
    index.write_text(json.dumps({"adapters": {"ink": {}}}), encoding="utf-8")
    with pytest.raises(UserError, match=r"adapters\.json is damaged"):
        load_pipeline(folder)


@pytest.mark.parametrize("names", ["{bad", "[1]", '{"nothing": "conv_in.weight"}', "[" * 5000 + "]" * 5000])
def test_a_style_whose_header_tells_nonsense_is_told(merged_adapters, tmp_path, names):
    folder = copy_folder(merged_adapters, tmp_path / "odd")
    file, index = folder / "styles" / "ink.safetensors", folder / "styles" / "adapters.json"
    save_file(load_file(file), file, {"dmm.parameters": names})
    told = json.loads(index.read_text(encoding="utf-8"))
    told["adapters"]["ink"]["files"]["ink.safetensors"] = sha256(file)
    index.write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(UserError, match=r"ink\.safetensors: its dmm\.parameters"):
        set_style(load_pipeline(folder), "ink")
