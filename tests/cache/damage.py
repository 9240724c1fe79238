"""Ways to damage a file of a cache or of an export: every position class, every kind."""

from collections.abc import Callable
from pathlib import Path


def flip(position: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[min(int(position * len(data)), len(data) - 1)] ^= 1
        path.write_bytes(data)

    return damage


def flip_from_end(distance: int) -> Callable[[Path], None]:
    """A bit so many bytes before the end: in a shard, the last entry of its index, before the checksum's 4 bytes."""

    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[-min(distance, len(data))] ^= 1
        path.write_bytes(data)

    return damage


def other_of(path: Path) -> Path:
    """A file of the same kind: the neighbouring shard or record, or the same file of another array."""
    if path.suffix == ".json" and path.parent.name != "c" and path.stem.isdigit():
        return path.with_name(f"{int(path.stem) ^ 1:05d}.json")
    if "offset" in path.parts:
        return path.parents[4] / "label" / "c" / "0"
    if "c" in path.parts:
        at = path.parts.index("c") + 1
        return Path(*path.parts[:at], str(int(path.parts[at]) ^ 1), *path.parts[at + 1 :])
    if path.name == "zarr.json":
        return next(o for o in sorted(path.parents[1].rglob("zarr.json")) if o.read_bytes() != path.read_bytes())
    if path.suffix == ".tar":
        return path.with_name(f"shard-{int(path.stem.removeprefix('shard-')) ^ 1:05d}.tar")
    others = {"spec.json": "manifest.json", "manifest.json": "spec.json", "index.json": "shard-00000.tar"}
    return path.with_name(others[path.name])


def swap(path: Path) -> None:
    other = other_of(path)
    data = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "first byte": flip(0.0),
    "in the middle": flip(0.5),
    "in the index": flip_from_end(12),
    "last byte": flip(1.0),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]) and None,
    "emptied": lambda path: path.write_bytes(b"") and None,
    "deleted": lambda path: path.unlink(),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"\n") and None,
    "swapped": swap,
}
