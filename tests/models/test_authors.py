"""Merged models in the layout that DMM's authors released."""

import json

import pytest
import torch
from conftest import PROVENANCE, STYLE_NAMES, tiny_pipeline, tiny_unet
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.embeddings import TimestepEmbedding
from helpers import copy_folder, paint, rewrite, same_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dmm.errors import UserError
from dmm.models.authors import is_authors
from dmm.models.styles import styled_port
from dmm.pipeline.export import export_authors
from dmm.pipeline.styled import load_pipeline, save_pipeline, set_style, style_names

NUM_MODELS = 3
UNET = "unet/diffusion_pytorch_model.safetensors"


class AuthorsUNet(UNet2DConditionModel):
    """A UNet in their published structure: the side-car's two modules inside it, under their names.

    The formula is theirs: the embedding of the timestep, plus ``add_embedding(model_embedding(model_ids))``.
    """

    def __init__(self, **config):
        super().__init__(**config)
        dim = self.time_embedding.linear_2.out_features
        self.model_embedding = torch.nn.Embedding(NUM_MODELS, dim)
        self.add_embedding = TimestepEmbedding(dim, dim)
        self.model_ids = None
        torch.nn.init.normal_(self.add_embedding.linear_2.weight, std=2)
        self.time_embedding.register_forward_hook(self._add)

    def _add(self, _module, _inputs, embedding):
        return embedding + self.add_embedding(self.model_embedding(self.model_ids))


def authors_unet():
    torch.manual_seed(0)
    return AuthorsUNet(**{key: value for key, value in tiny_unet().config.items() if not key.startswith("_")})


@pytest.fixture(scope="session")
def released(tmp_path_factory):
    """A folder with random weights in their layout, and the UNet that it was made of."""
    folder = tmp_path_factory.mktemp("authors") / "released"
    tiny_pipeline().save_pretrained(folder)
    unet = authors_unet()
    save_file(unet.state_dict(), folder / UNET, {"format": "pt"})
    for file, changes in (
        ("model_index.json", {"_class_name": "StableDiffusionDMMPipeline"}),
        ("model_index.json", {"unet": ["modeling.dmm_unet", "DMMUNet2DConditionModel"]}),
        ("unet/config.json", {"_class_name": "DMMUNet2DConditionModel", "num_models": NUM_MODELS}),
        ("unet/config.json", {"addition_embed_type": "model_merge"}),
    ):
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder, unet


@pytest.fixture(scope="session")
def released_file(released, tmp_path_factory):
    """The same as a single file: the original layout, and the five tensors beside it."""
    path = tmp_path_factory.mktemp("authors") / "released.safetensors"
    export_authors(load_pipeline(released[0]), path)
    return path


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    return sample, torch.tensor([7, 900]), torch.randn(2, 6, 16, generator=generator)


@torch.no_grad()
def predict(unet, seed=0):
    sample, timesteps, text = inputs(seed)
    return unet(sample, timesteps, text).sample


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_their_release_gives_what_their_formula_gives(released, released_file, sd1_folder, kind):
    folder, unet = released
    pipe = load_pipeline(folder) if kind == "folder" else load_pipeline(released_file, config=sd1_folder)
    assert style_names(pipe) == ["0", "1", "2"]
    for i in range(NUM_MODELS):
        set_style(pipe, str(i))
        unet.model_ids = torch.full((2,), i)
        torch.testing.assert_close(predict(pipe.unet), predict(unet), rtol=0, atol=1e-5)
    set_style(pipe, ["0", "2"])  # theirs take one a sample, too
    unet.model_ids = torch.tensor([0, 2])
    torch.testing.assert_close(predict(pipe.unet), predict(unet), rtol=0, atol=1e-5)
    set_style(pipe, "0")
    other = predict(pipe.unet)
    set_style(pipe, "1")
    assert (predict(pipe.unet) - other).abs().max() > 1e-2


