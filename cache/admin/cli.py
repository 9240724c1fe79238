"""The commands that copy caches between folders and URLs: each is one library call."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import TransferSpeedColumn

from darht.cache.read.cli import retry_option
from darht.core.cli import FOLDER, StateCommand, transient_bar
from darht.core.units import parse_seconds

if TYPE_CHECKING:
    from darht.cache.admin.copies import Copied


@click.command(cls=StateCommand, kept="what was fetched is there")
@click.argument("url")
@click.option("--out", type=FOLDER, required=True, help="A new folder, or one that was pulled into before.")
@click.option("--arrays", help="Only these, such as image,label, beside what is there; the folder says so.")
@retry_option
def pull(url: str, out: Path, arrays: str | None, retry_for: str) -> None:
    """Copy a sealed cache or an export from URL into a folder; what is there already is not fetched again."""
    from darht.cache.admin.copies import pull as pull_cache
    from darht.cache.read.reach import Reach

    chosen = tuple(name.strip() for name in arrays.split(",")) if arrays else ()
    reach = Reach(retry_for=parse_seconds(retry_for, "--retry-for"))
    with _bar("pulling") as (total, done):
        found = pull_cache(url, out, arrays=chosen, reach=reach, on_total=total, on_bytes=done)
    click.echo(f"{out}: {_told(found)}" + (f"; a part: {', '.join(found.part)}" if found.part else ""))


@click.command(cls=StateCommand, kept="what was sent is there")
@click.argument("folder", metavar="CACHE", type=FOLDER)
@click.argument("url")
def push(folder: Path, url: str) -> None:
    """Copy a sealed cache or an export from CACHE to URL; what is there already is not sent again."""
    from darht.cache.admin.copies import push as push_cache

    with _bar("pushing") as (total, done):
        found = push_cache(folder, url, on_total=total, on_bytes=done)
    click.echo(f"{url}: {_told(found)}")


@contextmanager
def _bar(what: str) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    with transient_bar(Console(stderr=True), TransferSpeedColumn()) as bar:
        task = bar.add_task(what, total=None)
        yield (lambda total: bar.update(task, total=total)), (lambda size: bar.advance(task, size))


def _told(found: "Copied") -> str:
    copied = f"{found.files} files, {found.bytes / 1e6:.2f} MB copied"
    return f"{copied}, {found.there} were there; root hash {found.root_hash}"
