"""What a merge distils: models' denoisers, or the ControlNets of one model.

The loop trains a module that has a port for styles; here is where it comes from, where it hangs while the run goes on,
and what becomes of it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from dmm.data.control_images import Condition
from dmm.families import Family, denoiser_of, set_denoiser
from dmm.files.outputs import new_folder
from dmm.files.runs import INDEX, NET_INDEX
from dmm.formats.schedules import predicted
from dmm.maths.diffusion import PredictionType
from dmm.models.controlnets import copy_of_encoder, open_controlnet, write_controlnet
from dmm.models.residuals import Residuals, measured
from dmm.models.styles import Provenance, StylePrompts, attach_styles, styled_port
from dmm.models.teachers import ModelSource, freeze, open_pipeline
from dmm.pipeline.styled import add_styles, save_pipeline, told_of_full_disk


class Subject(Protocol):
    """What is trained, of any kind."""

    index: str
    """The file of the result that comes last."""

    def of(self, base: Any) -> Any:
        """The module that the student begins as, or has become."""

    def put(self, base: Any, module: Any) -> None:
        """From now on that is the one."""

    def open(
        self, source: ModelSource, *, name: str | None = None, torch_dtype: torch.dtype = torch.float32
    ) -> tuple[Any, PredictionType | None]:
        """A teacher's, and what it predicts; None of what predicts nothing itself.

        Raises: UserError: something is wrong with its files.
        """

    def add_styles(self, base: Any, prompts: StylePrompts) -> None:
        """Put styles on the module that is trained."""

    def save(self, base: Any, folder: Path, provenance: Sequence[Provenance]) -> None:
        """Write it with its styles, whole or not at all.

        Raises: UserError: the folder cannot be written.
        """


class Denoisers:
    """Of pipelines."""

    index = INDEX

    def of(self, base: Any) -> Any:
        """The base's denoiser."""
        return denoiser_of(base)

    def put(self, base: Any, module: Any) -> None:
        """Give the base another."""
        set_denoiser(base, module)

    def open(
        self, source: ModelSource, *, name: str | None = None, torch_dtype: torch.dtype = torch.float32
    ) -> tuple[Any, PredictionType | None]:
        """A pipeline's."""
        pipeline = open_pipeline(source, torch_dtype=torch_dtype, name=name)
        return denoiser_of(pipeline), predicted(pipeline.scheduler.config)

    def add_styles(self, base: Any, prompts: StylePrompts) -> None:
        """On the base."""
        add_styles(base, prompts)

    def save(self, base: Any, folder: Path, provenance: Sequence[Provenance]) -> None:
        """The base and its styles."""
        save_pipeline(base, folder, provenance=provenance)


class Controls:
    """ControlNets of one model, compared by their residuals.

    Args:
        family: of the model.
        teachers: the ControlNets' folders.
        conditions: what each is shown.
        prediction: see :class:`dmm.models.residuals.Residuals`.

    Attributes:
        residuals: how they are compared, once the base is there.
    """

    index = NET_INDEX

    def __init__(
        self, family: Family, teachers: Sequence[ModelSource], conditions: dict[str, Condition], prediction: float
    ) -> None:
        self.conditions, self.residuals = conditions, Residuals()
        self._family, self._teachers, self._prediction = family, teachers, prediction
        self._net: Any = None

    def of(self, base: Any) -> Any:
        """At first the copy of the base's encoder."""
        if self._net is None:
            self.residuals = Residuals(freeze(denoiser_of(base)), self._prediction)
            opened = (open_controlnet(Path(source.model), self._family) for source in self._teachers)
            self._net = measured(copy_of_encoder(opened, denoiser_of(base)), self.residuals)
        return self._net

    def put(self, base: Any, module: Any) -> None:
        """It hangs here: the base guides nothing itself."""
        self._net = module

    def open(
        self, source: ModelSource, *, name: str | None = None, torch_dtype: torch.dtype = torch.float32
    ) -> tuple[Any, PredictionType | None]:
        """A ControlNet, which says its residuals."""
        net = open_controlnet(Path(source.model), self._family, torch_dtype=torch_dtype)
        return measured(net, self.residuals), None

    def add_styles(self, base: Any, prompts: StylePrompts) -> None:
        """On the ControlNet."""
        attach_styles(self._net, prompts, self._family.port)

    def save(self, base: Any, folder: Path, provenance: Sequence[Provenance]) -> None:
        """A stock ControlNet's folder, with its styles."""
        port = styled_port(self._net)
        assert port is not None
        port.style_prompts.provenance = provenance
        with new_folder(folder) as temporary, told_of_full_disk(folder):
            write_controlnet(self._net, port.style_prompts, temporary, self._family)
