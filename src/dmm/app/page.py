"""The page for painting, by Gradio: its parts, and which of them a click changes."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from dmm.app import markup
from dmm.app.controls import MAX_COUNT, MAX_SIDE, MAX_STEPS, OVER_TIME, STRIP, WHAT, Controls, read_controls
from dmm.app.controls import restore_controls as controls_of_picture
from dmm.app.jobs import Cancelled, Job
from dmm.app.mixing import random_mix, rebalance, settle
from dmm.app.painter import Painter
from dmm.app.uploads import read_sent_parameters
from dmm.errors import UserError
from dmm.pipeline.samplers import SAMPLERS

EVEN = "all alike"


class PaintingPage:
    """The page of one model; ``blocks`` is what Gradio serves."""

    def __init__(self, painter: Painter, first: Controls) -> None:
        self._painter, self._first = painter, first
        self._jobs: dict[str, Job[Any]] = {}
        with gr.Blocks(title=f"{painter.model} - dmm", analytics_enabled=False, delete_cache=(60, 600)) as self.blocks:
            gr.Markdown(f"## {painter.model}")
            with gr.Row():
                with gr.Column(scale=6, min_width=340):
                    self._build_canvas()
                with gr.Column(scale=5, min_width=340):
                    self._build_controls()
            self._connect()

    def _build_canvas(self) -> None:
        # on a narrow screen the columns stand one above the other: what is painted stays under the button
        first = self._first
        self._parts: dict[str, Any] = {
            "prompt": gr.Textbox(first.prompt, label="Prompt", lines=2, elem_id="prompt"),
            "negative": gr.Textbox(first.negative, label="Negative prompt", lines=1, elem_id="negative"),
        }
        with gr.Row():
            self._paint_button = gr.Button("Paint", variant="primary", elem_id="paint", scale=3)
            self._cancel_button = gr.Button("Cancel", elem_id="cancel", scale=1, min_width=90)
        self._progress = gr.HTML(elem_id="progress")
        self._pictures = gr.HTML(markup.EMPTY, elem_id="pictures")

    def _build_controls(self) -> None:
        first, names, parts = self._first, self._painter.names, self._parts
        with gr.Group():
            with gr.Row():
                parts["what"] = gr.Dropdown(list(WHAT), value=first.what, label="What", elem_id="what", min_width=150)
                parts["count"] = gr.Number(
                    first.count, label="Pictures", precision=0, minimum=1, maximum=MAX_COUNT, min_width=90
                )
                parts["seed"] = gr.Number(first.seed, label="Seed", precision=0, minimum=0, min_width=90)
            with gr.Row(visible=False) as self._later:
                parts["other"] = gr.Dropdown(names, value=first.other or names[-1], label="To the style", min_width=120)
                parts["at"] = gr.Slider(0, 1, first.at, step=0.05, label="From this share of the steps", visible=False)
        with gr.Accordion("Styles", open=True):
            with gr.Row(equal_height=True):
                self._preset = gr.Dropdown(
                    [*names, EVEN], value=None, label="Preset", elem_id="preset", scale=2, min_width=120
                )
                self._random = gr.Button("Random mix", elem_id="random", scale=1, min_width=100)
            weights = [first.weights.get(name, 0.0) for name in names]
            self._sliders = [
                gr.Slider(0, 1, weight, step=0.01, label=name, buttons=[], elem_classes="style")
                for name, weight in zip(names, weights, strict=True)
            ]
        with gr.Accordion("How to paint", open=False, elem_id="how"):
            with gr.Row():
                parts["steps"] = gr.Slider(1, MAX_STEPS, first.steps, step=1, label="Steps", min_width=140)
                parts["guidance"] = gr.Slider(1, 20, first.guidance, step=0.1, label="Guidance", min_width=140)
            with gr.Row():
                parts["width"] = gr.Number(
                    first.width, label="Width", precision=0, minimum=8, maximum=MAX_SIDE, step=8, min_width=80
                )
                parts["height"] = gr.Number(
                    first.height, label="Height", precision=0, minimum=8, maximum=MAX_SIDE, step=8, min_width=80
                )
                parts["sampler"] = gr.Dropdown(list(SAMPLERS), value=first.sampler, label="Sampler", min_width=140)
        with gr.Accordion("Begin with an image", open=False, elem_id="begin"):
            with gr.Row():
                self._image = gr.Image(
                    type="filepath", format="png", label="Image", height=220, sources=["upload", "clipboard"]
                )
                self._mask = gr.Image(
                    type="filepath", format="png", label="Mask: white is painted anew", height=220, sources=["upload"]
                )
            parts["strength"] = gr.Slider(0.01, 1, first.strength, step=0.01, label="How much is painted over")
        with gr.Accordion("Regions", open=False):
            parts["regions"] = gr.Textbox(
                first.regions,
                label="Parts in a style of their own, and a prompt, a line each; elsewhere the mix holds",
                placeholder=f"0.5,0,1,1:{names[-1]}\n0,0.5,0.5,1:{names[0]}:a blue dog",
                lines=2,
            )
        with gr.Accordion("Settings of a picture", open=False, elem_id="settings"):
            self._dropped = gr.File(
                label="Drop a picture that was saved here: all controls become those it was made with",
                file_types=["image"],
                height=110,
                elem_id="dropped",
            )
        if self._painter.exports is not None:
            with gr.Accordion("Export this mix", open=False), gr.Row():
                self._export_name = gr.Textbox("mix", label="File name", max_lines=1, scale=2)
                self._export_button = gr.Button("Export", scale=1)

    def _connect(self) -> None:
        controls, sliders = list(self._parts.values()), self._sliders
        for i, slider in enumerate(sliders):
            slider.input(
                lambda *weights, i=i: rebalance(weights, i) if len(weights) > 1 else 1.0,
                sliders,
                sliders,
                queue=False,
                show_progress="hidden",
                trigger_mode="always_last",
            )
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
        self._preset.input(self._choose_preset, self._preset, sliders, **quick)
        self._random.click(lambda: _each(random_mix(len(sliders), random.Random())), None, sliders, **quick)
        what = self._parts["what"]
        shown = [self._later, self._parts["at"]]
        what.change(
            lambda what: (gr.Row(visible=what in (STRIP, OVER_TIME)), gr.Slider(visible=what == OVER_TIME)),
            what,
            shown,
            **quick,
        )
        self._paint_button.click(
            self._paint,
            [self._image, self._mask, *controls, *sliders],
            [self._progress, self._pictures],
            show_progress="hidden",
            concurrency_limit=1,
            concurrency_id="model",
        )
        self._cancel_button.click(self._cancel, None, None, **quick)
        self._dropped.upload(
            self._restore, [self._dropped, *controls, *sliders], [self._dropped, *controls, *sliders], **quick
        )
        if self._painter.exports is not None:
            self._export_button.click(
                self._export,
                [self._export_name, *controls, *sliders],
                self._progress,
                show_progress="hidden",
                concurrency_limit=1,
                concurrency_id="model",
            )
        self.blocks.unload(self._cancel)

    def _read(self, values: tuple[Any, ...]) -> Controls:
        names = list(self._parts)
        told, weights = dict(zip(names, values, strict=False)), values[len(names) :]
        return read_controls(told, dict(zip(self._painter.names, weights, strict=True)))

    def _choose_preset(self, chosen: Any) -> Any:
        names = self._painter.names
        return _each(settle([1.0 if chosen in (name, EVEN) else 0.0 for name in names]) if chosen else [])

    def _paint(self, request: gr.Request, image: Any, mask: Any, *values: Any) -> Iterator[tuple[Any, Any]]:
        try:
            controls = self._read(values)
            job = self._painter.paint(controls, *(Path(file) if file else None for file in (image, mask)))
            for state in self._watched(job, request):
                if isinstance(state, float):
                    yield markup.progress(state), gr.skip()
                elif state is None:
                    yield markup.note("Cancelled."), gr.skip()
                else:
                    yield "", markup.pictures(state, (controls.width, controls.height))
        except UserError as error:
            raise _told(error) from None

    def _export(self, request: gr.Request, name: Any, *values: Any) -> Iterator[Any]:
        try:
            for state in self._watched(self._painter.export(self._read(values), str(name)), request):
                if isinstance(state, Path):
                    yield markup.note(f"Wrote {state.name}.")
                else:
                    yield markup.note("Cancelled." if state is None else "Exporting ...")
        except UserError as error:
            raise _told(error) from None

    def _watched(self, job: Job[Any], request: gr.Request) -> Iterator[Any]:
        """What a job yields; None in the end where it was cancelled."""
        who = str(request.session_hash)
        self._jobs[who] = job
        try:
            yield from job.watch()
        except Cancelled:
            yield None
        except torch.OutOfMemoryError:
            raise UserError("The device ran out of memory: ask for fewer or smaller pictures.") from None
        finally:
            self._jobs.pop(who, None)

    def _cancel(self, request: gr.Request) -> None:
        job = self._jobs.get(str(request.session_hash))
        if job is not None:
            job.cancel()

    def _restore(self, file: Any, *values: Any) -> list[Any]:
        try:
            told = read_sent_parameters(Path(str(file)))
            controls = controls_of_picture(told, self._painter.names, self._read(values))
        except UserError as error:
            raise _told(error) from None
        each = [getattr(controls, name) for name in self._parts]
        return [None, *each, *(controls.weights[name] for name in self._painter.names)]


def _each(weights: list[float]) -> Any:
    """Values for the sliders; none leaves them."""
    if not weights:
        return gr.skip()
    return weights if len(weights) > 1 else weights[0]


def _told(error: UserError) -> gr.Error:
    return gr.Error(str(error), print_exception=False)
