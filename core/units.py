"""Bytes and times as people write them."""

import re

from darht.core.errors import ConfigError

_BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SECONDS = {"": 1, "S": 1, "M": 60, "MIN": 60, "H": 3600}
_NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str, option: str) -> int:
    """Bytes from a number and a unit: `50GB`, `1.5TiB`, `0`.

    Raises:
        ConfigError: it is something else.
    """
    return int(_parse(text, option, _BYTES, "50GB or 1.5TiB"))


def parse_seconds(text: str, option: str) -> float:
    """Seconds from a number and a unit: `90`, `10m`, `2h`.

    Raises:
        ConfigError: it is something else.
    """
    return _parse(text, option, _SECONDS, "90s, 10m or 2h")


def _parse(text: str, option: str, units: dict[str, int], example: str) -> float:
    found = _NUMBER.fullmatch(text)
    if found is None or found[2].upper() not in units:
        raise ConfigError(f"{option} is a number and a unit, such as {example}; got {text!r}")
    return float(found[1]) * units[found[2].upper()]
