"""Every command line in README.md and docs/ parses as it stands: the command, its options, and their choices exist."""

import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from blocks import ROOT, blocks

from darht.core.cli import json_mapping
from darht.tools.experiment import plan_stages
from darht.tools.experiment_config import load_experiment
from darht.trainer.config import load_recipe
from darht.trainer.teacher.config import load_teaching

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
NOT_RUN = "cli.md"  # usage lines with [OPTIONS], written from the commands themselves


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command line in a page's code blocks, with continued lines joined and comments dropped."""
    for block in re.findall(r"^```(?:\w*)\n(.*?)^```", page.read_text(), flags=re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if any(script in line for script in SCRIPTS):
                yield from programs(shlex.split(line, comments=True))


def programs(words: list[str]) -> Iterator[list[str]]:
    """The calls of our programs in one line: cut at pipes and &&, without what starts them (srun, torchrun, ...)."""
    while words:
        end = next((i for i, word in enumerate(words) if word in ("&&", "|", ";", "&", "||")), len(words))
        part, words = words[:end], words[end + 1 :]
        begin = next((i for i, word in enumerate(part) if Path(word).name in SCRIPTS), None)
        if begin is not None:
            yield [Path(part[begin]).name, *(word for word in part[begin + 1 :] if word not in (">", "2>&1"))]


def mentions(page: Path) -> Iterator[list[str]]:
    """Command lines within a sentence, which may leave arguments out, or name choices as `hub|plain`."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for code in re.findall(r"`([^`]+)`", text):
        if re.match(rf"({'|'.join(SCRIPTS)}) ", code):
            yield [word.split("|")[0] for word in shlex.split(code.replace("\\|", "|")) if word != "..."]


def label(case: tuple[str, list[str]]) -> str:
    return f"{case[0]}: {' '.join(case[1])[:70]}"


def entry(name: str) -> click.Command:
    module, _, attribute = SCRIPTS[name].partition(":")
    found: click.Command = getattr(importlib.import_module(module), attribute)
    return found


CASES = [(page.name, words) for page in PAGES if page.name != NOT_RUN for words in commands(page)]
MENTIONS = [(page.name, words) for page in PAGES for words in mentions(page)]


def parse(command: click.Command, name: str, words: list[str], parent: click.Context | None = None) -> click.Context:
    """Parse a line as the program does, without running anything; gives the context of the command it ends at."""
    context = command.make_context(name, list(words), parent=parent)
    if isinstance(command, click.Group):
        below, command_below, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert below is not None and command_below is not None
        return parse(command_below, below, rest, context)
    return context


def check_values(values: dict[str, Any]) -> None:
    """What the programs parse themselves: training options, options of networks, files of this repository."""
    if values.get("kwargs"):
        json_mapping(values["kwargs"], "--kwargs")
    if values.get("algorithm"):
        inner = {} if values["inner"] is None else {"inner": {"kind": values["inner"]}}
        load_teaching({"algorithm": values["algorithm"], **inner}, values["assignments"])
    elif "assignments" in values:
        recipe = str(values["recipe"])
        load_recipe(
            ROOT / recipe if recipe.startswith("recipes/") else ROOT / "recipes/darht.yaml", values["assignments"]
        )


@pytest.mark.parametrize("case", CASES, ids=label)
def test_a_command_line_parses(case: tuple[str, list[str]]):
    page, words = case
    try:
        check_values(parse(entry(words[0]), words[0], words[1:]).params)
    except click.exceptions.Exit as done:  # --help and --version
        assert done.exit_code == 0
    except click.ClickException as error:
        pytest.fail(f"{page}: {shlex.join(words)}: {error.format_message()}")


@pytest.mark.parametrize("case", MENTIONS, ids=label)
def test_a_mention_names_what_there_is(case: tuple[str, list[str]]):
    page, words = case
    try:
        parse(entry(words[0]), words[0], words[1:])
    except (click.MissingParameter, click.exceptions.Exit, click.exceptions.NoArgsIsHelpError):
        pass
    except click.ClickException as error:
        if "requires an argument" in error.format_message():  # `darht-cache verify --recompute`
            return
        pytest.fail(f"{page}: {shlex.join(words)}: {error.format_message()}")


def test_there_are_command_lines():
    assert len(CASES) > 30 and len(MENTIONS) > 20
    assert {words[0] for _, words in (*CASES, *MENTIONS)} == set(SCRIPTS)


def test_the_commands_of_an_experiment_are_those_it_runs():
    """docs/results.md lists them under the table that they made."""
    config = load_experiment(ROOT / "recipes/cifar10-small.yaml")
    stages = plan_stages(config, Path("build/cifar10-small"), Path("DIR"))
    (block,) = (text for text in blocks("docs/results.md", "") if "cifar10-small/teachers" in text)
    assert [shlex.split(line) for line in block.splitlines()] == [list(stage.words) for stage in stages]
    for stage in (*stages, *plan_stages(load_experiment(ROOT / "recipes/digits-demo.yaml"), Path("out"), None)):
        parse(entry(stage.words[0]), stage.words[0], list(stage.words[1:]))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_and_targets_that_pages_name_are_there(page: Path):
    text = page.read_text()
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    assert set(re.findall(r"(?:^|`)make ([a-z]+)", text, flags=re.M)) <= set(targets)
    for script, rest in re.findall(r"python ([\w./]+\.py)([^`\n]*)", text):
        options = set(re.findall(r"--[a-z-]+", rest))
        source = (ROOT / script).read_text() if (ROOT / script).is_file() else ""
        assert source and {name for name in options if f'"{name}"' not in source} == set(), (
            f"{page.name}: {script}{rest}"
        )


@pytest.mark.parametrize(("line", "said"), [
    ("darht-cache bild x --out y", "No such command"), ("darht-train --shard x --out y", "No such option"),
    ("darht-eval run --tier fast", "is not one of"), ("darht-cache build x", "Missing option"),
])  # fmt: skip
def test_a_wrong_line_is_noticed(line: str, said: str):
    (words,) = programs(shlex.split(line))
    with pytest.raises(click.ClickException) as caught:
        parse(entry(words[0]), words[0], words[1:])
    assert said in caught.value.format_message()
