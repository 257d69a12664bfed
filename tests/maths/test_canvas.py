"""Weights of regions and tiles."""

from itertools import pairwise

import pytest
import torch

from dmm.maths.canvas import WINDOWS, box_mask, region_weights, tile_starts


def test_a_box_covers_whole_pixels_and_parts_of_them():
    mask = box_mask((0.5, 1, 3, 2.25), height=3, width=4)
    assert mask.tolist() == [[0, 0, 0, 0], [0.5, 1, 1, 0], [0.125, 0.25, 0.25, 0]]


def test_weights_sum_to_one_and_what_nothing_covers_is_the_backgrounds():
    masks = torch.stack([box_mask((0, 0, 8, 16), 16, 16), box_mask((4, 0, 12, 16), 16, 16)])
    weights = region_weights(masks, 4, feather=0)
    assert weights[:, 0].T.tolist() == [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0, 1]]
    assert torch.allclose(region_weights(masks, 4, feather=1.0).sum(0), torch.ones(4, 4))


def test_a_region_of_the_whole_picture_leaves_nothing_to_the_background_however_soft():
    *_, background = region_weights(torch.ones(1, 32, 32), 4, feather=1.0)
    assert not background.any()


def test_feathering_softens_a_border_and_leaves_what_is_far_from_it():
    weights = region_weights(box_mask((0, 0, 64, 8), 8, 128)[None], 8, feather=1.0)[0, 0]
    assert weights[0] > 0.999
    assert 0.5 < weights[7] < 0.9
    assert weights[7] + weights[8] == pytest.approx(1)
    assert weights[15] < 0.001


@pytest.mark.parametrize(("length", "tile", "stride"), [(24, 8, 4), (25, 8, 4), (8, 8, 4), (9, 8, 8), (40, 8, 3)])
def test_tiles_cover_everything_and_none_reaches_beyond(length, tile, stride):
    starts = tile_starts(length, tile, stride)
    covered = {pixel for start in starts for pixel in range(start, start + tile)}
    assert covered == set(range(length))
    assert all(later - start <= stride for start, later in pairwise(starts))


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_are_positive_and_alike_from_all_sides(name):
    window = WINDOWS[name](6, 8)
    assert window.shape == (6, 8)
    assert (window > 0).all()
    assert torch.allclose(window, window.flip(0))
    assert torch.allclose(window, window.flip(1))


def test_mixture_of_diffusers_weighs_the_middle_more():
    window = WINDOWS["mixture"](8, 8)
    assert window[4, 4] > 10 * window[0, 0]
