"""A plan for people: what ``dmm plan`` prints, and ``dmm merge`` before it begins."""

import shutil
from collections.abc import Iterable, Mapping, Sequence

import torch

from dmm.data import CaptionedImages, Synthesis
from dmm.files.outputs import existing_parent
from dmm.files.runs import FIRST_STAGE, SAMPLES, find_run
from dmm.files.sizes import told_bytes
from dmm.planning.advice import cheapest, told
from dmm.planning.cards import CARDS, MEASURED
from dmm.planning.estimate import Estimate, num_served, samples_of
from dmm.planning.look import Looked, look_at
from dmm.planning.memory import LIBRARIES, micro_batch
from dmm.recipes.recipe import Recipe
from dmm.training.costs import Sizes
from dmm.training.machine import shares_of
from dmm.training.merge_costs import checkpoint_bytes, disk_parts, student_bytes, training_parts
from dmm.training.outlook import Outlook, count, every, kept, told_device


def outlook_lines(outlook: Outlook) -> str:
    """What a merge is going to do, told before it begins."""
    recipe, plan, folder, device = outlook.recipe, outlook.plan, outlook.folder, outlook.device
    lines = what_lines(recipe, plan.styles, outlook.source, plan.size)
    interval = recipe.sample_interval
    lines["samples"] = f"{every(interval)} in {folder / SAMPLES}" if interval else "none"
    if recipe.kind == "controlnet":
        lines |= _counted_lines(recipe, plan.sizes, outlook.num_processes)
    else:
        looked = look_at(plan, outlook.source)
        on_gpu = device.type == "cuda"
        num_bytes = torch.cuda.get_device_properties(device).total_memory if on_gpu else None
        found = looked.estimate(recipe, on_gpu=on_gpu, num_bytes=num_bytes, num_processes=outlook.num_processes)
        lines |= need_lines(recipe, looked, found, outlook.num_processes)
    place = existing_parent(folder)
    lines["disk"] += f"; {told_bytes(shutil.disk_usage(place).free)} are free at {place}"
    run = find_run(folder)
    if run is not None and run.style is not None:
        lines["goes on"] = f"where the style '{run.style}' has {count(run.step, 'step')}"
    elif run is not None and run.step:
        lines["goes on"] = f"from step {run.step:,} of {recipe.training.steps:,}"
    elif run is not None and run.is_calibrated:
        lines["goes on"] = "with the styles as they were calibrated"
    stage = "First stage of two: " if folder.name == FIRST_STAGE else ""
    stage = "Second stage: " if (folder / FIRST_STAGE).is_dir() else stage
    processes = "" if outlook.num_processes == 1 else f" in {outlook.num_processes} processes, each"
    head = f"{stage}{_styles(plan.styles)} merged{processes} on {told_device(device)}, in {recipe.training.precision}."
    return _laid_out(head, lines)


def plan_lines(recipe: Recipe, looked: Looked, found: Estimate, *, on_gpu: bool, num_processes: int) -> str:
    """What ``dmm plan`` prints of one stage."""
    where = "a GPU" if on_gpu else "the CPU"
    each = "" if num_processes == 1 else f" in {num_processes} processes, each"
    lines = what_lines(recipe, looked.styles, looked.source, looked.shapes.size)
    lines |= need_lines(recipe, looked, found, num_processes)
    if looked.far:
        lines["unseen"] = f"{', '.join(looked.far)}: not here, and taken to be as the base is"
    if looked.source is None:
        lines["data"] = "not here, and not counted"
    text = _laid_out(f"{_styles(looked.styles)}{each} on {where}, in {recipe.training.precision}.", lines)
    return f"{text}\n\n{phase_table(found)}\n\n{card_table(recipe, looked, num_processes)}"


def what_lines(
    recipe: Recipe, styles: Sequence[str], source: CaptionedImages | Synthesis | None, size: int
) -> dict[str, str]:
    """What a merge does."""
    training = recipe.training
    apart = recipe.styles.trained == "adapters"
    steps = f"{count(training.steps, 'step')} of {count(training.batch_size, 'sample')}"
    if recipe.styles.trained == "none":
        lines = {"training": "none: adapters as they are calibrated"}
    else:
        each = " for each style" if apart else ""
        rate = f"learning rate {training.learning_rate:g}"
        lines = {"training": f"{steps}{each}, {_samples(recipe, styles)}; {rate}"}
    if source is not None:
        lines["data"] = _data(source, size)
    return lines


def _counted_lines(recipe: Recipe, sizes: Sizes, num_processes: int) -> dict[str, str]:
    """What a merge of ControlNets takes, as far as it is counted: their steps are not traced."""
    num_teachers = num_served(recipe, num_processes)
    weights = sum(training_parts(sizes, recipe, num_teachers=num_teachers).values())
    at_once = count(micro_batch(recipe.training, num_processes), "sample")
    lines = _checkpoint_line(recipe, sizes)
    lines["memory"] = f"{told_bytes(weights)} of weights, gradients and moments, and what {at_once} at a time take"
    lines["disk"] = f"{told_bytes(sum(disk_parts(sizes, recipe).values()))} written, beside the cache"
    return lines


def _checkpoint_line(recipe: Recipe, sizes: Sizes) -> dict[str, str]:
    if recipe.styles.trained == "none":
        return {}
    size, checkpoint = told_bytes(checkpoint_bytes(sizes, recipe)), recipe.checkpoint
    return {"checkpoints": f"{every(checkpoint.every)} and at the end, of {size} each; {kept(checkpoint.keep)}"}


