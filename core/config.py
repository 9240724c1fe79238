"""From a YAML or JSON file to a frozen dataclass, and from there to canonical JSON, a fingerprint and a diff.

A mistake in a file is reported with the place, the numbers and the fix, and all mistakes are reported at once.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast

from darht.core.bounded import MAX_BYTES, MAX_DEPTH, cut, place, read_json, read_yaml, short_json, show
from darht.core.errors import ConfigError

T = TypeVar("T")
_SHOWN_PROBLEMS = 20  # of one file in a message; a list of wrong items has one for each
_LONG_KEY = 60  # characters; no key of ours is near one that is longer
_MAX_MESSAGE = 4000  # characters
_BUILTINS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}


def load_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML (or JSON, which is YAML) file whose top level is a mapping.

    Raises:
        ConfigError: the file is missing, is not YAML, is beyond the bounds of `read_yaml`, or is not a mapping.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    data = read_yaml(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values; it holds {type(data).__name__}")
    return data


def parse(cls: type[T], data: Mapping[str, Any], where: str) -> T:
    """Build the dataclass `cls` from `data`; `where` names the place in messages.

    Raises:
        ConfigError: unknown keys (with the nearest known one), missing keys, wrong types, and whatever rule
            `__post_init__` of a dataclass finds broken; all of them in one message.
    """
    problems: list[str] = []
    value = _parse_dataclass(cls, data, where, problems)
    if problems:
        more = len(problems) - _SHOWN_PROBLEMS
        rest = [f"and {more} more problems"] if more > 0 else []
        raise ConfigError(cut("; ".join(problems[:_SHOWN_PROBLEMS] + rest), _MAX_MESSAGE))
    return cast(T, value)


def _parse_dataclass(cls: Any, data: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(data, Mapping):
        problems.append(f"{where} must be a mapping; got {show(data)}")
        return None
    known = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = _types_of(cls)
    before = len(problems)
    problems += [f"{where}: unknown key {_nearest(str(key), known)}" for key in data if key not in known]
    for name, field in known.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in data:
            problems.append(f"{where}: key '{name}' is required")
    values = {
        key: _convert(hints[key], _levels(key, value), f"{where}.{key}", problems)
        for key, value in data.items()
        if key in known
    }
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except ConfigError as error:
        problems.append(f"{where}: {error}")
        return None


@functools.cache
def _types_of(cls: Any) -> dict[str, Any]:
    """The fields' types; a manifest has a record of one class for each of its thousands of shards."""
    return typing.get_type_hints(cls)


def _levels(key: str, value: Any) -> Any:
    """Eps and steps are in pixel levels, which people write as N/255 too."""
    if key in ("eps", "step") and isinstance(value, str) and value.strip().endswith("/255"):
        return value.strip().removesuffix("/255")
    return value


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    close = [] if len(key) > _LONG_KEY else difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    fix = f"did you mean '{close[0]}'?" if close else f"known keys are {', '.join(known)}"
    return f"{show(key)}; {fix}"


def _convert(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, cast(type, hint)) else _parse_dataclass(hint, value, where, problems)
    if origin is Literal:
        if value not in arguments:
            problems.append(f"{where} must be one of {', '.join(map(str, arguments))}; got {show(value)}")
        return value
    if origin in (Union, types.UnionType):
        return _convert_optional(arguments, value, where, problems)
    if origin is tuple:
        return _convert_tuple(arguments, value, where, problems)
    if origin is dict:
        return _convert_dict(arguments, value, where, problems)
    return _convert_builtin(hint, value, where, problems)


def _convert_optional(arguments: tuple[Any, ...], value: Any, where: str, problems: list[str]) -> Any:
    if value is None and type(None) in arguments:
        return None
    attempts: list[tuple[bool, list[str]]] = []
    for hint in (hint for hint in arguments if hint is not type(None)):
        attempt: list[str] = []
        converted = _convert(hint, value, where, attempt)
        if not attempt:
            return converted
        attempts.append(((typing.get_origin(hint) is tuple) == isinstance(value, list | tuple), attempt))
    problems += max(reversed(attempts), key=lambda one: one[0])[1]  # of a list what is wrong with it as a list
    return None


