"""One plain LoRA under every name that tools give its layers is the same change of the model."""

import json
import logging
import re

import pytest
import torch
import yaml
from conftest import tiny_pipeline
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dmm.cli import main
from dmm.errors import UserError
from dmm.families.sd1 import SD1
from dmm.formats.lora import read_lora, save_kohya_lora
from dmm.formats.original_layout import original_names

RANK, ALPHA = 4, 4.0
TARGETS = ["to_q", "proj_in", "conv1"]


@pytest.fixture(scope="module")
def adapted():
    pipe = tiny_pipeline()
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=False))
    return pipe


@pytest.fixture(scope="module")
def plain():
    return tiny_pipeline()


def models_of(pipe):
    return {"unet": pipe.unet, "vae": pipe.vae, "text_encoder": pipe.text_encoder}


def deltas(path, pipe):
    changes = read_lora(path, models_of(pipe), SD1)
    return {(one.component, one.module): one.rows(0, one.form.num_rows) for one in changes}


@pytest.fixture(scope="module")
def kohya(adapted, tmp_path_factory):
    path = tmp_path_factory.mktemp("kohya") / "lora.safetensors"
    save_kohya_lora(path, {"unet": adapted.unet}, SD1)
    return path


def by_path(adapted):
    """Down and up by the layer's path."""
    state = get_peft_model_state_dict(adapted.unet)
    return {
        key.removesuffix(".lora_A.weight"): (state[key], state[key.replace("_A.", "_B.")])
        for key in state
        if "_A." in key
    }


def renamed(path, adapted, name, down=".lora_down.weight", up=".lora_up.weight"):
    tensors = {}
    for module, (one, other) in by_path(adapted).items():
        tensors[name(module) + down], tensors[name(module) + up] = one, other
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return path


def original(adapted, module):
    plain_unet = tiny_pipeline().unet
    names = original_names({"unet": plain_unet}, SD1)["unet"]
    return names[f"{module}.weight"].removesuffix(".weight").removeprefix("model.diffusion_model.")


def flat(module):
    return module.replace(".", "_")


LAYOUTS = {
    "diffusers": lambda f, a: _save_weights(f, a) / "pytorch_lora_weights.safetensors",
    "a folder of diffusers": lambda f, a: _save_weights(f, a),
    "save_lora_adapter": lambda f, a: (a.unet.save_lora_adapter(f / "u"), f / "u" / "pytorch_lora_weights.safetensors")[
        1
    ],
    "PEFT's names": lambda f, a: renamed(
        f / "x.safetensors", a, lambda m: f"base_model.model.{m}", ".lora_A.weight", ".lora_B.weight"
    ),
    "PEFT's names with an adapter's": lambda f, a: renamed(
        f / "x.safetensors", a, lambda m: f"base_model.model.{m}", ".lora_A.default.weight", ".lora_B.default.weight"
    ),
    "old diffusers": lambda f, a: renamed(
        f / "x.safetensors",
        a,
        lambda m: "unet." + re.sub(r"\.(to_q)$", r".processor.\1", m),
        "_lora.down.weight",
        "_lora.up.weight",
    ),
    "older kohya, lora.down": lambda f, a: renamed(
        f / "x.safetensors", a, lambda m: f"unet.{m}", ".lora.down.weight", ".lora.up.weight"
    ),
    "LyCORIS' wrapper": lambda f, a: renamed(f / "x.safetensors", a, lambda m: f"lycoris_{flat(m)}"),
    "ComfyUI's saver": lambda f, a: renamed(f / "x.safetensors", a, lambda m: f"diffusion_model.{original(a, m)}"),
    "kohya with original names": lambda f, a: renamed(
        f / "x.safetensors", a, lambda m: f"lora_unet_{flat(original(a, m))}"
    ),
    "a suffix in capitals": lambda f, a: renamed(f / "X.SAFETENSORS", a, lambda m: f"lora_unet_{flat(m)}"),
}


def _save_adapter(folder, adapted):
    adapted.unet.save_lora_adapter(folder / "u")
    return folder / "u" / "pytorch_lora_weights.safetensors"


