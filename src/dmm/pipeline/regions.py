"""Pictures whose regions have styles and prompts of their own, and pictures wider than the model's.

The denoiser of a pipeline is stood in for by one that cuts the canvas into overlapping tiles, asks the model for every
region that reaches into a tile, in the region's style, and adds up what it says, weighed by the regions' masks and by
each tile's window. A canvas of the model's own size is one tile. Since the mixing is of predictions, every sampler
and every way to begin works as it does without.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dmm.errors import UserError
from dmm.families import arguments, denoiser_of, family_of, set_denoiser
from dmm.maths.canvas import WINDOWS, Box, box_mask, region_weights, tile_starts
from dmm.maths.mixes import Mix
from dmm.models.conditioning import encode_captions, encode_tokens, tokenize
from dmm.pipeline.choosing import temporarily
from dmm.pipeline.reading import reads_otherwise
from dmm.pipeline.sampling import picture_size, sample, usual_batch_size
from dmm.pipeline.style_schedule import check_style
from dmm.pipeline.styled import style_names, style_prompts_of, temporary_style

FEATHER = 1.0
"""Standard deviation, in latent pixels, of the blur that softens the regions' borders."""
WHOLE = 1.5
"""How many times the model's own sides a canvas may measure before it is painted in tiles: beyond, models repeat."""


@dataclass(frozen=True)
class Region:
    """A part of the picture with a style, and perhaps a prompt, of its own."""

    area: Box | Image.Image
    """A box in pixels: x0, y0, x1, y1; or a grey picture of the canvas's size, white where the region is."""
    style: Mix | None
    """A style, a mix, or none."""
    prompt: str | None = None
    """By default that of the whole picture."""


@dataclass(frozen=True)
class _Layer:
    """What is painted with one style and prompt: (h, w) weights on the latent canvas."""

    weights: Tensor
    style: Mix | None
    conditioning: Mapping[str, Any] | None


