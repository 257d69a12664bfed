"""Quantised files: scaled fp8 is unpacked exactly by every reader, everything packed is refused by name."""

import json
import shutil

import pytest
import torch
import yaml
from helpers import rewrite, same_weights
from safetensors.torch import load_file, save_file

from dmm.cli import main
from dmm.errors import UserError
from dmm.formats.tensors import read_header, read_tensors
from dmm.models.teachers import ModelSource, open_pipeline
from dmm.soup.reading import WeightFile

LAYER = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
WEIGHT = f"{LAYER}.weight"


def scaled(source, target, *, name=".scale_weight", dtype=torch.float8_e4m3fn, limit=200.0, by_output=False):
    """The model with its UNet's matrices as fp8 times a scale; returns the weights that it then has."""
    truth = {}

    def change(tensors):
        for key, tensor in list(tensors.items()):
            if tensor.ndim != 2 or not key.startswith("model.diffusion_model."):
                truth[key] = tensor
                continue
            size = tensor.float().abs()
            scale = (size.amax(1) if by_output else size.amax()[None]).clamp(min=1e-6) / limit
            tensors[key] = (tensor.float() / scale[:, None]).to(dtype)
            tensors[key.removesuffix(".weight") + name] = scale
            tensors[key.removesuffix(".weight") + ".scale_input"] = torch.ones(1)
            truth[key] = tensors[key].float() * scale[:, None]
        tensors["scaled_fp8"] = torch.empty(2, dtype=dtype)

    rewrite(source, target, change)
    return truth


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("by_output", [False, True])
@pytest.mark.parametrize("name", [".scale_weight", ".weight_scale"])
def test_every_reader_unpacks_scaled_fp8_exactly(sd1_file, sd1_folder, tmp_path, dtype, by_output, name):
    path = tmp_path / "scaled.safetensors"
    truth = scaled(sd1_file, path, name=name, dtype=dtype, by_output=by_output)
    plain = tmp_path / "plain.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in truth.items()}, plain, {"format": "pt"})

    header = read_header(path)
    assert header.tensors.keys() == truth.keys()
    assert header.tensors[WEIGHT].dtype == torch.float32
    assert all(torch.equal(tensor, truth[key]) for key, tensor in read_tensors(path).items())

    file = WeightFile(path)
    columns = truth[WEIGHT].shape[1]
    start, stop = columns + 3, 3 * columns - 2
    assert torch.equal(file.read(WEIGHT, start, stop, torch.float32), truth[WEIGHT].flatten()[start:stop])
    file.close()

    assert same_weights(*(open_pipeline(ModelSource(one, config=sd1_folder)) for one in (path, plain)))


def test_a_soup_of_one_model_scaled_twice_and_plain_is_that_model(sd1_file, tmp_path, capsys):
    truth = load_file(sd1_file)
    for name, limit in (("a", 448.0), ("b", 112.0)):
        scaled(sd1_file, tmp_path / f"{name}.safetensors", limit=limit)
    teachers = [{"name": name, "model": f"{name}.safetensors"} for name in "ab"]
    teachers.append({"name": "plain", "model": str(sd1_file)})
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"method": "soup", "teachers": teachers}))
    assert main(["soup", str(tmp_path / "r.yaml"), "--output", str(tmp_path / "soup.safetensors")]) == 0
    soup = load_file(tmp_path / "soup.safetensors")
    assert truth.keys() <= soup.keys()
    assert not any(key.endswith((".scale_weight", ".scale_input")) for key in soup)
    for key, tensor in truth.items():
        assert (soup[key].float() - tensor.float()).norm() <= 0.03 * tensor.float().norm() + 1e-6


PACKED = {
    "bitsandbytes NF4": ".quant_state.bitsandbytes__nf4",
    "bitsandbytes FP4": ".quant_state.bitsandbytes__fp4",
    "bitsandbytes blocks": ".absmax",
    "LLM.int8": ".SCB",
    "GPTQ": ".qweight",
    "AWQ": ".qzeros",
    "SVDQuant": ".wscales",
    "compressed-tensors": ".weight_packed",
    "quanto": "._data",
    "torchao": ".weight_qdata",
}


@pytest.mark.parametrize("suffix", PACKED.values(), ids=PACKED)
def test_packed_weights_are_refused_by_name(sd1_file, tmp_path, suffix):
    def pack(tensors):
        tensors[LAYER + suffix] = torch.zeros(8, dtype=torch.uint8)

    with pytest.raises(UserError, match=r"is quantised: it keeps weights as .* shows"):
        read_header(rewrite(sd1_file, tmp_path / "packed.safetensors", pack))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_integers_are_no_weights(sd1_file, tmp_path, dtype):
    def change(tensors):
        tensors[WEIGHT] = tensors[WEIGHT].to(dtype)

    path = rewrite(sd1_file, tmp_path / "integers.safetensors", change)
    with pytest.raises(UserError, match=f"integers .{str(dtype).removeprefix('torch.')}"):
        read_header(path)


