"""What one run paints, and where each picture stands when they are laid in a grid."""

import re
from dataclasses import dataclass

from dmm.cli.arguments import write_seeds
from dmm.cli.style_options import Style, pairs, write_style
from dmm.pipeline.style_schedule import StyleSchedule

WIDEST_ROW = 8  # pictures, where one prompt's seeds are wrapped


@dataclass(frozen=True)
class Picture:
    """One picture to paint, and the name of its file where it gets one of its own."""

    prompt: str
    seed: int
    style: Style | None
    file_name: str


@dataclass(frozen=True)
class Layout:
    """A grid: its labels, and which picture each cell shows, row by row; the last row may be short."""

    num_columns: int
    cells: list[int]
    row_labels: list[str]
    column_labels: list[str]

    @property
    def num_rows(self) -> int:
        """Rows, the short one counted."""
        return -(-len(self.cells) // self.num_columns)


def list_pictures(prompts: list[str], seeds: list[int], styles: list[Style] | list[None]) -> list[Picture]:
    """Every prompt with every seed in every style, in the order of painting."""
    return [
        Picture(prompt, seed, style, f"{i:04d}-seed{seed}{_suffix(style)}.png")
        for i, prompt in enumerate(prompts, 1)
        for seed in seeds
        for style in styles
    ]


def lay_out(prompts: list[str], seeds: list[int], styles: list[Style] | list[None]) -> Layout:
    """Several styles across, prompts and their seeds down; of one style or none, prompts down and seeds across.

    One prompt's many seeds are wrapped.
    """
    count = len(prompts) * len(seeds) * len(styles)
    cells = list(range(count))
    if len(styles) > 1:
        told = {"prompt": len(prompts) > 1 or len(seeds) == 1, "seed": len(seeds) > 1}
        rows = [
            ", ".join([*([prompt] if told["prompt"] else []), *([f"seed {seed}"] if told["seed"] else [])])
            for prompt in prompts
            for seed in seeds
        ]
        return Layout(len(styles), cells, rows, [_label(style or {}) for style in styles])
    if len(prompts) == 1 and len(seeds) > WIDEST_ROW:
        starts = range(0, len(seeds), WIDEST_ROW)
        rows = [f"seeds {write_seeds(seeds[start : start + WIDEST_ROW])}" for start in starts]
        return Layout(WIDEST_ROW, cells, rows, [])
    return Layout(len(seeds), cells, prompts, [f"seed {seed}" for seed in seeds])


def lay_out_pairs(names: list[str]) -> Layout:
    """All styles across and down, each two half and half where they meet; a pair's one picture stands there twice."""
    painted = {pair: i for i, pair in enumerate(pairs(names))}
    cells = [
        painted[pair if pair in painted else pair[::-1]] for pair in ((one, other) for one in names for other in names)
    ]
    return Layout(len(names), cells, names, names)


def stack(layout: Layout, names: list[str], first: str) -> Layout:
    """The same grid once for each name, one below the other, each row behind a further picture.

    Args:
        layout: of P pictures.
        names: N, told before the rows' labels.
        first: what the further pictures are called.
    Returns: a grid of N P pictures, the name's after those of the name before, and after them the N further ones.
    """
    count = max(layout.cells) + 1
    width = layout.num_columns if len(layout.cells) % layout.num_columns == 0 else len(layout.cells)
    starts = range(0, len(layout.cells), width)
    cells, labels = [], []
    for i, name in enumerate(names):
        for row, start in enumerate(starts):
            cells += [len(names) * count + i, *(i * count + cell for cell in layout.cells[start : start + width])]
            labels.append(f"{name}: {layout.row_labels[row]}".removesuffix(": "))
    return Layout(width + 1, cells, labels, [first, *layout.column_labels] if layout.column_labels else [])


def _label(style: Style) -> str:
    """A style for people: of a mix or a style over time, a line for each of its parts."""
    if isinstance(style, StyleSchedule):
        return write_style(style).replace(";", "\n").replace(",", "\n").replace(":", ": ")
    return "\n".join(name if weight == 1 else f"{name} {weight:.3g}" for name, weight in style.items())


def _suffix(style: Style | None) -> str:
    return "" if style is None else "-" + re.sub(r"[^\w.,=-]+", "-", write_style(style))
