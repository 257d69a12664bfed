"""Styles that change how prompts are read, as their teachers with text encoders of their own do, in every family."""

import copy
import threading
from types import SimpleNamespace

import pytest
import torch
from adapter_helpers import some_adapter
from helpers import same_weights
from safetensors.torch import load_file, save_file
from tiny_families import TINY, UNETS

import dmm
from dmm.errors import UserError
from dmm.families import FAMILIES, denoiser_of, family_of
from dmm.models.adapters import Adapter
from dmm.models.conditioning import encode_tokens, tokenize
from dmm.models.styles import Provenance, StylePrompts, styled_port
from dmm.models.text_adapters import clips_of, fitted, reading_as, text_difference
from dmm.pipeline.export import export_all, export_style
from dmm.pipeline.regions import Region, paint_regions
from dmm.pipeline.removal import remove_style
from dmm.pipeline.sampling import sample
from dmm.pipeline.style_schedule import StyleSchedule
from dmm.pipeline.styled import add_styles, temporary_style

CLIPS = [name for name in FAMILIES if FAMILIES[name].clips]
FILES = ["sd1", "sdxl", "flux"]  # one text encoder, two, and one of a transformer
MIX = {"ink": 0.7, "clay": 0.3}
PROMPTS = ["a cat", "a dog", "a house"]


def near(family, seed):
    """A teacher, about as far from the base as a fine-tune is."""
    pipe, generator = TINY[family](seed=0), torch.Generator().manual_seed(seed)
    for encoder in clips_of(pipe).values():
        for parameter in encoder.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return pipe


@pytest.fixture(params=CLIPS)
def family(request):
    return request.param


@pytest.fixture
def pipe(family):
    """Of three styles the first and the last read otherwise."""
    pipe = TINY[family](seed=0)
    prompts, adapters = StylePrompts(["ink", "photo", "clay"], dim=0), {}
    for seed, name in enumerate(prompts.names):
        text = {} if name == "photo" else text_difference(near(family, seed), pipe, 64)
        made = some_adapter(denoiser_of(pipe), seed)
        adapters[name] = Adapter(made.factors, made.offsets, text)
    prompts.adapters = adapters
    add_styles(pipe, prompts)
    return pipe


def plain(pipe, folder):
    """A folder as plain diffusers opens it."""
    absent = {"text_encoder_3": None, "tokenizer_3": None} if family_of(pipe).name == "sd3" else {}
    return type(pipe).from_pretrained(folder, **absent)


def read(pipe, prompts=PROMPTS):
    return encode_tokens(pipe, tokenize(pipe, prompts))


def is_close(one, other, atol=1e-2):
    return all(torch.allclose(one[name], other[name], atol=atol) for name in other)


def paint(pipe, prompts, styles=None):
    pictures = sample(pipe, prompts, list(range(len(prompts))), styles=styles, steps=2, width=16, height=16)
    return torch.stack([torch.frombuffer(bytearray(one.tobytes()), dtype=torch.uint8).int() for one in pictures])


def test_the_difference_of_full_rank_reads_as_the_teacher_does(family):
    base, teacher = TINY[family](seed=0), near(family, 3)
    reader = reading_as(base, Adapter({}, {}, text_difference(teacher, base, 64)))
    assert is_close(read(reader), read(teacher))
    assert not is_close(read(base), read(teacher), atol=0.1)
    assert same_weights(base, TINY[family](seed=0))
    assert text_difference(TINY[family](seed=0), base, 4) == {}
    few = reading_as(base, Adapter({}, {}, text_difference(teacher, base, 2)))
    assert not is_close(read(few), read(teacher), atol=0.1)


def test_prompts_are_read_in_the_style_and_without_one_as_ever_to_the_bit(family, pipe):
    stock = read(TINY[family](seed=0))
    for style, seed in (("ink", 0), ("clay", 2), ("photo", None)):
        dmm.set_style(pipe, style)
        assert is_close(read(pipe), stock if seed is None else read(near(family, seed)))
    dmm.set_style(pipe, MIX)
    mixed = read(pipe)
    weights = {
        component: {
            name: 0.7 * one + 0.3 * other
            for (name, one), other in zip(
                encoder.state_dict().items(), clips_of(near(family, 2))[component].state_dict().values(), strict=True
            )
        }
        for component, encoder in clips_of(near(family, 0)).items()
    }
    expected = TINY[family](seed=0)
    for component, encoder in clips_of(expected).items():
        encoder.load_state_dict(weights[component])
    assert is_close(mixed, read(expected))
    dmm.set_style(pipe, None)
    assert all(read(pipe)[name].equal(stock[name]) for name in stock)
    assert same_weights(pipe, TINY[family](seed=0))


