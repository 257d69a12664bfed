"""The ComfyUI nodes paint what the model paints, and touch nothing but a clone."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import comfy_stub
import pytest
import torch
from conftest import tiny_adapted, tiny_pipeline, tiny_styled

from dmm.models.adapters import Adapter
from dmm.models.styles import styled_port
from dmm.models.text_adapters import text_difference
from dmm.pipeline.style_schedule import StyleSchedule
from dmm.pipeline.styled import save_pipeline, set_style, style_term

CHECKOUT = os.environ.get("DMM_COMFYUI")
MIX = {"ink": 0.7, "photo": 0.3}


@pytest.fixture
def nodes(tmp_path, monkeypatch, merged, merged_adapters):
    for name, folder in (("merged", merged), ("some/adapters", merged_adapters)):
        shutil.copytree(folder, tmp_path / "diffusers" / name)
    for name, module in comfy_stub.modules(tmp_path).items():
        monkeypatch.setitem(sys.modules, name, module)
    loaded = comfy_stub.load_nodes()
    yield {name: node() for name, node in loaded.NODE_CLASS_MAPPINGS.items()}
    for name in [name for name in sys.modules if name.startswith(loaded.__name__)]:
        del sys.modules[name]


def styles_of(model):
    folder = importlib.import_module("custom_nodes_dmm.loading").merged_models()[model]
    return importlib.import_module("custom_nodes_dmm.side_car").read_styles(folder)


def mixed(nodes, styles, weights, **more):
    filled = [*weights.items(), *[("(none)", 1.0)] * (4 - len(weights))]
    widgets = {}
    for i, (name, weight) in enumerate(filled, start=1):
        widgets |= {f"style_{i}": name, f"weight_{i}": weight}
    return nodes["DMMStyleMix"].mix(styles, **widgets, **more)[0]


def arguments():
    torch.manual_seed(3)
    return torch.randn(2, 4, 8, 8), torch.tensor([700.0, 40.0]), torch.randn(2, 5, 16)


@torch.no_grad()
def ours(pipe, style):
    set_style(pipe, style)
    return pipe.unet(*arguments()).sample


@pytest.mark.parametrize(("model", "make"), [("merged", tiny_styled), ("some/adapters", tiny_adapted)])
def test_a_mix_paints_what_the_model_paints_and_its_input_stays(nodes, model, make):
    plain = comfy_stub.patcher_of(tiny_pipeline().unet)
    before = plain.predict(*arguments())
    style = mixed(nodes, styles_of(model), MIX)
    (styled,) = nodes["DMMApplyStyle"].apply(plain, style)
    pipe = make()
    expected = ours(pipe, MIX)
    assert (styled.predict(*arguments()) - expected).abs().max() < 1e-4
    assert (expected - before).abs().max() > 0.01
    assert plain.predict(*arguments()).equal(before)
    assert before.equal(ours(pipe, None))


@torch.no_grad()
def test_prompts_are_read_in_a_mix_as_the_model_reads_them(nodes, tmp_path):
    pipe, other = tiny_adapted(), tiny_pipeline(seed=5)
    adapters = styled_port(pipe.unet).style_prompts.adapters
    text = text_difference(other, pipe, 3)
    adapters["ink"] = Adapter(adapters["ink"].factors, adapters["ink"].offsets, text)
    save_pipeline(pipe, tmp_path / "diffusers" / "readers")
    style = mixed(nodes, styles_of("readers"), MIX)
    clip, ids = comfy_stub.CLIP(tiny_pipeline().text_encoder), torch.arange(6)[None]
    before = clip.read(ids)
    (read,) = nodes["DMMReadInStyle"].apply(clip, style)
    (styled,) = nodes["DMMApplyStyle"].apply(comfy_stub.patcher_of(tiny_pipeline().unet), style)
    assert (styled.predict(*arguments()) - ours(pipe, MIX)).abs().max() < 1e-4
    expected = pipe.text_encoder(ids).last_hidden_state
    assert (read.read(ids) - expected).abs().max() < 0.02  # products of halves
    assert (expected - before).abs().max() > 0.1
    assert clip.read(ids).equal(before)
    ((_, values),), _ = nodes["DMMStyleByRegion"].apply([["a", {}]], [["b", {}]], style, 1.0)
    weights = [key for hook in values["hooks"].hooks if hasattr(hook, "weights") for key in hook.weights]
    assert weights
    assert not any(key.startswith(("lora_te", "text_encoders.")) for key in weights)


def test_the_mix_is_taken_before_the_network(nodes):
    styles, pipe = styles_of("merged"), tiny_styled()
    assert torch.allclose(styles.term(MIX), style_term(pipe, MIX), atol=1e-5)
    half_and_half = (styles.term({"ink": 1.0}) + styles.term({"photo": 1.0})) / 2
    assert not torch.allclose(styles.term({"ink": 0.5, "photo": 0.5}), half_and_half, atol=1e-2)


def test_weights_are_shares_and_mixes_are_chained(nodes):
    styles = styles_of("merged")
    first = mixed(nodes, styles, {"ink": 2.0, "photo": 1.0})
    both = mixed(nodes, styles, {"clay": 1.0}, and_mix=first)
    assert both.parts[0].weights == {"ink": 0.5, "photo": 0.25, "clay": 0.25}


def test_a_style_that_is_not_there_or_no_style_is_refused(nodes):
    styles = styles_of("merged")
    with pytest.raises(ValueError, match="no style 'oil' in this model; its styles are ink, photo, clay"):
        mixed(nodes, styles, {"oil": 1.0})
    with pytest.raises(ValueError, match="sum to 0"):
        mixed(nodes, styles, {})


@pytest.mark.parametrize("num_steps", [1, 5, 8])
def test_a_schedule_is_in_the_style_of_each_step(nodes, num_steps):
    styles = styles_of("merged")
    ink, photo, clay = (mixed(nodes, styles, {name: 1.0}) for name in ("ink", "photo", "clay"))
    schedule = nodes["DMMStyleSchedule"].schedule
    (style,) = schedule(*schedule(ink, photo, 0.4), clay, 0.75)
    (styled,) = nodes["DMMApplyStyle"].apply(comfy_stub.patcher_of(tiny_pipeline().unet), style)
    pipe, told = tiny_styled(), StyleSchedule([(0, 0.4, "ink"), (0.4, 0.75, "photo"), (0.75, 1, "clay")])
    sigmas = torch.cat([torch.linspace(14.6, 0.03, num_steps), torch.zeros(1)])
    for step in range(num_steps):
        painted = styled.predict(*arguments(), sigmas=sigmas[step : step + 1], sample_sigmas=sigmas)
        assert (painted - ours(pipe, told.at(step / num_steps))).abs().max() < 1e-4


def test_a_region_has_its_own_style_whatever_the_model_has(nodes):
    styles = styles_of("merged")
    plain = comfy_stub.patcher_of(tiny_pipeline().unet)
    (styled,) = nodes["DMMApplyStyle"].apply(plain, mixed(nodes, styles, {"ink": 1.0}))
    mask = torch.ones(1, 8, 8)
    region = nodes["DMMStyleByRegion"].apply([["a", {}]], [["b", {}]], mixed(nodes, styles, {"photo": 1.0}), 1.0, mask)
    for ((_, values),) in region:
        assert values["mask"] is mask
        painted = styled.predict(*arguments(), hooks=values["hooks"].hooks)
        assert (painted - ours(tiny_styled(), "photo")).abs().max() < 1e-4


def test_a_region_of_adapters_brings_its_weights_by_keyframes(nodes):
    styles = styles_of("some/adapters")
    (style,) = nodes["DMMStyleSchedule"].schedule(mixed(nodes, styles, MIX), mixed(nodes, styles, {"clay": 1.0}), 0.5)
    ((_, values),), _ = nodes["DMMStyleByRegion"].apply([["a", {}]], [["b", {}]], style, 1.0)
    frames = [hook.hook_keyframe.keyframes for hook in values["hooks"].hooks if hasattr(hook, "weights")]
    assert frames == [[(0.0, 0.7), (0.5, 0.0)], [(0.0, 0.3), (0.5, 0.0)], [(0.0, 0.0), (0.5, 1.0)]]


def test_what_would_add_up_or_not_fit_is_refused(nodes):
    adapters, terms = styles_of("some/adapters"), styles_of("merged")
    plain = comfy_stub.patcher_of(tiny_pipeline().unet)
    ink, clay = (mixed(nodes, adapters, {name: 1.0}) for name in ("ink", "clay"))
    (styled,) = nodes["DMMApplyStyle"].apply(plain, ink)
    with pytest.raises(ValueError, match="has a DMM style on it already"):
        nodes["DMMApplyStyle"].apply(styled, ink)
    with pytest.raises(ValueError, match="over time for a conditioning only"):
        nodes["DMMApplyStyle"].apply(plain, *nodes["DMMStyleSchedule"].schedule(ink, clay, 0.5))
    ((_, values),), _ = nodes["DMMStyleByRegion"].apply([["a", {}]], [["b", {}]], clay, 1.0)
    with pytest.raises(ValueError, match="which would add up"):
        styled.predict(*arguments(), hooks=values["hooks"].hooks)
    with pytest.raises(ValueError, match="of different models"):
        mixed(nodes, terms, {"ink": 1.0}, and_mix=ink)
    narrower = comfy_stub.patcher_of(tiny_pipeline().unet)
    del narrower.model.diffusion_model.mid_block
    with pytest.raises(ValueError, match=r"changes lora_unet_mid_block\w+ and \d+ more layers that this model does"):
        nodes["DMMApplyStyle"].apply(narrower, ink)


def test_the_loader_finds_merged_models_and_follows_their_schedule(nodes, tmp_path):
    choices = type(nodes["DMMLoadModel"]).INPUT_TYPES()["required"]["model"][0]
    assert choices == ["merged", "some/adapters"]
    assert type(nodes["DMMStyleMix"]).INPUT_TYPES()["required"]["style_1"][0] == ["(none)", "ink", "photo", "clay"]
    model, clip, _vae, styles = nodes["DMMLoadModel"].load("merged")
    assert styles.names == ["ink", "photo", "clay"]
    assert model.object_patches == {}
    assert any(name.startswith("text_model.") for name in clip[0])

    path = tmp_path / "diffusers" / "merged" / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}))
    sampling = nodes["DMMLoadModel"].load("merged")[0].object_patches["model_sampling"]
    assert [kind.__name__ for kind in type(sampling).__bases__] == ["ModelSamplingDiscrete", "V_PREDICTION"]
    assert sampling.zsnr is True
    path.write_text(json.dumps(config | {"beta_end": 0.02}))
    with pytest.raises(ValueError, match="a noise schedule of its own"):
        nodes["DMMLoadModel"].load("merged")


def test_the_registry_finds_what_it_reads():
    told = tomllib.loads((comfy_stub.NODES / "pyproject.toml").read_text())
    assert told["project"]["name"]
    assert told["tool"]["comfy"]["DisplayName"]


@pytest.mark.parametrize("path", sorted((comfy_stub.NODES / "example_workflows").glob("*.json")), ids=lambda p: p.stem)
def test_example_workflows_fit_the_nodes(nodes, path):
    graph = json.loads(path.read_text())
    by_id = {node["id"]: node for node in graph["nodes"]}
    ours_seen = 0
    for node in graph["nodes"]:
        if node["type"] not in nodes:
            continue
        ours_seen += 1
        kind = type(nodes[node["type"]])
        inputs = kind.INPUT_TYPES()
        told = {**inputs["required"], **inputs.get("optional", {})}
        wires = {name: kind_of[0] for name, kind_of in told.items() if _is_wire(kind_of[0])}
        assert {one["name"]: one["type"] for one in node["inputs"]} == wires
        assert len(node["widgets_values"]) == len(told) - len(wires)
        assert [one["type"] for one in node["outputs"]] == list(kind.RETURN_TYPES)
    assert ours_seen or path.stem.startswith("loras-")
    for number, source, output, target, slot, kind in graph["links"]:
        assert number in by_id[source]["outputs"][output]["links"]
        assert by_id[source]["outputs"][output]["type"] == kind == by_id[target]["inputs"][slot]["type"]
        assert by_id[target]["inputs"][slot]["link"] == number


def _is_wire(kind):
    return isinstance(kind, str) and kind not in ("FLOAT", "INT", "STRING", "BOOLEAN")


@pytest.mark.skipif(not CHECKOUT, reason="DMM_COMFYUI names no checkout of ComfyUI")
def test_in_comfyui_itself():
    script = Path(__file__).parent / "in_comfyui.py"
    path = os.pathsep.join([str(script.parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, script, CHECKOUT],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    differences = json.loads(done.stdout.splitlines()[-1])
    assert max(differences.values()) < 1e-4, differences
