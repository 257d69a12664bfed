import pytest

from dmm.cli.style_options import read_style, write_style


@pytest.mark.parametrize("text", ["ink", "ink=0.7,photo=0.3", "a b=-0.5,c=1.5"])
def test_a_style_is_read_as_it_is_written(text):
    assert write_style(read_style(text)) == text
