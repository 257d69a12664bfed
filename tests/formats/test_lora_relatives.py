"""LoHa, LoKr, DoRA and the like are merged to what their own libraries compute; others are refused by name."""

import pytest
import torch
from conftest import tiny_pipeline
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import save_file

from dmm.errors import UserError
from dmm.families.sd1 import SD1
from dmm.formats.lora import fuse_lora, read_lora
from dmm.models.teachers import ModelSource
from dmm.soup.reading import WeightFile
from dmm.soup.sources import Change, Changed, Kept

LINEAR = "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
CONV = "down_blocks.0.resnets.0.conv1"
KOHYA = {LINEAR: f"lora_unet_{LINEAR.replace('.', '_')}", CONV: f"lora_unet_{CONV.replace('.', '_')}"}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def models_of(pipe):
    return {"unet": pipe.unet, "text_encoder": pipe.text_encoder}


def randomize(module, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "dora" in name or "magnitude" in name:
            parameter.data *= 1 + 0.2 * noise
        elif "lora_" in name or "hada_" in name or "lokr_" in name:
            parameter.data = 0.3 * noise


KINDS = {
    "LoCon": (LoConModule, {}),
    "Tucker": (LoConModule, {"use_tucker": True}),
    "DoRA of outputs": (LoConModule, {"weight_decompose": True}),
    "DoRA of inputs": (LoConModule, {"weight_decompose": True, "wd_on_out": False}),
    "rank-stabilised": (LoConModule, {"rs_lora": True}),
    "LoHa": (LohaModule, {}),
    "LoHa with Tucker": (LohaModule, {"use_tucker": True}),
    "LoKr": (LokrModule, {"factor": 2}),
    "LoKr, both as products": (LokrModule, {"decompose_both": True, "factor": 4}),
    "LoKr whole": (LokrModule, {"full_matrix": True}),
    "LoKr with Tucker": (LokrModule, {"use_tucker": True, "factor": 2}),
    "LoKr with DoRA": (LokrModule, {"weight_decompose": True}),
}


@pytest.mark.parametrize("module", [LINEAR, CONV], ids=["linear", "convolution"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_computes_what_the_library_computes(pipe, tmp_path, kind, module):
    network, settings = KINDS[kind]
    layer = pipe.unet.get_submodule(module)
    theirs = network("x", layer, multiplier=1.0, lora_dim=2, alpha=1.0, **settings)
    randomize(theirs)
    theirs.eval()
    path = tmp_path / "lora.safetensors"
    save_file({f"{KOHYA[module]}.{key}": value for key, value in theirs.state_dict().items()}, path)

    shape = (3, layer.in_features) if module == LINEAR else (3, layer.in_channels, 5, 5)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    theirs.apply_to()
    expected = layer(x)
    theirs.restore()
    assert (expected - layer(x)).abs().max() > 0.01

    (change,) = read_lora(path, models_of(pipe))
    ours = torch.func.functional_call(layer, {"weight": change.changed(layer.weight, 1.0)}, x)
    assert torch.allclose(ours, expected, atol=1e-5)


def test_a_soup_reads_the_same_in_slices(pipe, tmp_path):
    """Of every form, slices that begin and end within rows."""
    weight = pipe.unet.get_submodule(CONV).weight.detach()
    save_file({"w": weight}, tmp_path / "model.safetensors")
    file = WeightFile(tmp_path / "model.safetensors")
    for kind, (network, settings) in KINDS.items():
        theirs = network("x", pipe.unet.get_submodule(CONV), multiplier=1.0, lora_dim=2, alpha=1.0, **settings)
        randomize(theirs)
        path = tmp_path / f"{kind}.safetensors"
        save_file({f"{KOHYA[CONV]}.{key}": value for key, value in theirs.state_dict().items()}, path)
        (change,) = read_lora(path, models_of(pipe))
        source = Changed(Kept(file, "w", tuple(weight.shape)), (Change(change, 0.7),))
        expected = change.changed(weight.double(), 0.7).flatten()
        for start, stop in ((0, weight.numel()), (5, 100), (71, 73)):
            assert torch.allclose(source.read(start, stop, torch.float64), expected[start:stop], atol=1e-6), kind
    file.close()


PEFT_CONFIGS = {
    "LoRA, alpha of its config": LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "conv1"]),
    "rank-stabilised": LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["to_q"]),
    "patterns": LoraConfig(
        r=4, lora_alpha=8, rank_pattern={"attn1.to_q": 2}, alpha_pattern={"attn1.to_q": 3}, target_modules=["to_q"]
    ),
    "DoRA": LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["to_q", "conv1"]),
    "biases": LoraConfig(r=4, lora_alpha=6, lora_bias=True, target_modules=["conv1", "to_out.0"]),
    "LoHa": LoHaConfig(r=4, alpha=6, target_modules=["to_q", "conv1"]),
    "LoKr": LoKrConfig(r=2, alpha=6, target_modules=["to_q", "conv1"]),
}


