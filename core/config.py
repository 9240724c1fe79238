"""From a YAML or JSON file to a frozen dataclass, and from there to canonical JSON, a fingerprint and a diff.

A mistake in a file is reported with the place, the numbers and the fix, and all mistakes are reported at once.
"""

import copy
import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast

import yaml

from darht.core.errors import ConfigError

T = TypeVar("T")
_BUILTINS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}


class _StrictLoader(yaml.SafeLoader):
    """YAML without tags, in which a key that stands twice in a mapping is an error and not a silent loss."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse duplicate keys; keys that `<<` brings in may be overridden."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: key '{twice[0]}' stands twice in one mapping")
        return super().construct_mapping(node, deep)


def load_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML (or JSON, which is YAML) file whose top level is a mapping.

    Raises:
        ConfigError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        data = yaml.load(path.read_text(), Loader=_StrictLoader)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
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
        raise ConfigError("; ".join(problems))
    return cast(T, value)


def _parse_dataclass(cls: Any, data: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(data, Mapping):
        problems.append(f"{where} must be a mapping; got {data!r}")
        return None
    known = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = typing.get_type_hints(cls)
    before = len(problems)
    problems += [f"{where}: unknown key '{key}'{_nearest(str(key), known)}" for key in data if key not in known]
    for name, field in known.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in data:
            problems.append(f"{where}: key '{name}' is required")
    values = {key: _convert(hints[key], data[key], f"{where}.{key}", problems) for key in data if key in known}
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except ConfigError as error:
        problems.append(f"{where}: {error}")
        return None


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known keys are {', '.join(known)}"


def _convert(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, cast(type, hint)) else _parse_dataclass(hint, value, where, problems)
    if origin is Literal:
        if value not in arguments:
            problems.append(f"{where} must be one of {', '.join(map(str, arguments))}; got {value!r}")
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
    attempts: list[list[str]] = []
    for hint in (hint for hint in arguments if hint is not type(None)):
        attempt: list[str] = []
        converted = _convert(hint, value, where, attempt)
        if not attempt:
            return converted
        attempts.append(attempt)
    problems += attempts[-1]
    return None


def _convert_tuple(arguments: tuple[Any, ...], value: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(value, list | tuple):
        problems.append(f"{where} must be a list; got {value!r}")
        return None
    return tuple(_convert(arguments[0], item, f"{where}[{i}]", problems) for i, item in enumerate(value))


def _convert_dict(arguments: tuple[Any, ...], value: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(value, Mapping):
        problems.append(f"{where} must be a mapping; got {value!r}")
        return None
    return {str(key): _convert(arguments[1], item, f"{where}.{key}", problems) for key, item in value.items()}


def _convert_builtin(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    converted = _number(value) if hint is float else value
    if not isinstance(converted, hint) or (hint is int and isinstance(value, bool)):
        problems.append(f"{where} must be {_BUILTINS.get(hint, hint)}; got {value!r}")
    return converted


def _number(value: Any) -> float | None:
    """A finite float, or None; text counts, because YAML reads 5e-4 as text and people write it all the same."""
    try:
        number = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if number is not None and math.isfinite(number) else None


def to_plain(value: Any) -> Any:
    """Turn dataclasses, tuples and paths into what JSON knows; dictionaries keep their order."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
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
    try:
        value = parse(cls, json.loads(data), where)
    except ValueError as error:  # json's own error and a failed decoding are ValueErrors
        raise ConfigError(f"{where} is not JSON: {error}") from error
    if canonical_json(value).encode("ascii") != data:
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
    return [] if old == new else [f"{where}: {_short(old)} -> {_short(new)}"]


def _diff_key(old: Mapping[str, Any], new: Mapping[str, Any], key: str, where: str) -> list[str]:
    if key not in new:
        return [f"{where}: {_short(old[key])} -> (absent)"]
    if key not in old:
        return [f"{where}: (absent) -> {_short(new[key])}"]
    return spec_diff(old[key], new[key], where)


def _short(value: Any, limit: int = 60) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def override(data: dict[str, Any], assignments: tuple[str, ...]) -> dict[str, Any]:
    """Apply `a.b=value` assignments (the value is YAML) to a copy of a mapping.

    Raises:
        ConfigError: an assignment without `=`, one that descends into something that is not a mapping, or a value that
            is not YAML.
    """
    result = copy.deepcopy(data)
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator:
            raise ConfigError(f"an assignment reads key=value; got '{assignment}'")
        *parents, last = path.split(".")
        node: Any = result
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"'{assignment}': '{parent}' is not a mapping")
        try:
            node[last] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"'{assignment}': the value is not valid YAML: {' '.join(str(error).split())}") from error
    return result
