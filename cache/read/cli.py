"""The options of commands that read caches behind URLs."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from darht.core.cli import FOLDER
from darht.core.units import parse_bytes, parse_seconds

if TYPE_CHECKING:
    from darht.cache.read.reach import Reach

_RETRY = click.option("--retry-for", default="10m", show_default=True, help="How long a server is waited for.")


def reach_options(function: Any) -> Any:
    """The options `--cache-dir`, `--cache-size` and `--retry-for`."""
    size = "What copies of shards behind URLs may take, e.g. 50GB, or 0 for none [default: half of the free disk]."
    folder = "Where the copies lie [default: ~/.cache/darht/shards]."
    function = retry_option(function)
    function = click.option("--cache-size", help=size)(function)
    return click.option("--cache-dir", type=FOLDER, help=folder)(function)


def retry_option(function: Any) -> Any:
    """The option `--retry-for`."""
    return _RETRY(function)


def chosen_reach(location: str, cache_dir: Path | None, cache_size: str | None, retry_for: str) -> "Reach":
    """What the options say; where copies go is told when the location is a URL.

    Raises:
        ConfigError: a size or a time that is none.
    """
    from darht.cache.read.local_copy import default_copy
    from darht.cache.read.reach import Reach

    seconds = parse_seconds(retry_for, "--retry-for")
    size = None if cache_size is None else parse_bytes(cache_size, "--cache-size")
    if "://" not in location or size == 0:
        return Reach(retry_for=seconds)
    copy = default_copy(cache_dir, size)
    click.echo(f"{location}: {copy} (--cache-dir, --cache-size)", err=True)
    return Reach(copy, seconds)
