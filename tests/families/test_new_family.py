"""A family that exists only here: SD 1.x whose denoiser goes by another name. It merges, paints and is exported."""

from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import tiny_pipeline
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor

import dmm
from dmm.cli import main
from dmm.families import FAMILIES, denoiser_of, family_of
from dmm.families.sd1 import SD1
from dmm.files.yaml import write_yaml
from dmm.models.teachers import ModelSource, open_pipeline
from dmm.pipeline.export import export_style
from dmm.pipeline.sampling import sample


class PainterPipeline(StableDiffusionPipeline):
    """What its folders name."""

    safety_checker = feature_extractor = image_encoder = None

    def __init__(self, vae, text_encoder, tokenizer, painter, scheduler):
        DiffusionPipeline.__init__(self)
        self.register_modules(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, painter=painter, scheduler=scheduler
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def unet(self):
        """For the call that it has of its parent."""
        return self.painter


PAINTER = replace(
    SD1,
    name="painter",
    title="Painter",
    pipeline_class=PainterPipeline,
    pipelines={frozenset(): PainterPipeline},
    components=(replace(SD1.denoiser, name="painter"), *SD1.components[1:]),
    owns=lambda _: True,
    markers=("painter.",),
)


def new_painter(seed):
    pipe = tiny_pipeline(seed)
    return PainterPipeline(pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.unet, pipe.scheduler)


def paint(pipe):
    (picture,) = sample(pipe, ["a cat"], [0], steps=2, width=16, height=16)
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).float()


@pytest.mark.parametrize("styles", [{"rank": 0}, {"rank": 2, "samples": 8, "train": "none"}], ids=["paper", "adapters"])
def test_it_merges_paints_and_is_exported(styles, tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "painter", PAINTER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for seed, name in enumerate(("base", "one", "two")):
        new_painter(seed).save_pretrained(tmp_path / name)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    recipe = {
        "base": "base",
        "teachers": [{"name": name, "model": name} for name in ("one", "two")],
        "data": {"synthesize": {"prompts": "prompts.txt", "count": 2, "steps": 1}},
        "size": 16,
        "styles": styles,
        "training": {"steps": 1, "batch_size": 2, "precision": "fp32"},
        "losses": {"adversarial": 0.0},
        "logging": {"score_error_every": None, "sample_every": None},
    }
    (tmp_path / "recipe.yaml").write_text(write_yaml(recipe))
    try:
        assert main(["merge", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "merged")]) == 0
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    pipe = dmm.load_pipeline(tmp_path / "merged")
    assert type(pipe) is PainterPipeline
    assert family_of(pipe) is PAINTER
    assert denoiser_of(pipe) is pipe.painter
    export_style(pipe, "one", tmp_path / "exported")
    dmm.set_style(pipe, "one")
    exported = open_pipeline(ModelSource(tmp_path / "exported"))
    assert type(exported) is PainterPipeline
    assert (paint(exported) - paint(pipe)).abs().max() <= 2
