"""What the page's controls ask for, which pictures that is, and the controls that a picture was made with."""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dmm.app.mixing import settle
from dmm.cli.arguments import MAX_SEED, read_seeds
from dmm.cli.region_options import AskedRegion, read_region
from dmm.cli.style_options import Style, read_style, write_style
from dmm.errors import UserError
from dmm.maths.mixes import mix_weights
from dmm.pipeline.samplers import DEFAULT_SAMPLER, SAMPLERS, check_multiple, check_settings
from dmm.pipeline.style_schedule import StyleSchedule

PICTURES, STYLES, STRIP, OVER_TIME = "pictures", "every style", "strip", "over time"
WHAT = (PICTURES, STYLES, STRIP, OVER_TIME)
"""What is painted: pictures in the mix, one in each style, from the mix to another style, the mix and then another."""
MAX_COUNT = 16
MAX_STEPS = 150
MAX_SIDE = 2048
MAX_TEXT = 10_000
"""Of a request: one painting may take minutes, not hours."""


@dataclass(frozen=True)
class Controls:
    """The page's controls; the defaults are where they stand at first.

    Attributes:
        weights: of the mix, by style.
        what: one of :data:`WHAT`.
        other: the style that a strip leads to, or that comes later.
        at: where it comes, as a share of the steps.
        count: pictures, each with a seed of its own; of a strip, its length.
        strength: how much of an image to begin with is painted over.
        regions: a line each, as ``dmm generate --region`` takes boxes.
    """

    prompt: str = ""
    negative: str = ""
    seed: int = 0
    count: int = 1
    steps: int = 25
    guidance: float = 7.0
    sampler: str = DEFAULT_SAMPLER
    width: int = 512
    height: int = 512
    what: str = PICTURES
    other: str = ""
    at: float = 0.4
    strength: float = 0.75
    regions: str = ""
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def mix(self) -> dict[str, float]:
        """The styles that take part, by weight."""
        return {name: weight for name, weight in self.weights.items() if weight}


@dataclass(frozen=True)
class Shot:
    """A picture to be painted, and what stands under it."""

    seed: int
    style: Style
    label: str


def read_controls(values: Mapping[str, Any], weights: Mapping[str, Any]) -> Controls:
    """Controls of what a request holds, which may be anything.

    Raises: UserError: a value is missing, of another kind, or out of range.
    """
    read: dict[str, Any] = {}
    for one in fields(Controls):
        if one.name == "weights":
            continue
        kind, value = type(one.default), values.get(one.name)
        read[one.name] = _text(one.name, value) if kind is str else _number(one.name, value, whole=kind is int)
    mix = {str(name): float(_number(f"weight of {name}", weight)) for name, weight in weights.items()}
    controls = Controls(**read, weights=mix)
    _check(controls)
    return controls


def list_shots(controls: Controls) -> list[Shot]:
    """The pictures that the controls ask for, in order.

    Raises: UserError: there is no such style, or weights do not sum to 1.
    """
    names, mix, seed = list(controls.weights), controls.mix, controls.seed
    if controls.what == STYLES:
        return [Shot(seed, {name: 1.0}, name) for name in names]
    mix_weights(names, mix)
    if controls.what == PICTURES:
        return [Shot(seed + i, mix, f"seed {seed + i}") for i in range(controls.count)]
    other = {controls.other: 1.0}
    mix_weights(names, other)
    if controls.what == OVER_TIME:
        style: Style = mix
        if controls.at == 0:
            style = other
        elif controls.at < 1:
            style = StyleSchedule([(0, controls.at, mix), (controls.at, 1, other)])
        return [Shot(seed + i, style, f"seed {seed + i}") for i in range(controls.count)]
    if controls.count < 2:
        raise UserError("A strip has two ends: ask for at least 2 pictures.")
    shots = []
    for i in range(controls.count):
        share = i / (controls.count - 1)
        between = {name: (1 - share) * mix.get(name, 0.0) + share * other.get(name, 0.0) for name in names}
        shots.append(Shot(seed, {name: weight for name, weight in between.items() if weight}, f"{share:.0%}"))
    return shots


