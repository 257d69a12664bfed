"""Soups of single files of a transformer alone: prefixes, dtypes, LoRAs by either naming, and what is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from soup_models import digests, own_cache  # noqa: F401 - fixtures

from dmm.errors import UserError
from dmm.soup.make import make_soup
from dmm.soup.recipe import SoupRecipe

D, HEAD = 32, 16
METHODS = ["soup", "weighted_sum", "task_arithmetic", "slerp", "model_stock", "ties", "dare", "dare_ties"]
COMFY = "model.diffusion_model."


def flux(seed=0, *, guidance=True, width=D):
    """The names and shapes of a FLUX.1 of one double and one single block."""
    torch.manual_seed(seed)
    shapes = {"img_in": (width, 16), "txt_in": (width, 8), "final_layer.linear": (16, width)}
    for name, inputs in {"time_in": 256, "vector_in": 8, **({"guidance_in": 256} if guidance else {})}.items():
        shapes |= {f"{name}.in_layer": (width, inputs), f"{name}.out_layer": (width, width)}
    for stream in ("img", "txt"):
        block = f"double_blocks.0.{stream}"
        shapes |= {f"{block}_mod.lin": (6 * width, width), f"{block}_attn.qkv": (3 * width, width)}
        shapes |= {f"{block}_attn.proj": (width, width), f"{block}_mlp.0": (4 * width, width)}
        shapes |= {f"{block}_mlp.2": (width, 4 * width)}
    shapes |= {"single_blocks.0.linear1": (7 * width, width), "single_blocks.0.linear2": (width, 5 * width)}
    shapes |= {"single_blocks.0.modulation.lin": (3 * width, width)}
    shapes |= {"final_layer.adaLN_modulation.1": (2 * width, width)}
    tensors = {f"{name}.weight": torch.randn(shape) * 0.1 for name, shape in shapes.items()}
    tensors |= {f"{name}.bias": torch.randn(shape[0]) * 0.1 for name, shape in shapes.items()}
    norms = ("double_blocks.0.img_attn.", "double_blocks.0.txt_attn.", "single_blocks.0.")
    return tensors | {f"{name}norm.{one}_norm.scale": torch.ones(HEAD) for name in norms for one in ("query", "key")}


def save(tensors, path, dtype=torch.bfloat16, prefix=""):
    save_file({prefix + name: tensor.to(dtype) for name, tensor in tensors.items()}, path)
    return path


def lora(path, name, rows, columns=D, *, down="lora_A", up="lora_B", more=None, seed=9):
    """A LoRA of rank 2 on one layer; returns its file and the change of the weight."""
    torch.manual_seed(seed)
    a, b = torch.randn(2, columns), torch.randn(rows, 2)
    save_file({f"{name}.{down}.weight": a, f"{name}.{up}.weight": b, **(more or {})}, path)
    return path, b @ a


def soup(tmp_path, digests, teachers, method="soup", output="soup.safetensors", **more):  # noqa: F811
    given = [{"name": name, **teacher} for name, teacher in teachers.items()]
    recipe = SoupRecipe(method=method, teachers=given, **more)
    made = make_soup(recipe, tmp_path / output, digests=digests)
    return load_file(made.path), made


@pytest.mark.parametrize("method", METHODS)
def test_prefixes_and_dtypes_mix(tmp_path, digests, method):  # noqa: F811
    plain = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in flux(1).items()}
    save(plain, tmp_path / "a8.safetensors", torch.float8_e4m3fn)
    save(plain, tmp_path / "a16.safetensors", torch.float16, COMFY)  # every fp8 number is one in fp16, too
    save(flux(2), tmp_path / "b.safetensors", prefix=COMFY)
    save(flux(0), tmp_path / "base.safetensors")
    needs_base = method not in ("soup", "weighted_sum", "slerp")
    base = {"base": str(tmp_path / "base.safetensors")} if needs_base else {}

    def of(kind, output):
        teachers = {name: {"model": str(tmp_path / f"{one}.safetensors")} for name, one in (("a", kind), ("b", "b"))}
        return soup(tmp_path, digests, teachers, method, output, precision="fp32", **base)[0]

    eight, sixteen = of("a8", "8.safetensors"), of("a16", "16.safetensors")
    assert set(eight) == set(flux())  # the first that is read has no prefix
    prefix = "" if needs_base else COMFY
    assert {prefix + name for name in eight} == set(sixteen)
    assert all(tensor.equal(sixteen[prefix + name]) for name, tensor in eight.items())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float16])
def test_a_soup_of_one_is_that_file(tmp_path, digests, dtype):  # noqa: F811
    path = save(flux(), tmp_path / "a.safetensors", dtype, COMFY)
    found, _ = soup(tmp_path, digests, {"a": {"model": str(path)}})
    expected = load_file(path)
    assert found.keys() == expected.keys()
    assert all(found[name].view(torch.uint8).equal(tensor.view(torch.uint8)) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("name", "file", "rows"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv", "double_blocks.0.img_attn.qkv", range(3 * D)),
        ("diffusion_model.single_blocks.0.linear1", "single_blocks.0.linear1", range(7 * D)),
        ("transformer.transformer_blocks.0.attn.to_k", "double_blocks.0.img_attn.qkv", range(D, 2 * D)),
        ("transformer.transformer_blocks.0.attn.add_v_proj", "double_blocks.0.txt_attn.qkv", range(2 * D, 3 * D)),
        ("lora_transformer_single_transformer_blocks_0_proj_mlp", "single_blocks.0.linear1", range(3 * D, 7 * D)),
        ("base_model.model.transformer_blocks.0.ff.net.0.proj", "double_blocks.0.img_mlp.0", range(4 * D)),
        # diffusers keeps the scale before the shift, the file the shift before the scale
        ("transformer.norm_out.linear", "final_layer.adaLN_modulation.1", [*range(D, 2 * D), *range(D)]),
    ],
)
def test_a_lora_finds_its_rows_by_either_naming(tmp_path, digests, name, file, rows):  # noqa: F811
    path = save(flux(), tmp_path / "a.safetensors", torch.float32, COMFY)
    put, change = lora(tmp_path / "lora.safetensors", name, len(rows))
    found, _ = soup(tmp_path, digests, {"x": {"model": str(path), "lora": str(put), "lora_scale": 0.5}})
    expected = load_file(path)
    expected[f"{COMFY}{file}.weight"][list(rows)] += 0.5 * change
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-6)


def test_slices_and_a_dora_take_the_right_rows(tmp_path, digests, monkeypatch):  # noqa: F811
    monkeypatch.setattr("dmm.soup.slices.SLICE", 1024)
    monkeypatch.setattr("dmm.soup.slices.PIECE", 4096)
    path = save(flux(), tmp_path / "a.safetensors", torch.float32)
    weight = load_file(path)["double_blocks.0.img_attn.qkv.weight"]
    name = "transformer.transformer_blocks.0.attn.to_v"
    plain, change = lora(tmp_path / "plain.safetensors", name, D)
    found, _ = soup(tmp_path, digests, {"x": {"model": str(path), "lora": str(plain)}}, output="p.safetensors")
    expected = weight.clone()
    expected[2 * D :] += change
    torch.testing.assert_close(found["double_blocks.0.img_attn.qkv.weight"], expected, rtol=0, atol=1e-6)
    more = {f"{name}.lora_magnitude_vector": torch.full((D,), 2.0)}
    dora, change = lora(tmp_path / "dora.safetensors", name, D, more=more)
    found, _ = soup(tmp_path, digests, {"x": {"model": str(path), "lora": str(dora)}}, output="d.safetensors")
    new = weight[2 * D :] + change
    expected[2 * D :] = 2 * new / new.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found["double_blocks.0.img_attn.qkv.weight"], expected, rtol=0, atol=1e-6)


def test_what_a_lora_has_for_text_encoders_is_told(tmp_path, digests):  # noqa: F811
    path = save(flux(), tmp_path / "a.safetensors")
    text = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    more = {f"{text}.lora_down.weight": torch.ones(2, 4), f"{text}.lora_up.weight": torch.ones(4, 2)}
    put, _ = lora(tmp_path / "lora.safetensors", "lora_unet_img_in", D, 16, down="lora_down", up="lora_up", more=more)
    _, made = soup(tmp_path, digests, {"x": {"model": str(path), "lora": str(put)}})
    assert any("1 of its layers are text encoders'" in note for note in made.notes)


def test_a_lora_of_another_family_is_refused_with_how_much_of_it_fits(tmp_path, digests):  # noqa: F811
    path = save(flux(), tmp_path / "a.safetensors")
    wide = {"double_blocks.0.img_attn.proj.lora_A.weight": torch.ones(2, D)}
    wide |= {"double_blocks.0.img_attn.proj.lora_B.weight": torch.ones(D, 2)}
    put, _ = lora(tmp_path / "lora.safetensors", "double_blocks.0.img_attn.qkv", 3 * D, 2 * D, more=wide)
    with pytest.raises(
        UserError, match=r"lora\.safetensors: 1 of its 2 layers fit \S*a\.safetensors, a transformer of"
    ):
        soup(tmp_path, digests, {"x": {"model": str(path), "lora": str(put)}})
    sd, _ = lora(tmp_path / "sd.safetensors", "lora_unet_down_blocks_0_attentions_0_proj_in", D)
    with pytest.raises(UserError, match=r"0 of its 1 layers fit .* It says that it is of SD 1\.x or SD 2\.x"):
        soup(tmp_path, digests, {"x": {"model": str(path), "lora": str(sd)}})
    assert not (tmp_path / "soup.safetensors").exists()


def test_models_that_read_guidance_are_not_mixed_with_those_that_do_not(tmp_path, digests):  # noqa: F811
    dev, schnell = save(flux(), tmp_path / "dev.safetensors"), save(flux(guidance=False), tmp_path / "s.safetensors")
    teachers = {"dev": {"model": str(dev)}, "schnell": {"model": str(schnell)}}
    with pytest.raises(
        UserError, match=r"'dev': \S* is distilled to read a guidance scale .*'schnell': \S* reads none"
    ):
        soup(tmp_path, digests, teachers, missing="present")
    with pytest.raises(UserError, match="is distilled to read a guidance scale"):
        soup(tmp_path, digests, {"schnell": teachers["schnell"]}, "task_arithmetic", base=str(dev), missing="base")


def test_a_file_of_text_encoders_beside_the_transformer_keeps_its_names(tmp_path, digests):  # noqa: F811
    whole = {COMFY + name: tensor for name, tensor in flux().items()} | {"vae.decoder.conv_in.weight": torch.ones(2, 2)}
    path = save(whole, tmp_path / "a.safetensors")
    found, _ = soup(tmp_path, digests, {"a": {"model": str(path)}})
    assert found.keys() == whole.keys()
