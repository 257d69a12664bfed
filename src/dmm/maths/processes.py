"""What noises latents: the two processes that models are trained on, as tables of steps and what is done by them.

A step is a whole number from 0 on, drawn uniformly; its level is what the formulas are given, the signal power
alpha_bar or the spread sigma, and its timestep what a denoiser is told. Formulas stand in :mod:`dmm.maths.diffusion`
and :mod:`dmm.maths.flow`.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dmm.maths import diffusion, flow
from dmm.maths.diffusion import PredictionType


class Process(Protocol):
    """How clean latents become noise, T steps in order of growing noise."""

    @property
    def levels(self) -> Tensor:
        """(T,), of every step."""

    @property
    def timesteps(self) -> Tensor:
        """(T,), what a denoiser is told at every step: from 0 to the number that it was trained with."""

    @property
    def measured_as(self) -> PredictionType:
        """What predictions are compared as, whatever the models predict."""

    def add_noise(self, x_0: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """Noise latents, (B, C, H, W), to levels, (B,)."""

    def convert(
        self, model_output: Tensor, x_t: Tensor, levels: Tensor, source: PredictionType, target: PredictionType
    ) -> Tensor:
        """What a model of ``source`` type predicts, as one of ``target`` type would have said it: (B, C, H, W)."""

    def rediffuse(
        self,
        model_output: Tensor,
        x_t: Tensor,
        levels: Tensor,
        noise: Tensor,
        later: Tensor,
        prediction_type: PredictionType,
    ) -> Tensor:
        """The clean latents that a model predicts, noised again to later levels, (B,): (B, C, H, W)."""

    def score_weights(self, noise_weighting: float) -> Tensor:
        """(T,) of mean 1, by which the scores of samples at every step weigh."""


@dataclass(frozen=True)
class VariancePreserving:
    """DMM eq. 6: levels are the cumulative signal power.

    Attributes:
        levels: (T,), alphas_cumprod.
    """

    levels: Tensor
    measured_as: PredictionType = "epsilon"

    @property
    def timesteps(self) -> Tensor:
        """Steps as they are, (T,) int64."""
        return torch.arange(len(self.levels))

    def add_noise(self, x_0: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """:func:`dmm.maths.diffusion.add_noise`."""
        return diffusion.add_noise(x_0, noise, levels)

    def convert(
        self, model_output: Tensor, x_t: Tensor, levels: Tensor, source: PredictionType, target: PredictionType
    ) -> Tensor:
        """:func:`dmm.maths.diffusion.convert_prediction`."""
        return diffusion.convert_prediction(model_output, x_t, levels, source, target)

    def rediffuse(
        self,
        model_output: Tensor,
        x_t: Tensor,
        levels: Tensor,
        noise: Tensor,
        later: Tensor,
        prediction_type: PredictionType,
    ) -> Tensor:
        """:func:`dmm.maths.diffusion.rediffuse`."""
        return diffusion.rediffuse(model_output, x_t, levels, noise, later, prediction_type)

    def score_weights(self, noise_weighting: float) -> Tensor:
        """alpha_bar^-p over its mean."""
        weights = self.levels.double() ** -noise_weighting
        return (weights / weights.mean()).float()


@dataclass(frozen=True)
class RectifiedFlow:
    """Rectified flow: levels are sigmas.

    Attributes:
        levels: (T,), in (0, 1]; a density of draws is a table of its quantiles, see :func:`dmm.maths.flow.quantiles`.
    """

    levels: Tensor
    measured_as: PredictionType = "flow_prediction"

    @property
    def timesteps(self) -> Tensor:
        """1000 sigma, (T,) float32."""
        return 1000 * self.levels

    def add_noise(self, x_0: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """:func:`dmm.maths.flow.add_noise`."""
        return flow.add_noise(x_0, noise, levels)

    def convert(
        self, model_output: Tensor, x_t: Tensor, levels: Tensor, source: PredictionType, target: PredictionType
    ) -> Tensor:
        """The output itself: models of one flow all predict velocity."""
        assert source == target == "flow_prediction"
        return model_output

    def rediffuse(
        self,
        model_output: Tensor,
        x_t: Tensor,
        levels: Tensor,
        noise: Tensor,
        later: Tensor,
        prediction_type: PredictionType,
    ) -> Tensor:
        """:func:`dmm.maths.flow.rediffuse`."""
        assert prediction_type == "flow_prediction"
        return flow.rediffuse(model_output, x_t, levels, noise, later)

    def score_weights(self, noise_weighting: float) -> Tensor:
        """1 for all: velocity weighs noise by itself, and preflight takes no other weighting."""
        assert noise_weighting == 0
        return torch.ones_like(self.levels)
