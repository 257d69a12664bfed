"""Runs the nodes in a checkout of ComfyUI: ``python in_comfyui.py CHECKOUT [full-size]``,
with ``tests/`` on Python's path.

Prints, as JSON, the largest differences between what it paints there and what it should be. A tiny model of ComfyUI's
own classes by default; ``full-size`` opens one of SD 1.5's size, random weights, by ComfyUI's own loader.
"""

import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from adapter_helpers import some_adapter
from conftest import STYLE_NAMES, tiny_pipeline, tiny_unet
from safetensors.torch import load_file

from dmm.models.styles import StylePrompts
from dmm.pipeline.styled import add_styles, save_pipeline, set_style

MIX = {"ink": 0.7, "photo": 0.3}
SIZES = {
    "tiny": {"widths": (32, 64), "norm_num_groups": 32},
    "full-size": {
        "widths": (320, 640, 1280, 1280),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "layers_per_block": 2,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "norm_num_groups": 32,
    },
}


def import_comfy(checkout):
    """ComfyUI's modules on a CPU; what it takes of these packages is of other models and samplers."""
    sys.path.insert(0, checkout)
    for name in ("torchvision", "torchvision.transforms", "torchsde"):
        try:
            __import__(name)
        except ImportError:
            sys.modules[name] = ModuleType(name)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.sd


def merged_pipeline(size, adapted):
    pipe = tiny_pipeline()
    torch.manual_seed(0)
    pipe.unet = tiny_unet(**SIZES[size])
    prompts = StylePrompts(STYLE_NAMES, dim=0 if adapted else 4 * SIZES[size]["widths"][0])
    if adapted:
        prompts.adapters = {name: some_adapter(pipe.unet, i, rank=2 + i) for i, name in enumerate(STYLE_NAMES)}
    else:
        torch.nn.init.normal_(prompts.linear_2.weight, std=0.2)
    add_styles(pipe, prompts)
    return pipe


