"""What every command line shares: a user's mistake becomes one line and an exit code, never a traceback."""

import sys
from typing import Any

import click

from darht.core.errors import DarhtError


class Command(click.Command):
    """A click command that prints a `DarhtError` as one line on stderr and exits with 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command's function."""
        try:
            return super().invoke(ctx)
        except DarhtError as error:
            click.echo(f"error: {' '.join(str(error).split())}", err=True)
            sys.exit(self.exit_code(error))

    def exit_code(self, error: DarhtError) -> int:
        """The code of a user's mistake."""
        return DarhtError.exit_code


class StateCommand(Command):
    """A command that is asked about a folder's state: 3 says incomplete and 4 corrupt."""

    def exit_code(self, error: DarhtError) -> int:
        """The error's own code."""
        return error.exit_code


class Group(click.Group):
    """A click group whose subcommands report mistakes as `Command` does."""

    command_class = Command


class StateGroup(click.Group):
    """A click group whose subcommands report mistakes as `StateCommand` does."""

    command_class = StateCommand