def need_lines(recipe: Recipe, looked: Looked, found: Estimate, num_processes: int) -> dict[str, str]:
    """What it takes."""
    lines = _checkpoint_line(recipe, looked.sizes(recipe))
    parts = sorted(found.memory[found.phase].items(), key=lambda part: -part[1])
    most = ", ".join(f"{told_bytes(size)} {name}" for name, size in parts[:4])
    turns = "; teachers take turns" if found.in_turn else ""
    at_once = micro_batch(recipe.training, num_processes)
    lines["memory"] = (
        f"about {told_bytes(found.num_bytes)} at most, in {found.phase} ({most}), by {count(at_once, 'sample')} at a "
        f"time{turns}"
    )
    written = sum(size for name, size in found.disk.items() if name != "cache")
    lines["disk"] = f"{told_bytes(written)} written, beside {told_bytes(found.disk['cache'])} of cache at most"
    known = next(card for card in CARDS if card.rate is not None)
    seconds, how = found.seconds_on(known)
    many = "" if num_processes == 1 else f" each of {num_processes}"
    lines["time"] = (
        f"about {_duration(seconds / num_processes)} on{many or ' an'} {known.name} ({how}), "
        f"{_duration(found.seconds_on_core() / num_processes)} on{many or ' one'} core of a CPU; "
        f"{sum(found.flops.values()):.2g} FLOP"
    )
    return lines


def phase_table(found: Estimate) -> str:
    """The memory of a process by phase and part."""
    rows = [["memory by phase", "bytes", "of which"]]
    for phase, parts in found.memory.items():
        ordered = sorted(parts.items(), key=lambda part: -part[1])
        rows.append(
            [phase, told_bytes(sum(parts.values())), ", ".join(f"{n} {told_bytes(size)}" for n, size in ordered)]
        )
    return _table(rows)


def card_table(recipe: Recipe, looked: Looked, num_processes: int) -> str:
    """Whether a merge fits some cards, what to change where it does not, and how long it takes on them."""
    rows = [["card", "memory", "fits", "time", "known how"]]
    for card in CARDS:

        def fits(one: Recipe, room: float = card.num_bytes) -> bool:
            return fits_on_gpu(one, looked, room, num_processes)

        changes = cheapest(recipe, fits)
        found = looked.estimate(recipe, on_gpu=True, num_bytes=card.num_bytes, num_processes=num_processes)
        seconds, how = found.seconds_on(card)
        does = "no" if changes is None else told(changes) if changes else "yes"
        turns = ", teachers in turn" if found.in_turn and not changes else ""
        rows.append([card.name, told_bytes(found.num_bytes), does + turns, _duration(seconds / num_processes), how])
    told_of = (
        f"Measured: {MEASURED.samples_per_second} samples/s on an H200 ({MEASURED.where}); all else follows from it."
    )
    return f"{_table(rows)}\n{told_of}"


def advice_line(recipe: Recipe, looked: Looked, num_bytes: float, num_processes: int) -> str:
    """What makes a merge fit a memory."""
    room = told_bytes(num_bytes)
    changes = cheapest(recipe, lambda one: fits_on_gpu(one, looked, num_bytes, num_processes))
    if changes is None:
        return f"It does not fit {room}, whatever is changed of the recipe: take a larger GPU."
    return f"To fit {room}: {told(changes)}" if changes else f"It fits {room}."


def fits_on_gpu(recipe: Recipe, looked: Looked, num_bytes: float, num_processes: int) -> bool:
    """Whether a merge fits a GPU's memory, all but a tenth of it, which estimates may be wrong by."""
    room = 0.9 * num_bytes
    # weights alone tell most that do not, without a run
    if student_bytes(looked.sizes(recipe), recipe) + LIBRARIES > room:
        return False
    found = looked.estimate(recipe, on_gpu=True, num_bytes=num_bytes, num_processes=num_processes)
    return found.num_bytes <= room


def _laid_out(head: str, lines: Mapping[str, str]) -> str:
    return "\n".join([head, *(f"  {f'{name}:':<13}{line}" for name, line in lines.items())])


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _styles(styles: Iterable[str]) -> str:
    names = list(styles)
    return f"{count(len(names), 'style')} ({', '.join(names)})"


def _samples(recipe: Recipe, styles: Sequence[str]) -> str:
    """All of a run, and of each style."""
    total = samples_of(recipe)
    if recipe.styles.trained == "adapters":
        weights = [one.weight for one in recipe.teachers]
        shares = [weight / sum(weights) for weight in weights]
    else:
        new = shares_of(recipe)[: len(recipe.teachers)]
        shares = new + ([recipe.regularization / (len(styles) - len(new))] if recipe.regularization else [])
    least, most = (round(total * share) for share in (min(shares), max(shares)))
    each = f"{most:,}" if most == least else f"{least:,} to {most:,}"
    return f"{total:,} in all, {each} of each style"


def _data(source: CaptionedImages | Synthesis, size: int) -> str:
    if isinstance(source, Synthesis):
        prompts = count(len(source.prompts), "prompt")
        return f"{source.count:,} pictures of {prompts}, painted in {source.steps} steps, {size} x {size} pixels"
    return f"{len(source.captions):,} pictures with captions, brought to {size} x {size} pixels"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 90:
        return f"{minutes:.0f} min"
    hours = minutes / 60
    return f"{hours:.1f} h" if hours < 100 else f"{hours / 24:,.0f} days"
