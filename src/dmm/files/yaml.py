"""YAML as people mean it: where each value stands, duplicate keys refused, and numbers that look like numbers.

YAML 1.1, which PyYAML reads, takes ``1e-5`` for a text, ``no`` for false and ``010`` for eight. This is
the core schema of YAML 1.2, with underscores in whole numbers (``100_000``); ``010`` is a text.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from dmm.errors import UserError

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
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"'{path}' could not be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not UTF-8 text; save the file as UTF-8.") from error
    value, places = parse_yaml(text, str(path))
    if not isinstance(value, dict):
        found = "is empty" if value is None else "holds no keys and values"
        raise UserError(f"'{path}' {found}, expected lines such as 'key: value'.")
    return value, places


def parse_yaml(text: str, source: str) -> tuple[Any, Places]:
    """Read YAML.

    Args:
        source: what the text is, as an error's first words.
    Returns: the plain value, and where each of its parts was written.
    Raises: UserError: it is not valid YAML, or has a key twice.
    """
    loader: _Loader | None = None
    places: Places = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return (None if node is None else _plain(loader, node, (), (), source, places)), places
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


def _plain(
    loader: _Loader, node: yaml.Node, place: Place, inside: tuple[yaml.Node, ...], source: str, places: Places
) -> Any:
    """The value of a node; notes its place, and those of what it holds."""
    line = f"{source}, line {node.start_mark.line + 1}"
    if node in inside:
        raise UserError(f"{line}: an anchor holds itself.")
    places.setdefault(place, line)
    inside = (*inside, node)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, item, (*place, i), inside, source, places) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            line = f"{source}, line {key_node.start_mark.line + 1}"
            if not isinstance(key, str):
                raise UserError(f"{line}: a key must be a word, not a list or keys and values.")
            if key in mapping:
                raise UserError(f"{line}: the key '{key}' is there twice; remove one.")
            places[(*place, key)] = line
            mapping[key] = _plain(loader, value_node, (*place, key), inside, source, places)
        return mapping
    try:
        return loader.construct_object(node)
    except ValueError as error:  # a tag that is set by hand, such as !!int, on what is none
        raise UserError(f"{line}: this is not valid YAML: '{node.value}' is not what its tag says.") from error