def _save_weights(folder, adapted):
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(adapted.unet))
    StableDiffusionPipeline.save_lora_weights(folder / "w", unet_lora_layers=layers)
    return folder / "w"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_change(kohya, adapted, plain, tmp_path, layout):
    expected = deltas(kohya, plain)
    found = deltas(LAYOUTS[layout](tmp_path, adapted), plain)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[key], expected[key], atol=1e-6) for key in expected)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "original" not in name and "ComfyUI" not in name])
def test_a_lora_soup_of_any_layout_is_kohyas(kohya, adapted, plain, tmp_path, layout, capsys):
    path = LAYOUTS[layout](tmp_path, adapted)
    teachers = [{"name": "a", "lora": str(kohya)}, {"name": "b", "lora": str(path)}]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"kind": "lora", "method": "soup", "teachers": teachers}))
    output = tmp_path / "soup.safetensors"
    assert main(["soup", str(tmp_path / "r.yaml"), "--output", str(output)]) == 0, capsys.readouterr().err
    assert all(key.startswith("lora_unet_") for key in load_file(output))
    expected, found = deltas(kohya, plain), deltas(output, plain)
    assert all(torch.allclose(found[key], expected[key], atol=1e-5) for key in expected)
    fresh = tiny_pipeline()
    fresh.load_lora_weights(output)
    assert len(fresh.unet.peft_config) == 1


def test_names_of_the_original_layout_are_refused_in_a_soup_of_loras(adapted, tmp_path, capsys):
    path = LAYOUTS["ComfyUI's saver"](tmp_path, adapted)
    teachers = [{"name": "a", "lora": str(path)}]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"kind": "lora", "method": "soup", "teachers": teachers}))
    assert main(["soup", str(tmp_path / "r.yaml"), "--output", str(tmp_path / "s.safetensors")]) == 2
    assert "is a name of the original layout" in capsys.readouterr().err


def write(path, kohya, change=lambda tensors: None, metadata=None):
    tensors = load_file(kohya)
    change(tensors)
    save_file(tensors, path, metadata)
    return path


def first(tensors):
    return next(key for key in tensors if key.endswith(".lora_down.weight")).removesuffix(".lora_down.weight")


def test_a_bundled_embedding_is_left_out_and_told(kohya, plain, tmp_path, caplog):
    path = write(
        tmp_path / "x.safetensors", kohya, lambda t: t.update({"bundle_emb.x.string_to_param.*": torch.zeros(1, 8)})
    )
    with caplog.at_level(logging.WARNING):
        assert deltas(path, plain).keys() == deltas(kohya, plain).keys()
    assert "the embedding that is bundled with the LoRA is left out" in caplog.text


def test_layers_of_rank_0_change_nothing(kohya, plain, tmp_path):
    def empty(tensors):
        name = first(tensors)
        tensors[f"{name}.lora_down.weight"] = tensors[f"{name}.lora_down.weight"][:0].clone()
        tensors[f"{name}.lora_up.weight"] = tensors[f"{name}.lora_up.weight"][:, :0].clone()

    path = write(tmp_path / "x.safetensors", kohya, empty)
    assert len(deltas(path, plain)) == len(deltas(kohya, plain)) - 1


@pytest.mark.parametrize("told", ["{not json", "[]", '"x"', "[" * 100_000])
def test_metadata_that_cannot_be_read_matters_only_where_alpha_hangs_on_it(kohya, plain, tmp_path, told):
    def no_alpha(tensors):
        for key in [key for key in tensors if key.endswith(".alpha")]:
            del tensors[key]

    metadata = {"lora_adapter_metadata": told}
    assert deltas(write(tmp_path / "a.safetensors", kohya, metadata=metadata), plain)
    with pytest.raises(UserError, match=r"lora_adapter_metadata'.*, and no other place tells its scale"):
        read_lora(write(tmp_path / "b.safetensors", kohya, no_alpha, metadata), models_of(plain), SD1)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"unet.lora_alpha": None}, 1.0),
        ({"unet.lora_alpha": 8}, 2.0),
        ({"lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"nothing": 1}}, 2.0),
    ],
)
def test_alpha_of_the_metadata(kohya, adapted, plain, tmp_path, config, scale):
    path = renamed(tmp_path / "x.safetensors", adapted, lambda m: f"unet.{m}", ".lora_A.weight", ".lora_B.weight")
    save_file(load_file(path), path, {"lora_adapter_metadata": json.dumps(config)})
    expected = deltas(kohya, plain)
    assert all(torch.allclose(delta, scale * expected[key], atol=1e-5) for key, delta in deltas(path, plain).items())


