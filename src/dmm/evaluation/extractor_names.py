"""The extractors by name, and what can be said of an evaluation in their features before one is opened.

Nothing heavy at import, so that a mistake is told without waiting.
"""

from dmm.errors import UserError, nearest

MIN_BLOCK = 50  # samples; fewer tell little of a distribution
MIN_SMALL_BLOCK = 10  # of sets that do not make two blocks of the other size
NUM_FEATURES = {"inception": 2048, "clip": 768, "dino": 1024, "judge": 320}
"""Of each extractor with the weights that it has by default."""


def read_extractor(text: str) -> tuple[str, str | None]:
    """An extractor as people ask for it, as its name and its weights: ``judge``, ``inception=path.pth``.

    Raises: UserError: there is none of that name.
    """
    name, _, weights = text.partition("=")
    if name not in NUM_FEATURES:
        raise UserError(
            f"There is no extractor '{name}'{nearest(name, NUM_FEATURES)}; choose from {', '.join(NUM_FEATURES)}."
        )
    return name, weights or None


def check_count(num_images: int, num_features: int, extractor: str) -> None:
    """Refuse fewer pictures than FID can do with: the covariance of D features needs more than D.

    Raises: UserError.
    """
    least = max(num_features + 1, 2 * MIN_BLOCK)
    if num_images < least:
        raise UserError(
            f"{num_images} pictures of each style are too few for the {num_features} features of '{extractor}': FID "
            f"needs at least {least}. Raise --num-images, choose an extractor of fewer features, or do without FID: "
            "--quick."
        )


def check_quick_count(num_images: int) -> None:
    """Refuse fewer pictures than KID can do with, which needs two blocks of them to tell its error.

    Raises: UserError.
    """
    if num_images < 2 * MIN_SMALL_BLOCK:
        raise UserError(
            f"{num_images} pictures of each style are too few for KID and its error, also with --quick: it needs at "
            f"least {2 * MIN_SMALL_BLOCK}. Raise --num-images."
        )
