"""Randomness is a function of (seed, step, index), and no two samples share a draw."""

import pytest
import torch

from dmm.maths.draws import draw, draw_shares

SHAPE = {"latent_shape": (4, 4, 4), "num_timesteps": 1000, "caption_dropout": 0.1}


def take(seed, step, indices, own=(0.0, 0.0)):
    return draw(seed, step, indices, num_rows=50, num_own=[[(9, 3)]] * len(indices), own=own, **SHAPE)


def test_a_sample_is_the_same_in_any_share_of_the_batch():
    whole, part = take(0, 7, range(12)), take(0, 7, range(5, 9))
    for name in ("rows", "timesteps", "noise", "dropped"):
        assert torch.equal(getattr(whole, name)[5:9], getattr(part, name))


def test_no_two_samples_share_noise():
    noise = torch.cat([take(seed, step, range(64)).noise for seed in (0, 1) for step in (0, 1, 2**20)]).flatten(1)
    assert len(noise.unique(dim=0)) == len(noise)
    likeness = noise @ noise.T / noise.shape[1] - torch.eye(len(noise))
    assert likeness.abs().max() < 0.75


def test_draws_are_what_they_say():
    draws = take(3, 0, range(4000))
    assert draws.rows.min() >= 0
    assert draws.rows.max() == 49
    assert draws.timesteps.min() < 10
    assert 990 < draws.timesteps.max() < 1000
    assert draws.dropped.float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert draws.noise.mean().item() == pytest.approx(0, abs=0.01)
    assert draws.noise.std().item() == pytest.approx(1, abs=0.01)


def test_a_share_of_the_samples_is_of_their_styles_own_rows():
    draws = take(3, 0, range(4000), own=(0.25, 0.0))
    is_own = draws.own_rows >= 0
    assert is_own.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert set(draws.own_rows[is_own].tolist()) == set(range(9))
    assert (take(3, 0, range(50)).own_rows == -1).all()
    assert (take(3, 0, range(50), own=(1.0, 0.0)).own_rows >= 0).all()


def test_each_kind_of_own_rows_has_its_share():
    draws = take(3, 0, range(4000), own=(0.25, 0.5))
    kinds = torch.bucketize(draws.own_rows, torch.tensor([0, 9]), right=True)  # none, the first, the second
    shares = torch.bincount(kinds) / len(kinds)
    assert shares.tolist() == pytest.approx([0.25, 0.25, 0.5], abs=0.03)
    assert set(draws.own_rows[kinds == 2].tolist()) == set(range(9, 12))
    assert (take(3, 0, range(50), own=(0.0, 1.0)).own_rows >= 9).all()


def test_that_share_changes_nothing_else():
    one, other = take(0, 7, range(12)), take(0, 7, range(12), own=(0.25, 0.25))
    for name in ("rows", "timesteps", "noise", "dropped"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def test_a_choice_of_styles_is_even_and_takes_rows_of_the_style_chosen():
    draws = draw(0, 0, range(400), num_rows=9, num_own=[[(1,), (5,)]] * 400, own=[1.0], **SHAPE)
    assert 150 < draws.styles.sum() < 250
    assert (draws.own_rows[draws.styles == 0] == 0).all()
    assert set(draws.own_rows[draws.styles == 1].tolist()) == set(range(5))


def test_shares_are_uniform_and_each_samples_own():
    on_path, of_range = draw_shares(0, 3, range(2000))
    for shares in (on_path, of_range):
        assert 0 <= shares.min() < 0.01
        assert 0.99 < shares.max() < 1
        assert abs(shares.mean() - 0.5) < 0.03
    assert abs(torch.corrcoef(torch.stack([on_path, of_range]))[0, 1]) < 0.1
    again, _ = draw_shares(0, 3, [7])
    assert again == on_path[7]
    assert draw_shares(1, 3, [7])[0] != again
    assert draw_shares(0, 4, [7])[0] != again
