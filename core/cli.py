"""What every command line shares: a user's mistake becomes one line and an exit code, never a traceback."""

import sys
from typing import Any

import click

from darht.core.errors import DarhtError


class Command(click.Command):
    """A click command that prints a `DarhtError` as one line on stderr and exits with its code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command's function."""
        try:
            return super().invoke(ctx)
        except DarhtError as error:
            click.echo(f"error: {' '.join(str(error).split())}", err=True)
            sys.exit(error.exit_code)


class Group(click.Group):
    """A click group whose subcommands report mistakes as `Command` does."""

    command_class = Command
