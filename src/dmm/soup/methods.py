"""The methods of merging without training: pure functions on one tensor of every model, and their registry.

Tensors may be whole or any slice, flattened: all are elementwise, bar what a method *measures* of whole tensors
beforehand. They come in the dtype in which the sums are made, float32 or float64, and are summed in the order given.

``base`` is what the models were fine-tuned from; a model's *difference* is the model minus the base. The differences
are never added to the base as such: sums are written as weighted sums of the models themselves, which is the same and
exact where it should be, so that one model, or equal models, come out unchanged bit for bit.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def weighted_sum(models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Add up weighted models.

    Args:
        models: (n,) each.
        weights: used as they are; a sum of 1 makes it an average.
    Returns: (n,).
    Source: Model soups, https://arxiv.org/abs/2203.05482; Diffusion Soup, https://arxiv.org/abs/2406.08431.
    """
    total = models[0] * weights[0]
    for model, weight in zip(models[1:], weights[1:], strict=True):
        total.add_(model, alpha=weight)
    return total


def task_arithmetic(
    base: Tensor, models: Sequence[Tensor], weights: Sequence[float], origin: Tensor | None = None
) -> Tensor:
    """Add weighted differences to the base: ``base + sum(w * (model - origin))``; "add difference" in other tools.

    Args:
        weights: of the differences; negative ones take away.
        origin: what the differences are taken from; by default the base.
    Source: Editing models with task arithmetic, https://arxiv.org/abs/2212.04089.
    """
    rest = -math.fsum(weights)
    if origin is None:
        return weighted_sum([base, *models], [1 + rest, *weights])
    return weighted_sum([base, origin, *models], [1, rest, *weights])


def slerp(models: Sequence[Tensor], weights: Sequence[float], gram: Tensor | None = None) -> Tensor:
    """Turn from one model to another along the arc between them; in a straight line where they are parallel.

    Args:
        models: two.
        weights: of both, with a sum of 1; (1, 0) gives the first and (0, 1) the second.
        gram: (2, 2), the models' scalar products over the whole tensor; by default those of what is passed.
    Source: Animating rotation with quaternion curves, https://doi.org/10.1145/325334.325242.
    """
    gram = gram_matrix(models) if gram is None else gram
    norms = math.sqrt(gram[0, 0].item() * gram[1, 1].item())
    cosine = gram[0, 1].item() / norms if norms else 1.0
    if 1 - abs(cosine) < 1e-6:  # the arc's formula divides by a sine of 0
        return weighted_sum(models, weights)
    angle = math.acos(cosine)
    first, second = (math.sin(weight * angle) / math.sin(angle) for weight in weights)
    return weighted_sum(models, [first, second])


def model_stock(base: Tensor, models: Sequence[Tensor], gram: Tensor | None = None) -> Tensor:
    """Go from the base towards the models' average, the further the more the models agree.

    Args:
        gram: (k, k), the differences' scalar products over the whole tensor; by default those of what is passed.
    Source: Model Stock, https://arxiv.org/abs/2403.19522, eq. 5; the cosine is the mean over all pairs.
    """
    gram = gram_matrix([model - base for model in models]) if gram is None else gram
    count = len(models)
    norms = gram.diagonal().sqrt()
    pairs = [
        (gram[i, j] / (norms[i] * norms[j])).item() if norms[i] * norms[j] > 0 else float(norms[i] == norms[j])
        for i in range(count)
        for j in range(i)
    ]
    cosine = min(max(math.fsum(pairs) / len(pairs), 0.0), 1.0) if pairs else 1.0
    if cosine > 1 - 1e-9:  # what rounding leaves of 1: equal models must be that model
        cosine = 1.0
    share = count * cosine / (1 + (count - 1) * cosine)
    return weighted_sum([base, *models], [1 - share, *[share / count] * count])


def ties(
    base: Tensor,
    models: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: float,
    scale: float = 1.0,
    thresholds: Sequence[float] | None = None,
) -> Tensor:
    """Trim small differences, elect a sign for each element, and average the differences of that sign.

    Args:
        weights: relative, of the models, in the election and in the average.
        density: the share of each tensor's elements whose difference is kept, in (0, 1].
        scale: of the averaged difference (the paper's lambda).
        thresholds: the smallest magnitude that is kept, of each model; by default that of what is passed.
    Source: TIES-Merging, https://arxiv.org/abs/2306.01708. It trims over all tensors at once, we (as most tools) over
        each; magnitudes are compared in float32, and equal ones are kept together, as in the authors' code.
    """
    if thresholds is None:
        thresholds = [kept_above((model - base).abs(), density) for model in models]
    differences = [model - base for model in models]
    for difference, threshold in zip(differences, thresholds, strict=True):
        difference.mul_(difference.abs().float() >= threshold)  # torch.where takes five times as long
    return _elect(base, models, weights, differences, scale)


