"""What a style costs: time and memory against the stock pipeline on the same weights, measured in pairs in one run.

    OMP_NUM_THREADS=1 python benchmarks/styles.py [MERGED] [--pairs N] [--steps N] [--device NAME]

Prints, with the target of each, and exits with 1 where one is missed:
- a denoising run with a style set : the stock pipeline's; the median of paired ratios, with its 95 % interval
- the same runs' peak memory, in bytes; the style prompts themselves are counted apart
- eight styles in one batch : eight pictures of one style in one batch, likewise
- switching styles, in milliseconds

MERGED is by default the embedded base with eight style prompts that nobody trained: what they say is of no
consequence for what they cost. On a CPU, time is the process's own: other work on the machine does not count.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import dmm.demo
from dmm.models.styles import StylePrompts
from dmm.models.teachers import ModelSource, open_pipeline
from dmm.pipeline.styled import add_styles, load_pipeline, set_style, stock_twin, style_names

NUM_STYLES = 8
WARM_UP = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("merged", nargs="?", help="a merged model with at least two styles")
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--steps", type=int, default=10, help="denoising steps of a run")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    styled = open_styled(args.merged).to(args.device)
    styled.set_progress_bar_config(disable=True)
    stock = stock_twin(styled)
    names = style_names(styled)
    styles = [names[i % len(names)] for i in range(NUM_STYLES)]
    clock = clock_of(args.device)

    def denoise(pipe: Any, count: int) -> None:
        pipe(**embeddings[count], num_inference_steps=args.steps, output_type="latent", generator=generator(0))

    embeddings = {count: embed(stock, count) for count in (1, NUM_STYLES)}
    set_style(styled, names[0])
    pairs = [(lambda: denoise(styled, 1), lambda: denoise(stock, 1)) for _ in range(args.pairs)]
    met = [report("a style set : stock", *ratio(pairs, clock), at_most=1.01)]

    # in turns, the least of three: whatever a library keeps from its first call counts for nobody
    peaks = [[peak_memory(lambda pipe=pipe: denoise(pipe, 1), args.device) for pipe in (styled, stock)] for _ in "123"]
    with_style, without = (min(each) for each in zip(*peaks, strict=True))
    print(f"peak memory of a run: {with_style:,} bytes with a style set, {without:,} stock")
    met.append(told("peak memory, with a style : stock", with_style / without, at_most=1.01))

    def one_style() -> None:
        set_style(styled, names[0])
        denoise(styled, NUM_STYLES)

    def eight_styles() -> None:
        set_style(styled, styles)
        denoise(styled, NUM_STYLES)

    batches = ratio([(eight_styles, one_style)] * max(1, args.pairs // 3), clock)
    met.append(report(f"{NUM_STYLES} styles in a batch : one style", *batches, at_most=1.05))

    switches = [measure(lambda i=i: set_style(styled, names[i % 2]), time.perf_counter) for i in range(200)]
    milliseconds = 1000 * statistics.median(switches)
    met.append(told("switching styles, ms (median of 200, wall clock)", milliseconds, at_most=1.0))
    weights = sum(tensor.numel() * tensor.element_size() for tensor in StylePrompts(names, dim_of(styled)).parameters())
    print(f"the style prompts themselves: {weights:,} bytes")
    return 0 if all(met) else 1


def open_styled(merged: str | None) -> Any:
    if merged is not None:
        return load_pipeline(merged)
    pipe = open_pipeline(ModelSource(dmm.demo.experts()["base"]))
    torch.manual_seed(0)
    add_styles(pipe, StylePrompts([f"style-{i}" for i in range(NUM_STYLES)], dim_of(pipe)))
    return pipe


def dim_of(pipe: Any) -> int:
    return int(pipe.unet.time_embedding.linear_2.out_features)


def embed(pipe: Any, count: int) -> dict[str, Any]:
    embeds, negative = pipe.encode_prompt(["a red cat"] * count, pipe.device, 1, True)
    return {"prompt_embeds": embeds, "negative_prompt_embeds": negative}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clock_of(device: str) -> Callable[[], float]:
    if device == "cpu":
        return time.process_time

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def measure(run: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    run()
    return clock() - start


def ratio(
    pairs: list[tuple[Callable[[], object], Callable[[], object]]], clock: Callable[[], float]
) -> tuple[float, float, float]:
    """The median of paired ratios of times, and its 95 % bootstrap interval; who goes first alternates."""
    for first, second in pairs[:1] * WARM_UP:
        first()
        second()
    ratios = []
    for i, (ours, theirs) in enumerate(pairs):
        if i % 2:
            reference = measure(theirs, clock)
            ratios.append(measure(ours, clock) / reference)
        else:
            taken = measure(ours, clock)
            ratios.append(taken / measure(theirs, clock))
    draws = torch.randint(len(ratios), (10_000, len(ratios)), generator=generator(0))
    low, high = torch.tensor(ratios)[draws].median(dim=1).values.quantile(torch.tensor([0.025, 0.975])).tolist()
    return statistics.median(ratios), low, high


def peak_memory(run: Callable[[], object], device: str) -> int:
    """The most bytes that a run holds at once, beyond those that were held before it."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return int(torch.cuda.max_memory_allocated(device) - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def report(what: str, median: float, low: float, high: float, *, at_most: float) -> bool:
    return told(f"{what} (median of pairs; 95 % interval {low:.4f} to {high:.4f})", median, at_most=at_most)


def told(what: str, value: float, *, at_most: float) -> bool:
    print(f"{what}: {value:.4f}, at most {at_most:g}: {'met' if value <= at_most else 'MISSED'}", flush=True)
    return value <= at_most


if __name__ == "__main__":
    sys.exit(main())
