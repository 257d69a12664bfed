"""One resumable training loop for every stage here: AdamW, warm-up and cosine, EMA, checkpoints."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

StepFunction = Callable[[int, torch.Generator], tuple[Tensor, dict[str, float]]]


def fit(
    model: nn.Module,
    step_function: StepFunction,
    folder: Path,
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.01,
    ema_decay: float = 0.998,
    seed: int = 0,
    report_every: int = 100,
    save_every: int = 500,
    evaluate: Callable[[], dict[str, float]] | None = None,
) -> None:
    """Train ``model`` in place and leave it with its averaged weights.

    Args:
        step_function: (step, generator) to (loss, scalars to log). The generator is a function of
            (seed, step) alone, so a run that was stopped goes on as if it had not been.
        folder: holds ``checkpoint.pt`` and ``log.jsonl``; a finished run found there is only loaded.
        evaluate: called on the averaged weights at every save; its scalars are logged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(100, steps // 10), steps)
    ema = EMAModel(model.parameters(), decay=ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    checkpoint, first = folder / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        ema.load_state_dict(state["ema"])
        first = state["step"]
    started, begun = time.monotonic(), first
    model.train()
    for step in range(first, steps):
        loss, scalars = step_function(step, torch.Generator().manual_seed(seed * 1_000_003 + step))
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{folder.name}: the loss is {loss.item()} at step {step}.")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        ema.step(model.parameters())
        done = step + 1
        if done % report_every == 0 or done == steps:
            rate = (done - begun) / (time.monotonic() - started)
            log(folder, {"step": done, "loss": loss.item(), **scalars, "steps_per_second": rate})
        if done % save_every == 0 or done == steps:
            if evaluate is not None:
                log(folder, {"step": done, **with_average(model, ema, evaluate)})
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "ema": ema.state_dict(),
                "step": done,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    ema.copy_to(model.parameters())
    model.eval()


def with_average(model: nn.Module, ema: EMAModel, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
    """``evaluate`` while ``model`` holds the averaged weights."""
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    model.eval()
    with torch.no_grad():
        scalars = evaluate()
    model.train()
    ema.restore(model.parameters())
    return scalars


def log(folder: Path, row: dict[str, float]) -> None:
    """Append ``row`` to ``log.jsonl`` and show it."""
    line = json.dumps({name: round(value, 6) for name, value in row.items()})
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(f"{folder.name}: {line}", flush=True)