def dare(
    base: Tensor, models: Sequence[Tensor], weights: Sequence[float], *, kept: Sequence[Tensor], density: float
) -> Tensor:
    """Drop differences at random, scale up those that are left, and add them, weighted, to the base.

    Args:
        weights: of the differences.
        kept: (n,) bool, of each model; see :func:`random_mask`.
        density: the share that is kept, in (0, 1].
    Source: DARE, https://arxiv.org/abs/2311.03099.
    """
    total = torch.zeros_like(base)
    rest = torch.ones_like(base)
    for model, weight, mask in zip(models, weights, kept, strict=True):
        share = mask.to(base.dtype).mul_(weight / density)
        total.addcmul_(model, share)
        rest.sub_(share)
    # what rounding leaves of 0 would mix the base into models that make up the whole
    rest.masked_fill_(rest.abs() < 8 * torch.finfo(base.dtype).eps, 0)
    return total.addcmul_(base, rest)


def dare_ties(
    base: Tensor,
    models: Sequence[Tensor],
    weights: Sequence[float],
    *,
    kept: Sequence[Tensor],
    density: float,
    scale: float = 1.0,
) -> Tensor:
    """Drop differences at random, scale up those that are left, elect a sign, and average those of that sign.

    Args: see :func:`dare` and :func:`ties`.
    Source: DARE, https://arxiv.org/abs/2311.03099, in place of the trimming of TIES.
    """
    differences = [(model - base).mul_(mask) for model, mask in zip(models, kept, strict=True)]
    return _elect(base, models, weights, differences, scale / density)


def _elect(
    base: Tensor, models: Sequence[Tensor], weights: Sequence[float], differences: Sequence[Tensor], scale: float
) -> Tensor:
    """The last two steps of TIES; without a majority the base stays.

    Args:
        differences: 0 where they are dropped; only their signs are left of them.
    """
    mass = torch.zeros_like(base)
    for difference, weight in zip(differences, weights, strict=True):
        mass.add_(difference, alpha=weight)
    majority = mass.sign_()
    # where there is none, the base is the one that is averaged
    count = 1 - majority.abs()
    total = base * count
    for model, weight, difference in zip(models, weights, differences, strict=True):
        # 1 where a difference has the elected sign, 0 elsewhere: by floats, which are much faster than masks
        share = difference.sign_().mul_(majority).clamp_(min=0)
        total.addcmul_(model, share, value=weight)
        count.add_(share, alpha=weight)
    average = total.div_(count)
    return average if scale == 1 else average.mul_(scale).add_(base, alpha=1 - scale)


def gram_matrix(tensors: Sequence[Tensor]) -> Tensor:
    """Scalar products of tensors, (k, k), summed in float64 in an order that no thread count changes."""
    arrays = [tensor.double().numpy() for tensor in tensors]
    gram = torch.zeros(len(arrays), len(arrays), dtype=torch.float64)
    for i, one in enumerate(arrays):
        for j, other in enumerate(arrays[: i + 1]):
            # numpy's sum, unlike a dot product, has one order whatever library is beneath
            gram[i, j] = gram[j, i] = float(np.sum(one * other))
    return gram


def num_kept(density: float, count: int) -> int:
    """How many of a tensor's elements TIES keeps: at least one."""
    return max(1, int(density * count))


def kept_above(magnitudes: Tensor, density: float) -> float:
    """The smallest magnitude among those that TIES keeps."""
    count = magnitudes.numel()
    if count == 0:
        return 0.0
    flat = magnitudes.flatten().float()
    return float(flat.kthvalue(count - num_kept(density, count) + 1).values)


def random_mask(key: tuple[int, int], start: int, count: int, density: float) -> Tensor:
    """Which elements DARE keeps: (count,) bool, a function of the key and of each element's place alone.

    Args:
        key: of the generator, two 64-bit numbers that the seed, the model and the tensor give.
        start: place of the first element in its tensor, a multiple of 8.
        density: the share that is kept.
    """
    assert start % 8 == 0
    # Philox is a function of a counter: each count gives four 64-bit words, two elements each
    words = np.random.Philox(key=np.array(key, np.uint64), counter=start // 8).random_raw((count + 1) // 2)
    # compared as signed: torch has few operations on unsigned numbers
    numbers = torch.from_numpy(words.view(np.int32))[:count]
    return (
        numbers < min(round(density * 2**32) - 2**31, 2**31 - 1) if density < 1 else torch.ones(count, dtype=torch.bool)
    )
