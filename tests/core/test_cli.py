"""A user's mistake is one line and an exit code."""

from importlib.metadata import entry_points

import click
import pytest
from click.testing import CliRunner

import darht
from darht.core.cli import Command, Group, StateGroup
from darht.core.errors import CacheError, ConfigError, CorruptError, DarhtError, IncompleteError, SpecMismatchError


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
