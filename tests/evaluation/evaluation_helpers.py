"""A perfect merge: a tiny student with styles, whose teachers are its own styles, baked into stock models."""

import copy
import functools

from conftest import tiny_styled
from diffusers import UNet2DConditionModel
from torch.nn import functional as F

from dmm.evaluation.evaluate import Protocol, evaluate
from dmm.evaluation.held_out import Model
from dmm.evaluation.painting import Painting
from dmm.families.sd1 import SD1
from dmm.models.styles import bake, detach_styles
from dmm.pipeline.styled import temporary_style

STYLES = ("ink", "photo")
PROMPTS = ("a cat", "a dog", "a tree")
PAINTING = Painting(steps=2, guidance_scale=1.0)
NUM_IMAGES = 101  # a whole shard and a short one
PROTOCOL = Protocol(PROMPTS, NUM_IMAGES, PAINTING)


def strongly_styled():
    """A tiny merged model whose styles nobody takes for each other, nor for none."""
    pipeline = tiny_styled()
    for name, module in pipeline.unet.named_modules():
        if name.endswith("time_emb_proj"):
            module.weight.data *= 10
    pipeline.unet.conv_out.weight.data *= 4
    return pipeline


def without_styles():
    pipeline = strongly_styled()
    detach_styles(pipeline.unet)
    return pipeline


def baked(style):
    pipeline = strongly_styled()
    with temporary_style(pipeline, style):
        term = pipeline.unet.time_embedding.linear_2.term
    bake(pipeline.unet, term, SD1.port)
    unet = UNet2DConditionModel.from_config(pipeline.unet.config)
    unet.load_state_dict(pipeline.unet.state_dict())
    pipeline.register_modules(unet=unet)
    return pipeline


@functools.cache
def model(build, *args):
    """A model that is built once, and opened as a copy."""
    pipeline = build(*args)
    return Model(lambda _dtype: copy.deepcopy(pipeline), source=build.__name__)


STUDENT, BASE = (model(build) for build in (strongly_styled, without_styles))
TEACHERS = {style: model(baked, style) for style in STYLES}


class PooledPixels:
    """The simplest features: the mean colours of a picture's quarters, 12 of them."""

    name = "pixels"
    identity = "quarters"

    def __call__(self, images):
        return {"features": F.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)}


def evaluate_in(folder, student, teachers=TEACHERS, protocol=PROTOCOL, **options):
    """Evaluate a student, by default beside its own styles, with a cache in ``folder``."""
    return evaluate(student, teachers, PooledPixels(), protocol, folder, show_progress=False, **options)
