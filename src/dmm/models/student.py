"""The student: a stock denoiser and the style prompts, which may grow and shrink, as one module that is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dmm.errors import UserError
from dmm.families import Family, ask
from dmm.maths.mixes import check_name
from dmm.models.adapters import Adapter, Factors
from dmm.models.features import BlockTap
from dmm.models.styles import StylePrompts, attach_styles, styled_port
from dmm.models.unfused import changes_of, set_changes


@dataclass(frozen=True)
class StudentOutput:
    """What the student says of B samples.

    Attributes:
        prediction: (B, C, H, W), of the student's prediction type.
        features: block name to (B, C_block, H_block, W_block).
    """

    prediction: Tensor
    features: dict[str, Tensor]


def grow(style_prompts: StylePrompts, names: Sequence[str]) -> StylePrompts:
    """Style prompts with further styles, whose rows are drawn as all rows once were; the earlier ones stay as they are.

    Args:
        names: of the styles that are new.
    Source: DMM §3.5.
    """
    grown = StylePrompts([*style_prompts.names, *names], style_prompts.config.dim)
    state = style_prompts.state_dict()
    earlier = state.pop("embeddings")
    with torch.no_grad():
        grown.embeddings[: len(earlier)] = earlier
    grown.load_state_dict({**state, "embeddings": grown.embeddings.detach()})
    grown.adapters = style_prompts.adapters
    return grown


def shrink(style_prompts: StylePrompts, name: str) -> StylePrompts:
    """Style prompts without one style; the others stay as they are.

    Raises: UserError: there is no style of that name, or no other.
    """
    names = style_prompts.names
    check_name(names, name)
    if len(names) == 1:
        raise UserError(f"'{name}' is the only style: without it nothing is left to choose from.")
    kept = [i for i, one in enumerate(names) if one != name]
    shrunk = StylePrompts([names[i] for i in kept], style_prompts.config.dim)
    shrunk.load_state_dict({**style_prompts.state_dict(), "embeddings": style_prompts.embeddings.detach()[kept]})
    shrunk.provenance = [one for one in style_prompts.provenance if one.name != name]
    shrunk.adapters = {of: adapter for of, adapter in style_prompts.adapters.items() if of != name}
    return shrunk


class StyledStudent(nn.Module):
    """Denoiser and style prompts as children of one module: what DDP wraps.

    Were the style term computed outside of the wrapped module, the codebook's gradient would never be
    synchronised.

    Args:
        denoiser: a stock one; styles are attached to it.
        style_prompts: as wide as its timestep embedding.
        family: the denoiser's.
    Raises: UserError: the widths differ.
    """

    def __init__(self, denoiser: Any, style_prompts: StylePrompts, family: Family) -> None:
        super().__init__()
        attach_styles(denoiser, style_prompts, family.port)
        self.unet = denoiser
        self.style_prompts = style_prompts
        self._tap = BlockTap(denoiser)

    def parameter_groups(self, rate: float, style_rate: float) -> list[tuple[nn.Module, float]]:
        """What is trained, and how fast."""
        return [(self.unet, rate), (self.style_prompts, style_rate)]

    def forward(
        self, x_t: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor], style_weights: Tensor
    ) -> StudentOutput:
        """Predict with a style for each sample.

        Args:
            x_t: (B, C, H, W).
            timesteps: (B,).
            conditioning: what the denoiser reads, by flat names, such as ``encoder_hidden_states``, (B, T, D).
            style_weights: (B, N).
        """
        port = styled_port(self.unet)
        assert port is not None
        port.term = self.style_prompts(style_weights)
        try:
            with self._tap.catch() as features:
                prediction = ask(self.unet, x_t, timesteps, conditioning, x_t.dtype)
        finally:
            port.term = None
        return StudentOutput(prediction, dict(features))


class TrainedAdapter(nn.Module):
    """A style's adapter as parameters, float32."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self._text = adapter.text  # goes along: text is encoded before training begins
        for name, one in adapter.factors.items():
            self.register_parameter(f"up:{_escaped(name)}", nn.Parameter(one.up.float().clone()))
            self.register_parameter(f"down:{_escaped(name)}", nn.Parameter(one.down.float().clone()))
        for name, offset in adapter.offsets.items():
            self.register_parameter(f"offset:{_escaped(name)}", nn.Parameter(offset.float().clone()))

    def adapter(self) -> Adapter:
        """What it holds now; gradients flow to its parameters."""
        parts: dict[str, dict[str, Tensor]] = {"up": {}, "down": {}, "offset": {}}
        for name, parameter in self.named_parameters():
            kind, _, of = name.partition(":")
            parts[kind][of.replace("/", ".")] = parameter
        factors = {name: Factors(up, parts["down"][name]) for name, up in parts["up"].items()}
        return Adapter(factors, parts["offset"], self._text)

    @torch.no_grad()
    def frozen(self) -> Adapter:
        """What it holds now, on the CPU, apart from what is trained further."""
        adapter = self.adapter()
        factors = {name: Factors(_apart(one.up), _apart(one.down)) for name, one in adapter.factors.items()}
        return Adapter(factors, {name: _apart(offset) for name, offset in adapter.offsets.items()}, self._text)


def _apart(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _escaped(name: str) -> str:
    return name.replace(".", "/")  # torch keeps the dot for submodules


class AdaptedStudent(nn.Module):
    """A model and the adapters of styles as one module, of which DDP and the optimizer see what is trained.

    Args:
        denoiser: a stock one, on the device and in the dtype that it shall compute in, where it is frozen.
        adapters: by style, in the order of the style weights.
        train_shared: train the denoiser's weights, too; else it is frozen, and no submodule.
    """

    def __init__(self, denoiser: Any, adapters: Mapping[str, Adapter], *, train_shared: bool = False) -> None:
        super().__init__()
        self.names = list(adapters)
        self.adapters = nn.ModuleList(TrainedAdapter(one) for one in adapters.values())
        if train_shared:
            self.unet = denoiser.requires_grad_()
        else:
            # __setattr__ would register it as a submodule: saved with every checkpoint, and sent to every process
            self.__dict__["unet"] = denoiser.eval().requires_grad_(False)
        self._train_shared = train_shared
        self._tap = BlockTap(denoiser)

    def parameter_groups(self, rate: float, style_rate: float) -> list[tuple[nn.Module, float]]:
        """What is trained, and how fast."""
        return [*([(self.unet, rate)] if self._train_shared else []), (self.adapters, style_rate)]

    def forward(
        self, x_t: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor], style_weights: Tensor
    ) -> StudentOutput:
        """Predict with a style for each sample; arguments as of :meth:`StyledStudent.forward`, of one-hot weights."""
        index = style_weights.argmax(1) if len(self.names) > 1 else None
        # they stay until the next call: where activations are computed again, that is in the backward pass
        set_changes(self.unet, changes_of([one.adapter() for one in self._trained()], index))
        with self._tap.catch() as features:
            prediction = ask(self.unet, x_t, timesteps, conditioning, x_t.dtype)
        return StudentOutput(prediction, dict(features))

    def adapter(self, name: str) -> Adapter:
        """What a style's adapter is now, apart from what is trained further."""
        return self._trained()[self.names.index(name)].frozen()

    def _trained(self) -> list[TrainedAdapter]:
        return [one for one in self.adapters if isinstance(one, TrainedAdapter)]
