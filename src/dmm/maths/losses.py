"""The losses of distillation: tensors in, one value per sample out; the caller weighs and averages.

The paper writes squared norms and leaves the reduction open. Here an error is a mean over elements,
so that a loss weight means the same at every resolution and width.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def score_loss(student_output: Tensor, teacher_output: Tensor) -> Tensor:
    """Mean squared difference of what student and teacher predict, in the student's prediction type.

    Args:
        student_output, teacher_output: (B, C, H, W).
    Returns: (B,) float32.
    Source: DMM eq. 9.
    """
    return _mean_squared_error(student_output, teacher_output)


def feature_loss(student_features: Mapping[str, Tensor], teacher_features: Mapping[str, Tensor]) -> Tensor:
    """Sum over blocks of the mean squared difference of the block's output.

    Args:
        student_features, teacher_features: by the block's name, (B, C_block, H_block, W_block) each. The student
            may hold more blocks than the teacher: those are not imitated.
    Returns: (B,) float32.
    Raises: ValueError: the teacher has a block that the student lacks, or has none.
    Source: DMM eq. 10.
    """
    if not teacher_features:
        raise ValueError("The teacher has no block to imitate.")
    if strange := teacher_features.keys() - student_features.keys():
        raise ValueError(f"The student lacks the teacher's blocks {', '.join(sorted(strange))}.")
    errors = [_mean_squared_error(student_features[name], features) for name, features in teacher_features.items()]
    return torch.stack(errors).sum(0)


def adversarial_loss(student_logits: Tensor, styles: Tensor) -> Tensor:
    """How little the discriminator takes the student's latents for the teachers' of their styles.

    Args:
        student_logits: (B, 2 N), of what the student painted.
        styles: (B,) int64 in [0, N), whose style each is.
    Returns: (B,) float32.
    Source: DMM eq. 11, Algorithm 1 line 11.
    """
    return F.cross_entropy(student_logits.float(), styles, reduction="none")


def discriminator_loss(student_logits: Tensor, teacher_logits: Tensor, styles: Tensor) -> Tensor:
    """How badly the discriminator tells the student in a style from that style's teacher, and styles from each other.

    The student's class is N + i, the teacher's i, as in Algorithm 1; the second term of eq. 11 has it the other
    way round, which contradicts the text.

    Args:
        student_logits, teacher_logits: (B, 2 N).
        styles: (B,) int64 in [0, N).
    Returns: (B,) float32.
    Source: DMM Algorithm 1 line 17.
    """
    num_styles = student_logits.shape[1] // 2
    fake = F.cross_entropy(student_logits.float(), num_styles + styles, reduction="none")
    return fake + F.cross_entropy(teacher_logits.float(), styles, reduction="none")


def consistency_loss(student: Tensor, target: Tensor, *, width: float = 1e-3) -> Tensor:
    """Mean pseudo-Huber distance of two values of the consistency function.

    Args:
        student, target: (B, C, H, W).
        width: c, below which differences count by their square, above by their size.
    Returns: (B,) float32.
    Source: LCM (arXiv:2310.04378), in the form of its code: sqrt(d^2 + c^2) - c.
    """
    difference = student.float() - target.float()
    return ((difference.square() + width**2).sqrt() - width).flatten(1).mean(1)


def _mean_squared_error(a: Tensor, b: Tensor) -> Tensor:
    # squares of half-precision differences underflow
    return (a.float() - b.float()).square().flatten(1).mean(1)
