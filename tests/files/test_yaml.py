import time
from itertools import pairwise

import pytest

from dmm.errors import UserError
from dmm.files.yaml import parse_yaml, read_yaml, write_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("1e-5", 1e-5), ("1.0e-5", 1e-5), ("-2E+3", -2000.0), (".5", 0.5), ("3.", 3.0), (".inf", float("inf"))],
        *[("10", 10), ("-10", -10), ("100_000", 100_000), ("0", 0), ("010", "010"), ("1:30", "1:30")],
        *[("true", True), ("False", False), ("no", "no"), ("on", "on"), ("y", "y")],
        *[("null", None), ("~", None), ("", None), ("'1e-5'", "1e-5"), ("2024-01-01", "2024-01-01")],
        *[("[1, a]", [1, "a"]), ("{a: 1, no: 2}", {"a": 1, "no": 2}), ("{1: a}", {"1": "a"})],
        *[("[&x {a: 1}, *x]", [{"a": 1}, {"a": 1}])],
    ],
)
def test_values_are_what_people_mean(text, value):
    assert parse_yaml(text, "here")[0] == value
    assert type(parse_yaml(text, "here")[0]) is type(value)


@pytest.mark.parametrize(
    "value",
    [
        *["no", "1e-5", "010", "1", "1.5", "true", "null", "~", "", "2024-01-01"],
        *["a: b", "# a", " a ", "käfer 🐞", "x" * 300, "line\nline"],
        *[1e-5, 1e300, 0.1 + 0.2, 10**30, None, True],
    ],
)
def test_what_is_written_is_read_back(value):
    whole = {"text": value, "list": [value, [value]], "same": [value]}
    read = parse_yaml(write_yaml(whole), "here")[0]
    assert read == whole
    assert type(read["text"]) is type(value)


def test_places_are_lines():
    _, places = parse_yaml("a: 1\nb:\n  - c: 2\n\n  - d: [3,\n         4]\n", "f")
    assert places[("a",)] == "f, line 1"
    assert places[("b", 0, "c")] == "f, line 3"
    assert places[("b", 1)] == "f, line 5"
    assert places[("b", 1, "d", 1)] == "f, line 6"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1, 2\nc: 3", "f, line 3: this is not valid YAML: .*"),
        ("a: 1\n\tb: 2", "f, line 2: this is not valid YAML: .*"),
        ("a: 1\n--- \nb: 2", "f, line 2: this is not valid YAML: but found another document."),
        ("a: 1\nb:\n  c: 1\n  c: 2", "f, line 4: the key 'c' is there twice; remove one."),
        ("? [a]\n: 1", "f, line 1: a key must be a word, not a list or keys and values."),
        ("a: &x [*x]", "f, line 1: an anchor holds itself."),
        ("a: *x", "f, line 1: this is not valid YAML: found undefined alias 'x'."),
        ("a: !!python/object:os.system 1", "f, line 1: this is not valid YAML: could not determine a constructor .*"),
        ("a: !!int x", "f, line 1: this is not valid YAML: 'x' is not what its tag says."),
        ("a: \x07", "f: this is not valid YAML: .*"),
    ],
)
def test_mistakes_are_one_sentence_with_the_line(text, message):
    with pytest.raises(UserError, match=rf"\A{message}\Z") as caught:
        parse_yaml(text, "f")
    assert "\n" not in str(caught.value)


def test_files_that_hold_no_keys_and_values(tmp_path):
    path = tmp_path / "f.yaml"
    for content, message in [
        (b"", "is empty"),
        (b"# only this\n", "is empty"),
        (b"- 1\n", "holds no keys and values"),
        (b"\xff\xfe", "not UTF-8"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_yaml(path)
    with pytest.raises(UserError, match="No such file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="Is a directory"):
        read_yaml(tmp_path)
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\n")
    assert read_yaml(path)[0] == {"a": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a: &a [x,x,x,x,x,x,x,x,x]\n"
            + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghi")),
            "stands for more than 20000 values",
        ),
        ("a: &a {x: 1, y: 2}\nb: [" + "*a, " * 10_000 + "]", "stands for more than 20000 values"),
        ("a: " + "[" * 900 + "]" * 900, "nested more than 50 levels deep"),
        ("{a: " * 60 + "}" * 60, "nested more than 50 levels deep"),
    ],
)
def test_what_stands_for_more_than_memory_holds_is_refused_in_no_time(text, message):
    begun = time.perf_counter()
    with pytest.raises(UserError, match=message):
        parse_yaml(text, "f")
    assert time.perf_counter() - begun < 5


@pytest.mark.parametrize("text", ["a: !!int ''", "a: !!timestamp x", "a: !!bool x", "a: !!float x", "a: " + "9" * 5000])
def test_values_that_are_not_what_they_say_are_sentences(text):
    with pytest.raises(UserError, match="f, line 1: this is not valid YAML"):
        parse_yaml(text, "f")
