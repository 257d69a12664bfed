"""A sample is led from a point of the teacher's path to the one before it, whatever batch it is in."""

import pytest
import torch
from toy import ALPHAS_CUMPROD, STYLES, ToyData

from dmm.data.training import STUDENT
from dmm.maths.consistency import embed_guidance, sub_path_noise
from dmm.maths.sharing import Group
from dmm.models.few_step import TOLD_DIM
from dmm.training.paths import Paths

GROUPS = [Group(0, range(6), 1 / 12), Group(1, range(6, 12), 1 / 12)]


def paths(**changes):
    settings = {
        "groups": GROUPS,
        "readers": [STUDENT] * len(STYLES),
        "style_by_style": False,
        "alphas_cumprod": ALPHAS_CUMPROD,
        "skip": 20,
        "draws_gamma": True,
        "guidance": (2.0, 2.0),
        "own": 1.0,
        "caption_dropout": 0.0,
        "micro_batch_size": 64,
        "seed": 3,
        "device": torch.device("cpu"),
        **changes,
    }
    return Paths(ToyData(), STYLES, **settings)


def all_of(batches, name):
    return torch.cat([getattr(batch, name) for batch in batches])


@pytest.mark.parametrize("cut", [{"micro_batch_size": 5}, {"style_by_style": True, "micro_batch_size": 4}])
def test_a_step_is_the_same_however_it_is_cut(cut):
    (whole,) = paths().of_step(7)
    parts = list(paths(**cut).of_step(7))
    assert len(parts) == len(paths(**cut))
    for name in ("x_t", "timesteps", "earlier", "gamma", "guidance", "style_weights", "loss_weights", "between"):
        assert torch.equal(getattr(whole, name), all_of(parts, name))
    if "style_by_style" in cut:
        assert all(len(batch.style_weights.unique(dim=0)) == 1 for batch in parts)


def test_steps_lead_from_point_to_point_of_the_path_and_the_first_to_its_end():
    seen = set()
    for step in range(60):
        for batch in paths().of_step(step):
            for t, s in zip(batch.timesteps.tolist(), batch.earlier.tolist(), strict=True):
                assert t % 20 == 19
                assert s == max(t - 20, 0)
                seen.add(t)
            assert torch.equal(batch.levels, ALPHAS_CUMPROD[batch.timesteps])
            assert torch.equal(batch.alpha_bar_s, ALPHAS_CUMPROD[batch.earlier])
    assert seen == set(range(19, 1000, 20))


def test_a_style_learns_on_what_was_painted_in_it():
    (batch,) = paths().of_step(0)
    text = ToyData().conditioning("student", torch.arange(32), torch.zeros(32, dtype=torch.bool))[
        "encoder_hidden_states"
    ]
    for one, weights in zip(batch.conditioning["encoder_hidden_states"], batch.style_weights, strict=True):
        (row,) = (text == one).flatten(1).all(1).nonzero()[0].tolist()
        assert row % len(STYLES) == weights.argmax()
    assert batch.unconditional["encoder_hidden_states"].abs().max() == 0


def test_the_student_begins_at_a_point_or_where_there_is_as_much_noise_as_between_two():
    for step in range(20):
        (splam,) = paths().of_step(step)
        assert splam.told is None
        assert len(splam.gamma.unique()) == 12
        assert 0 < splam.gamma.min() < splam.gamma.max() <= 1
        assert ((splam.earlier <= splam.between) & (splam.between <= splam.timesteps)).all()
        below = splam.between.long()
        share = splam.between - below
        power = sub_path_noise(splam.gamma, splam.levels, splam.alpha_bar_s)
        level = ALPHAS_CUMPROD[below].lerp(ALPHAS_CUMPROD[(below + 1).clamp(max=999)], share)
        torch.testing.assert_close(level, splam.levels / (splam.levels + power), rtol=1e-2, atol=1e-4)
    (lcm,) = paths(draws_gamma=False).of_step(0)
    assert torch.equal(lcm.between, lcm.timesteps)
    assert lcm.gamma.tolist() == [1.0] * 12


def test_the_student_is_told_guidance_where_that_is_drawn():
    (fixed,) = paths().of_step(0)
    assert fixed.told is None
    assert fixed.guidance.tolist() == [2.0] * 12
    for draws_gamma in (False, True):
        (drawn,) = paths(draws_gamma=draws_gamma, guidance=(3.0, 12.0)).of_step(0)
        assert torch.equal(drawn.told, embed_guidance(drawn.guidance, TOLD_DIM))
        assert 3 <= drawn.guidance.min() < drawn.guidance.max() <= 12