def test_their_release_survives_the_round_trip_to_the_bit(released, released_file, sd1_folder, tmp_path):
    folder, _ = released
    export_authors(load_pipeline(folder), tmp_path / "again")
    theirs, again = (load_file(path / UNET) for path in (folder, tmp_path / "again"))
    assert theirs.keys() == again.keys()
    assert all(theirs[name].equal(again[name]) for name in theirs)
    for file in ("model_index.json", "unet/config.json"):
        told, back = (json.loads((path / file).read_text()) for path in (folder, tmp_path / "again"))
        for key in ("_class_name", "unet", "addition_embed_type", "num_models"):
            assert told.get(key) == back.get(key)
    export_authors(load_pipeline(released_file, config=sd1_folder), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == released_file.read_bytes()


def test_their_release_becomes_ours_and_theirs_again(released, tmp_path):
    theirs = load_pipeline(released[0])
    save_pipeline(theirs, tmp_path / "ours")
    ours = load_pipeline(tmp_path / "ours")
    assert same_weights(ours, theirs)
    set_style(ours, {"0": 0.5, "2": 0.5})
    set_style(theirs, {"0": 0.5, "2": 0.5})
    assert (paint(ours) == paint(theirs)).all()


@pytest.mark.parametrize("output", ["theirs", "theirs.safetensors"])
def test_ours_in_their_layout_keeps_names_and_provenance(merged, sd1_folder, tmp_path, output):
    ours = load_pipeline(merged)
    export_authors(ours, tmp_path / output)
    back = load_pipeline(tmp_path / output, config=sd1_folder if output.endswith("safetensors") else None)
    assert style_names(back) == STYLE_NAMES
    assert styled_port(back.unet).style_prompts.provenance == PROVENANCE
    assert same_weights(back, ours)
    for style in (*STYLE_NAMES, None):
        set_style(ours, style)
        set_style(back, style)
        assert (paint(back) == paint(ours)).all()


def test_styles_without_provenance_keep_their_names(styled, tmp_path):
    export_authors(styled, tmp_path / "theirs")
    back = load_pipeline(tmp_path / "theirs")
    assert style_names(back) == STYLE_NAMES
    assert not styled_port(back.unet).style_prompts.provenance


def test_tools_that_ignore_the_extra_tensors_paint_the_average(styled, sd1_folder, tmp_path):
    export_authors(styled, tmp_path / "theirs.safetensors")
    plain = StableDiffusionPipeline.from_single_file(
        str(tmp_path / "theirs.safetensors"), config=str(sd1_folder), safety_checker=None
    )
    assert (paint(plain) == paint(styled)).all()
    with safe_open(tmp_path / "theirs.safetensors", framework="pt") as file:
        assert "model.diffusion_model.model_embedding.weight" in file.keys()  # noqa: SIM118


def test_half_precision(styled, tmp_path):
    export_authors(styled, tmp_path / "theirs", dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "theirs" / UNET).values()} == {torch.float16}
    back = load_pipeline(tmp_path / "theirs")
    assert back.unet.dtype == styled_port(back.unet).style_prompts.embeddings.dtype == torch.float32
    set_style(styled, "ink")
    set_style(back, "ink")
    assert abs(paint(back) - paint(styled)).mean() < 5


def test_only_theirs_is_taken_for_theirs(released, released_file, merged, sd1_folder, sd1_file):
    assert [is_authors(path) for path in (released[0], released_file)] == [True, True]
    assert [is_authors(path) for path in (merged, sd1_folder, sd1_file)] == [False] * 3


def spoil_weights(folder, change):
    rewrite(folder / UNET, folder / UNET, change)


def spoil_config(folder, **changes):
    path = folder / "unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: spoil_config(folder, addition_embed_type="model_merge_xl"),
            "lacks 4 of the 5 tensors of its StylePrompts, the first of them 'add_embedding2.linear_1.weight'",
        ),
        (lambda folder: spoil_config(folder, addition_embed_type="text"), "of addition_embed_type text"),
        (lambda folder: spoil_config(folder, block_out_channels=[8, 8]), "has no use for: 2"),
        (lambda folder: spoil_weights(folder, lambda t: t.pop("model_embedding.weight")), "has no 'model_embedding"),
        (lambda folder: spoil_weights(folder, lambda t: t.pop("add_embedding.linear_1.bias")), "lacks 1 of the 5"),
        (lambda folder: spoil_weights(folder, lambda t: t.pop("conv_in.bias")), "lacks 1 of"),
        (lambda folder: spoil_weights(folder, lambda t: t.update(x=torch.ones(1))), "has no use for: 1"),
        (lambda folder: spoil_weights(folder, lambda t: t["conv_in.bias"].fill_(torch.nan)), "unet: .*NaN"),
        (lambda folder: spoil_weights(folder, lambda t: t["model_embedding.weight"].fill_(torch.inf)), "NaN or inf"),
        (lambda folder: (folder / UNET).unlink(), "holds no diffusion_pytorch_model.safetensors"),
    ],
)
def test_damaged_releases_are_told(released, tmp_path, spoil, message):
    folder = copy_folder(released[0], tmp_path / "x")
    spoil(folder)
    with pytest.raises(UserError, match=message):
        load_pipeline(folder)


def test_a_single_file_of_two_families_is_told(released_file, tmp_path):
    def change(tensors):
        tensors["model.diffusion_model.add_embedding2.linear_1.bias"] = torch.ones(1)

    file = rewrite(released_file, tmp_path / "xl.safetensors", change)
    with pytest.raises(UserError, match=r"lacks 3 of the 5 .* 'add_embedding2\.linear_1\.weight'"):
        load_pipeline(file)
