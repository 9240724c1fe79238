"""The command that reads everything a folder holds: `darht-train verify FOLDER...`."""

import sys
from pathlib import Path

import click

from darht.core.cli import FOLDER, StateCommand


@click.command(cls=StateCommand)
@click.argument("folders", nargs=-1, required=True, type=FOLDER)
def verify(folders: tuple[Path, ...]) -> None:
    """Compare every file of runs, teachers, evaluations, indexes or exports with its sha256; exit 4 for a damaged one.

    A cache has darht-cache verify.
    """
    from darht.core.errors import CorruptError
    from darht.trainer.state.verify import verify_folder

    damaged = 0
    for folder in folders:
        found = verify_folder(folder)
        for line in found.damaged:
            click.echo(line)
        unhashed = f", {len(found.unhashed)} carry none" if found.unhashed else ""
        click.echo(f"{folder}: {len(found.whole)} files have their sha256{unhashed}, {len(found.damaged)} are damaged")
        damaged += len(found.damaged)
    if damaged:
        sys.exit(CorruptError.exit_code)