def list_regions(controls: Controls) -> list[AskedRegion]:
    """The regions that the controls ask for; elsewhere the mix holds.

    Raises: UserError: a line is none, names a file, or asks for a style that there is not; or what is painted changes
        style, which regions do not.
    """
    regions = []
    for line in filter(None, map(str.strip, controls.regions.splitlines())):
        try:
            region = read_region(line)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"Regions: {error}.") from error
        if isinstance(region.area, Path):  # files of the server are not for those who ask
            raise UserError(f"Regions: '{line}' is no box; write x0,y0,x1,y1:STYLE or x0,y0,x1,y1:STYLE:PROMPT.")
        mix_weights(list(controls.weights), region.style)
        regions.append(region)
    if len(regions) > MAX_COUNT:
        raise UserError(f"At most {MAX_COUNT} regions are painted.")
    if regions and controls.what == OVER_TIME:
        raise UserError("With regions, the mix is what holds elsewhere, at all times: paint pictures or a strip.")
    return regions


def restore_controls(told: Mapping[str, str], names: Sequence[str], present: Controls) -> Controls:
    """The controls that a picture was made with.

    Args:
        told: the picture's ``parameters``.
        names: of the model's styles.
        present: what stays as it is where the picture does not tell.
    Raises: UserError: they are damaged, or ask for a style that this model does not have.
    """
    width, _, height = told.get("Size", f"{present.width}x{present.height}").partition("x")
    try:
        seeds = read_seeds(told.get("Seed", str(present.seed)))
        style = read_style(told["Style"].split("; ")[0]) if "Style" in told else None
    except argparse.ArgumentTypeError as error:
        raise UserError(f"The picture's parameters cannot be read: {error}.") from error
    values: dict[str, Any] = {one.name: getattr(present, one.name) for one in fields(Controls)}
    values |= {
        "prompt": told.get("Prompt", ""),
        "negative": told.get("Negative prompt", ""),
        "seed": seeds[0],
        "count": len(seeds),
        "steps": told.get("Steps", present.steps),
        "guidance": told.get("CFG scale", present.guidance),
        "sampler": told.get("Sampler", present.sampler),
        "strength": told.get("Denoising strength", present.strength),
        "width": width,
        "height": height,
        "what": PICTURES,
        "regions": told.get("Regions", "").replace("; ", "\n"),
    }
    weights = {name: present.weights.get(name, 0.0) for name in names}
    if isinstance(style, StyleSchedule):
        (_, at, mix), (_, _, other) = style.parts[0], style.parts[-1]
        if len(style.parts) != 2 or not isinstance(mix, Mapping) or not isinstance(other, Mapping) or len(other) != 1:
            raise UserError(
                f"The picture's style over time, {write_style(style)}, is more than these controls can say."
            )
        mix_weights(names, other)
        values |= {"what": OVER_TIME, "at": at, "other": next(iter(other))}
        style = dict(mix)
    if style is not None:
        weights = dict(zip(names, settle(mix_weights(names, style)), strict=True))
    return read_controls(values, weights)


def _check(controls: Controls) -> None:
    check_settings(steps=controls.steps, guidance_scale=controls.guidance, negative_prompt=controls.negative.strip())
    for name, value, least, most in (
        ("number of pictures", controls.count, 1, MAX_COUNT),
        ("number of steps", controls.steps, 1, MAX_STEPS),
        ("seed", controls.seed, 0, MAX_SEED - MAX_COUNT),
        ("guidance", controls.guidance, 1, 100),
        ("width", controls.width, 8, MAX_SIDE),
        ("height", controls.height, 8, MAX_SIDE),
        ("strength", controls.strength, 0.01, 1),
        ("share of the steps", controls.at, 0, 1),
    ):
        if not least <= value <= most:
            raise UserError(f"The {name} is from {least:g} to {most:g}; {value:g} was asked for.")
    check_multiple("width", controls.width, 8)
    check_multiple("height", controls.height, 8)
    for name, chosen, known in (("sampler", controls.sampler, SAMPLERS), ("kind", controls.what, WHAT)):
        if chosen not in known:
            raise UserError(f"There is no {name} '{chosen[:100]}'; choose from {', '.join(known)}.")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str | None) or len(value or "") > MAX_TEXT:
        raise UserError(f"The {name} is a text of at most {MAX_TEXT:,} characters.")
    return value or ""


def _number(name: str, value: Any, *, whole: bool = False) -> float | int:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or (whole and number != int(number)):
        raise UserError(f"The {name} is a {'whole ' if whole else ''}number; {str(value)[:100]!r} is none.")
    return int(number) if whole else number