def _convert_tuple(arguments: tuple[Any, ...], value: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(value, list | tuple):
        problems.append(f"{where} must be a list; got {show(value)}")
        return None
    return tuple(_convert(arguments[0], item, f"{where}[{i}]", problems) for i, item in enumerate(value))


def _convert_dict(arguments: tuple[Any, ...], value: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(value, Mapping):
        problems.append(f"{where} must be a mapping; got {show(value)}")
        return None
    return {str(key): _convert(arguments[1], item, f"{where}.{place(key)}", problems) for key, item in value.items()}


def _convert_builtin(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    converted = _number(value) if hint is float else value
    if not isinstance(converted, hint) or (hint is int and isinstance(value, bool)):
        problems.append(f"{where} must be {_BUILTINS.get(hint, hint)}; got {show(value)}")
    return converted


def _number(value: Any) -> float | None:
    """A finite float, or None; text counts, because YAML reads 5e-4 as text and people write it all the same."""
    try:
        number = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if number is not None and math.isfinite(number) else None


def added(default: Any) -> Any:
    """A field that is younger than files are: its default is not written, so that their bytes stay canonical."""
    return dataclasses.field(default=default, metadata={"unwritten": default})


def to_plain(value: Any) -> Any:
    """Turn dataclasses, tuples and paths into what JSON knows; dictionaries keep their order."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
        written = [(f.name, v) for f, v in pairs if "unwritten" not in f.metadata or v != f.metadata["unwritten"]]
        return {name: to_plain(item) for name, item in written}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, ASCII, no NaN, a newline at the end."""
    return json.dumps(to_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n"


def parse_canonical(cls: type[T], data: bytes, where: str) -> T:
    """Build the dataclass `cls` from the canonical JSON that was written of it, and from nothing else.

    Raises:
        ConfigError: not JSON, not such a dataclass, or other bytes than `canonical_json` gives for the value.
    """
    value = parse(cls, read_json(data, where), where)
    try:
        canonical = canonical_json(value)
    except ValueError as error:  # JSON as Python reads it has NaN and Infinity
        raise ConfigError(f"{where} holds a number that JSON does not know: {error}") from error
    if canonical.encode("ascii") != data:
        raise ConfigError(f"{where} is not written the canonical way")
    return value


def fingerprint(value: Any) -> str:
    """The sha256 of the canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical_json(value).encode("ascii")).hexdigest()


def spec_diff(old: Any, new: Any, where: str = "") -> list[str]:
    """The fields in which two plain values differ, as lines `path: old -> new`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(key for key in new if key not in old)]
        return [line for key in keys for line in _diff_key(old, new, key, f"{where}.{key}" if where else str(key))]
    return [] if old == new else [f"{where}: {short_json(old)} -> {short_json(new)}"]


def _diff_key(old: Mapping[str, Any], new: Mapping[str, Any], key: str, where: str) -> list[str]:
    if key not in new:
        return [f"{where}: {short_json(old[key])} -> (absent)"]
    if key not in old:
        return [f"{where}: (absent) -> {short_json(new[key])}"]
    return spec_diff(old[key], new[key], where)


def override(
    data: dict[str, Any], assignments: tuple[str, ...], cls: type | None = None, under: Mapping[str, type] | None = None
) -> dict[str, Any]:
    """Apply `a.b=value` assignments (the value is YAML) to a copy of a mapping; what none reaches is shared with it.

    Args:
        data: the mapping.
        assignments: as they are typed, applied in their order.
        cls: the dataclass that the mapping will become. `key=null` then puts the default back, unless null is a value
            of the key itself.
        under: the dataclasses that mappings at the top level of `cls` become, where their hints do not say.

    Raises:
        ConfigError: an assignment without `=`, one that descends into something that is not a mapping, or a value that
            is not YAML.
    """
    result = dict(data)
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator:
            raise ConfigError(f"an assignment reads key=value; got {show(assignment)}")
        *parents, last = path.split(".")
        if len(parents) >= MAX_DEPTH:
            raise ConfigError(f"{show(path)} descends {len(parents)} levels; an assignment may descend {MAX_DEPTH - 1}")
        node: Any = result
        for parent in parents:
            child = node.get(parent, {})
            if not isinstance(child, dict):
                raise ConfigError(f"{show(assignment)}: {show(parent)} is not a mapping")
            copied = dict(child)  # through a YAML alias other keys may hold the same mapping
            node[parent] = copied
            node = copied
        value = read_yaml(text, f"{show(assignment)}: the value")
        if value is None and cls is not None and _null_is_default(cls, [*parents, last], under or {}):
            node.pop(last, None)
        else:
            node[last] = value
    return result


def _null_is_default(cls: Any, path: list[str], under: Mapping[str, type]) -> bool:
    """Whether the field at `path` has a default and null is none of its values."""
    *parents, last = path
    for depth, parent in enumerate(parents):
        cls = (under.get(parent) if depth == 0 else None) or _hints(cls).get(parent)
    fields = {field.name: field for field in dataclasses.fields(cls)} if last in _hints(cls) else {}
    field = fields.get(last)
    if field is None or (field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING):
        return False
    return type(None) not in typing.get_args(_hints(cls)[last])


def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}