def test_each_prompt_is_read_in_its_images_style(family, pipe):
    styles = ["ink", "photo", MIX]
    dmm.set_style(pipe, styles)
    together = read(pipe)
    for i, style in enumerate(styles):
        dmm.set_style(pipe, style)
        alone = read(pipe)
        for name in alone:
            torch.testing.assert_close(together[name][i], alone[name][i], atol=1e-4, rtol=1e-4)
    # two images a prompt: one reading for both
    dmm.set_style(pipe, ["ink", "ink", "photo", "photo"])
    twice = read(pipe, PROMPTS[:2])
    assert all(torch.allclose(twice[name], together[name][:2], atol=1e-4) for name in twice)
    dmm.set_style(pipe, ["ink", "photo", "photo", "photo"])
    with pytest.raises(ValueError, match="a prompt is read once for all its images: give each image a prompt of its"):
        read(pipe, PROMPTS[:2])


def test_pictures_of_several_styles_are_what_each_is_alone(family, pipe):
    if not FAMILIES[family].keeps_rows:
        return  # they are painted in turn
    together = paint(pipe, ["a cat"] * 3, ["ink", "photo", MIX])
    for i, style in enumerate(["ink", "photo", MIX]):
        dmm.set_style(pipe, style)
        assert (paint(pipe, ["a cat"] * 3)[i] - together[i]).abs().max() <= 1


def test_a_style_over_time_reads_in_the_style_that_it_begins_in(family, pipe):
    expected = read(near(family, 0))
    schedule = StyleSchedule([(0, 0.5, "ink"), (0.5, 1, "photo")])
    with dmm.style_over_time(pipe, schedule) as callback:
        for step in range(2):
            assert is_close(read(pipe), expected)
            callback(SimpleNamespace(num_timesteps=2), step, None, {})
    assert same_weights(pipe, TINY[family](seed=0))


