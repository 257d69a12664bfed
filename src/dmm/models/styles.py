"""Style prompts: the only new parameters of a merged model, and how they reach a stock one.

A merged model is a stock diffusers model plus a side-car of N learned vectors e_i, the style prompts,
and an MLP. To paint in a style, or a mix with weights w, the vector

    MLP(sum_i w_i e_i)

is added to the embedding of the timestep (DMM §3.3, §A.1). For fixed weights it is a constant, so it
can also be baked into a bias, or, where there is none, into a weight, which leaves an ordinary checkpoint.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from dmm.errors import UserError
from dmm.families.ports import all_timesteps, hidden
from dmm.maths.mixes import Mix, mix_weights
from dmm.maths.rank_one import constant_direction
from dmm.models.adapters import Adapter, Factors
from dmm.models.adapting import Adaptation

MAX_ERROR = 1e-3
"""Of a term, relative: above it a term is no change of rank one. Rounding weights to float16 costs as much."""


@dataclass(frozen=True)
class Provenance:
    """Where a style came from."""

    name: str
    """Of the style."""
    source: str
    """Its teacher: the file, folder or hub id."""
    sha256: str
    """Of the teacher's file, or of its folder's denoiser weights."""
    family: str
    """A key of ``dmm.families.FAMILIES``."""
    prediction_type: str
    """What the teacher predicts."""


class StylePrompts(ModelMixin, ConfigMixin):
    """A codebook of N style prompts and the MLP that aligns them with the timestep embedding.

    The codebook starts as N(0, 1), the MLP as PyTorch's default: the paper's rows have norms of about
    36, the square root of 1280, after training as such a start has before it (seed for seed).

    Args:
        names: of the N styles, in the order of the codebook's rows.
        dim: D, the width of the model's timestep embedding; 1280 in most UNets. 0 where styles are adapters alone, and
            have no prompt.
    Source: DMM §3.3, §A.1.
    """

    provenance: Sequence[Provenance] = ()
    """Where each style came from, in the order of the names; empty where that is not known."""
    adapters: Mapping[str, Adapter] = MappingProxyType({})
    """What a style changes of the weights, where it brings that, too."""

    @register_to_config
    def __init__(self, names: Sequence[str], dim: int = 1280) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(torch.randn(len(names), dim))
        self.linear_1 = nn.Linear(dim, dim) if dim else nn.Identity()
        self.act = nn.SiLU()
        self.linear_2 = nn.Linear(dim, dim) if dim else nn.Identity()

    @property
    def names(self) -> list[str]:
        """The styles' names, in the order of the codebook's rows."""
        return list(self.config.names)

    def forward(self, style_weights: Tensor) -> Tensor:
        """The style term of each mix.

        The mix is taken before the MLP: the midpoint of two styles is the term of the mean of their prompts.

        Args:
            style_weights: (..., N), each row summing to 1.
        Returns: (..., D).
        """
        mixed = style_weights.to(self.embeddings.dtype) @ self.embeddings
        term: Tensor = self.linear_2(self.act(self.linear_1(mixed)))
        return term


class StyledLinear(nn.Linear):
    """The last linear layer of what embeds time, which also adds the current style term.

    Its parameters are those of the layer that it was, under the same names, so that the model saves, loads and trains
    as if it were stock. The side-car and the term are plain attributes: what is no submodule is not saved with the
    model, and what is no buffer is not made equal across processes by DDP.
    """

    style_prompts: StylePrompts
    term: Tensor | None
    adaptation: Adaptation
    guided: Callable[[], bool]
    """Whether the images that are painted now stand in a batch more than once each, for guidance."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, ..., D_in) to (B, ..., D), with the style term where one is set.

        Raises: ValueError: the term is of S styles and B is not S, 2 S or 3 S (guidance makes blocks of S), or S under
            guidance.
        """
        embedding = super().forward(input)
        if self._num_chosen == len(embedding) and self.guided():
            raise ValueError(
                f"{len(embedding)} styles were set, one for each image, and the images of a batch are "
                f"{len(embedding) // 2}, under guidance: set one style for all, or as many as prompts x images per "
                "prompt, on the pipeline that paints."
            )
        if self.term is None:
            return embedding
        term = self.term.to(embedding)  # its device, too: offloading moves parameters only
        if term.ndim == 2:
            blocks, rest = divmod(len(embedding), len(term))
            if rest or not 1 <= blocks <= 3:
                size = len(embedding)
                # guidance is the pipeline's business: only it knows whether half of these are without the prompt
                images = f"{size // 2} under guidance, {size} without" if size % 2 == 0 else f"{size}"
                raise ValueError(
                    f"{len(term)} styles were set, one for each image, and the images of a batch are {images}: set one "
                    "style for all, or as many as prompts x images per prompt."
                )
            term = term.repeat(blocks, 1)
            term = term.reshape(len(term), *(1,) * (embedding.ndim - 2), -1)
        return embedding + term

    @property
    def _num_chosen(self) -> int | None:
        """Of styles, where each image has one of its own."""
        if self.term is not None and self.term.ndim == 2:
            return len(self.term)
        chosen = self.adaptation.chosen
        return len(chosen) if isinstance(chosen, Sequence) and not isinstance(chosen, str) else None

    def _apply(self, fn: Any, recurse: bool = True) -> "StyledLinear":
        super()._apply(fn, recurse)
        if self.term is not None:
            self.term = fn(self.term)
        self.style_prompts._apply(fn, recurse)
        return self


def attach_styles(model: Any, style_prompts: StylePrompts, port: str) -> None:
    """Let a diffusers model take style terms; until one is set its output does not change by a bit.

    Args:
        model: a denoiser or a ControlNet; any model one of whose modules embeds time.
        port: the path of that module's last linear layer, which becomes a :class:`StyledLinear` in place.
    Raises: UserError: the layer's width is not that of the style prompts.
    """
    linear = model.get_submodule(port)
    if style_prompts.config.dim not in (0, linear.out_features):
        raise UserError(
            f"The style prompts are {style_prompts.config.dim} wide, the model's timestep embedding "
            f"{linear.out_features}: they belong to another model."
        )
    linear.__class__ = StyledLinear
    vars(linear)["style_prompts"] = style_prompts  # __setattr__ would register the side-car as a submodule
    linear.term = None
    linear.adaptation = Adaptation()
    linear.guided = bool  # nothing is known of it: False


def styled_port(model: nn.Module) -> StyledLinear | None:
    """The layer of ``model`` that takes style terms; None where :func:`attach_styles` has not been."""
    return next((module for module in model.modules() if isinstance(module, StyledLinear)), None)


def style_weights(names: Sequence[str], style: Mix | Sequence[Mix]) -> Tensor:
    """Styles by name as weights.

    Args:
        names: the N styles that there are.
        style: one style, or a mix; or a list of these, one for each image.
    Returns: (N,), or (S, N) for a list of S; float32.
    Raises: UserError: there is no style of that name; weights are not finite numbers that sum to 1; an empty list.
    """
    if not isinstance(style, str | Mapping) and isinstance(style, Sequence):
        if not style:
            raise UserError("A list of styles needs one style for each image; this one is empty.")
        return torch.stack([style_weights(names, one) for one in style])
    return torch.tensor(mix_weights(names, style))


@torch.no_grad()
def bake(model: Any, term: Tensor, port: str) -> None:
    """Put a style term into the layer after which it would be added; the model is then stock and paints that style.

    Args:
        model: a diffusers model as for :func:`attach_styles`, changed in place; attached styles are taken off.
        term: (D,), of :class:`StylePrompts`.
        port: see :func:`attach_styles`.
    Raises: UserError: see :func:`term_change`.
    """
    detach_styles(model)
    change = term_change(model, term, port)
    for name, difference in change.offsets.items():
        model.get_parameter(name).add_(difference.to(model.get_parameter(name)))
    for name, factors in change.factors.items():
        weight = model.get_parameter(name)
        # summed in float64, rounded once
        weight.copy_(weight.double() + (factors.up @ factors.down).to(weight.device))


def term_change(model: Any, term: Tensor, port: str) -> Adapter:
    """A style term as a change of weights: of the layer's bias, or, where it has none, of rank one.

    Args: see :func:`bake`.
    Raises: UserError: the layer has no bias, and is too narrow for a constant to be a change of its weight.
    """
    linear = model.get_submodule(port)
    if linear.bias is not None:
        return Adapter({}, {f"{port}.bias": term})
    direction, error = constant_of(model, port)
    if error > MAX_ERROR:
        raise UserError(
            f"The layer that embeds time has no bias, and with {linear.in_features} numbers is too narrow for a style "
            f"to be put into its weight (the error would be {error:.1%}). Use the style by its name, or as an adapter."
        )
    return Adapter({f"{port}.weight": Factors(term.double().cpu()[:, None], direction[None])}, {})


def constant_of(model: Any, port: str) -> tuple[Tensor, float]:
    """The u of :mod:`dmm.maths.rank_one` for the layer at a port.

    Returns: (D,), float64; and the largest ``|u . h - 1|``, at timesteps between those that it was found by, too: the
        relative error of every term.
    """
    direction = constant_direction(hidden(model, port, all_timesteps(2)))
    return direction, float((hidden(model, port, all_timesteps(4)) @ direction - 1).abs().max())


def detach_styles(model: nn.Module) -> None:
    """Undo :func:`attach_styles`: the model is stock again."""
    linear: nn.Linear | None = styled_port(model)
    if linear is not None:
        for name in ("style_prompts", "term", "adaptation"):
            del vars(linear)[name]
        linear.__class__ = nn.Linear
