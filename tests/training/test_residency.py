"""Where teachers are changes nothing of what they say."""

import pytest
import torch
from toy import ALPHAS_CUMPROD, STYLES, ToyData, toy_teachers

from dmm.maths.processes import VariancePreserving
from dmm.maths.sharing import share_batch
from dmm.training.batches import Batches, Role
from dmm.training.residency import TakingTurns, place_teachers

CPU = torch.device("cpu")


def ask(teacher, index, device):
    """What a teacher says of the two samples that are its own in the toy's first step."""
    groups = share_batch(4, [1 / len(STYLES)] * len(STYLES), 1, 0)
    roles = [Role([i], name, 1 / len(STYLES)) for i, name in enumerate(STYLES)]
    (batch,) = Batches(
        ToyData(),
        STYLES,
        roles,
        groups=groups,
        process=VariancePreserving(ALPHAS_CUMPROD),
        caption_dropout=0.0,
        micro_batch_size=4,
        seed=0,
        device=device,
    ).of_step(0)
    return teacher(batch, batch.parts[index])


def test_on_a_cpu_all_are_there():
    teachers = dict(enumerate(toy_teachers()))
    placed = place_teachers({1: teachers[1]}, CPU, num_student_bytes=10**15)
    assert placed[1] is teachers[1]
    prediction, features = ask(placed[1], 1, CPU)
    assert len(prediction) == 2
    assert features
    with pytest.raises(KeyError):
        placed[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_teachers_that_take_turns_say_what_they_say_together():
    device = torch.device("cuda")
    together = place_teachers(dict(enumerate(toy_teachers())), device, num_student_bytes=0)
    expected = [ask(together[index], index, device) for index in range(2)]
    turns = place_teachers(dict(enumerate(toy_teachers())), device, num_student_bytes=10**15)
    assert isinstance(turns, TakingTurns)
    for index in (0, 0, 1, 0, 1, 1, 0):
        prediction, features = ask(turns[index], index, device)
        torch.testing.assert_close(prediction, expected[index][0])
        assert features.keys() == expected[index][1].keys()