def paint_regions(
    pipe: Any,
    regions: Sequence[Region],
    prompt: str,
    *,
    style: Mix | None = None,
    seed: int = 0,
    width: int | None = None,
    height: int | None = None,
    feather: float = FEATHER,
    tile: int | None = None,
    overlap: float = 0.5,
    window: str = "mixture",
    clip_skip: int | None = None,
    batch_size: int | None = None,
    progress: Callable[[float], object] | None = None,
    **settings: Any,
) -> Image.Image:
    """One picture whose regions are painted in styles and prompts of their own.

    Args:
        pipe: a merged model; it is left as it was.
        regions: where they overlap they share, and what none covers is painted in ``style``. As many passes through
            the model as regions reach into a tile.
        prompt: of the picture, and of regions without one.
        style: of what no region covers.
        width, height: of the canvas, in pixels; by default the model's own.
        feather: how soft the regions' borders are, see :func:`dmm.maths.canvas.region_weights`.
        tile: pixels a side of the tiles; by default the model's own size where a side of the canvas is more than
            :data:`WHOLE` times as long, and no tiles elsewhere. Memory grows with the tile, not with the canvas.
        overlap: the share of a tile that the next one covers again, in [0, 0.9].
        window: a key of :data:`dmm.maths.canvas.WINDOWS`: how a tile's predictions are weighed.
        clip_skip: see :func:`dmm.pipeline.sampling.sample`.
        batch_size: passes at a time; by default as many tiles as make up four of 512 x 512.
        settings: further ones of :func:`dmm.pipeline.sampling.sample`.
    Raises: UserError: the pipeline has no styles, there is none of that name, weights do not sum to 1, or a region is
        empty or lies outside of the canvas.
    Source: DMM §4.5; MultiDiffusion (arXiv:2302.08113); Mixture of Diffusers (arXiv:2302.02412).
    """
    if not family_of(pipe).takes_regions:
        raise UserError(
            f"Regions are cut out of latents, and {family_of(pipe).title} passes its own as tokens: paint the whole "
            "picture in one style or mix."
        )
    names = style_names(pipe)
    for one in (style, *(region.style for region in regions)):
        check_style(names, one)
    if window not in WINDOWS:
        raise UserError(f"There is no window '{window}'; choose from {', '.join(WINDOWS)}.")
    if not 0 <= overlap <= 0.9:
        raise UserError(f"The overlap of tiles is a share from 0 to 0.9, not {overlap:g}.")
    width, height = picture_size(pipe, width, height)
    everything = Region((0, 0, width, height), style)
    regions = regions or [everything]
    masks = torch.stack([_mask(region, width, height) for region in regions])
    factor = pipe.vae_scale_factor
    weights = region_weights(masks, factor, feather)
    layers = [
        _Layer(layer, one.style, _read(pipe, one, prompt, settings.get("negative_prompt", ""), clip_skip))
        for layer, one in zip(weights, (*regions, everything), strict=True)
        if layer.any()
    ]
    sides = _tile_sides(pipe, width, height, tile)
    if sides != (width, height) and hasattr(pipe, "controlnet"):
        raise UserError(
            f"A ControlNet sees a whole canvas, and one of {width} x {height} pixels is painted in tiles: leave it "
            "out, or make the canvas smaller."
        )
    rows = _rows(layers, sides[1] // factor, sides[0] // factor, overlap, WINDOWS[window])
    ours = copy.copy(pipe)
    regional = _RegionalDenoiser(pipe, rows, batch_size or usual_batch_size(*sides))
    set_denoiser(ours, _stand_in(denoiser_of(pipe), regional))
    # what layers do not read themselves, the pipeline reads without a style
    with temporary_style(pipe, None), _tiled_vae(pipe.vae, is_tiled=sides != (width, height)):
        (picture,) = sample(
            ours, [prompt], [seed], width=width, height=height, clip_skip=clip_skip, progress=progress, **settings
        )
    return picture


@dataclass(frozen=True)
class _Row:
    """One pass through the model: a tile of the canvas in one layer."""

    place: tuple[slice, slice]
    layer: _Layer
    weights: Tensor
    """(h, w), of what is predicted for the tile: the tile's window times the layer's weights."""


def _rows(
    layers: Sequence[_Layer], tile_height: int, tile_width: int, overlap: float, window: Callable[[int, int], Tensor]
) -> list[_Row]:
    height, width = layers[0].weights.shape
    window_of_tile = window(tile_height, tile_width)
    starts = (
        tile_starts(side, tile, max(1, round(tile * (1 - overlap))))
        for side, tile in ((height, tile_height), (width, tile_width))
    )
    rows = []
    for top, left in product(*starts):
        place = slice(top, top + tile_height), slice(left, left + tile_width)
        rows += [_Row(place, layer, window_of_tile * layer.weights[place]) for layer in layers]
    return [row for row in rows if row.weights.any()]


class _RegionalDenoiser:
    """What a pipeline calls in its denoiser's place.

    Args:
        pipe: whose denoiser is asked.
        rows: what it is asked for.
        batch_size: rows at a time.
    """

    def __init__(self, pipe: Any, rows: Sequence[_Row], batch_size: int) -> None:
        self._pipe = pipe
        self._batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]

    def __call__(
        self, sample: Tensor | None = None, timestep: Any = None, *args: Any, **arguments: Any
    ) -> tuple[Tensor]:
        """The model's prediction of a canvas, (G, C, H, W), one picture in G parts of guidance, the prompt's last.

        A UNet's pipeline gives the canvas by its place, and one timestep; a transformer's by name, and one for each
        part.
        """
        by_name = sample is None
        sample = arguments.pop("hidden_states") if sample is None else sample
        num_parts = len(sample)
        predicted = torch.zeros_like(sample, dtype=torch.float32)
        counted = torch.zeros_like(predicted[:1, :1])
        for rows in self._batches:
            # by guidance first, then by row: the order that a list of styles has
            tiles = torch.stack([sample[(slice(None), slice(None), *row.place)] for row in rows], 1).flatten(0, 1)
            read = [_conditioning(row.layer.conditioning, arguments, num_parts) for row in rows]
            denoiser, more = denoiser_of(self._pipe), _stack(read)
            with temporarily(denoiser, [row.layer.style for row in rows]):
                if by_name:
                    output = denoiser(hidden_states=tiles, timestep=timestep[:1].expand(len(tiles)), **more)[0]
                else:
                    output = denoiser(tiles, timestep, *args, **more)[0]
            for row, of_row in zip(rows, output.unflatten(0, (num_parts, len(rows))).unbind(1), strict=True):
                weights = row.weights.to(predicted)
                predicted[(slice(None), slice(None), *row.place)] += weights * of_row.float()
                counted[(slice(None), slice(None), *row.place)] += weights
        return ((predicted / counted).to(sample.dtype),)