def patcher_of(folder, size):
    """ComfyUI's model with the folder's weights."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.sd
    import comfy.supported_models
    import comfy.utils

    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    if size == "full-size":
        return comfy.sd.load_diffusion_model_state_dict(weights)
    config = comfy.supported_models.SD15(
        {
            "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 2],
            "num_res_blocks": [1, 1], "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1],
            "transformer_depth_middle": 1, "context_dim": 16, "use_spatial_transformer": True, "legacy": False,
            "use_linear_in_transformer": False, "adm_in_channels": None, "dtype": torch.float32,
        }
    )  # fmt: skip
    config.unet_config |= {"num_heads": 2, "num_head_channels": -1}
    model = comfy.model_base.BaseModel(config, device="cpu")
    names = comfy.utils.unet_to_diffusers(config.unet_config)
    model.diffusion_model.load_state_dict({names[name]: tensor for name, tensor in weights.items()})
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def arguments(size):
    torch.manual_seed(3)
    return (
        torch.randn(2, 4, 8, 8),
        torch.tensor([700.0, 40.0]),
        torch.randn(2, 5, SIZES[size].get("cross_attention_dim", 16)),
    )


@torch.no_grad()
def forward(patcher, size):
    """One forward, as ComfyUI has its weights and patches while it samples."""
    patcher.patch_model()
    try:
        sample, timesteps, text = arguments(size)
        options = {**patcher.model_options["transformer_options"]}
        return patcher.model.diffusion_model(sample, timesteps, context=text, transformer_options=options)
    finally:
        patcher.unpatch_model()


@torch.no_grad()
def sampled(patcher, positive, negative, sampler="euler"):
    import comfy.sample

    torch.manual_seed(5)
    noise = torch.randn(1, 4, 8, 8)
    latent = torch.zeros_like(noise)
    return comfy.sample.sample(
        patcher, noise, 6, 3.0, sampler, "normal", positive, negative, latent, seed=1, disable_pbar=True
    )


def largest(one, other):
    return float((one - other).abs().max() / other.abs().max())


def main(checkout, size="tiny"):
    import_comfy(checkout)
    import comfy_stub

    with tempfile.TemporaryDirectory() as scratch:
        sys.modules["folder_paths"] = comfy_stub.modules(Path(scratch))["folder_paths"]
        nodes = {name: node() for name, node in comfy_stub.load_nodes().NODE_CLASS_MAPPINGS.items()}
        found = {}
        for kind in ("prompts", "adapters"):
            folder = Path(scratch) / "diffusers" / kind
            pipe = merged_pipeline(size, kind == "adapters")
            with torch.no_grad():
                set_style(pipe, MIX)
                sample, timesteps, text = arguments(size)
                expected = pipe.unet(sample, timesteps, text).sample
                set_style(pipe, None)
                plain_expected = pipe.unet(sample, timesteps, text).sample
            save_pipeline(pipe, folder)
            del pipe
            found |= of_one(nodes, kind, folder, size, expected, plain_expected)
            if size == "full-size":
                break
    print(json.dumps(found))


def of_one(nodes, kind, folder, size, expected, plain_expected):
    read_styles = sys.modules["custom_nodes_dmm.side_car"].read_styles
    styles, plain = read_styles(folder), patcher_of(folder, size)

    def mixed(weights):
        filled = [*weights.items(), *[("(none)", 1.0)] * (4 - len(weights))]
        widgets = {f"style_{i}": name for i, (name, _) in enumerate(filled, 1)}
        return nodes["DMMStyleMix"].mix(styles, **widgets, **{f"weight_{i}": w for i, (_, w) in enumerate(filled, 1)})[
            0
        ]

    mix, clay = mixed(MIX), mixed({"clay": 1.0})
    (styled,) = nodes["DMMApplyStyle"].apply(plain, mix)
    assert largest(expected, plain_expected) > 0.01
    found = {
        f"{kind}: a mix, one forward": float((forward(styled, size) - expected).abs().max()),
        f"{kind}: the model that went in": float((forward(plain, size) - plain_expected).abs().max()),
    }
    if size == "full-size":
        return found
    text = torch.randn(1, 5, 16)
    given = [[[text, {}]], [[torch.zeros_like(text), {}]]]
    whole = sampled(styled, *given)
    region = nodes["DMMStyleByRegion"].apply(*given, mix, 1.0)
    found[f"{kind}: a region of all the picture"] = largest(sampled(plain, *region), whole)
    assert largest(whole, sampled(plain, *given)) > 0.01

    mask = torch.zeros(1, 64, 64)
    mask[..., :32] = 1
    halves = [nodes["DMMStyleByRegion"].apply(*given, mix, 1.0, side) for side in (mask, 1 - mask)]
    together = [[*left, *right] for left, right in zip(*halves, strict=True)]
    found[f"{kind}: two regions in one style"] = largest(sampled(plain, *together), whole)
    other = nodes["DMMStyleByRegion"].apply(*given, clay, 1.0, 1 - mask)
    split = sampled(plain, *[[*left, *right] for left, right in zip(halves[0], other, strict=True)])
    assert largest(split, whole) > 0.01

    (schedule,) = nodes["DMMStyleSchedule"].schedule(mix, clay, 0.5)
    over_time = sampled(plain, *nodes["DMMStyleByRegion"].apply(*given, schedule, 1.0))
    assert largest(over_time, whole) > 1e-4
    if kind == "prompts":
        (scheduled,) = nodes["DMMApplyStyle"].apply(plain, schedule)
        found[f"{kind}: a schedule, of the model and of a conditioning"] = largest(
            sampled(scheduled, *given), over_time
        )
        (styled_too,) = nodes["DMMApplyStyle"].apply(plain, clay)
        over_model = sampled(styled_too, *nodes["DMMStyleByRegion"].apply(*given, mix, 1.0))
        found[f"{kind}: a region over the model's own style"] = largest(over_model, whole)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
