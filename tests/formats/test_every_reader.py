"""What opens equals what diffusers opens, by every way in; what does not is one sentence, in every command.

All commands open weight files through ``read_header``, which a test at the end shows of each.
"""

import re
import shutil

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from helpers import same_weights
from safetensors.torch import load_file, save_file
from tiny_families import later_on_disk  # noqa: F401 - a fixture

from dmm.cli import main
from dmm.errors import UserError
from dmm.formats.tensors import read_header
from dmm.models.teachers import ModelSource, open_pipeline
from dmm.soup.models import open_model

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
LAYER = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
WEIGHT, BIAS = f"{LAYER}.weight", "model.diffusion_model.out.2.bias"


def in_dtype(tensors, dtype):
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def stock(path, config):
    return StableDiffusionPipeline.from_single_file(
        str(path), config=str(config), local_files_only=True, safety_checker=None
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["model.safetensors", "MODEL.SAFETENSORS", "model.ckpt"])
def test_a_single_file_opens_as_diffusers_opens_it(sd1_file, sd1_folder, tmp_path, name, dtype):
    tensors = in_dtype(load_file(sd1_file), dtype)
    path = tmp_path / name
    torch.save({"state_dict": tensors}, path) if path.suffix == ".ckpt" else save_file(tensors, path)
    save_file(tensors, tmp_path / "plain.safetensors")
    opened = open_pipeline(ModelSource(path, config=sd1_folder, allow_pickle=True))
    assert same_weights(opened, stock(tmp_path / "plain.safetensors", sd1_folder))
    if path.suffix == ".ckpt":
        return
    model = open_model(path, "model")
    for key, source in model.tensors.items():
        assert torch.equal(source.read(0, source.num_elements, torch.float32), tensors[key].float().flatten())
    for file in model.files.values():
        file.close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_so_it_does_of_every_family(later_on_disk, tmp_path, name, dtype):  # noqa: F811
    family, folder, whole = later_on_disk
    tensors = in_dtype(load_file(whole), dtype)
    path = tmp_path / name
    torch.save({"state_dict": tensors}, path) if path.suffix == ".ckpt" else save_file(tensors, path)
    save_file(tensors, tmp_path / "plain.safetensors")
    opened = open_pipeline(ModelSource(path, config=folder, allow_pickle=True))
    expected = family.pipeline_class.from_single_file(
        str(tmp_path / "plain.safetensors"), config=str(folder), local_files_only=True
    )
    assert same_weights(opened, expected)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize(
    "settings",
    [{}, {"variant": "fp16"}, {"max_shard_size": "20KB"}, {"safe_serialization": False}],
    ids=["plain", "a variant", "in shards", "pickled"],
)
def test_a_folder_opens_as_diffusers_opens_it(pipeline, tmp_path, settings, dtype):
    folder = tmp_path / "model"
    pipeline.to(dtype).save_pretrained(folder, **settings)
    opened = open_pipeline(ModelSource(folder, allow_pickle=True))
    # widened to float32, the weights are those that were kept
    expected = StableDiffusionPipeline.from_pretrained(
        folder, dtype=torch.float32, variant=settings.get("variant"), local_files_only=True, safety_checker=None
    )
    assert same_weights(opened, expected)


def beside(ending, shape=(8,), dtype=torch.uint8):
    return lambda tensors: {**tensors, LAYER + ending: torch.ones(shape).to(dtype)}


def with_weight(dtype, name=WEIGHT):
    return lambda tensors: {**tensors, name: tensors[name].to(dtype)}


def scaled_by(name, shape):
    def change(tensors):
        tensors[WEIGHT] = tensors[WEIGHT].to(torch.float8_e4m3fn)
        return {**tensors, name: torch.ones(shape)}

    return change


REFUSED = {
    "NF4 of bitsandbytes": beside(".weight.quant_state.bitsandbytes__nf4"),
    "FP4 of bitsandbytes": beside(".weight.quant_state.bitsandbytes__fp4"),
    "a map of bitsandbytes": beside(".weight.quant_map", dtype=torch.float32),
    "maxima of bitsandbytes": beside(".weight.absmax", dtype=torch.float32),
    "maxima of the layer": beside(".absmax", dtype=torch.float32),
    "LLM.int8": beside(".SCB", dtype=torch.float32),
    "GPTQ": beside(".qweight", (2, 4), torch.int32),
    "GPTQ's groups": beside(".g_idx", dtype=torch.int32),
    "AWQ": beside(".qzeros", (2, 4), torch.int32),
    "SVDQuant": beside(".wscales", dtype=torch.bfloat16),
    "compressed-tensors": beside(".weight_packed", (2, 4), torch.int32),
    "its zero points": beside(".weight_zero_point", dtype=torch.int8),
    "zero points": beside(".zero_point", dtype=torch.int32),
    "NVFP4": beside(".weight_scale_2", (), torch.float32),
    "blocks of fp8": scaled_by(f"{LAYER}.weight_scale_inv", (1, 1)),
    "quanto": beside(".weight._data", dtype=torch.int8),
    "torchao": beside(".weight_qdata", dtype=torch.int8),
    "HQQ": beside(".W_q"),
    "AQLM": beside(".codebooks", (1, 2, 2), torch.float16),
    "int8": with_weight(torch.int8),
    "uint8": with_weight(torch.uint8),
    "int16": with_weight(torch.int16),
    "int32": with_weight(torch.int32),
    "int64": with_weight(torch.int64),
    "uint16": with_weight(torch.uint16),
    "truth values": with_weight(torch.bool),
    "complex numbers": with_weight(torch.complex64),
    "a bias of int8": with_weight(torch.int8, BIAS),
    "a scale under another name": scaled_by(f"{LAYER}.weight.scale", (1,)),
    "a scaling factor": scaled_by(f"{LAYER}.weights_scaling_factor", (1,)),
    "scales of blocks": scaled_by(f"{LAYER}.weight_scale", (2, 2, 2)),
    "scales of inputs": scaled_by(f"{LAYER}.weight_scale", (1, 8)),
    "a scale of what is not in fp8": beside(".scale_weight", (1,), torch.float32),
    "a scale of nothing": lambda tensors: {**tensors, "model.diffusion_model.nothing.scale_weight": torch.ones(1)},
}