def test_a_gguf_file_is_named(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match="it is a GGUF file"):
        read_header(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"a.scale_weight": torch.ones(1)}, "'a.weight' is missing"),
        ({f"{LAYER}.scale_weight": torch.ones(1)}, "is float32"),
        (
            {WEIGHT: torch.zeros(8, 8, dtype=torch.float8_e4m3fn), f"{LAYER}.weight_scale": torch.ones(8, 2)},
            "expected one number, or one for each of the 8",
        ),
    ],
)
def test_scales_that_fit_no_weight_are_refused(sd1_file, tmp_path, more, told):
    with pytest.raises(UserError, match=told):
        read_header(rewrite(sd1_file, tmp_path / "odd.safetensors", lambda tensors: tensors.update(more)))


def test_all_commands_refuse_what_is_packed_and_write_nothing(sd1_file, sd1_folder, tmp_path, capsys):
    packed = {f"{LAYER}.qweight": torch.zeros(8, dtype=torch.int32)}
    path = rewrite(sd1_file, tmp_path / "packed.safetensors", lambda tensors: tensors.update(packed))
    teachers = [{"name": "a", "model": str(sd1_file)}, {"name": "b", "model": str(path)}]
    (tmp_path / "prompts.txt").write_text("a cat\n")
    (tmp_path / "soup.yaml").write_text(yaml.safe_dump({"method": "soup", "teachers": teachers, "missing": "present"}))
    data = {"synthesize": {"prompts": "prompts.txt", "count": 2}}
    recipe = {"base": str(sd1_folder), "teachers": teachers, "data": data, "size": 16}
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(recipe))
    for argv in (
        ["generate", str(path), "a cat", "--config", str(sd1_folder), "--output", str(tmp_path / "out.png")],
        ["merge", str(tmp_path / "merge.yaml"), "--output", str(tmp_path / "out")],
        ["soup", str(tmp_path / "soup.yaml"), "--output", str(tmp_path / "out.safetensors")],
    ):
        assert main(argv) == 2
        assert "is quantised: it keeps weights as packed integers" in capsys.readouterr().err
    assert not [one for one in tmp_path.iterdir() if one.name.startswith("out")]


@pytest.mark.parametrize(
    ("file", "layer"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "attn1.to_q.weight"),
        ("text_encoder/model.safetensors", "q_proj.weight"),
        ("vae/diffusion_pytorch_model.safetensors", "to_q.weight"),
    ],
)
def test_scaled_fp8_in_a_folder_is_unpacked_exactly(sd1_folder, tmp_path, file, layer):
    folder, plain = tmp_path / "folder", tmp_path / "plain"
    shutil.copytree(sd1_folder, folder)
    shutil.copytree(sd1_folder, plain)

    def change(tensors):
        for name in [key for key in tensors if key.endswith(layer)]:
            scale = tensors[name].abs().max() / 100
            tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
            tensors[name.replace(".weight", ".scale_weight")] = scale.reshape(1)

    def unpack(tensors):
        change(tensors)
        for name in [key for key in tensors if key.endswith(layer)]:
            tensors[name] = tensors[name].float() * tensors.pop(name.replace(".weight", ".scale_weight"))

    rewrite(folder / file, folder / file, change)
    rewrite(plain / file, plain / file, unpack)
    opened, expected = (open_pipeline(ModelSource(one)) for one in (folder, plain))
    assert same_weights(opened, expected)
    assert not same_weights(opened, open_pipeline(ModelSource(sd1_folder)))
    if file.startswith("vae"):
        lent = open_pipeline(ModelSource(sd1_folder, vae=folder))
        assert all(torch.equal(tensor, lent.vae.state_dict()[name]) for name, tensor in opened.vae.state_dict().items())


def test_a_dtype_without_a_name_here_is_named(sd1_file, tmp_path):
    raw = sd1_file.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"F6X"', 1)
    (tmp_path / "odd.safetensors").write_bytes(raw)
    with pytest.raises(UserError, match="is kept as F6X, a dtype that is not read here"):
        read_header(tmp_path / "odd.safetensors")


def test_null_metadata_is_none(sd1_file, tmp_path):
    raw = sd1_file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    declared = {**json.loads(raw[8 : 8 + length]), "__metadata__": None}
    changed = json.dumps(declared, separators=(",", ":")).ljust(length).encode()
    (tmp_path / "null.safetensors").write_bytes(raw[:8] + changed + raw[8 + length :])
    assert read_header(tmp_path / "null.safetensors").metadata == {}
