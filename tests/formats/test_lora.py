"""Every layout must give W + scale * alpha / rank * up @ down."""

import math
import re

import pytest
import torch
from conftest import tiny_pipeline
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from helpers import rewrite
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dmm.errors import UserError
from dmm.families.sd1 import SD1
from dmm.formats.lora import fuse_lora, read_lora, save_kohya_lora

UNET_TARGETS = ["to_q", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "conv_shortcut", "time_emb_proj", "linear_1"]
TEXT_TARGETS = ["q_proj", "out_proj", "fc1"]
LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"
TEXT = "encoder.layers.0.self_attn.q_proj"


def adapted(rank=4, alpha=2.0, **config) -> StableDiffusionPipeline:
    """A tiny pipeline with a random adapter on linear layers and convolutions of UNet and text encoder."""
    pipeline = tiny_pipeline()
    for model, targets in ((pipeline.unet, UNET_TARGETS), (pipeline.text_encoder, TEXT_TARGETS)):
        model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **config))
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return pipeline


def write_lora(path, **config):
    pipeline = adapted(**config)
    save_kohya_lora(path, {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}, SD1)
    return path


@pytest.fixture(scope="module")
def kohya(tmp_path_factory):
    return write_lora(tmp_path_factory.mktemp("lora") / "lora.safetensors")


def models_of(pipeline):
    return {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}


def fuse(pipeline, path, scale=1.0):
    fuse_lora(pipeline, read_lora(path, models_of(pipeline)), scale)
    return pipeline


def weight(pipeline, component, module):
    return getattr(pipeline, component).get_submodule(module).weight


def changed(pipeline) -> int:
    plain = tiny_pipeline()
    return sum(
        not tensor.equal(getattr(plain, component).state_dict()[key])
        for component in ("unet", "text_encoder")
        for key, tensor in getattr(pipeline, component).state_dict().items()
    )


@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize(
    ("component", "module", "kohya_name"),
    [
        ("unet", LINEAR, "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"),
        ("unet", CONV, "lora_unet_down_blocks_0_resnets_0_conv1"),
        ("unet", "down_blocks.0.attentions.0.proj_in", "lora_unet_down_blocks_0_attentions_0_proj_in"),
        ("text_encoder", TEXT, "lora_te_text_model_encoder_layers_0_self_attn_q_proj"),
    ],
)
def test_kohya_is_the_formula_by_hand(kohya, pipeline, component, module, kohya_name, scale):
    tensors = load_file(kohya)
    down, up = tensors[f"{kohya_name}.lora_down.weight"], tensors[f"{kohya_name}.lora_up.weight"]
    assert tensors[f"{kohya_name}.alpha"] == 2.0
    assert len(down) == 4
    product = up @ down if down.ndim == 2 else torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
    expected = weight(pipeline, component, module).detach() + scale * 2.0 / 4 * product
    torch.testing.assert_close(weight(fuse(pipeline, kohya, scale), component, module), expected, rtol=0, atol=1e-7)


def test_kohya_equals_what_diffusers_and_peft_fuse(kohya, pipeline):
    ours = fuse(tiny_pipeline(), kohya, scale=0.7)
    pipeline.load_lora_weights(str(kohya))
    pipeline.fuse_lora(lora_scale=0.7)
    pipeline.unload_lora_weights()
    assert changed(ours) == len(load_file(kohya)) / 3
    for component in ("unet", "text_encoder"):
        theirs = getattr(pipeline, component).state_dict()
        for key, tensor in getattr(ours, component).state_dict().items():
            torch.testing.assert_close(tensor, theirs[key], rtol=0, atol=1e-6)


def test_a_fused_lora_acts_as_its_adapter_did(kohya, pipeline):
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = adapted().unet(x, t, text).sample
        plain = pipeline.unet(x, t, text).sample
        found = fuse(pipeline, kohya).unet(x, t, text).sample
    assert (plain - expected).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_kohya_files_say_what_made_them(kohya):
    with safe_open(kohya, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_module"] == "networks.lora"
    assert metadata["ss_network_dim"] == "4"


@pytest.mark.parametrize("layout", ["peft", "diffusers", "kohya by diffusers"])
def test_other_layouts_equal_kohyas(kohya, pipeline, tmp_path, layout):
    # without a config in the metadata these layouts mean alpha = rank
    source = adapted(alpha=4.0)
    unet = get_peft_model_state_dict(source.unet)
    text_encoder = get_peft_model_state_dict(source.text_encoder)
    if layout == "diffusers":
        unet, text_encoder = convert_state_dict_to_diffusers(unet), convert_state_dict_to_diffusers(text_encoder)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet, text_encoder)
    path = tmp_path
    if layout == "kohya by diffusers":
        from diffusers.utils import convert_state_dict_to_kohya

        path = tmp_path / "kohya.safetensors"
        save_file(convert_state_dict_to_kohya(load_file(tmp_path / "pytorch_lora_weights.safetensors")), path)
    found = fuse(pipeline, path, scale=0.5)  # a folder that diffusers wrote, too
    expected = fuse(tiny_pipeline(), kohya)
    for component, module in (("unet", LINEAR), ("unet", CONV), ("text_encoder", TEXT)):
        assert weight(found, component, module).equal(weight(expected, component, module))


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 8 / 4), (True, 8 / math.sqrt(4))])
def test_alpha_from_pefts_config_counts(pipeline, tmp_path, rslora, scaling):
    source = adapted(alpha=8.0, use_rslora=rslora)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        get_peft_model_state_dict(source.unet),
        unet_lora_adapter_metadata=source.unet.peft_config["default"].to_dict(),
    )
    layers = read_lora(tmp_path, models_of(pipeline))
    assert {layer.scaling for layer in layers} == {scaling}
    # and kohya's layout carries the same scaling
    save_kohya_lora(tmp_path / "kohya.safetensors", {"unet": source.unet}, SD1)
    assert {layer.scaling for layer in read_lora(tmp_path / "kohya.safetensors", models_of(pipeline))} == {scaling}


