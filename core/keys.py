"""Keys and seeds from hashes, for random numbers that depend on nothing but what they are for."""

import hashlib

from darht.core.errors import ConfigError


def derive_key(*parts: object) -> tuple[int, int]:
    """Two 32-bit words from a hash of the parts; different parts give independent streams."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def check_seed(seed: int) -> None:
    """Raise ConfigError for a negative seed: what draws from it knows none."""
    if seed < 0:
        raise ConfigError(f"seed must be at least 0; got {seed}: write {-seed}")


def derive_seed(*parts: object) -> int:
    """One integer below 2**63 from a hash of the parts, for generators that take a seed."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "little") >> 1
