"""What a style brings, and what else is trained."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, model_validator

from dmm.recipes.parts import Number, Part, Whole, in_range


def _num_bytes(text: Any) -> int:
    """A size such as 40MB as a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)i?B", str(text).strip(), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"found '{text}', expected a size such as 40MB")
    return round(float(match[1]) * 1000 ** " KMG".index(match[2].upper() or " "))


DEFAULT_RANK = 16
"""Of a UNet of 860 M parameters that is 34 MB a style in half precision, 2 %."""


DEFAULT_TEXT_RANK = 16
"""Of a CLIP text encoder of 123 M parameters that is 7 MB a style in half precision, where a teacher's differs."""


class Styles(Part):
    """What a style brings: a prompt alone, as in the paper, or an adapter, a low-rank change of the weights."""

    rank: Annotated[Whole, in_range(least=0, most=4096)] | None = None
    """Of uniform adapters of as many bytes; :data:`DEFAULT_RANK` where nothing says how large a style is. 0: styles are
    prompts alone, the paper's method."""
    size: Annotated[str, AfterValidator(lambda text: _num_bytes(text) and text)] | None = None
    """In place of ``rank``: of a style on disk, on average, such as 40MB."""
    error: Annotated[Number, in_range(above=0, below=1)] | None = None
    """In place of ``rank``: about the score error that each style starts with, 1 being the start's."""
    text_encoder_rank: Annotated[Whole, in_range(least=0, most=4096)] | None = None
    """Of what a style changes of CLIP text encoders, in every layer, where its teacher's differ from the base's; by
    default :data:`DEFAULT_TEXT_RANK`. 0: the base's read for all styles, as in the paper."""
    train: Literal["adapters", "all", "none"] | None = None
    """What is trained: ``adapters``, the shared weights being frozen; ``all``; or ``none``: a merge without training.
    By default adapters, and of a rank of 0, all."""
    samples: Annotated[Whole, in_range(least=1)] = 128
    """Noised ones, of each style, by which its adapter is calibrated."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_rank(cls, given: Any) -> Any:
        if isinstance(given, dict) and all(given.get(name) is None for name in ("rank", "size", "error")):
            return {**given, "rank": DEFAULT_RANK}
        return given

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        given = [name for name in ("rank", "size", "error") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"found {' and '.join(given)}, which each say how large a style is; choose one")
        if not self.has_adapters and self.text_encoder_rank:
            raise ValueError(
                f"text_encoder_rank is {self.text_encoder_rank}, but with a rank of 0 styles are prompts, which change "
                "no text encoder; choose a rank, or leave text_encoder_rank out"
            )
        if not self.has_adapters and self.train not in (None, "all"):
            raise ValueError(
                f"train is {self.train}, but with a rank of 0 styles are prompts, which are trained with all weights; "
                "choose a rank, or leave train out"
            )
        return self

    @property
    def has_adapters(self) -> bool:
        """Whether styles are adapters."""
        return bool(self.rank) or self.size is not None or self.error is not None

    @property
    def text_rank(self) -> int:
        """Of what a style may change of text encoders; 0 where it changes nothing of them."""
        if not self.has_adapters:
            return 0
        return DEFAULT_TEXT_RANK if self.text_encoder_rank is None else self.text_encoder_rank

    @property
    def trained(self) -> Literal["adapters", "all", "none"]:
        """What is trained."""
        return self.train or ("adapters" if self.has_adapters else "all")

    @property
    def num_bytes(self) -> int | None:
        """Of a style, on average, where the recipe says so."""
        return None if self.size is None else _num_bytes(self.size)
