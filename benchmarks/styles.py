"""What a style costs: time and memory against the stock pipeline on the same weights, measured in pairs in one run.

    OMP_NUM_THREADS=1 python benchmarks/styles.py [MERGED] [--rank R] [--pairs N] [--steps N] [--device NAME]
    OMP_NUM_THREADS=1 python benchmarks/styles.py --switch --rank 16

Prints, with the target of each, and exits with 1 where one is missed:
- a denoising run with a style set : the stock pipeline's; the median of paired ratios, with its 95 % interval
- the same runs' peak memory, in bytes; the style prompts themselves are counted apart
- eight styles in one batch : eight pictures of one style in one batch, likewise
- switching styles, in milliseconds

MERGED is by default the embedded base with eight style prompts that nobody trained: what they say is of no
consequence for what they cost; with --rank, adapters of that rank in every layer. --switch measures instead how long
it takes to go from one adapter to another in a UNet of SD 1.5's size, bf16, random weights (5 GB of memory). On a CPU,
time is the process's own: other work on the machine does not count.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.profiler import ProfilerActivity, profile

import dmm.demo
from dmm.models.adapters import Adapter, Factors
from dmm.models.adapting import Adaptation
from dmm.models.calibration import layers_of
from dmm.models.styles import StylePrompts, styled_port
from dmm.models.teachers import ModelSource, open_pipeline
from dmm.pipeline.styled import add_styles, load_pipeline, set_style, stock_twin, style_names

NUM_STYLES = 8
WARM_UP = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("merged", nargs="?", help="a merged model with at least two styles")
    parser.add_argument("--rank", type=int, default=0, help="of adapters; 0: style prompts")
    parser.add_argument("--switch", action="store_true", help="measure a switch of adapters at full size alone")
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--steps", type=int, default=10, help="denoising steps of a run")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    if args.switch:
        return 0 if measure_switch(args.rank or 16) else 1
    styled = open_styled(args.merged, args.rank).to(args.device)
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
    has_adapters = bool(styled_port(styled.unet).style_prompts.adapters)

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
    met.append(report(f"{NUM_STYLES} styles in a batch : one style", *batches, at_most=1.3 if has_adapters else 1.05))
    if has_adapters:  # a switch changes all weights: see --switch
        return 0 if all(met) else 1

    switches = [measure(lambda i=i: set_style(styled, names[i % 2]), time.perf_counter) for i in range(200)]
    milliseconds = 1000 * statistics.median(switches)
    met.append(told("switching styles, ms (median of 200, wall clock)", milliseconds, at_most=1.0))
    weights = sum(tensor.numel() * tensor.element_size() for tensor in StylePrompts(names, dim_of(styled)).parameters())
    print(f"the style prompts themselves: {weights:,} bytes")
    return 0 if all(met) else 1


def measure_switch(rank: int) -> bool:
    """What going from one adapter to another takes in a UNet of SD 1.5's size: a second, at most."""
    torch.manual_seed(0)
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, block_out_channels=(320, 640, 1280, 1280), attention_head_dim=8, cross_attention_dim=768
        )
    unet.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in unet.parameters():
        parameter.data.fill_(0.01)  # what they are changes nothing
    adapters = {f"style-{i}": some_adapter(unet, rank).to("cpu", torch.float16) for i in range(2)}
    adaptation, names = Adaptation(), list(adapters)
    adaptation.choose(unet, names, adapters, names[0])  # the first time it keeps the shared weights, too
    switches = [partial(adaptation.choose, unet, names, adapters, names[i % 2]) for i in (1, 2, 3, 4, 5)]
    seconds = [measure(switch, time.process_time) for switch in switches]
    what = f"a switch of adapters of rank {rank}, s of CPU time ({torch.get_num_threads()} threads, median of 5)"
    return told(what, statistics.median(seconds), at_most=1.0)


def some_adapter(unet: Any, rank: int) -> Adapter:
    """An adapter that nobody trained, small, of one rank in every layer."""
    factors = {}
    for name, layer in layers_of(unet).items():
        weight: Any = layer.weight
        size = min(rank, weight.shape[0], weight[0].numel())
        up, down = 0.01 * torch.randn(weight.shape[0], size), 0.01 * torch.randn(size, *weight.shape[1:])
        factors[name] = Factors(up, down)
    offsets = {name: torch.zeros(one.shape) for name, one in unet.named_parameters() if name not in factors}
    return Adapter(factors, offsets)


def open_styled(merged: str | None, rank: int) -> Any:
    if merged is not None:
        return load_pipeline(merged)
    pipe = open_pipeline(ModelSource(dmm.demo.experts()["base"]))
    torch.manual_seed(0)
    names = [f"style-{i}" for i in range(NUM_STYLES)]
    prompts = StylePrompts(names, 0 if rank else dim_of(pipe))
    prompts.adapters = {name: some_adapter(pipe.unet, rank) for name in names} if rank else {}
    add_styles(pipe, prompts)
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
