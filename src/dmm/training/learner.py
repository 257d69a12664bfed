"""A module that is trained: its optimizer, schedule, clipping, and all of its state that a run goes on from."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from dmm.errors import UserError
from dmm.recipes.training import Training
from dmm.training.checkpoint import Checkpoint, pack_optimizer, unpack_optimizer
from dmm.training.ranks import leave


class Learner:
    """A module on the accelerator's device, and AdamW on its schedule.

    Args:
        accelerator: wraps the module, and makes it equal to the main process's.
        module: float32.
        groups: its parameters, and the learning rate of each group.
        training: the schedule, the weight decay and the norm that gradients are clipped to.

    Attributes:
        model: the module, wrapped where there are several processes.
        parameters: by name.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        module: nn.Module,
        groups: Sequence[tuple[nn.Module, float]],
        training: Training,
    ) -> None:
        self._accelerator, self._module = accelerator, module
        self._max_norm = training.max_grad_norm or math.inf
        self.parameters = dict(module.named_parameters())
        optimizer = torch.optim.AdamW(
            [{"params": list(part.parameters()), "lr": rate} for part, rate in groups],
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            fused=accelerator.device.type == "cuda",  # a launch for many tensors
        )
        self._schedule = get_scheduler(
            training.lr_schedule, optimizer, num_warmup_steps=training.warmup_steps, num_training_steps=training.steps
        )
        self.model = accelerator.prepare_model(module)
        self._optimizer = accelerator.prepare_optimizer(optimizer)

    @property
    def learning_rate(self) -> float:
        """Of the first group, now."""
        return float(self._schedule.get_last_lr()[0])

    def step(self, number: int) -> None:
        """Learn from the gradients that have been added up, and clear them.

        Args:
            number: of the step, to be told where a gradient is not finite.
        Raises: UserError: it is not.
        """
        norm = self._accelerator.clip_grad_norm_(self.parameters.values(), self._max_norm)
        # loss scaling meets infinities on purpose, and skips such steps by itself
        if self._accelerator.scaler is None:
            self._check_finite(number, norm)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad(set_to_none=True)

    def state(self, name: str) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
        """All that the module goes on from, for :func:`dmm.training.checkpoint.save_checkpoint`.

        Args:
            name: of the module.
        Returns: its weights and the optimizer's moments as groups of tensors, and what else there is.
        """
        moments, options = pack_optimizer(self._optimizer.optimizer, self.parameters)
        info = {"optimizer": options, "schedule": self._schedule.state_dict()["last_epoch"]}
        return {name: self._module.state_dict(), f"{name}_optimizer": moments}, {name: info}

    def load_state(self, name: str, checkpoint: Checkpoint) -> None:
        """Go on from what :meth:`state` gave, at the learning rates and weight decays of now."""
        info = checkpoint.info[name]
        groups: list[dict[str, Any]] = self._optimizer.optimizer.param_groups
        options = [{key: group[key] for key in ("initial_lr", "weight_decay")} for group in groups]
        self._module.load_state_dict(checkpoint.tensors[name])
        moments = checkpoint.tensors[f"{name}_optimizer"]
        unpack_optimizer(self._optimizer.optimizer, self.parameters, moments, info["optimizer"])
        self._schedule.load_state_dict({**self._schedule.state_dict(), "last_epoch": info["schedule"]})
        for group, option, factor in zip(groups, options, self._schedule.lr_lambdas, strict=True):
            group.update(option, lr=option["initial_lr"] * factor(info["schedule"]))

    def _check_finite(self, number: int, norm: Tensor) -> None:
        if torch.isfinite(norm):
            return
        if not self._accelerator.is_main_process:  # all have the same gradients
            leave()
        broken = (n for n, p in self.parameters.items() if p.grad is not None and not p.grad.isfinite().all())
        raise UserError(
            f"Step {number}: the gradient of '{next(broken, 'all')}' is not finite; nothing was saved since. Resume "
            "from the last checkpoint with a lower learning_rate, or with precision bf16 or fp32."
        )
