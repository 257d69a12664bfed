"""A toy merge for the tests of training: two tiny teachers, a few rows of data held in memory.

Run as a script, it trains in a process of its own: ``python toy.py FOLDER SETTINGS [RANK:STEP]``, where
SETTINGS are a recipe's keys as JSON, and the process of that rank is killed when it comes to that step.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from conftest import tiny_unet
from diffusers import DDPMScheduler

from dmm.errors import UserError
from dmm.families.sd1 import SD1
from dmm.maths.processes import VariancePreserving
from dmm.maths.sharing import share_batch
from dmm.models.discriminator import Discriminator
from dmm.models.student import StyledStudent
from dmm.models.styles import StylePrompts
from dmm.models.teachers import freeze
from dmm.recipes.recipe import Recipe
from dmm.training.batches import Batches, Role
from dmm.training.distill import Adversary, Imitation, Teacher
from dmm.training.processes import join_processes
from dmm.training.trainer import Trainer

STYLES = ("ink", "photo")
ALPHAS_CUMPROD = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod


class ToyData:
    """Rows of noise with a text embedding each, every other one for the other teacher; a dropped caption is zeros."""

    num_rows = 32
    latent_shape = (4, 8, 8)

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self._latents = torch.randn(self.num_rows, *self.latent_shape, generator=generator)
        self._text = torch.randn(self.num_rows, 6, 16, generator=generator)

    def rows_of(self, painter):
        first = STYLES.index(painter) if painter in STYLES else self.num_rows
        return torch.arange(first, self.num_rows, len(STYLES))

    def latents(self, rows):
        return self._latents[rows]

    def shown(self, rows, styles):
        return {}

    @property
    def sizes(self):
        return [torch.arange(self.num_rows)]

    def conditioning(self, encoder, rows, dropped):
        assert encoder in ("student", *STYLES)
        return {"encoder_hidden_states": self._text[rows] * ~dropped[:, None, None]}


def toy_recipe(**settings):
    training = {"steps": 6, "batch_size": 8, "learning_rate": 1e-3, "precision": "fp32", **settings.pop("training", {})}
    teachers = [{"name": name, "model": "o/m"} for name in STYLES]
    parts = {
        "checkpoint": {"every": 2, "keep": 2},
        "logging": {"every": 1},
        "losses": {"feature": 0.1, "adversarial": 0.01},
        "styles": {"rank": 0},
        **settings,
    }
    data = {"dataset": "o/d"}
    return Recipe.model_validate({"base": "o/b", "teachers": teachers, "data": data, "training": training, **parts})


def toy_student():
    torch.manual_seed(0)
    unet = tiny_unet()
    return StyledStudent(unet, StylePrompts(STYLES, dim=32), SD1)


def toy_teachers():
    """Two experts that were, so to speak, fine-tuned from the student's start."""
    teachers = []
    for seed in (1, 2):
        torch.manual_seed(0)
        unet, generator = tiny_unet(), torch.Generator().manual_seed(seed)
        for parameter in unet.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        teachers.append(Teacher(freeze(unet), "epsilon", "epsilon"))
    return teachers


def toy_trainer(folder, recipe, student=None, **settings):
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(recipe.training.precision, recipe.training.precision), cpu=True
    )
    training = recipe.training
    weight = recipe.losses.adversarial
    adversary = Adversary(Discriminator(toy_student().unet, len(STYLES)), weight, "epsilon") if weight else None
    roles = [Role([i], name, 1 / len(STYLES)) for i, name in enumerate(STYLES)]
    groups = share_batch(
        training.batch_size, [role.share for role in roles], accelerator.num_processes, accelerator.process_index
    )
    batches = Batches(
        ToyData(),
        STYLES,
        roles,
        groups=groups,
        process=VariancePreserving(ALPHAS_CUMPROD),
        caption_dropout=training.caption_dropout,
        micro_batch_size=training.micro_batch_size,
        seed=recipe.seed,
        device=accelerator.device,
        adversarial=adversary is not None,
    )
    folder.mkdir(parents=True, exist_ok=True)
    lesson = Imitation(toy_teachers(), recipe.losses.feature, adversary)
    return Trainer(
        accelerator, student or toy_student(), lesson, batches, recipe, folder, STYLES, adversary, **settings
    )


def die_at(trainer, rank, step):
    """Kill this process, if it is of that rank, when it comes to a step."""
    train_step = trainer._step

    def die(number):
        if number == step and trainer.accelerator.process_index == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        train_step(number)

    trainer._step = die


def main(folder, recipe, kill=None):
    trainer = toy_trainer(Path(folder), toy_recipe(**json.loads(recipe)))
    if kill:
        die_at(trainer, *map(int, kill.split(":")))
    trainer.train()


if __name__ == "__main__":
    torch.set_num_threads(1)
    join_processes()  # as a merge does; it also parts them in the end
    try:
        main(*sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
