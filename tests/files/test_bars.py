"""Bars that move by parts."""

import io

import pytest

from dmm.files.bars import PartsBar


@pytest.mark.parametrize("parts", [36, 75, 7])
def test_parts_are_shown_as_whole_things_and_end_at_their_number(parts):
    shown = io.StringIO()
    with PartsBar(3, " images", "samples", file=shown, mininterval=0) as bar:
        for _ in range(3 * parts):
            bar.update(1 / parts)  # which add up to a hair more or less than 3
    lines = shown.getvalue().replace("\r", "\n").split("\n")
    assert all(line.startswith("samples: ") for line in lines if line.strip())
    assert "3/3" in lines[-2]
    assert not any("." in line.split("|")[-1].split(" [")[0] for line in lines)


def test_a_bar_without_a_title_begins_with_its_share():
    shown = io.StringIO()
    with PartsBar(2, " images", file=shown) as bar:
        bar.update(2)
    assert shown.getvalue().strip("\r").startswith("  0%|")
    assert "2/2" in shown.getvalue()
