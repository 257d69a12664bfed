"""The page that watches a merge, by Gradio."""

from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from dmm.app import markup
from dmm.app.chart import chart
from dmm.app.watching import look_at
from dmm.errors import UserError

EVERY = 5.0
"""Seconds between two looks."""


def watch_page(folder: Path) -> Any:
    """Gradio's ``Blocks`` of a merge's folder, looked at again and again.

    Raises: UserError: it is no merge's.
    """
    first = look_at(folder)
    with gr.Blocks(title=f"{folder.resolve().name} - dmm", analytics_enabled=False) as blocks:
        told = gr.Markdown(f"### {first.told}", elem_id="told")
        term = gr.Dropdown(
            first.terms, value=first.terms[0] if first.terms else None, label="Curves of", elem_id="term"
        )
        curves = gr.HTML(elem_id="curves")
        samples = gr.HTML(elem_id="samples")
        with gr.Accordion("Recipe", open=False):
            gr.HTML(f"<pre>{escape(first.recipe)}</pre>")

        def look(chosen: Any) -> tuple[Any, ...]:
            try:
                now = look_at(folder)
            except UserError as error:
                return f"### {error}", gr.skip(), gr.skip(), gr.skip()
            chosen = chosen if chosen in now.terms else next(iter(now.terms), None)
            shown = chart(now.of_term(chosen) if chosen else {})
            picture = markup.sample(now.samples) if now.samples else markup.note("No samples yet.")
            return f"### {now.told}", gr.Dropdown(now.terms, value=chosen), shown, picture

        outputs = [told, term, curves, samples]
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
        blocks.load(look, term, outputs, **quick)
        term.input(look, term, outputs, **quick)
        gr.Timer(EVERY).tick(look, term, outputs, **quick)
    return blocks
