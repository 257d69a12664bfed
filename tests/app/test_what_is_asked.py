"""What the controls ask for, and how a picture sets them again."""

from dataclasses import replace

import pytest
from conftest import STYLE_NAMES

from dmm.app.controls import (
    OVER_TIME,
    STRIP,
    STYLES,
    Controls,
    list_regions,
    list_shots,
    read_controls,
    restore_controls,
)
from dmm.cli.style_options import write_style
from dmm.errors import UserError
from dmm.files.parameters import Parameters, read_parameters
from dmm.files.pictures import save_png
from dmm.pipeline.style_schedule import StyleSchedule

MIX = {"ink": 0.7, "photo": 0.3, "clay": 0.0}
FIRST = Controls(prompt="a cat", seed=3, weights=MIX)


def values_of(controls):
    return {name: value for name, value in vars(controls).items() if name != "weights"}


def test_pictures_count_seeds_up_in_the_mix():
    shots = list_shots(replace(FIRST, count=3))
    assert [(shot.seed, shot.style) for shot in shots] == [(seed, {"ink": 0.7, "photo": 0.3}) for seed in (3, 4, 5)]


def test_every_style_is_of_one_seed():
    shots = list_shots(replace(FIRST, what=STYLES))
    assert [(shot.seed, shot.style, shot.label) for shot in shots] == [(3, {n: 1.0}, n) for n in STYLE_NAMES]


def test_a_strip_goes_from_the_mix_to_a_style():
    shots = list_shots(replace(FIRST, what=STRIP, other="clay", count=3))
    assert [shot.style for shot in shots] == [
        {"ink": 0.7, "photo": 0.3},
        {"ink": 0.35, "photo": 0.15, "clay": 0.5},
        {"clay": 1.0},
    ]
    with pytest.raises(UserError, match="at least 2"):
        list_shots(replace(FIRST, what=STRIP, other="clay"))


@pytest.mark.parametrize(("at", "expected"), [(0.0, {"clay": 1.0}), (1.0, {"ink": 0.7, "photo": 0.3})])
def test_a_style_over_time_that_never_changes_is_none(at, expected):
    assert list_shots(replace(FIRST, what=OVER_TIME, other="clay", at=at))[0].style == expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "negative": "blurry, Steps: 3",
            "steps": 40,
            "guidance": 4.5,
            "sampler": "Euler a",
            "width": 256,
            "height": 64,
        },
        {"what": OVER_TIME, "other": "clay", "at": 0.35},
        {"regions": "0.5,0,1,1:clay\n0,0,0.5,0.5:ink=0.5,clay=0.5:a blue dog"},
        {"weights": {"ink": 0.34, "photo": 0.33, "clay": 0.33}},
    ],
    ids=["first", "settings", "over time", "regions", "mix of three"],
)
def test_a_picture_sets_the_controls_that_it_was_made_with(tmp_path, changes):
    from PIL import Image

    controls = replace(FIRST, **changes)
    (shot,) = list_shots(controls)
    told = Parameters(
        controls.prompt,
        controls.negative,
        controls.steps,
        controls.sampler,
        controls.guidance,
        str(shot.seed),
        controls.width,
        controls.height,
        "merged",
        style=write_style(shot.style),
        plugins={"Regions": "; ".join(map(str, list_regions(controls)))} if controls.regions else {},
    )
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", told)
    present = Controls(prompt="else", steps=5, other=controls.other, at=0.4, weights=dict.fromkeys(STYLE_NAMES, 0.0))
    restored = restore_controls(read_parameters(tmp_path / "a.png"), STYLE_NAMES, replace(present, at=controls.at))
    assert restored == controls


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"Style": "oil"}, "no style 'oil'"),
        ({"Style": "=,="}, "cannot be read"),
        ({"Seed": "x"}, "cannot be read"),
        ({"Size": "64"}, "height is a whole number"),
        ({"Size": "99999x99999"}, "width is from 8 to 2048"),
        ({"Steps": "1e9"}, "steps is from 1 to 150"),
        ({"Sampler": "Heun"}, "no sampler 'Heun'"),
        ({"Style": "0-0.3:ink;0.3-0.6:photo;0.6-1:clay"}, "more than these controls can say"),
    ],
    ids=lambda value: str(value),
)
def test_a_picture_that_asks_for_what_there_is_not_is_refused(told, message):
    with pytest.raises(UserError, match=message):
        restore_controls(told, STYLE_NAMES, FIRST)


@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": None}, {"seed": 1.5}, {"seed": "x"}, {"seed": -1}, {"seed": 2**40}, {"count": 10_000},
        {"steps": float("nan")}, {"width": 13}, {"prompt": ["a"]}, {"prompt": "a" * 20_000}, {"what": "all"},
        {"guidance": 0}, {"guidance": 1, "negative": "x"}, {"sampler": {}}, {"height": 10**400},
    ],
    ids=str,
)  # fmt: skip
def test_what_a_request_may_not_hold_is_refused(wrong):
    with pytest.raises(UserError):
        read_controls(values_of(FIRST) | wrong, MIX)


@pytest.mark.parametrize("weights", [{"ink": 0.5}, {"ink": None}, {"ink": 0.0}, {"ink": float("inf")}], ids=str)
def test_weights_that_do_not_sum_to_1_are_refused(weights):
    with pytest.raises(UserError):
        list_shots(read_controls(values_of(FIRST), weights))


def test_what_a_request_holds_is_read():
    assert read_controls(values_of(FIRST) | {"seed": 3.0, "guidance": "7"}, MIX) == FIRST
    assert isinstance(list_shots(replace(FIRST, what=OVER_TIME, other="clay"))[0].style, StyleSchedule)


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ("/etc/passwd:ink", "is no box"),
        ("mask.png:ink:a dog", "is no box"),
        ("0,0,1,1", "is no region"),
        ("0,0,1,1:oil", "no style 'oil'"),
        ("0,0,0.5,8:ink", "is no box"),
        ("0,0,1,1:ink\n" * 17, "At most 16"),
    ],
    ids=lambda value: value[:16],
)
def test_regions_are_boxes_in_styles_that_there_are(regions, message):
    with pytest.raises(UserError, match=message):
        list_regions(replace(FIRST, regions=regions))
    with pytest.raises(UserError, match="at all times"):
        list_regions(replace(FIRST, regions="0,0,1,1:ink", what=OVER_TIME, other="clay"))