def test_without_alpha_the_product_is_added_as_it_is(kohya, pipeline, tmp_path):
    def drop_alphas(tensors):
        for name in [name for name in tensors if name.endswith(".alpha")]:
            del tensors[name]

    path = rewrite(kohya, tmp_path / "lora.safetensors", drop_alphas)
    assert {layer.scaling for layer in read_lora(path, models_of(pipeline))} == {1.0}


def refused(path, pipeline, match):
    before = pipeline.unet.conv_in.weight.clone()
    with pytest.raises(UserError, match=match):
        read_lora(path, models_of(pipeline))
    assert pipeline.unet.conv_in.weight.equal(before)


def test_a_lora_none_of_whose_keys_match(kohya, pipeline, tmp_path):
    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace("lora_unet_", "lora_unet_x").replace("lora_te_", "lora_te_x")] = tensors.pop(name)

    path = rewrite(kohya, tmp_path / "lora.safetensors", rename)
    refused(path, pipeline, r"none of its \d+ layers is one of this model's: it has 'lora_\w+', the model 'lora_unet_")


def test_an_sdxl_lora(pipeline, tmp_path):
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    path = tmp_path / "lora.safetensors"
    save_file({f"{name}.lora_down.weight": torch.zeros(4, 16), f"{name}.lora_up.weight": torch.zeros(16, 4)}, path)
    refused(path, pipeline, "none of its 1 layers .* It is of SDXL; pass a LoRA made for this one")


def test_a_lora_some_of_whose_keys_match(kohya, pipeline, tmp_path):
    def rename(tensors):
        for name in [name for name in tensors if "down_blocks_0_resnets_0_conv1" in name]:
            tensors[name.replace("blocks_0", "blocks_7")] = tensors.pop(name)

    path = rewrite(kohya, tmp_path / "lora.safetensors", rename)
    refused(path, pipeline, r"1 of its \d+ layers are not this model's: 'lora_unet_down_blocks_7_resnets_0_conv1'\.")


def test_a_lora_of_another_width(kohya, pipeline, tmp_path):
    name = "lora_unet_down_blocks_0_resnets_0_conv1"

    def narrow(tensors):
        tensors[f"{name}.lora_down.weight"] = tensors[f"{name}.lora_down.weight"][:, :4].contiguous()

    path = rewrite(kohya, tmp_path / "lora.safetensors", narrow)
    refused(path, pipeline, re.escape(f"the layer '{name}' changes a weight of 8 x 36, the model's is (8, 8, 3, 3)"))


def test_a_lora_whose_ranks_disagree(kohya, pipeline, tmp_path):
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"

    def cut(tensors):
        tensors[f"{name}.lora_up.weight"] = tensors[f"{name}.lora_up.weight"][:, :2].contiguous()

    path = rewrite(kohya, tmp_path / "lora.safetensors", cut)
    refused(path, pipeline, f"the layer '{name}' has .*, which do not fit each other")


def test_half_a_layer(kohya, pipeline, tmp_path):
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    path = rewrite(kohya, tmp_path / "lora.safetensors", lambda tensors: tensors.pop(f"{name}.lora_up.weight"))
    refused(path, pipeline, f"'{name}' has alpha and down but not both down and up")


def test_nan_in_a_lora(kohya, pipeline, tmp_path):
    name = "lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight"

    def spoil(tensors):
        tensors[name][0] = float("nan")

    path = rewrite(kohya, tmp_path / "lora.safetensors", spoil)
    refused(path, pipeline, f"4 of the 32 values of '{name}' are NaN or infinite")


def test_a_full_checkpoint_as_lora(sd1_file, pipeline):
    refused(sd1_file, pipeline, r"is a full checkpoint \(SD 1.x; it holds .*\), not a LoRA. Pass it as the model")


def test_no_lora_at_all(pipeline, tmp_path):
    save_file({"emb_params": torch.zeros(4)}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", pipeline, "is no LoRA: .*such as 'emb_params'")


def test_a_missing_lora(pipeline, tmp_path):
    refused(tmp_path / "x.safetensors", pipeline, "no such file")


def test_writing_without_an_adapter(pipeline, tmp_path):
    with pytest.raises(UserError, match="no LoRA adapter to write"):
        save_kohya_lora(tmp_path / "x.safetensors", {"unet": pipeline.unet}, SD1)
    assert not list(tmp_path.iterdir())
