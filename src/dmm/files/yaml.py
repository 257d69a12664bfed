"""YAML as people mean it: where each value stands, duplicate keys refused, and numbers that look like numbers.

YAML 1.1, which PyYAML reads, takes ``1e-5`` for a text, ``no`` for false and ``010`` for eight. This is
the core schema of YAML 1.2, with underscores in whole numbers (``100_000``); ``010`` is a text.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from dmm.errors import UserError, is_text
from dmm.files.text import read_text

Place = tuple[str | int, ...]
"""Keys and indices that lead to a value."""
Places = dict[Place, str]
"""Where a value was written, as an error's first words: ``recipe.yaml, line 3``."""

_SCALARS = (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
)


_LARGEST = 2**20  # bytes; the parser is slow, and no recipe comes near
_MOST_VALUES = 20_000
"""That a text may stand for: a few anchors within anchors stand for more than memory holds."""
_DEEPEST = 50
"""Levels of lists, and of keys and values."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's, which declares it so


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's, which declares it so

    def ignore_aliases(self, data: Any) -> bool:
        """Write everything out: anchors are for machines."""
        return True


for _name, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}", re.compile(f"({_pattern})$"), [*_first, *([""] if _name == "null" else [])]
        )


def read_yaml(path: Path) -> tuple[dict[Any, Any], Places]:
    """Read a YAML file of keys and values.

    Returns: the plain values, and where each was written.
    Raises: UserError: it cannot be read, is not valid YAML, has a key twice, or holds no keys and values.
    """
    value, places = parse_yaml(read_text(path, largest=_LARGEST), str(path))
    if not isinstance(value, dict):
        found = "is empty" if value is None else "holds no keys and values"
        raise UserError(f"'{path}' {found}, expected lines such as 'key: value'.")
    return value, places


def parse_yaml(text: str, source: str) -> tuple[Any, Places]:
    """Read YAML.

    Args:
        source: what the text is, as an error's first words.
    Returns: the plain value, and where each of its parts was written.
    Raises: UserError: it is not valid YAML, has a key twice, or stands for more than anybody means.
    """
    loader: _Loader | None = None
    places: Places = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return (None if node is None else _Values(loader, source, places).plain(node)), places
    except RecursionError:
        raise UserError(f"{source}: this is nested more than {_DEEPEST} levels deep.") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{source}, line {line}: this is not valid YAML: {error.problem}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{source}: this is not valid YAML: {' '.join(str(error).split())}.") from error
    finally:
        if loader is not None:
            loader.dispose()


def write_yaml(value: Any) -> str:
    """Plain values as YAML that :func:`parse_yaml` reads back, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Values:
    """Makes plain values of nodes, and notes where each was written."""

    def __init__(self, loader: _Loader, source: str, places: Places) -> None:
        self._loader, self._source, self._places = loader, source, places
        self._num_values = 0

    def plain(self, node: yaml.Node, place: Place = (), inside: tuple[yaml.Node, ...] = ()) -> Any:
        """The value of a node; notes its place, and those of what it holds."""
        line = f"{self._source}, line {node.start_mark.line + 1}"
        self._num_values += 1
        if node in inside:
            raise UserError(f"{line}: an anchor holds itself.")
        if len(inside) == _DEEPEST:
            raise UserError(f"{line}: this is nested more than {_DEEPEST} levels deep.")
        if self._num_values > _MOST_VALUES:
            raise UserError(
                f"{line}: the text stands for more than {_MOST_VALUES} values, with what its aliases repeat."
            )
        self._places.setdefault(place, line)
        inside = (*inside, node)
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(item, (*place, i), inside) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, place, inside)
        if not is_text(node.value):
            raise UserError(f"{line}: this spells half a character, a surrogate by itself.")
        try:
            return self._loader.construct_object(node)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            # a tag that is set by hand, such as !!int, on what is none
            raise UserError(f"{line}: this is not valid YAML: '{node.value}' is not what its tag says.") from error

    def _mapping(self, node: yaml.MappingNode, place: Place, inside: tuple[yaml.Node, ...]) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            line = f"{self._source}, line {key_node.start_mark.line + 1}"
            if not isinstance(key, str):
                raise UserError(f"{line}: a key must be a word, not a list or keys and values.")
            if not is_text(key):
                raise UserError(f"{line}: this spells half a character, a surrogate by itself.")
            if key in mapping:
                raise UserError(f"{line}: the key '{key}' is there twice; remove one.")
            self._places[(*place, key)] = line
            mapping[key] = self.plain(value_node, (*place, key), inside)
        return mapping
