"""What every command line shares: a user's mistake becomes one line and an exit code, never a traceback."""

import contextlib
import functools
import io
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click
from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from darht.core import stopping
from darht.core.bars import Bar
from darht.core.bounded import read_json
from darht.core.errors import ConfigError, DarhtError, UnreachableError
from darht.core.files import expanded
from darht.core.hub import fetched
from darht.core.trust import trusting
from darht.core.version import VERSION

version_option = click.version_option(VERSION, prog_name="darht")

_WORD = 10  # characters; a column of text is no narrower than this, or than its longest word
_LOG_WIDTH = 120  # characters

FOLDER = click.Path(path_type=Path)
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
skip_broken_option = click.option("--skip-broken", is_flag=True, help="Leave image files out that cannot be decoded.")


def trust_option(function: Any) -> Any:
    """The option `--trust-code`, for commands that read cards of networks."""

    @functools.wraps(function)
    def trusted(*args: Any, trust_code: bool, **options: Any) -> Any:
        with trusting(trust_code):
            return function(*args, **options)

    text = "Call the python: functions that cards name which were not made here."
    return click.option("--trust-code", is_flag=True, help=text)(trusted)


def data_options(*, data: str, root: str, required: bool = False) -> Callable[[Any], Any]:
    """The options `--data`, `--root`, `--image-size`, `--skip-broken` and `--download`.

    Args:
        data: which data sets, or which by default.
        root: where it lies, or by default.
        required: whether `--data` must be given.
    """
    options = (
        click.option("--download", is_flag=True, help="Fetch CIFAR when its files are not there."),
        skip_broken_option,
        click.option("--image-size", type=click.IntRange(min=1), help="Side to which an imagefolder is cut."),
        click.option("--root", type=FOLDER, help=root),
        click.option("--data", required=required, help=data),
    )

    def decorate(function: Any) -> Any:
        for option in options:
            function = option(function)
        return function

    return decorate


def echo_notes(notes: Iterable[str]) -> None:
    """Say on stderr what a person should know about the rows that were read."""
    for note in notes:
        click.echo(note, err=True)


def named_folders(items: tuple[str, ...], option: str = "--teacher") -> dict[str, Path]:
    """Folders by name from `NAME=FOLDER`; `~` is expanded, and `hf://USER/NAME` fetched.

    Raises:
        ConfigError: one has another form, or a name comes twice.
    """
    given = {name: Path(folder) for name, _, folder in (item.partition("=") for item in items) if name and folder}
    if len(given) != len(items):
        raise ConfigError(f"{option} reads NAME=FOLDER, each name once; got {', '.join(items)}")
    return {name: fetched(expanded(folder)) for name, folder in given.items()}


