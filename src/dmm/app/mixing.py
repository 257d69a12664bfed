"""Weights of styles on sliders: whole hundredths that always sum to 1."""

import random
from collections.abc import Sequence

WHOLE = 100


def rebalance(weights: Sequence[float], moved: int) -> list[float]:
    """What the sliders show once one of them was moved: the others share what is left as they did before.

    Args:
        weights: N, as the sliders stand, the moved one at its new place; each in [0, 1].
        moved: its index.
    Returns: N, whole hundredths that sum to 1. Where the others were all at 0 they share alike; a single style is 1.
    """
    if len(weights) == 1:
        return [1.0]
    kept = min(max(round(WHOLE * weights[moved]), 0), WHOLE)
    others = [0.0 if i == moved else max(weight, 0.0) for i, weight in enumerate(weights)]
    if not sum(others):
        others = [float(i != moved) for i in range(len(weights))]
    shared = _hundredths(others, WHOLE - kept)
    return [(kept if i == moved else share) / WHOLE for i, share in enumerate(shared)]


def settle(weights: Sequence[float]) -> list[float]:
    """Weights, at least one of them above 0, in whole hundredths that sum to 1."""
    return [share / WHOLE for share in _hundredths([max(weight, 0.0) for weight in weights], WHOLE)]


def random_mix(count: int, source: random.Random) -> list[float]:
    """Weights of ``count`` styles, every mix as likely as every other."""
    return settle([source.expovariate(1) for _ in range(count)])


def _hundredths(shares: Sequence[float], whole: int) -> list[int]:
    """``whole`` dealt out by shares, by the largest remainders."""
    total = sum(shares)
    exact = [whole * share / total for share in shares]
    dealt = [int(one) for one in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: dealt[i] - exact[i])
    for i in by_remainder[: whole - sum(dealt)]:
        dealt[i] += 1
    return dealt