def test_shared_pipelines_read_each_in_its_style_at_once(family, pipe):
    dmm.set_style(pipe, "ink")
    second = dmm.share(pipe)
    assert is_close(read(second), read(near(family, 0)))
    dmm.set_style(second, "clay")
    said = {}
    threads = [
        threading.Thread(target=lambda name=name, one=one: said.update({name: read(one)}))
        for name, one in (("ink", pipe), ("clay", second))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert is_close(said["ink"], read(near(family, 0)))
    assert is_close(said["clay"], read(near(family, 2)))
    for component, encoder in clips_of(pipe).items():
        twin = clips_of(second)[component]
        assert [one.data_ptr() for one in encoder.parameters()] == [one.data_ptr() for one in twin.parameters()]


def provenance(pipe):
    return [Provenance(name, name, "", family_of(pipe).name, "epsilon") for name in dmm.style_names(pipe)]


@pytest.mark.parametrize("family", FILES, indirect=True)
def test_saved_and_loaded_styles_read_the_same_and_files_keep_every_bit(family, pipe, tmp_path):
    dmm.set_style(pipe, "ink")
    said = read(pipe)
    dmm.save_pipeline(pipe, tmp_path / "saved", provenance=provenance(pipe))
    again = dmm.load_pipeline(tmp_path / "saved")
    assert same_weights(again, TINY[family](seed=0))
    dmm.set_style(again, "ink")
    assert all(read(again)[name].equal(said[name]) for name in said)
    dmm.save_pipeline(again, tmp_path / "again")
    for file in (tmp_path / "saved" / "styles").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / "styles" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("family", FILES, indirect=True)
def test_a_removed_style_leaves_the_others_files_as_they_are(family, pipe, tmp_path):
    dmm.save_pipeline(pipe, tmp_path / "saved", provenance=provenance(pipe))
    remove_style(tmp_path / "saved", "ink", tmp_path / "left")
    files = [file for file in (tmp_path / "saved" / "styles").iterdir() if file.name.startswith(("photo.", "clay."))]
    assert len(files) == 4
    for file in files:
        assert file.read_bytes() == (tmp_path / "left" / "styles" / file.name).read_bytes()
    left = dmm.load_pipeline(tmp_path / "left")
    dmm.set_style(left, "clay")
    assert is_close(read(left), read(near(family, 2)))


@pytest.mark.parametrize("family", FILES, indirect=True)
def test_plain_diffusers_loads_the_text_encoders_part_of_a_lora(family, pipe, tmp_path):
    dmm.save_pipeline(pipe, tmp_path / "saved", provenance=provenance(pipe))
    export_all(pipe, tmp_path / "all")
    adapter = styled_port(denoiser_of(pipe)).style_prompts.adapters["ink"]
    for folder, loras in (("saved", "styles"), ("all", "loras")):
        other = plain(pipe, tmp_path / folder)
        other.load_lora_weights(tmp_path / folder / loras, weight_name="ink.safetensors")
        other.fuse_lora(components=list(clips_of(other)))
        other.unload_lora_weights()
        for component, encoder in clips_of(other).items():
            part = fitted(component, encoder, adapter)
            base = clips_of(TINY[family](seed=0))[component]
            for name, parameter in encoder.named_parameters():
                carried = name in part.factors and "encoder.layers." in name
                expected = base.get_parameter(name) + (part.change(name) if carried else 0)
                torch.testing.assert_close(parameter, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", FILES, indirect=True)
@pytest.mark.parametrize("style", ["ink", MIX], ids=str)
def test_an_export_reads_as_the_style_does(family, pipe, tmp_path, style):
    export_style(pipe, style, tmp_path / "folder")
    dmm.set_style(pipe, style)
    exported = [plain(pipe, tmp_path / "folder")]
    if family in UNETS:
        export_style(pipe, style, tmp_path / "one.safetensors")
        config = {"config": str(tmp_path / "folder"), "local_files_only": True}
        exported.append(type(pipe).from_single_file(str(tmp_path / "one.safetensors"), **config))
    for one in exported:
        assert is_close(read(one), read(pipe), atol=1e-4)
        assert (paint(one, ["a cat"]) - paint(pipe, ["a cat"])).abs().max() <= 2
    dmm.set_style(pipe, None)
    assert same_weights(pipe, TINY[family](seed=0))


@pytest.mark.parametrize("family", FILES, indirect=True)
def test_patches_of_all_styles_hold_their_text_encoders(family, pipe, tmp_path):
    export_all(pipe, tmp_path / "all")
    patch = load_file(tmp_path / "all/styles/ink.safetensors")
    for component in clips_of(pipe):
        file = next((tmp_path / "all" / component).glob("*.safetensors"))
        changed = {
            name.removeprefix(f"{component}."): one for name, one in patch.items() if name.startswith(f"{component}.")
        }
        assert changed.keys() <= load_file(file).keys()
        save_file({**load_file(file), **changed}, file, {"format": "pt"})
    assert is_close(read(plain(pipe, tmp_path / "all")), read(near(family, 0)))
    assert not any(name.startswith("text_encoder") for name in load_file(tmp_path / "all/styles/photo.safetensors"))
    if family in UNETS:
        export_all(pipe, tmp_path / "file", single_file=True)
        whole = load_file(tmp_path / "file/model.safetensors") | load_file(tmp_path / "file/styles/ink.safetensors")
        save_file(whole, tmp_path / "patched.safetensors")
        config = {"config": str(tmp_path / "all"), "local_files_only": True}
        patched = type(pipe).from_single_file(str(tmp_path / "patched.safetensors"), **config)
        assert is_close(read(patched), read(near(family, 0)))


def test_regions_are_read_in_their_styles(family, pipe):
    if not FAMILIES[family].takes_regions:
        return
    settings = {"width": 16, "height": 16, "steps": 2, "guidance_scale": 5.0}
    whole = Region((0, 0, 16, 16), "ink")
    dmm.set_style(pipe, "clay")  # what is set does not matter
    for negative in ("", "a dog"):
        painted = paint_regions(pipe, [whole], "a cat", negative_prompt=negative, **settings)
        with temporary_style(pipe, "ink"):
            (alone,) = sample(pipe, ["a cat"], [0], negative_prompt=negative, **settings)
        one, other = (torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).int() for p in (painted, alone))
        assert (one - other).abs().max() <= 1


def test_a_file_of_another_models_text_encoder_is_told(family, pipe):
    prompts = styled_port(denoiser_of(pipe)).style_prompts
    other = copy.deepcopy(prompts.adapters["ink"])
    component = next(iter(other.text))
    name, one = next(iter(other.text[component].offsets.items()))
    wrong = {component: Adapter({}, {name: torch.cat([one, one])})}
    prompts.adapters = {**prompts.adapters, "ink": Adapter({}, {}, wrong)}
    with pytest.raises(UserError, match="It was made for another model"):
        dmm.set_style(pipe, "ink")
