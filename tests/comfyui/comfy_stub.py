"""As much of ComfyUI's public interfaces as the nodes use, on a diffusers UNet: a stand-in for a checkout.

Written from what those interfaces do (comfy 0.8: model_patcher, lora, hooks, sd). Weights have the names that diffusers
has, after ``diffusion_model.``.
"""

import copy
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from safetensors.torch import load_file
from torch.func import functional_call

NODES = Path(__file__).parents[2] / "comfyui"


class ModelPatcher:
    def __init__(self, model):
        self.model, self.patches, self.object_patches = model, {}, {}
        self.model_options = {"transformer_options": {}}

    def clone(self):
        other = ModelPatcher(self.model)
        other.patches = {name: patches[:] for name, patches in self.patches.items()}
        other.object_patches = dict(self.object_patches)
        other.model_options = copy.deepcopy(self.model_options)
        return other

    def set_model_emb_patch(self, patch):
        patches = self.model_options["transformer_options"].setdefault("patches", {})
        patches["emb_patch"] = [*patches.get("emb_patch", []), patch]

    def add_object_patch(self, name, value):
        self.object_patches[name] = value

    def add_patches(self, patches, strength_patch=1.0):
        for name, patch in patches.items():
            self.patches.setdefault(name, []).append((strength_patch, patch))
        return list(patches)

    @torch.no_grad()
    def predict(self, sample, timestep, text, hooks=(), **told):
        """One forward; ``hooks`` are those of the conditioning, ``told`` what is told of the steps."""
        regional = [hook.transformers_dict for hook in hooks if hasattr(hook, "transformers_dict")]
        own = self.model_options["transformer_options"].get("patches", {}).get("emb_patch", [])
        of_hooks = [patch for one in regional for patch in one["patches"]["emb_patch"]]
        options = {**told, "patches": {"emb_patch": [*of_hooks, *own]}}
        weights = {name: tensor.clone() for name, tensor in self.model.diffusion_model.named_parameters()}
        for name, patches in self.patches.items():
            for strength, change in patches:
                weights[name.removeprefix("diffusion_model.")] += strength * change

        def patch_emb(_module, _inputs, emb):
            for patch in options["patches"]["emb_patch"]:
                emb = patch(emb, 8, options)
            return emb

        handle = self.model.diffusion_model.time_embedding.register_forward_hook(patch_emb)
        try:
            return functional_call(self.model.diffusion_model, weights, (sample, timestep, text)).sample
        finally:
            handle.remove()


def patcher_of(unet):
    return ModelPatcher(SimpleNamespace(diffusion_model=unet, model_config=None))


def _lora_keys(model, key_map):
    for name, _ in model.diffusion_model.named_parameters():
        if name.endswith(".weight"):
            layer = name.removesuffix(".weight")
            key_map[f"lora_unet_{layer.replace('.', '_')}"] = f"diffusion_model.{name}"
    return key_map


class CLIP:
    def __init__(self, text_encoder):
        self.cond_stage_model, self.patches = text_encoder, []

    def clone(self):
        other = CLIP(self.cond_stage_model)
        other.patches = self.patches[:]
        return other

    def add_patches(self, patches, strength_patch=1.0):
        self.patches.append((strength_patch, patches))

    @torch.no_grad()
    def read(self, ids):
        weights = {name: tensor.clone() for name, tensor in self.cond_stage_model.named_parameters()}
        for strength, patches in self.patches:
            for name, change in patches.items():
                weights[name] += strength * change
        return functional_call(self.cond_stage_model, weights, (ids,)).last_hidden_state


def _clip_keys(model, key_map):
    level = "" if hasattr(model, "text_model") else "text_model."
    for name, _ in model.named_parameters():
        if name.endswith(".weight"):
            layer = level + name.removesuffix(".weight")
            key_map[f"text_encoders.clip_l.transformer.{layer}"] = name
            if ".self_attn." in layer or ".mlp." in layer:
                key_map[f"lora_te_{layer.replace('.', '_')}"] = name
    return key_map