def _stand_in(denoiser: Any, forward: Callable[..., tuple[Tensor]]) -> Any:
    """What looks like a denoiser to a pipeline, and answers as ``forward`` does."""
    stand_in = copy.copy(denoiser)
    stand_in.forward = forward
    # hooks see what the denoiser itself is asked, not this
    stand_in._forward_pre_hooks, stand_in._forward_hooks = {}, {}
    return stand_in


def _conditioning(own: Mapping[str, Any] | None, given: Mapping[str, Any], num_parts: int) -> dict[str, Any]:
    """The arguments of a pass: what the pipeline gives, but for the last parts of guidance, a prompt of one's own and
    perhaps what that leads away from.
    """
    if own is None:
        return dict(given)
    merged = dict(given)
    for name, value in own.items():
        if isinstance(value, Mapping):
            merged[name] = _conditioning(value, given[name], num_parts)
        else:
            own_parts = value[-num_parts:].to(given[name])
            merged[name] = torch.cat([given[name][: num_parts - len(own_parts)], own_parts])
    return merged


def _stack(arguments: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The arguments of several passes as those of one batch, by guidance first."""
    return {name: _together([one[name] for one in arguments]) for name in arguments[0]}


def _together(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor) and first.ndim:
        return torch.stack(list(values), 1).flatten(0, 1)
    if isinstance(first, Mapping):
        return _stack(values)
    if isinstance(first, list | tuple):
        return type(first)(_together(of_all) for of_all in zip(*values, strict=True))
    return first


def _read(pipe: Any, region: Region, prompt: str, negative: str, clip_skip: int | None) -> Mapping[str, Any] | None:
    """What a region's pass reads that the others do not: its own prompt, or all, where its style reads otherwise."""
    given = region.prompt if region.prompt is not None else prompt
    if reads_otherwise(style_prompts_of(pipe), region.style):
        with temporary_style(pipe, region.style):
            led_away, led_to = encode_captions(pipe, [negative], clip_skip), _tokens_read(pipe, given, clip_skip)
        return arguments({name: torch.cat([led_away[name], led_to[name]]) for name in led_to})
    return None if region.prompt is None else arguments(_tokens_read(pipe, given, clip_skip))


def _tokens_read(pipe: Any, prompt: str, clip_skip: int | None) -> dict[str, Tensor]:
    return encode_tokens(pipe, tokenize(pipe, [prompt]), clip_skip)


def _mask(region: Region, width: int, height: int) -> Tensor:
    """(height, width) in [0, 1].

    Raises: UserError: the region is empty, leaves the canvas, or is a mask of another size.
    """
    if isinstance(region.area, Image.Image):
        if region.area.size != (width, height):
            raise UserError(
                f"A region's mask is {region.area.width} x {region.area.height} pixels, the picture is {width} x "
                f"{height}: give one of the picture's size."
            )
        mask = torch.frombuffer(bytearray(region.area.convert("L").tobytes()), dtype=torch.uint8)
        mask = mask.view(height, width) / 255
        if not mask.any():
            raise UserError("A region's mask is black all over: white is where the region is.")
        return mask
    x0, y0, x1, y1 = region.area
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise UserError(
            f"A region is {x0:g},{y0:g},{x1:g},{y1:g}, expected x0 < x1 and y0 < y1 within the picture's {width} x "
            f"{height} pixels."
        )
    return box_mask(region.area, height, width)


def _tile_sides(pipe: Any, width: int, height: int, tile: int | None) -> tuple[int, int]:
    """Width and height, in pixels, of the tiles: of the whole canvas where it needs none."""
    if tile is not None:
        own = picture_size(pipe, tile, tile)
    else:
        own = picture_size(pipe)
        if width <= WHOLE * own[0] and height <= WHOLE * own[1]:
            return width, height
    return min(width, own[0]), min(height, own[1])


@contextmanager
def _tiled_vae(vae: Any, *, is_tiled: bool) -> Iterator[None]:
    """Within the block, the VAE decodes in tiles, too: of twice its own size, whose seams do not show."""
    names = ("use_tiling", "tile_sample_min_size", "tile_latent_min_size")
    before = {name: getattr(vae, name) for name in names}
    if is_tiled:
        vae.use_tiling = True
        vae.tile_sample_min_size *= 2
        vae.tile_latent_min_size *= 2
    try:
        yield
    finally:
        vars(vae).update(before)
