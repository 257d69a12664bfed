import argparse

import pytest

from dmm.cli.style_options import choose_styles, read_style, write_style
from dmm.errors import UserError


@pytest.mark.parametrize(
    "text",
    [
        *("ink", "ink=0.7,photo=0.3", "a b=-0.5,c=1.5"),
        *("0-0.4:ink;0.4-1:photo", "0-0.25:a=0.7,b=0.3;0.25-0.5:b;0.5-1:a"),
    ],
)
def test_a_style_is_read_as_it_is_written(text):
    assert write_style(read_style(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0-0.4:ink", "these end at 0.4"),
        ("0-0.4:ink;0.5-1:photo", "begins at 0.5 where 0.4 was expected"),
        ("0-1:", "'' is no style"),
        ("ink:0-1", "'ink:0-1' is no part of a style over time; write 0-0.4:a;0.4-1:b"),
        ("0-1:ink;", "'' is no part"),
        ("0-1:ink=0.5,ink=0.5", "names 'ink' twice"),
    ],
)
def test_a_style_over_time_that_reads_otherwise_is_told(text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        read_style(text)


def test_the_same_style_over_time_is_not_painted_twice():
    args = argparse.Namespace(style=[read_style("0-0.5:a;0.5-1:b")] * 2, strip=None, pairs=False, styles=None)
    with pytest.raises(UserError, match=r"'0-0\.5:a;0\.5-1:b' is asked for twice"):
        choose_styles(args, ["a", "b"])
