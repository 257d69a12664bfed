"""Two toy teachers and a batch for them."""

import torch
from conftest import tiny_unet
from toy import ALPHAS_CUMPROD

from dmm.maths.processes import VariancePreserving
from dmm.models.teachers import freeze
from dmm.training.distill import Batch, Part, Teacher

NAMES = ("ink", "photo")


def new_unet(seed):
    torch.manual_seed(seed)
    return tiny_unet()


def new_teachers(types=("epsilon", "epsilon")):
    """Two experts that were, so to speak, fine-tuned from the student's start."""
    unets = []
    for seed in (1, 2):
        unet = new_unet(0)
        generator = torch.Generator().manual_seed(seed)
        for parameter in unet.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        unets.append(freeze(unet))
    return [Teacher(unet, prediction_type, "epsilon") for unet, prediction_type in zip(unets, types, strict=True)]


def new_batch(student, seed=0, per_teacher=4):
    generator = torch.Generator().manual_seed(seed)
    unet = student.unet
    size = 2 * per_teacher
    shape = (size, unet.config.in_channels, 8, 8)
    text = torch.randn(size, 6, unet.config.cross_attention_dim, generator=generator)
    samples = [slice(i * per_teacher, (i + 1) * per_teacher) for i in range(2)]
    parts = [Part(i, these, {"encoder_hidden_states": text[these]}) for i, these in enumerate(samples)]
    return Batch(
        x_t=torch.randn(shape, generator=generator),
        timesteps=torch.randint(1000, (size,), generator=generator),
        levels=torch.rand(size, generator=generator) * 0.9 + 0.05,
        style_weights=torch.eye(2).repeat_interleave(per_teacher, 0),
        conditioning={"encoder_hidden_states": text},
        loss_weights=torch.full((size,), 1 / size),
        score_weights=torch.ones(size),
        parts=parts,
        process=VariancePreserving(ALPHAS_CUMPROD),
    )
