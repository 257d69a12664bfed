"""How fast devices are: the rates that were measured, and what follows from them for cards that were not.

A rate that nobody measured is scaled from one that was, by the cards' peaks in dense bfloat16 (their makers' figures);
it says so wherever it is shown.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rate:
    """Samples a second that a training was measured to make.

    Attributes:
        flops: of a sample, as :mod:`dmm.planning.step` counts them.
        where: the device, the work, and where the figure is told.
    """

    samples_per_second: float
    flops: float
    where: str

    @property
    def flops_per_second(self) -> float:
        """What the device made of its peak."""
        return self.samples_per_second * self.flops


MEASURED = Rate(
    60.3, 3.27e12, "a UNet of 860 M parameters, 512 px, rank 0, 8 teachers, micro-batches of 20, bf16, torch 2.11"
)
"""On an H200: docs/results.md, on a student of full size."""
MEASURED_CORE = Rate(90.0, 5.3e8, "the embedded experts, 32 px, rank 0, fp32")
"""On one core of a CPU: docs/results.md, on a student of full size."""
LAUNCH = 2e-5
"""Seconds that a GPU takes for any operation, however small; assumed. What embedded experts are bound by."""


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        num_bytes: of its memory.
        peak: FLOP a second, dense bfloat16, summed in float32.
        rate: what was measured on it.
    """

    name: str
    num_bytes: float
    peak: float
    rate: Rate | None = None


CARDS = (
    Card("RTX 3060 12 GB", 12e9, 51e12),
    Card("RTX 4090 24 GB", 24e9, 165e12),
    Card("A100 80 GB", 80e9, 312e12),
    Card("H100 80 GB", 80e9, 989e12),
    Card("H200 141 GB", 141e9, 989e12, MEASURED),
)


def seconds_per_sample(card: Card, flops: float, num_operations: float) -> tuple[float, str]:
    """How long a card takes for a sample, and how that is known.

    Args:
        flops: of a sample.
        num_operations: of a sample: those of a micro-batch, by its samples.
    """
    known = next(one for one in CARDS if one.rate is not None)
    assert known.rate is not None
    by_peak = known.rate.flops_per_second * card.peak / known.peak
    seconds = flops / by_peak
    if num_operations * LAUNCH > seconds:
        return num_operations * LAUNCH, "bound by launches, assumed"
    if card is known:
        alike = abs(flops / known.rate.flops - 1) < 0.05
        return seconds, "measured" if alike else f"scaled by arithmetic from {known.rate.samples_per_second} samples/s"
    return seconds, f"scaled by peak from the {known.name}"