def refused(folder, change, sd1_file):
    path = folder / "refused.safetensors"
    save_file(change(load_file(sd1_file)), path)
    return path


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_packed_in_another_way_is_one_sentence(sd1_file, tmp_path, kind):
    with pytest.raises(UserError) as caught:
        read_header(refused(tmp_path, REFUSED[kind], sd1_file))
    told = str(caught.value)
    assert re.fullmatch(r"\S*refused\.safetensors[^\n]*get the model in fp16[^\n]*\.", told)
    assert "missing:" not in told


def commands(model, merged, config, folder):
    """A command line each, by which the four commands open a model; the merged one has that model's UNet."""
    teachers = [{"name": name, "model": str(model)} for name in "ab"]
    (folder / "prompts.txt").write_text("a cat\n")
    (folder / "soup.yaml").write_text(yaml.safe_dump({"method": "soup", "teachers": teachers, "missing": "present"}))
    data = {"synthesize": {"prompts": str(folder / "prompts.txt"), "count": 2}}
    recipe = {"base": str(config), "teachers": teachers, "data": data, "size": 16}
    (folder / "merge.yaml").write_text(yaml.safe_dump(recipe))
    return {
        "generate": ["generate", str(model), "a cat", "--config", str(config), "--output", str(folder / "out.png")],
        "merge": ["merge", str(folder / "merge.yaml"), "--output", str(folder / "out")],
        "soup": ["soup", str(folder / "soup.yaml"), "--output", str(folder / "out.safetensors")],
        "export": ["export", str(merged), "--style", "ink", "--output", str(folder / "out.safetensors")],
    }


@pytest.mark.parametrize("kind", REFUSED)
def test_every_command_refuses_it_in_that_sentence(sd1_file, sd1_folder, merged, tmp_path, capsys, kind):
    folder = shutil.copytree(merged, tmp_path / "merged")
    (unet,) = (folder / "unet").glob("*.safetensors")
    tensors = load_file(unet)
    weight = next(name for name in tensors if name.endswith("attn1.to_q.weight"))
    names = {LAYER: weight.removesuffix(".weight"), BIAS: "conv_out.bias"}
    changed = REFUSED[kind]({WEIGHT: tensors.pop(weight), BIAS: tensors.pop("conv_out.bias")})
    for original, ours in names.items():
        changed = {name.replace(original, ours): tensor for name, tensor in changed.items()}
    save_file({**tensors, **changed}, unet)
    path = refused(tmp_path, REFUSED[kind], sd1_file)
    for command, argv in commands(path, folder, sd1_folder, tmp_path).items():
        assert main(argv) == 2, command
        (told,) = capsys.readouterr().err.splitlines()
        assert "get the model in fp16" in told, command
    assert not list(tmp_path.glob("out*"))


def test_every_command_asks_the_one_check(sd1_file, sd1_folder, merged, tmp_path, capsys, monkeypatch):
    def refuse(path, tensors):
        raise UserError("The one check refuses it.")

    monkeypatch.setattr("dmm.formats.tensors.check_not_packed", refuse)
    for command, argv in commands(sd1_file, merged, sd1_folder, tmp_path).items():
        assert main(argv) == 2, command
        assert "The one check refuses it." in capsys.readouterr().err


def test_every_command_asks_the_one_reader_of_loras(sd1_file, sd1_folder, tmp_path, capsys, monkeypatch):
    def refuse(*_):
        raise UserError("The one reader refuses it.")

    monkeypatch.setattr("dmm.formats.lora.reading.split_names", refuse)
    lora = tmp_path / "lora.safetensors"
    save_file({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(1, 8)}, lora)
    argvs = commands(sd1_file, tmp_path, sd1_folder, tmp_path)
    del argvs["export"]  # which puts no LoRA on what it writes
    for name in ("merge", "soup"):
        path = tmp_path / f"{name}.yaml"
        recipe = yaml.safe_load(path.read_text())
        teachers = [{"name": name, "lora": str(lora)} for name in "ab"]
        path.write_text(yaml.safe_dump({**recipe, "base": str(sd1_folder), "teachers": teachers}))
    argvs["generate"] += ["--lora", str(lora)]
    recipe = {"kind": "lora", "method": "soup", "teachers": teachers}
    (tmp_path / "loras.yaml").write_text(yaml.safe_dump(recipe))
    argvs["soup of LoRAs"] = ["soup", str(tmp_path / "loras.yaml"), "--output", str(tmp_path / "out.safetensors")]
    for command, argv in argvs.items():
        assert main(argv) == 2, command
        assert "The one reader refuses it." in capsys.readouterr().err
