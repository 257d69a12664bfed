"""The authors' layout where the stock UNet has an ``add_embedding`` of its own."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import TimestepEmbedding
from helpers import paint, same_weights
from safetensors.torch import load_file, save_file
from tiny_families import tiny_sd2, tiny_sdxl

from dmm.errors import UserError
from dmm.models.authors import is_authors
from dmm.models.styles import StylePrompts
from dmm.pipeline.export import export_authors
from dmm.pipeline.styled import add_styles, load_pipeline, set_style, style_names

NUM_MODELS = 3
UNET = "unet/diffusion_pytorch_model.safetensors"


class AuthorsUNet(UNet2DConditionModel):
    """A UNet in their published structure. The formula is theirs: the style's term comes after the text's and time's.

    It is added where a stock UNet may have an activation of the sum, so that the order is theirs too.
    """

    def __init__(self, **config):
        super().__init__(**config)
        dim = self.time_embedding.linear_2.out_features
        self.model_embedding = torch.nn.Embedding(NUM_MODELS, dim)
        self.add_embedding2 = TimestepEmbedding(dim, dim)
        self.model_ids = None
        torch.nn.init.normal_(self.add_embedding2.linear_2.weight, std=2)
        self.time_embed_act = lambda emb: emb + self.add_embedding2(self.model_embedding(self.model_ids))


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A folder with random weights in their layout, and the UNet that it was made of."""
    folder = tmp_path_factory.mktemp("authors") / "released"
    pipe = tiny_sdxl()
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    pipe.save_pretrained(folder)
    torch.manual_seed(0)
    unet = AuthorsUNet(**{key: value for key, value in pipe.unet.config.items() if not key.startswith("_")})
    save_file(unet.state_dict(), folder / UNET, {"format": "pt"})
    for file, changes in (
        ("model_index.json", {"_class_name": "StableDiffusionXLDMMPipeline"}),
        ("model_index.json", {"unet": ["modeling.dmm_unet", "DMMUNet2DConditionModel"]}),
        ("unet/config.json", {"_class_name": "DMMUNet2DConditionModel", "num_models": NUM_MODELS}),
        ("unet/config.json", {"addition_embed_type": "model_merge_xl"}),
    ):
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder, unet


@torch.no_grad()
def predict(unet):
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 6, 40, generator=generator)
    added = {"text_embeds": torch.randn(2, 12, generator=generator), "time_ids": torch.arange(12.0).reshape(2, 6)}
    return unet(sample, torch.tensor([7, 900]), text, added_cond_kwargs=added).sample


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_their_release_gives_what_their_formula_gives(released, tmp_path, kind):
    folder, unet = released
    assert is_authors(folder)
    pipe = load_pipeline(folder)
    if kind == "file":
        export_authors(pipe, tmp_path / "released.safetensors")
        pipe = load_pipeline(tmp_path / "released.safetensors")
    assert style_names(pipe) == ["0", "1", "2"]
    assert pipe.config.force_zeros_for_empty_prompt is False
    for i in range(NUM_MODELS):
        set_style(pipe, str(i))
        unet.model_ids = torch.full((2,), i)
        torch.testing.assert_close(predict(pipe.unet), predict(unet), rtol=0, atol=1e-5)
    set_style(pipe, "0")
    other = predict(pipe.unet)
    set_style(pipe, "1")
    assert (predict(pipe.unet) - other).abs().max() > 1e-2


def test_their_release_survives_the_round_trip_to_the_bit(released, tmp_path):
    folder, _ = released
    export_authors(load_pipeline(folder), tmp_path / "again")
    theirs, again = (load_file(path / UNET) for path in (folder, tmp_path / "again"))
    assert theirs.keys() == again.keys()
    assert all(theirs[name].equal(again[name]) for name in theirs)
    for file in ("model_index.json", "unet/config.json"):
        told, back = (json.loads((path / file).read_text()) for path in (folder, tmp_path / "again"))
        for key in ("_class_name", "unet", "addition_embed_type", "num_models", "force_zeros_for_empty_prompt"):
            assert told.get(key) == back.get(key)


@pytest.mark.parametrize("output", ["theirs", "theirs.safetensors"])
def test_ours_in_their_layout_is_the_same_model(tmp_path, output):
    ours = tiny_sdxl()
    torch.manual_seed(1)
    prompts = StylePrompts(["ink", "photo"], dim=32)
    torch.nn.init.normal_(prompts.linear_2.weight, std=2)
    add_styles(ours, prompts)
    export_authors(ours, tmp_path / output)
    back = load_pipeline(tmp_path / output)
    assert style_names(back) == ["ink", "photo"]
    assert same_weights(back, ours)
    for style in ("ink", None):
        set_style(ours, style)
        set_style(back, style)
        assert (paint(back) == paint(ours)).all()


@pytest.mark.parametrize("output", ["theirs", "theirs.safetensors"])
def test_a_family_that_they_released_nothing_of_is_refused(tmp_path, output):
    pipe = tiny_sd2()
    add_styles(pipe, StylePrompts(["ink"], dim=32))
    with pytest.raises(UserError, match=r"released no SD 2\.x model"):
        export_authors(pipe, tmp_path / output)
    assert not list(tmp_path.iterdir())
