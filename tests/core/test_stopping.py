"""SIGTERM and SIGUSR1 stop a command as Ctrl-C does, and it says what is kept and how to go on."""

import os
import signal

import click
import pytest
from click.testing import CliRunner

from darht.core.cli import Group


def command(number: int) -> click.Group:
    @click.group(cls=Group)
    def top() -> None: ...

    @top.command(kept="all that was done")
    @click.argument("folder")
    @click.option("--size", multiple=True)
    @click.option("--fast", is_flag=True)
    def work(**options: object) -> None:
        os.kill(os.getpid(), number)

    return top


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)])
def test_a_stopped_command(number, code):
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    words = ["work", "a folder", "--size", "1", "--size", "2", "--fast"]
    stopped = CliRunner().invoke(command(number), words, prog_name="darht-x")
    assert (stopped.exit_code, stopped.stdout) == (code, "")
    assert stopped.stderr == (
        "stopped: all that was done\ngo on with: darht-x work 'a folder' --size 1 --size 2 --fast\n"
    )
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == handlers


def test_what_a_signal_did_before_it_does_again():
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        assert CliRunner().invoke(command(signal.SIGTERM), ["work", "a folder"]).exit_code == 143
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_command_that_ignores_ctrl_c_in_the_background_of_a_shell_is_stopped_all_the_same(number):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert CliRunner().invoke(command(number), ["work", "a folder"]).exit_code == 143
    finally:
        signal.signal(signal.SIGINT, before)
