"""Where teachers are changes nothing of what they say."""

import pytest
import torch
from toy import ALPHAS_CUMPROD, toy_teachers

from dmm.residency import TakingTurns, place_teachers

CPU = torch.device("cpu")


def question(device):
    generator = torch.Generator().manual_seed(0)
    x_t, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 6, 16, generator=generator)
    timesteps = torch.tensor([10, 900])
    told = (x_t, timesteps, ALPHAS_CUMPROD[timesteps])
    return (*(tensor.to(device) for tensor in told), {"encoder_hidden_states": text.to(device)})


def test_on_a_cpu_all_are_there():
    teachers = dict(enumerate(toy_teachers()))
    placed = place_teachers({1: teachers[1]}, CPU, num_student_bytes=10**15)
    assert placed[1] is teachers[1]
    with pytest.raises(KeyError):
        placed[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_teachers_that_take_turns_say_what_they_say_together():
    device = torch.device("cuda")
    together = place_teachers(dict(enumerate(toy_teachers())), device, num_student_bytes=0)
    expected = [together[index](*question(device)) for index in range(2)]
    turns = place_teachers(dict(enumerate(toy_teachers())), device, num_student_bytes=10**15)
    assert isinstance(turns, TakingTurns)
    for index in (0, 0, 1, 0, 1, 1, 0):
        prediction, features = turns[index](*question(device))
        torch.testing.assert_close(prediction, expected[index][0])
        assert features.keys() == expected[index][1].keys()
