"""What every command line shares: a user's mistake becomes one line and an exit code, never a traceback."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from darht.core.errors import DarhtError


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """Bars on stderr, with a field `note` for each; a mistake wipes them away, so that its one line stands alone."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        try:
            yield progress
        except DarhtError:
            progress.live.transient = True
            raise


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


class DefaultGroup(Group):
    """A group whose command `default` may be left out: its options follow the group's name at once."""

    def __init__(self, *args: Any, default: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.default = default

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the default command before what does not begin with a command."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Show the default command's options beside the commands."""
        self.commands[self.default].format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


class StateGroup(click.Group):
    """A click group whose subcommands report mistakes as `StateCommand` does."""

    command_class = StateCommand
