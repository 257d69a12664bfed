"""The training loop on accelerate: batch, distil, backward, clip, step, log, save. It knows no formula."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm import tqdm

from dmm.errors import UserError
from dmm.files.runs import CHECKPOINTS, LOG
from dmm.recipes.training import Checkpoint as Kept
from dmm.recipes.training import Training
from dmm.training.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint, save_checkpoint, sweep
from dmm.training.curves import Curves
from dmm.training.distill import Adversary, Distillation, Lesson, Samples, Seen, discriminate
from dmm.training.learner import Learner
from dmm.training.log import cut_log, log_until
from dmm.training.processes import stop_signals, telling_of_loss
from dmm.training.watch import Watch

STUDENT, DISCRIMINATOR = "student", "discriminator"

_logger = logging.getLogger(__name__)


class Stopped(KeyboardInterrupt):
    """A run was asked to stop, and has saved where it is."""


class Course(Protocol):
    """What a trainer reads of a recipe."""

    @property
    def training(self) -> Training:
        """How the student is trained."""

    @property
    def checkpoint(self) -> Kept:
        """What is kept to go on from."""

    @property
    def log_interval(self) -> int:
        """Steps between two entries of the loss curves."""

    @property
    def sample_interval(self) -> int | None:
        """Steps between two grids of samples; None for none."""

    @property
    def watch_interval(self) -> int | None:
        """Steps between two measurements of the score error; None for none."""


class Steps(Protocol):
    """Batches of one process, by step."""

    def __len__(self) -> int:
        """How many micro-batches a step has."""

    def of_step(self, step: int, /) -> Iterator[Any]:
        """Those of a step: :class:`dmm.training.distill.Samples`."""


class Trainer:
    """Trains a student to the end of its recipe, or until it is asked to stop.

    Args:
        accelerator: of the recipe's precision, its trackers set up.
        student: a module, of which what is trained is float32; put on the accelerator's device, and made equal to the
            main process's.
        lesson: what the student learns of each batch.
        batches: this process's.
        recipe: the training, its losses, its checkpoints and its log.
        folder: of the run; holds ``checkpoints/`` and ``log.jsonl``.
        styles: the student's, by name.
        adversary: on the accelerator's device; its head is trained beside the student.
        watch: measures the student at the recipe's intervals.
        show: called on the main process at the recipe's intervals with the step, while the student holds its
            averaged weights.
        title: of the bar, before the step.
        before: steps that other styles have been trained by, for trackers.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        student: Any,
        lesson: Lesson,
        batches: Steps,
        recipe: Course,
        folder: Path,
        styles: Sequence[str],
        adversary: Adversary | None = None,
        watch: Watch | None = None,
        show: Callable[[int], None] | None = None,
        *,
        title: str = "",
        before: int = 0,
    ) -> None:
        self.accelerator, self.student, self.lesson, self.batches = accelerator, student, lesson, batches
        self.recipe, self.folder, self.adversary, self.show = recipe, folder, adversary, show
        self.watch = watch
        self._title, self._before = title, before
        training = recipe.training
        if training.gradient_checkpointing:
            student.unet.enable_gradient_checkpointing()
        if training.compile:
            student.unet.compile()
        style_rate = training.style_learning_rate or training.learning_rate
        groups = student.parameter_groups(training.learning_rate, style_rate)
        self.learners = {STUDENT: Learner(accelerator, student, groups, training)}
        self.parameters = self.learners[STUDENT].parameters
        if adversary is not None:
            head = adversary.discriminator.head
            self.learners[DISCRIMINATOR] = Learner(accelerator, head, [(head, training.learning_rate)], training)
        # of the weights as they now are: where there are several processes, the main one's in all of them
        on_gpu = accelerator.device.type == "cuda"  # where a launch a tensor takes longer than the arithmetic
        averaging = {"decay": training.ema_decay, "foreach": on_gpu}
        self.ema = EMAModel(self.parameters.values(), **averaging) if training.ema_decay else None
        self.sample_every = recipe.sample_interval or math.inf
        self.watch_every = recipe.watch_interval or math.inf
        self.curves = Curves(styles, accelerator.device)
        self._first: int | None = None  # the step that training begins with, once that is known

    def resume(self) -> int:
        """Take up the newest whole checkpoint, if there is one; nothing is written.

        Returns: how many steps it has.
        Raises: UserError: it has more than the recipe's, holds what is not finite, or is of another run; or the log
            cannot be read.
        """
        newest = newest_checkpoint(self.folder / CHECKPOINTS)
        if newest is None:
            self._first = 0
        else:
            checkpoint = load_checkpoint(newest)
            try:
                self._load(checkpoint)
            except (KeyError, TypeError, AttributeError, RuntimeError) as error:
                raise UserError(
                    f"The checkpoint '{newest}' is whole, but none of this run ({error!r}). Remove it to go on from "
                    "the one before."
                ) from error
            self._first = checkpoint.step
        log_until(self.folder / LOG, self._first)
        return self._first

    def train(self) -> None:
        """Go on from where :meth:`resume`, which is called here unless it was, has found the run; saved at the end.

        Raises: Stopped: SIGINT or SIGTERM came; UserError: see :meth:`resume`; or the loss or a weight is no longer
            finite.
        """
        first = self.resume() if self._first is None else self._first
        if self.accelerator.is_main_process:
            sweep(self.folder / CHECKPOINTS)
            cut_log(self.folder / LOG, first)
        self.accelerator.wait_for_everyone()
        training = self.recipe.training
        with (
            stop_signals() as asked_to_stop,
            tqdm(
                total=training.steps * training.batch_size,
                initial=first * training.batch_size,
                unit=" samples",
                unit_scale=True,
                desc=f"{self._title}step {first}/{training.steps}",
                disable=not self.accelerator.is_main_process,
            ) as bar,
        ):
            for step in range(first, training.steps):
                with telling_of_loss(step):
                    self.student.train()
                    self._step(step)
                    done = step + 1
                    bar.set_description(f"{self._title}step {done}/{training.steps}", refresh=False)
                    bar.update(training.batch_size)
                    is_last = done == training.steps
                    measured = self._measure() if is_last or done % self.watch_every == 0 else {}
                    if measured or is_last or done % self.recipe.log_interval == 0:
                        self._log(done, bar, measured)
                    stop = self._any(asked_to_stop())
                    if stop or done % self.recipe.checkpoint.every == 0 or done == training.steps:
                        self._save(done)
                    if self.show and (done == training.steps or done % self.sample_every == 0):
                        self._show(done)
                    if stop and done < training.steps:
                        raise Stopped(f"step {done} of {training.steps} is saved in '{self.folder}'; --resume goes on")

    def _step(self, step: int) -> None:
        student = self.learners[STUDENT]
        averages = dict(zip(self.parameters, self.ema.shadow_params, strict=True)) if self.ema else self.parameters
        seen = []
        for i, batch in enumerate(self.batches.of_step(step)):
            with self._accumulating(student, i):
                result = self.lesson(student.model, batch, averages)
            self._learn_from(result, batch)
            seen.append(result.seen)
        student.step(step)
        if self.ema:
            self.ema.step(self.parameters.values())
        if self.adversary is not None:
            self._step_discriminator(step, seen)

    def _step_discriminator(self, step: int, seen: Sequence[Seen | None]) -> None:
        discriminator = self.learners[DISCRIMINATOR]
        for i, one in enumerate(seen):
            assert one is not None
            with self._accumulating(discriminator, i):
                result = discriminate(discriminator.model, one)
            self._learn_from(result, one.batch)
        discriminator.step(step)

    @contextmanager
    def _accumulating(self, learner: Learner, micro_batch: int) -> Iterator[None]:
        # gradients are synchronised once a step, with the last micro-batch's
        is_last = micro_batch == len(self.batches) - 1
        with nullcontext() if is_last else self.accelerator.no_sync(learner.model), self.accelerator.autocast():
            yield

    def _learn_from(self, result: Distillation, batch: Samples) -> None:
        self.curves.add(batch, result.terms)
        # DDP takes the mean over processes; the loss weights want the sum
        self.accelerator.backward(result.loss * self.accelerator.num_processes)

    def _measure(self) -> Mapping[str, float]:
        if self.watch is None:
            return {}
        with self.averaged(), self.accelerator.autocast():
            return self.watch.measure(self.student, self.accelerator)

    def _log(self, done: int, bar: Any, measured: Mapping[str, float]) -> None:
        scalars = self.curves.take(self.accelerator)
        scalars |= {"learning_rate": self.learners[STUDENT].learning_rate, **measured}
        if not self.accelerator.is_main_process:
            return
        bar.set_postfix(
            {name: f"{scalars[name]:.4f}" for name in ("score", "score_error", "consistency") if name in scalars}
        )
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": done, "time": round(time.time(), 3), **scalars}) + "\n")
        self.accelerator.log(scalars, step=self._before + done)

    def _save(self, done: int) -> None:
        if self.accelerator.is_main_process:
            tensors: dict[str, Mapping[str, Tensor]] = {}
            info: dict[str, Any] = {}
            for name, learner in self.learners.items():
                state, told = learner.state(name)
                tensors |= state
                info |= told
            if self.ema:
                tensors["ema"] = dict(zip(self.parameters, self.ema.shadow_params, strict=True))
            scaler = self.accelerator.scaler
            save_checkpoint(
                self.folder / CHECKPOINTS,
                done,
                tensors,
                {
                    **info,
                    "ema_step": self.ema.optimization_step if self.ema else 0,
                    "scaler": scaler.state_dict() if scaler else {},
                    "num_threads": torch.get_num_threads(),
                    "num_processes": self.accelerator.num_processes,
                },
                keep=self.recipe.checkpoint.keep,
            )
        self.accelerator.wait_for_everyone()

    def _load(self, checkpoint: Checkpoint) -> None:
        """Take up a checkpoint's state.

        Raises: UserError: it is of another run.
        """
        if checkpoint.step > self.recipe.training.steps:
            raise UserError(
                f"The run in '{self.folder}' has trained {checkpoint.step} steps already, more than the recipe's "
                f"training.steps of {self.recipe.training.steps}."
            )
        info = checkpoint.info
        for what, now in (
            ("num_threads", torch.get_num_threads()),
            ("num_processes", self.accelerator.num_processes),
        ):
            if info[what] != now:
                _logger.warning("The run had %s %s and now has %d: its last bits may differ.", what, info[what], now)
        for name, learner in self.learners.items():
            if name in info:  # a discriminator may be new
                learner.load_state(name, checkpoint)
        if self.ema:
            # a run that had no average begins one here
            averages = checkpoint.tensors.get("ema", checkpoint.tensors["student"])
            for shadow, name in zip(self.ema.shadow_params, self.parameters, strict=True):
                shadow.copy_(averages[name])
            self.ema.optimization_step = info["ema_step"]
        if self.accelerator.scaler is not None and info["scaler"]:  # it may have trained in another precision
            self.accelerator.scaler.load_state_dict(info["scaler"])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block, the student holds its averaged weights, where there are any, and is in ``eval``."""
        self.student.eval()
        if self.ema:
            self.ema.store(self.parameters.values())
            self.ema.copy_to(self.parameters.values())
        try:
            yield
        finally:
            if self.ema:
                self.ema.restore(self.parameters.values())

    def _show(self, done: int) -> None:
        assert self.show is not None
        if self.accelerator.is_main_process:
            with self.averaged():
                self.show(done)
        self.accelerator.wait_for_everyone()

    def _any(self, flag: bool) -> bool:
        """Whether any process says so: all of them stop at the same step, or none does."""
        if self.accelerator.num_processes == 1:
            return flag
        told = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(told, reduction="sum") > 0)
