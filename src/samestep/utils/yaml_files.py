"""YAML as settings need it: plain values, each field once, no file that grows when it is read."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from samestep.errors import ConfigError
from samestep.utils.files import open_regular

_FILE_BYTES = 2**23
_EXPANDED = 2**20
"""Characters and nodes that a file may stand for once its aliases are followed."""

_PLAIN = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("str", "bool", "null", "map", "seq"))
"""Kinds of values beside numbers; dates are texts, other tags are refused."""


class _Loader(yaml.SafeLoader):
    """The safe loader without dates, sets, bytes and pairs, and without fields given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        first: dict[str, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                raise _problem("a field must be a plain word", key)
            if key.value in first and key.tag != "tag:yaml.org,2002:merge":
                raise _problem(f"{key.value!r} stands in line {first[key.value]} already", key)
            first.setdefault(key.value, key.start_mark.line + 1)
        return super().construct_mapping(node, deep=deep)

    def construct_number(self, node: Any) -> Any:
        is_integer = node.tag.endswith(":int")
        try:
            value = self.construct_yaml_int(node) if is_integer else self.construct_yaml_float(node)
        except (ValueError, OverflowError):
            raise _problem(f"{node.value[:40]!r} is no number that can be read", node) from None
        if is_integer and abs(value) >= 2**64:
            raise _problem(f"{node.value[:40]} is too large a number", node)
        return value


_CONSTRUCTORS: dict[str | None, Any] = {
    **{tag: yaml.SafeLoader.yaml_constructors[tag] for tag in _PLAIN},
    "tag:yaml.org,2002:int": _Loader.construct_number,
    "tag:yaml.org,2002:float": _Loader.construct_number,
    None: yaml.SafeLoader.yaml_constructors[None],
}
_Loader.yaml_constructors = _CONSTRUCTORS
_Loader.yaml_implicit_resolvers = {
    letter: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
    for letter, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _problem(text: str, node: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, text, node.start_mark)


def load_yaml(path: Path) -> Any:
    """What a YAML file holds: dictionaries, lists, texts, numbers, true, false and null.

    Args:
        path: The file.

    Returns:
        Its one document.

    Raises:
        ConfigError: It cannot be read, is no YAML, holds a tag, a field twice or a number that is
            too large, or stands for far more than is written in it (aliases of aliases).
    """
    try:
        with open_regular(path) as file:
            content = file.read(_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > _FILE_BYTES:
        raise ConfigError(f"{path}: larger than {_FILE_BYTES // 2**20} MiB: these are no settings")
    try:
        loader = _Loader(content.decode("utf-8"))
        node = loader.get_single_node()
        _expanded(node, {}, ())
        return None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError, KeyError, OverflowError) as error:  # and of no UTF-8
        raise ConfigError(f"{path}: not YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not YAML: nested too deeply") from None


def _expanded(node: Any, known: dict[int, int], above: tuple[int, ...]) -> int:
    """How much a node stands for with its aliases followed; refuses too much, and circles."""
    if id(node) in known:
        return known[id(node)]
    if id(node) in above:
        raise _problem("an alias of what it stands in", node)
    size, inside = 1, (*above, id(node))
    if isinstance(node, yaml.ScalarNode):
        size += len(node.value)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_expanded(part, known, inside) for part in node.value)
    elif isinstance(node, yaml.MappingNode):
        size += sum(_expanded(part, known, inside) for pair in node.value for part in pair)
    if size > _EXPANDED:
        raise _problem("with its aliases followed it is far larger than what is written", node)
    known[id(node)] = size
    return size
