"""Figures of a report, by matplotlib: the FID matrix beside its reference (DMM fig. 4), the score error over time."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmm.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_ANNOTATED = 16  # styles; more, and the numbers in the cells cannot be read


@contextmanager
def new_figure(path: Path, width: float, height: float) -> Iterator["Figure"]:
    """An empty figure of that many inches, which is written to ``path`` as PNG at the end of the block."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UserError("Figures need matplotlib: install dmm with pip install 'dmm[evaluate]'.") from error
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 150}):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        # no date and no version, so that equal figures are equal files
        figure.savefig(path, format="png", metadata={"Software": None})


def draw_fid_matrix(figures: Mapping[str, Any], path: Path) -> None:
    """Two heatmaps on one scale: the student's styles, and the teachers' own second batch, from the teachers.

    Args:
        figures: of ``report.json``.
    """
    styles = figures["styles"]
    side = max(2.6, 0.62 * len(styles))
    highest = max(value for name in ("fid_matrix", "fid_reference") for row in figures[name] for value in row)
    with new_figure(path, 2 * side + 3.6, side + 1.2) as figure:
        axes = figure.subplots(1, 2)
        for ax, name, rows, title in (
            (axes[0], "fid_matrix", "student", f"student: FIDt {figures['fidt']:.4g}"),
            (axes[1], "fid_reference", "teacher, other noise", f"reference: FIDt {figures['fidt_reference']:.4g}"),
        ):
            image = ax.imshow(figures[name], cmap="viridis_r", vmin=0, vmax=highest)
            ax.set_title(title)
            ax.set_xlabel("teacher")
            ax.set_ylabel(rows)
            ax.set_xticks(range(len(styles)), styles, rotation=40, ha="right", rotation_mode="anchor")
            ax.set_yticks(range(len(styles)), styles)
            ax.spines[:].set_visible(False)
            if len(styles) <= _MOST_ANNOTATED:
                _annotate(ax, figures[name], highest)
        figure.colorbar(image, ax=axes, label=f"FID ({figures['extractor']})", shrink=0.8)
        gap = f"{figures['fidt_gap_percent']:+.1f} %"
        figure.suptitle(f"FID, {figures['num_images']} pictures of each style; FIDt {gap} beside the reference")


def _annotate(ax: "Axes", matrix: Sequence[Sequence[float]], highest: float) -> None:
    for row, values in enumerate(matrix):
        nearest = min(range(len(values)), key=values.__getitem__)
        for column, value in enumerate(values):
            ax.text(
                column,
                row,
                _short(value),
                ha="center",
                va="center",
                fontsize=8,
                color="white" if value > 0.55 * highest else "black",
                fontweight="bold" if column == nearest else "normal",
            )


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def draw_score_error(errors: Mapping[str, Any], path: Path) -> None:
    """Relative score error of every style, and their mean, over the timesteps.

    Args:
        errors: ``score_error`` of ``report.json``.
    """
    middles = [(start + stop - 1) / 2 for start, stop in errors["bands"]]
    with new_figure(path, 8, 4) as figure:
        ax = figure.subplots()
        for style, values in errors["by_band"].items():
            ax.plot(middles, values, marker=".", linewidth=1, label=f"{style}  {errors['by_style'][style]:.3f}")
        ax.plot(middles, errors["curve"], color="black", linewidth=2.5, label=f"mean  {errors['mean']:.3f}")
        ax.set_ylim(bottom=0)
        ax.set_xlim(0, errors["bands"][-1][1])
        ax.set_xlabel("timestep (0: clean, right: noise)")
        ax.set_ylabel("relative score error")
        ax.set_title("How far the student's predictions are from its teachers' (1: as far as the base's)")
        ax.grid(alpha=0.3)
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