def _load_lora(lora, to_load, log_missing=True):
    found = {}
    for layer, name in to_load.items():
        if f"{layer}.lora_up.weight" in lora:
            up, down = lora[f"{layer}.lora_up.weight"].flatten(1), lora[f"{layer}.lora_down.weight"]
            scale = lora[f"{layer}.alpha"] / len(down)
            found[name] = (scale * up @ down.flatten(1)).reshape(len(up), *down.shape[1:])
        if f"{layer}.diff" in lora:
            found[name] = lora[f"{layer}.diff"]
        if f"{layer}.diff_b" in lora:
            found[f"{name.removesuffix('.weight')}.bias"] = lora[f"{layer}.diff_b"]
    return found


class Hook:
    def __init__(self, **values):
        vars(self).update(values)


class HookGroup:
    def __init__(self):
        self.hooks = []

    def add(self, hook):
        self.hooks.append(hook)

    def set_keyframes_on_hooks(self, keyframes):
        for hook in self.hooks:
            hook.hook_keyframe = keyframes


class HookKeyframeGroup:
    def __init__(self):
        self.keyframes = []

    def add(self, keyframe):
        self.keyframes.append(keyframe)


def _create_hook_lora(lora, strength_model, strength_clip):
    group = HookGroup()
    group.add(Hook(weights=lora, strength_model=strength_model, strength_clip=strength_clip))
    return group


def _set_conds_props(conds, strength, set_cond_area, mask=None, hooks=None):
    told = {"hooks": hooks} | ({} if mask is None else {"mask": mask, "mask_strength": strength})
    return [[[tensor, {**values, **told}] for tensor, values in cond] for cond in conds]


def modules(models_folder):
    """ComfyUI's modules by name; its models are under ``models_folder``."""
    comfy = {name: ModuleType(f"comfy.{name}") for name in ("hooks", "lora", "sd", "utils", "model_sampling")}
    comfy["hooks"].HookGroup = HookGroup
    comfy["hooks"].HookKeyframeGroup = HookKeyframeGroup
    comfy["hooks"].HookKeyframe = lambda strength, start_percent: (start_percent, strength)
    comfy["hooks"].EnumHookScope = SimpleNamespace(HookedOnly="hooked_only")
    comfy["hooks"].TransformerOptionsHook = lambda patches, hook_scope: Hook(
        transformers_dict=patches, hook_scope=hook_scope
    )
    comfy["hooks"].create_hook_lora = _create_hook_lora
    comfy["hooks"].set_conds_props = _set_conds_props
    comfy["lora"].model_lora_keys_unet, comfy["lora"].load_lora = _lora_keys, _load_lora
    comfy["lora"].model_lora_keys_clip = _clip_keys
    comfy["utils"].load_torch_file = load_file
    comfy["sd"].load_clip = lambda paths, embedding_directory: [load_file(path) for path in paths]
    comfy["sd"].VAE = lambda sd: sd
    comfy["sd"].load_diffusion_model_state_dict = lambda sd: patcher_of(sd)
    kinds = {
        "EPS": type("EPS", (), {}),
        "V_PREDICTION": type("V_PREDICTION", (), {}),
        "ModelSamplingDiscrete": type(
            "ModelSamplingDiscrete", (), {"__init__": lambda self, config, zsnr: setattr(self, "zsnr", zsnr)}
        ),
    }
    vars(comfy["model_sampling"]).update(kinds)
    paths = ModuleType("folder_paths")
    paths.get_folder_paths = lambda name: [str(models_folder / name)]
    root = ModuleType("comfy")
    vars(root).update(comfy)
    return {"comfy": root, "folder_paths": paths, **{f"comfy.{name}": module for name, module in comfy.items()}}


def load_nodes():
    """The folder of nodes as ComfyUI imports it: by its path, under a name made of that."""
    name = "custom_nodes_dmm"
    spec = importlib.util.spec_from_file_location(name, NODES / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