@pytest.mark.parametrize("config", [{"unet.lora_alpha": "much"}, {"unet.lora_alpha": True}, {"unet.lora_alpha": [1]}])
def test_an_alpha_that_is_no_number_is_told(adapted, plain, tmp_path, config):
    path = renamed(tmp_path / "x.safetensors", adapted, lambda m: f"unet.{m}", ".lora_A.weight", ".lora_B.weight")
    save_file(load_file(path), path, {"lora_adapter_metadata": json.dumps(config)})
    with pytest.raises(UserError, match="expected a number"):
        read_lora(path, models_of(plain), SD1)


@pytest.mark.parametrize("shape", [(5,), (), (2, 2, 2, 2, 2)])
def test_what_is_no_matrix_is_told(kohya, plain, tmp_path, shape):
    path = write(
        tmp_path / "x.safetensors",
        kohya,
        lambda t: t.update({f"{first(t)}.lora_down.weight": torch.zeros(shape)}),
    )
    with pytest.raises(UserError, match=r"expected a matrix or a convolution's weight"):
        read_lora(path, models_of(plain), SD1)


def test_two_files_in_one_are_told(kohya, plain, tmp_path):
    def twice(tensors):
        name = first(tensors)
        tensors[f"{name}.lora_A.weight"] = tensors[f"{name}.lora_down.weight"].clone()

    with pytest.raises(UserError, match=r"has both .* and .* Two files were put into one"):
        read_lora(write(tmp_path / "x.safetensors", kohya, twice), models_of(plain), SD1)


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("conditioner.embedders.0.transformer.text_model.x.weight", "SDXL"),
        ("double_blocks.0.img_attn.qkv.weight", "FLUX.1"),
        ("joint_blocks.0.x_block.weight", "SD 3"),
    ],
)
def test_a_checkpoint_of_another_family_is_told_what_it_is_and_not_advised_as_the_model(plain, tmp_path, name, title):
    save_file({name: torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=re.escape(f"is a full checkpoint ({title}; it holds '{name}')")) as told:
        read_lora(tmp_path / "x.safetensors", models_of(plain), SD1)
    assert "Pass it as the model" not in str(told.value)


def test_a_folder_without_a_lora_is_told(plain, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no .safetensors files, and neither"):
        read_lora(tmp_path / "empty", models_of(plain), SD1)


def test_whole_differences_and_norms_are_merged(plain, tmp_path):
    norm, conv = "conv_norm_out", "conv_in"
    change = torch.full_like(plain.unet.conv_in.weight, 0.5)
    tensors = {
        f"lora_unet_{norm}.w_norm": torch.full_like(plain.unet.conv_norm_out.weight, 0.25),
        f"lora_unet_{norm}.b_norm": torch.full_like(plain.unet.conv_norm_out.bias, -1.0),
        f"lora_unet_{conv}.diff": change,
        f"lora_unet_{conv}.diff_b": torch.ones_like(plain.unet.conv_in.bias),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    found = {(c.module, c.parameter): c for c in read_lora(tmp_path / "x.safetensors", models_of(plain), SD1)}
    assert found.keys() == {(norm, "weight"), (norm, "bias"), (conv, "weight"), (conv, "bias")}
    weight = plain.unet.conv_in.weight.detach()
    assert torch.allclose(found[conv, "weight"].changed(weight, 2.0), weight + 1.0)
    bias = plain.unet.conv_norm_out.bias.detach()
    assert torch.allclose(found[norm, "bias"].changed(bias, 1.0), bias - 1.0)


def test_the_soups_header_names_one_layout(kohya, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump({"kind": "lora", "method": "soup", "teachers": [{"name": "a", "lora": str(kohya)}]})
    )
    assert main(["soup", str(tmp_path / "r.yaml"), "--output", str(tmp_path / "s.safetensors")]) == 0
    with safe_open(tmp_path / "s.safetensors", "pt") as file:
        assert file.metadata()["ss_network_module"] == "networks.lora"
