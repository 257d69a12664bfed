"""LoRAs of every family, under the names that tools give its layers: merged as diffusers merges them."""

import logging
import re

import pytest
import torch
from conftest import tiny_unet
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_families import TINY, UNETS

from dmm.errors import UserError
from dmm.families import FAMILIES
from dmm.formats.lora import fuse_lora, read_lora, save_kohya_lora
from dmm.formats.original_layout import original_names

UNET_TARGETS = ["to_q", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "conv_shortcut", "time_emb_proj"]
UNET_TARGETS += ["time_embedding.linear_1"]  # diffusers itself reads no "add_embedding" in kohya's layout
TEXT_TARGETS = ["q_proj", "out_proj", "fc1"]


def models_of(pipe):
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def layers_of(pipe):
    return {name: part for name, part in models_of(pipe).items() if name != "vae"}


@pytest.fixture(scope="module", params=UNETS)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def adapted(family):
    pipe = TINY[family.name]()
    for name, model in layers_of(pipe).items():
        targets = UNET_TARGETS if name == "unet" else TEXT_TARGETS
        model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets))
        torch.manual_seed(1)
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.1)
    return pipe


@pytest.fixture(scope="module")
def kohya(family, adapted, tmp_path_factory):
    path = tmp_path_factory.mktemp(family.name) / "lora.safetensors"
    save_kohya_lora(path, layers_of(adapted), family)
    return path


def fused(family, path, scale=0.7):
    pipe = TINY[family.name]()
    fuse_lora(pipe, read_lora(path, models_of(pipe), family), scale)
    return pipe


def differences(one, other):
    """The largest difference of any two weights, and how many tensors differ at all."""
    found = [
        (tensor - getattr(other, name).state_dict()[key]).abs().max().item()
        for name, part in models_of(one).items()
        for key, tensor in part.state_dict().items()
        if tensor.is_floating_point()
    ]
    return max(found), sum(difference > 0 for difference in found)


def test_kohyas_names_are_the_familys(family, kohya):
    names = load_file(kohya).keys()
    prefixes = [component.kohya[0] for component in family.components if component.kohya]
    assert {re.match(r"lora_(unet|te\d?)_", name)[0] for name in names} == set(prefixes)
    for prefix in prefixes[1:]:
        assert f"{prefix}text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in names
    with safe_open(kohya, "pt") as file:
        assert file.metadata()["ss_base_model_version"] == family.kohya_name


def test_kohyas_is_what_diffusers_loads_and_fuses(family, kohya):
    pipe = TINY[family.name]()
    pipe.load_lora_weights(str(kohya))
    pipe.fuse_lora(components=list(layers_of(pipe)), lora_scale=0.7)
    pipe.unload_lora_weights()
    ours = fused(family, kohya)
    assert differences(ours, pipe)[0] <= 1e-6
    assert differences(ours, TINY[family.name]())[1] == len(load_file(kohya)) / 3


def saved_by_diffusers(convert):
    def write(family, adapted, folder):
        layers = {
            f"{name}_lora_layers": convert(get_peft_model_state_dict(one)) for name, one in layers_of(adapted).items()
        }
        family.pipeline_class.save_lora_weights(folder, **layers)
        return folder

    return write


def renamed(change):
    def write(family, adapted, folder):
        path = folder / "renamed.safetensors"
        plain = TINY[family.name]()
        tensors = {}
        for component, model in layers_of(adapted).items():
            original = original_names({component: layers_of(plain)[component]}, family)[component]
            for key, tensor in get_peft_model_state_dict(model).items():
                module, _, part = key.rpartition(".lora_")
                name = change(family, component, module, original[f"{module}.weight"].removesuffix(".weight"))
                part = {"A": "lora_down", "B": "lora_up"}[part[0]]
                tensors[f"{name}.{part}.weight"] = tensor.contiguous()
        save_file(tensors, path)
        return path

    return write


def with_level(module):
    return module if module.startswith("text_model.") else f"text_model.{module}"


def kohya_original(family, component, module, original):
    if component == "unet":
        return f"lora_unet_{original.removeprefix('model.diffusion_model.').replace('.', '_')}"
    return part_of(family, component).kohya[0] + with_level(module).replace(".", "_")


def comfy(family, component, module, original):
    if component == "unet":
        return original.removeprefix("model.")
    return part_of(family, component).comfy[0] + with_level(module)


def part_of(family, name):
    return next(component for component in family.components if component.name == name)


LAYOUTS = {
    "diffusers": saved_by_diffusers(dict),
    "older diffusers": saved_by_diffusers(convert_state_dict_to_diffusers),
    "kohya with original names": renamed(kohya_original),
    "ComfyUI": renamed(comfy),
    "PEFT": renamed(lambda family, component, module, original: f"base_model.model.{component}.{module}"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_change(family, adapted, kohya, tmp_path, layout):
    found = fused(family, LAYOUTS[layout](family, adapted, tmp_path))
    assert differences(found, fused(family, kohya)) == (0, 0)


@pytest.mark.parametrize("layout", ["diffusers", "kohya with original names"])
def test_diffusers_reads_those_layouts_alike(family, adapted, tmp_path, layout):
    if family.name != "sdxl" and "original" in layout:
        pytest.skip("only SDXL's trainers write them")
    path = LAYOUTS[layout](family, adapted, tmp_path)
    pipe = TINY[family.name]()
    pipe.load_lora_weights(str(path))
    pipe.fuse_lora(components=list(layers_of(pipe)), lora_scale=0.7)
    pipe.unload_lora_weights()
    assert differences(fused(family, path), pipe)[0] <= 1e-6


@pytest.mark.parametrize("other", UNETS)
def test_another_familys_is_refused_by_its_name(family, kohya, other, caplog):
    if other == family.name:
        return
    pipe = TINY[other]()
    if "sdxl" not in (other, family.name):
        # tiny ones of these two are of one shape, real ones are not; the header alone is no ground to refuse
        with caplog.at_level(logging.WARNING):
            assert read_lora(kohya, models_of(pipe), FAMILIES[other])
        assert f"says that it is of {family.title}; all of it fits" in caplog.text
        pipe.register_modules(unet=tiny_unet((16, 32)))
    with pytest.raises(UserError, match=f"is of {family.title}"):
        read_lora(kohya, models_of(pipe), FAMILIES[other])