def json_mapping(text: str, option: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ConfigError: it is something else.
    """
    try:
        value = read_json(text, option)
    except ConfigError as error:
        raise ConfigError(f"{option} must be JSON, such as '{{\"width\": 16}}'; got {text!r}: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{option} must be a JSON mapping; got {text!r}")
    return value


def numbers(text: str, option: str, *, three: bool = False) -> tuple[float, ...]:
    """Numbers with commas between them, any count of them or exactly three.

    Raises:
        ConfigError: it is something else.
    """
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or (three and len(values) != 3):
        many = "three numbers" if three else "numbers"
        raise ConfigError(f"{option} must be {many} with commas between them; got {text!r}")
    return values


def look_here(*typed: str | None) -> None:
    """Let the `python:` names that a person typed be found in the current folder, after everything that is installed.

    Names in cards and recipes are not typed: what somebody else wrote runs nothing that happens to lie here.
    """
    here = str(Path.cwd())
    if here not in sys.path and any(text is not None and text.startswith("python:") for text in typed):
        sys.path.append(here)


def print_table(table: Table) -> None:
    """Print a table on stdout; where it is wider than the terminal, that breaks its lines, and nothing is left out.

    Cells are taken as they are: a stranger's name such as `cat [small]` is no markup.
    """
    console, width = Console(markup=False, emoji=False), 1
    for column in table.columns:
        cells = [str(cell) for cell in (column.header, *column.cells)]
        parts = cells if column.no_wrap else [word for cell in cells for word in cell.split()]
        longest = max(map(cell_len, parts), default=1)
        column.min_width = longest if column.no_wrap else min(longest, _WORD)
        column.overflow = "fold"
        width += column.min_width + 3  # a border, and a blank on each side
    console.width = max(width, console.width)
    console.print(table)


def stderr_console(*, quiet: bool = False) -> Console:
    """A console for progress: as wide as the terminal, and in a log wide enough that nothing is cut."""
    console = Console(stderr=True, quiet=quiet)
    if not console.is_terminal:
        console.width = max(console.width, _LOG_WIDTH)
    return console


def time_columns() -> tuple[ProgressColumn, ...]:
    """Time that passed and time left, which a narrow terminal does not cut: the bar gives way before them."""
    return TimeElapsedColumn(Column(no_wrap=True)), TimeRemainingColumn(table_column=Column(no_wrap=True))


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """Bars on stderr, with a field `note` for each; a mistake wipes them away, so that its one line stands alone.

    In a file a plain line every half minute comes before them.
    """
    bar = BarColumn(None, table_column=Column(max_width=40))
    columns = (TextColumn("{task.description}"), bar, MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Bar(*columns, *time_columns(), console=stderr_console()) as progress:
        try:
            yield progress
        except DarhtError:
            progress.live.transient = True
            raise


@contextlib.contextmanager
def transient_bar(console: Console, *extra: ProgressColumn) -> Iterator[Progress]:
    """A counting bar that leaves nothing behind, with `extra` columns; in a file a line every half minute."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), *extra)
    with Bar(*columns, console=console, transient=True) as progress:
        yield progress


def _print_anything(streams: Iterable[Any]) -> None:
    """Let a terminal that knows fewer letters than a text has get them as escapes, and not the command end."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


class _Main:
    """The beginning of every command line."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line."""
        _print_anything((sys.stdout, sys.stderr))
        return super().main(*args, **kwargs)  # type: ignore[misc]  # of click's classes beside this one


class Command(_Main, click.Command):
    """A click command that prints a `DarhtError` as one line on stderr and exits with 2.

    Args:
        kept: what a stopped command leaves, in words; the same command goes on from there. SIGTERM and SIGUSR1 then
            stop it as Ctrl-C does. Empty for a command that begins anew.
        args, options: of click's own.
    """

    def __init__(self, *args: Any, kept: str = "", **options: Any) -> None:
        super().__init__(*args, **options)
        self.kept = kept

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command's function."""
        if not self.kept:
            return self._run(ctx)
        stopping.listen()
        try:
            return self._run(ctx)
        except KeyboardInterrupt:
            click.echo(f"stopped: {self.kept}\ngo on with: {same_command(ctx)}", err=True)
            sys.exit(stopping.exit_code())
        finally:
            stopping.stop_listening()

    def _run(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DarhtError as error:
            longer = isinstance(error, UnreachableError) and error.waited and _knows(ctx, "retry_for")
            fix = ", or wait longer with --retry-for" if longer else ""
            click.echo(f"error: {' '.join(str(error).split())}{fix}", err=True)
            if isinstance(error, UnreachableError):
                click.echo(f"go on with: {command_again(ctx)}", err=True)
                sys.exit(error.exit_code)
            sys.exit(self.exit_code(error))

    def exit_code(self, error: DarhtError) -> int:
        """The code of a user's mistake."""
        return DarhtError.exit_code


class StateCommand(Command):
    """A command that is asked about a folder's state: 3 says incomplete and 4 corrupt."""

    def exit_code(self, error: DarhtError) -> int:
        """The error's own code."""
        return error.exit_code


class Group(_Main, click.Group):
    """A click group whose subcommands report mistakes as `Command` does."""

    command_class = Command


class DefaultGroup(Group):
    """A group whose command `default` may be left out: its options follow the group's name at once."""

    def __init__(self, *args: Any, default: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.default = default

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the default command before what does not begin with a command, --help or --version."""
        if args and args[0] not in self.commands and args[0] not in (*ctx.help_option_names, "--version"):
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Show the default command's options beside the commands."""
        self.commands[self.default].format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


class StateGroup(_Main, click.Group):
    """A click group whose subcommands report mistakes as `StateCommand` does."""

    command_class = StateCommand


def same_command(ctx: click.Context, *name: str) -> str:
    """The command as it was given, under another name where one is given."""
    return shlex.join([*(name or ctx.command_path.split()), *_given(ctx)])


def _given(ctx: click.Context) -> list[str]:
    """The arguments and options that were typed."""
    words: list[str] = []
    for parameter in ctx.command.params:
        name, value = parameter.name or "", ctx.params.get(parameter.name or "")
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE and name != "resume":
            values = value if isinstance(value, tuple) else (value,)
            option = [] if isinstance(parameter, click.Argument) else [parameter.opts[0]]
            words += [word for item in values for word in (*option, *([] if item is True else [str(item)]))]
    return words


def command_again(ctx: click.Context, *name: str) -> str:
    """The command that goes on with this: the same options, and --resume where it knows that."""
    again = same_command(ctx, *name)
    return f"{again} --resume" if _knows(ctx, "resume") else again


def _knows(ctx: click.Context, name: str) -> bool:
    """Whether the command has such a parameter."""
    return any(parameter.name == name for parameter in ctx.command.params)