@pytest.mark.parametrize("as_folder", [False, True])
@pytest.mark.parametrize("kind", PEFT_CONFIGS)
def test_what_peft_saves_is_what_peft_merges(tmp_path, kind, as_folder):
    config = PEFT_CONFIGS[kind]
    config.inference_mode = False
    ours, theirs = tiny_pipeline(), tiny_pipeline()
    adapted = get_peft_model(theirs.unet, config)
    randomize(adapted)
    adapted.save_pretrained(tmp_path / "peft")
    merged = adapted.merge_and_unload()
    path = tmp_path / "peft" if as_folder else tmp_path / "peft" / "adapter_model.safetensors"
    before = {name: tensor.clone() for name, tensor in ours.unet.state_dict().items()}
    fuse_lora(ours, read_lora(path, models_of(ours), SD1), 1.0)
    for name, tensor in merged.state_dict().items():
        assert torch.allclose(ours.unet.state_dict()[name], tensor, atol=1e-5), name
    assert any(not torch.equal(before[name], tensor) for name, tensor in merged.state_dict().items())


STRANGERS = {
    "OFT": "oft_blocks",
    "OFT of PEFT": "oft_R.weight",
    "BOFT": "boft_R",
    "GLoRA": "a1.weight",
    "(IA)^3": "on_input",
    "(IA)^3 of PEFT": "ia3_l",
    "VeRA": "vera_lambda_d",
    "AdaLoRA": "lora_E",
    "FourierFT": "fourierft_spectrum",
    "whole weights": "set_weight",
    "embeddings": "lora_embedding_A",
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_other_relatives_are_refused_by_name(pipe, tmp_path, kind):
    path = tmp_path / "x.safetensors"
    save_file({f"{KOHYA[LINEAR]}.{STRANGERS[kind]}": torch.zeros(4)}, path)
    word = kind.split()[0]
    with pytest.raises(UserError, match=r"which is not read") as told:
        read_lora(path, models_of(pipe))
    assert word in str(told.value)


def test_an_ia3_of_lycoris_is_told_by_the_tensor_that_says_so(pipe, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({f"{KOHYA[LINEAR]}.{name}": torch.zeros(1) for name in ("weight", "on_input")}, path)
    with pytest.raises(UserError, match=r"is an \(IA\)\^3 \('.*on_input'\), which is not read"):
        read_lora(path, models_of(pipe))


def test_a_bias_for_a_layer_without_one_is_told_truly(tmp_path):
    adapted = get_peft_model(tiny_pipeline().unet, LoraConfig(r=2, lora_bias=True, target_modules=["attn1.to_q"]))
    adapted.save_pretrained(tmp_path / "peft")
    with pytest.raises(UserError, match=r"changes a bias, and the model's layer has none .* \(lora_bias: false\)"):
        read_lora(tmp_path / "peft", models_of(tiny_pipeline()))


def test_a_dora_at_half_strength_goes_half_the_way(pipe, tmp_path):
    layer = pipe.unet.get_submodule(LINEAR)
    network = LoConModule("x", layer, multiplier=1.0, lora_dim=2, alpha=1.0, weight_decompose=True)
    randomize(network)
    path = tmp_path / "dora.safetensors"
    save_file({f"{KOHYA[LINEAR]}.{key}": value for key, value in network.state_dict().items()}, path)
    (change,) = read_lora(path, models_of(pipe))
    weight = layer.weight.detach()
    half = (weight + change.changed(weight, 1.0)) / 2
    assert torch.allclose(change.changed(weight, 0.5), half, atol=1e-6)


@pytest.mark.parametrize("missing", ["hada_w1_a", "hada_w2_b"])
def test_half_a_loha_is_told(pipe, tmp_path, missing):
    network = LohaModule("x", pipe.unet.get_submodule(LINEAR), lora_dim=2)
    tensors = {f"{KOHYA[LINEAR]}.{key}": value for key, value in network.state_dict().items() if key != missing}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"has only .* The file is incomplete"):
        read_lora(tmp_path / "x.safetensors", models_of(pipe))


def test_a_teacher_may_be_one(sd1_folder, pipe, tmp_path):
    from dmm.models.teachers import open_pipeline

    network = LohaModule("x", pipe.unet.get_submodule(CONV), lora_dim=2, alpha=1.0)
    randomize(network)
    path = tmp_path / "LOHA.SAFETENSORS"
    save_file({f"{KOHYA[CONV]}.{key}": value for key, value in network.state_dict().items()}, path)
    opened = open_pipeline(ModelSource(sd1_folder, loras=((path, 0.5),)))
    expected = pipe.unet.get_submodule(CONV).weight + 0.5 * network.get_weight(network.shape).reshape(8, 8, 3, 3)
    assert torch.allclose(opened.unet.get_submodule(CONV).weight, expected, atol=1e-6)
