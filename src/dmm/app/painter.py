"""The model behind the page: what is asked for is painted, with all settings in the picture, or exported."""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from dmm.app.controls import Controls, Shot, list_regions, list_shots
from dmm.app.jobs import Desk, Job
from dmm.app.painted import Painted
from dmm.app.uploads import check_picture
from dmm.cli.region_options import AskedRegion, to_pixels
from dmm.cli.style_options import write_style
from dmm.errors import UserError
from dmm.files.outputs import check_file
from dmm.files.parameters import Parameters, UsedLora
from dmm.files.pictures import encode_png
from dmm.pipeline.export import export_style
from dmm.pipeline.plugins import Start, add_plugins
from dmm.pipeline.regions import Region, paint_regions
from dmm.pipeline.sampling import picture_size, sample
from dmm.pipeline.style_schedule import StyleSchedule
from dmm.pipeline.styled import style_names


class Painter:
    """A merged model that paints for everybody who asks, one at a time.

    Args:
        pipe: a merged model, on its device.
        model: its name.
        model_hash: of :func:`dmm.files.parameters.model_hash`.
        loras: that are on it.
        exports: the folder that mixes may be written to; None where that was not allowed.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        model: str,
        model_hash: str | None = None,
        loras: Sequence[UsedLora] = (),
        exports: Path | None = None,
    ) -> None:
        self.model, self.exports = model, exports
        self.names = style_names(pipe)
        self.size = picture_size(pipe)
        self._pipe, self._model_hash, self._loras = pipe, model_hash, loras
        self._desk = Desk()

    def close(self) -> None:
        """Cancel what is being painted, and all that waits."""
        self._desk.is_closed.set()

    def paint(self, controls: Controls, image: Path | None = None, mask: Path | None = None) -> Job[list[Painted]]:
        """A job that paints what the controls ask for.

        Args:
            image: to begin with; its sides do not matter.
            mask: white where that is painted anew.
        Raises: UserError: they ask for what there is not.
        """
        shots = list_shots(controls)
        list_regions(controls)
        picture_size(self._pipe, controls.width, controls.height)
        if mask is not None and image is None:
            raise UserError("A mask is for an image to begin with: give that too, or take the mask away.")
        start = None
        if image is not None:
            for file in (image, *([mask] if mask else [])):
                check_picture(file)
            start = Start(image, controls.strength, mask)
        return Job(lambda advance: self._paint(controls, shots, start, advance), len(shots), self._desk)

    def export(self, controls: Controls, name: str) -> Job[Path]:
        """A job that writes the mix as an ordinary checkpoint, in half precision.

        Raises: UserError: that is not allowed, or the file is there already.
        """
        if self.exports is None:
            raise UserError("This server writes nothing: it was started without --exports.")
        if not re.fullmatch(r"\w[\w-]{0,63}", name):
            raise UserError("A file's name is of letters, digits, - and _, at most 64.")
        output = self.exports / f"{name}.safetensors"
        check_file(output)

        def work(_: Callable[[float], None]) -> Path:
            export_style(self._pipe, controls.mix, output, dtype=torch.float16)
            return output

        return Job(work, 1, self._desk)

    def _paint(
        self, controls: Controls, shots: Sequence[Shot], start: Start | None, advance: Callable[[float], None]
    ) -> list[Painted]:
        pipeline, inputs = add_plugins(self._pipe, start=start)
        size = controls.width, controls.height
        settings: dict[str, Any] = {
            "inputs": lambda count: inputs(count, size),
            "steps": controls.steps,
            "guidance_scale": controls.guidance,
            "negative_prompt": controls.negative.strip(),
            "width": controls.width,
            "height": controls.height,
            "sampler": controls.sampler,
            "progress": advance,
        }
        regions = [_in_pixels(region, *size) for region in list_regions(controls)]
        if regions:
            images: Iterable[Any] = (
                paint_regions(pipeline, regions, controls.prompt, style=shot.style, seed=shot.seed, **settings)
                for shot in shots
                if not isinstance(shot.style, StyleSchedule)
            )
        else:
            prompts, seeds = [controls.prompt] * len(shots), [shot.seed for shot in shots]
            images = sample(pipeline, prompts, seeds, styles=[shot.style for shot in shots], **settings)
        return [self._told(controls, shot, image, start) for shot, image in zip(shots, images, strict=True)]

    def _told(self, controls: Controls, shot: Shot, image: Any, start: Start | None) -> Painted:
        style, regions = write_style(shot.style), list_regions(controls)
        plugins = {"Denoising strength": f"{start.strength:g}"} if start else {}
        plugins |= {"Regions": "; ".join(map(str, regions))} if regions else {}
        parameters = Parameters(
            prompt=controls.prompt,
            negative_prompt=controls.negative.strip(),
            steps=controls.steps,
            sampler=controls.sampler,
            guidance_scale=controls.guidance,
            seed=str(shot.seed),
            width=controls.width,
            height=controls.height,
            model=self.model,
            model_hash=self._model_hash,
            style=style,
            loras=self._loras,
            plugins=plugins,
        )
        name = re.sub(r"[^\w.,=-]+", "-", f"{controls.prompt[:40]}-{style}-{shot.seed}").strip("-")
        return Painted(encode_png(image, parameters), shot.label, f"{name}.png")


def _in_pixels(region: AskedRegion, width: int, height: int) -> Region:
    assert not isinstance(region.area, Path)  # see list_regions
    return Region(to_pixels(region.area, width, height), region.style, region.prompt)
