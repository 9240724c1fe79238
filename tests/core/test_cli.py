"""A user's mistake is one line and an exit code."""

import os
import subprocess
import sys
from importlib.metadata import entry_points

import click
import pytest
from click.testing import CliRunner
from rich.table import Table

import darht
from darht.core.cli import Command, Group, StateGroup, look_here, print_table, progress_bar
from darht.core.errors import (
    CacheError,
    ConfigError,
    CorruptError,
    DarhtError,
    IncompleteError,
    SpecMismatchError,
    UnreachableError,
)


def tree(group: type[click.Group], error: BaseException) -> click.Group:
    @click.group(cls=group)
    def root() -> None: ...

    @root.command()
    def go() -> None:
        raise error

    return root


@pytest.mark.parametrize("error", [ConfigError("a rule\n  is broken"), IncompleteError("a"), CorruptError("b")])
def test_a_mistake_is_one_line_and_exits_with_2(error):
    result = CliRunner().invoke(tree(Group, error), ["go"])
    assert result.exit_code == 2
    assert result.output == f"error: {' '.join(str(error).split())}\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [(DarhtError, 2), (CacheError, 2), (SpecMismatchError, 2), (IncompleteError, 3), (CorruptError, 4)],
)
def test_a_command_on_a_folder_exits_with_its_state(error, code):
    result = CliRunner().invoke(tree(StateGroup, error("why")), ["go"])
    assert (result.exit_code, result.output) == (code, "error: why\n")


@pytest.mark.parametrize(("waited", "told"), [(True, ", or wait longer with --retry-for"), (False, "")])
def test_a_command_that_can_wait_longer_says_how(waited, told):
    @click.group(cls=Group)
    def root() -> None: ...

    @root.command()
    @click.option("--retry-for")
    def patient(retry_for: str | None) -> None:
        raise UnreachableError("it is away; run again", waited=waited)

    @root.command()
    def other() -> None:
        raise UnreachableError("it is away; run again", waited=waited)

    for command, more in (("patient", told), ("other", "")):
        result = CliRunner().invoke(root, [command])
        assert result.exit_code == 75
        assert result.output == f"error: it is away; run again{more}\ngo on with: root {command}\n"


def test_a_fault_of_the_program_is_not_hidden():
    result = CliRunner().invoke(tree(Group, ZeroDivisionError("bug")), ["go"])
    assert isinstance(result.exception, ZeroDivisionError)


def test_a_command_of_its_own():
    @click.command(cls=Command)
    def go() -> None:
        raise ConfigError("no")

    result = CliRunner().invoke(go)
    assert (result.exit_code, result.output) == (2, "error: no\n")


@pytest.mark.parametrize(
    "command", [entry for entry in entry_points(group="console_scripts") if entry.value.startswith("darht.")]
)
def test_every_console_command_tells_the_version(command):
    result = CliRunner().invoke(command.load(), ["--version"])
    assert (result.exit_code, result.output) == (0, f"darht, version {darht.__version__}\n")


@pytest.mark.parametrize("columns", [20, 40, 200])
def test_a_narrow_terminal_empties_no_cell_of_a_table(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    table = Table()
    for title in ("measured", "%", "95 %", "right of", "attack"):
        table.add_column(title, no_wrap=title in ("%", "95 %", "right of"))
    cells = ("transfer:a-long-name", "100.0", "99.6-100.0", "1000/1000", "L-inf 8/255, 20 steps of 2")
    table.add_row(*cells)
    print_table(table)
    lines = capsys.readouterr().out.splitlines()
    read = [
        "".join(line.split("│")[number].strip() for line in lines if line.startswith("│")) for number in range(1, 6)
    ]
    assert [text.replace(" ", "") for text in read] == [cell.replace(" ", "") for cell in cells]
    assert "…" not in "".join(lines)


def test_a_table_takes_no_name_for_markup(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    table = Table(title="of x[/y]")
    table.add_column("cat [small]")
    table.add_row("x[/y] [bold] :cat:")
    print_table(table)
    said = capsys.readouterr().out
    assert all(text in said for text in ("of x[/y]", "cat [small]", "x[/y] [bold] :cat:"))


def test_a_log_holds_whole_times(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    with progress_bar() as progress:
        progress.add_task("adaptive:apgd-t on the mean of 16", total=40, completed=40, note="images, 25 alive")
    said = capsys.readouterr().err
    assert "40/40 images, 25 alive 0:00:00 -:--:--" in said
    assert "…" not in said


def test_python_that_was_typed_is_looked_for_in_the_current_folder_last(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    look_here("resnet18", None, "runs/python:x")
    assert str(tmp_path) not in sys.path
    look_here(None, "python:nets:make")
    look_here("python:nets:make")
    assert sys.path[-1] == str(tmp_path) and sys.path.count(str(tmp_path)) == 1


SAY = """
from rich.console import Console
from darht.core.cli import Group
import click
@click.group(cls=Group)
def top(): ...
@top.command()
def say(): Console().print("\u03b5 \u2264 8", highlight=False)
top()
"""


def test_a_terminal_that_knows_ascii_alone_gets_escapes():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", SAY, "say"], check=True, env=environment, capture_output=True)
    assert done.stdout == rb"\u03b5 \u2264 8" + b"\n"
