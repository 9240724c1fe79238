"""Read YAML and JSON that anybody may have written: size, nesting, aliases and numbers have bounds, and so do messages.

A YAML alias costs four characters and stands for all that it names, so a few lines can describe more than any memory
holds. What a file describes is counted while it is read, with every alias written out.
"""

import json
import reprlib
from collections import Counter
from typing import Any

import yaml

from darht.core.errors import ConfigError

MAX_BYTES = 1 << 20  # of a YAML file; people write some KiB
MAX_DEPTH = 50  # lists and mappings inside each other; our own files have 6
MAX_NODES = 100_000  # values of a YAML file, aliases written out; a recipe has some hundred
MAX_SCALAR = 1000  # characters of a number or date; text may be longer
_SHOWN = 80  # characters of a value in a message

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxlong = _repr.maxother = _SHOWN
_repr.maxlevel = 4


class _StrictLoader(yaml.SafeLoader):
    """YAML without code and with bounds, in which a key that stands twice in a mapping is no silent loss."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth, self._nodes = 0, 0
        self._measured: dict[int, tuple[int, int]] = {}  # by id of a node: values in it, and levels of nesting

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Count what is composed; an alias counts as all that it names."""
        is_alias, before = self.check_event(yaml.AliasEvent), self._nodes
        self._depth += 1
        self._check()
        node = super().compose_node(parent, index)
        if node is not None:  # only of an empty document
            if not is_alias:
                self._nodes += 1
                self._measured[id(node)] = (self._nodes - before, 1 + self._levels(node))
            elif id(node) not in self._measured:
                raise yaml.YAMLError(
                    f"line {node.start_mark.line + 1}: an anchor holds an alias of itself; write it out"
                )
            else:
                nodes, levels = self._measured[id(node)]
                self._nodes += nodes
                self._check(levels - 1)
        self._check()
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse duplicate keys; keys that `<<` brings in may be overridden."""
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<")
        twice = min((key for key, times in keys.items() if times > 1), default=None)
        if twice is not None:
            raise yaml.YAMLError(
                f"line {node.start_mark.line + 1}: key {show(twice)} stands twice in one mapping; remove one"
            )
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        """Refuse numbers without end, which take quadratic time to read."""
        if isinstance(node, yaml.ScalarNode) and len(node.value) > MAX_SCALAR and not node.tag.endswith(":str"):
            raise yaml.YAMLError(
                f"line {node.start_mark.line + 1}: a number may have {MAX_SCALAR} characters; this one has "
                f"{len(node.value)}: quote it if it is text"
            )
        return super().construct_scalar(node)

    def _levels(self, node: yaml.Node) -> int:
        if isinstance(node, yaml.ScalarNode):
            return 0
        mapping = isinstance(node, yaml.MappingNode)
        children = [part for pair in node.value for part in pair] if mapping else node.value
        return max((self._measured[id(child)][1] for child in children), default=0)

    def _check(self, more_levels: int = 0) -> None:
        if self._depth + more_levels > MAX_DEPTH:
            raise yaml.YAMLError(f"values may be nested {MAX_DEPTH} levels deep, aliases written out; make it flatter")
        if self._nodes > MAX_NODES:
            raise yaml.YAMLError(
                f"a file may hold {MAX_NODES:,} values, aliases written out, and this one holds more: use fewer aliases"
            )


def read_yaml(text: str | bytes, where: str) -> Any:
    """The value of a YAML text; JSON is YAML.

    Args:
        text: UTF-8 where it is bytes.
        where: what messages call it.

    Raises:
        ConfigError: not YAML, or beyond MAX_BYTES, MAX_DEPTH, MAX_NODES or MAX_SCALAR.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{where} is larger than the {MAX_BYTES:,} bytes that YAML written by people may have")
    try:
        return yaml.load(text.decode() if isinstance(text, bytes) else text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError) as error:  # a ValueError of bytes that are no text, of a 13th month, and so on
        raise ConfigError(f"{where} is not valid YAML: {_line(error)}") from error


def read_json(data: str | bytes, where: str) -> Any:
    """The value of a JSON text of any size.

    Raises:
        ConfigError: not JSON, or nested more than MAX_DEPTH levels deep.
    """
    try:
        value = json.loads(data)
    except ValueError as error:  # json's own error and a failed decoding are ValueErrors
        raise ConfigError(f"{where} is not JSON: {_line(error)}") from error
    except RecursionError:
        value, too_deep = None, True
    else:
        too_deep = _is_deep(value)
    if too_deep:
        raise ConfigError(f"{where} is nested more than {MAX_DEPTH} levels deep")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [item for item in level if isinstance(item, dict | list)]
        if not level:
            return False
        inner = [item.values() if isinstance(item, dict) else item for item in level]
        level = [item for items in inner for item in items]
    return True


def show(value: Any) -> str:
    """The value as Python writes it, cut to what a message can carry, without making the whole text first."""
    return cut(_repr.repr(value), 2 * _SHOWN)


def short_json(value: Any, limit: int = 60) -> str:
    """The first characters of a value's JSON, without making the whole text first."""
    text = ""
    for piece in json.JSONEncoder(sort_keys=True, default=str).iterencode(value):
        text += piece
        if len(text) > limit:
            return f"{text[: limit - 3]}..."
    return text


def place(key: Any) -> str:
    """A key as a part of a dotted path in messages: bare where it is short and plain."""
    text = str(key)
    return text if len(text) <= _SHOWN and text.isprintable() else show(text)


def cut(text: str, limit: int) -> str:
    """At most `limit` characters of a text."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _line(error: Exception) -> str:
    return cut(" ".join(str(error).split()), 4 * _SHOWN)
