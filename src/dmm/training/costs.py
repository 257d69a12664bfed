"""What a merge takes of memory and disk: plain arithmetic, in bytes, on the numbers of its weights.

What is not here is what activations take, which only a run of the model tells.
"""

from dataclasses import dataclass

FULL, HALF = 4, 2
"""Bytes of a weight in float32, and in bfloat16 or float16."""
MOMENTS = 2
"""AdamW's, of each weight that is trained."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of weights.

    Attributes:
        denoiser: of the base, and so of each teacher.
        style_prompts: of the student's.
        readers: the VAE and the text encoder, which come with the result.
        backbone: what the discriminator looks with; frozen.
        head: what it judges with.
        num_styles: that the merge adds.
        adapter: of each such style, where it has one, at most.
        calibrated: of what is kept of each before training, to be dealt from.
        text_adapter: of what each may change of text encoders, at most.
    """

    denoiser: int
    style_prompts: int
    readers: int
    backbone: int = 0
    head: int = 0
    num_styles: int = 1
    adapter: int = 0
    calibrated: int = 0
    text_adapter: int = 0

    @property
    def student(self) -> int:
        """All that is trained of it, but for adapters."""
        return self.denoiser + self.style_prompts

    @property
    def pipeline(self) -> int:
        """All of a model."""
        return self.denoiser + self.readers


def checkpoint_bytes(sizes: Sizes, *, averaged: bool) -> int:
    """Of one checkpoint: weights and moments, and an average of the student."""
    trained = (1 + MOMENTS) * (sizes.student + sizes.head)
    return FULL * (trained + (sizes.student if averaged else 0))


def disk_bytes(sizes: Sizes, *, keep: int, averaged: bool) -> int:
    """Of all that is written: the result, and one more checkpoint than are kept, while the newest is written."""
    return (keep + 1) * checkpoint_bytes(sizes, averaged=averaged) + FULL * (sizes.student + sizes.readers)


def student_bytes(sizes: Sizes, *, averaged: bool) -> int:
    """Of the memory for what is trained in float32: weights, gradients, moments, and an average of the student."""
    trained = (2 + MOMENTS) * (sizes.student + sizes.head)
    return FULL * (trained + (sizes.student if averaged else 0))


def teacher_bytes(sizes: Sizes, *, num_teachers: int, half: bool) -> int:
    """Of the memory for what is frozen: the teachers that a process serves, and the discriminator's backbone."""
    return (HALF if half else FULL) * (num_teachers * sizes.denoiser + sizes.backbone)
