"""What the page shows that no ready-made part does: pictures with their files in them, and progress.

Pictures are in the page itself, as the bytes that were encoded: what Gradio shows it writes to disk first, and encodes
anew, without the text that tells how a picture was made.
"""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from dmm.app.painted import Painted

STYLE = """
.dmm-pictures { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(var(--side), 1fr)); }
.dmm-pictures figure { margin: 0; }
.dmm-pictures img {
  width: 100%; display: block; border-radius: 8px; background: #fff; image-rendering: var(--scaling);
}
.dmm-pictures figcaption { display: flex; justify-content: space-between; gap: 8px; font-size: 13px; padding: 4px 2px; }
.dmm-pictures figcaption span { overflow-wrap: anywhere; }
.dmm-bar { height: 10px; border-radius: 5px; background: var(--block-border-color); overflow: hidden; }
.dmm-bar div { height: 100%; background: var(--color-accent); transition: width .25s; }
.dmm-faint { color: var(--body-text-color-subdued); font-size: 13px; }
.dmm-empty {
  border: 1px dashed var(--block-border-color); border-radius: 8px; padding: 3rem 1rem; text-align: center;
  color: var(--body-text-color-subdued);
}
.dmm-chart svg { width: 100%; height: auto; }
.dmm-chart text { font-size: 13px; fill: var(--body-text-color-subdued); }
@media (max-width: 600px) { .dmm-chart text { font-size: 26px; } }
.dmm-chart .tick { stroke: var(--block-border-color); }
.dmm-chart div { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13px; }
.dmm-chart i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 5px; }
.dmm-samples img { max-width: 100%; border-radius: 8px; }
footer { display: none !important; }
"""
EMPTY = '<div class="dmm-empty">What you paint appears here.</div>'

_SMALL = 128  # pixels a side: such pictures are shown enlarged, every pixel a square


def pictures(painted: Sequence[Painted], size: tuple[int, int]) -> str:
    """Pictures with what they are, each with a link to save it; ``size`` is their width and height in pixels."""
    is_small = max(size) <= _SMALL
    side = 130 if is_small or len(painted) > 4 else 320 if len(painted) == 1 else 200
    scaling = "pixelated" if is_small else "auto"
    shown = "".join(_figure(one) for one in painted)
    return f'<div class="dmm-pictures" style="--side: min({side}px, 100%); --scaling: {scaling}">{shown}</div>'


def progress(share: float) -> str:
    """A bar that is full by a share in [0, 1]."""
    told = "Waiting, or at the first step" if not share else f"{share:.0%}"
    return f'<div class="dmm-bar"><div style="width: {share:.1%}"></div></div><div class="dmm-faint">{told}</div>'


def note(text: str) -> str:
    """A sentence in small letters."""
    return f'<div class="dmm-faint">{escape(text)}</div>'


def data_url(png: bytes) -> str:
    """A picture as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def sample(file: Path) -> str:
    """A picture of samples from a merge's folder, with its name."""
    address = data_url(file.read_bytes())
    return f'<div class="dmm-samples"><img src="{address}" alt="samples">{note(file.stem)}</div>'


def _figure(painted: Painted) -> str:
    address, label, name = data_url(painted.png), escape(painted.label), escape(painted.file_name, quote=True)
    link = f'<a href="{address}" download="{name}">save</a>'
    return f'<figure><img src="{address}" alt="{label}"><figcaption><span>{label}</span>{link}</figcaption></figure>'
