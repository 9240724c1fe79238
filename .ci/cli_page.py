"""Write `docs/cli.md` from the commands themselves; `make docs` runs it, and a test compares the page with it."""

import importlib
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "cli.md"
HEAD = """# Commands

Every command of every program, its options and their defaults, written by `make docs` from the programs themselves.
Programs print the same with `--help`. What they are for: [Using darht](usage.md). The
words: [Glossary](glossary.md).

A mistake is answered in one line on stderr with the rule, the numbers and the fix, and exit code 2. Commands that are
asked about a cache's state end with 3 when it is incomplete and 4 when it is corrupt.
"""


def page() -> str:
    """The whole page."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    parts = [HEAD]
    for name, target in scripts.items():
        module, _, attribute = target.partition(":")
        parts += sections(getattr(importlib.import_module(module), attribute), name, None)
    return "\n".join(parts)


def sections(command: click.Command, name: str, parent: click.Context | None) -> Iterator[str]:
    """The section of a command, and those of the commands below it."""
    context = click.Context(command, info_name=name, parent=parent)
    yield section(command, context)
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            yield from sections(command.commands[below], below, context)


def section(command: click.Command, context: click.Context) -> str:
    """Heading, usage, help, and a table of the options or of the commands below."""
    text = (command.help or "").replace("\b\n", "").strip()
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    level = "##" if context.parent is None else "###"
    parts = [f"{level} {context.command_path}", f"```\n{usage}\n```", _paragraphs(text)]
    if isinstance(command, click.Group):
        rows = [_below(command.commands[name], context, name) for name in command.list_commands(context)]
        parts.append(_table(("command", "what it does"), rows))
    else:
        rows = [_option(option, context) for option in command.params if isinstance(option, click.Option)]
        parts += [_table(("option", "what it says", "default"), rows)] if rows else []
    return "\n\n".join(parts) + "\n"


def _below(command: click.Command, context: click.Context, name: str) -> tuple[str, str]:
    path = f"{context.command_path} {name}"
    return f"[`{name}`](#{path.replace(' ', '-')})", command.get_short_help_str(200)


def _option(option: click.Option, context: click.Context) -> tuple[str, str, str]:
    """Its names and what it takes, its help, its default."""
    names = f"`{' '.join([', '.join(option.opts), *_takes(option, context)])}`"
    said = [option.help or "", "May be given several times." if option.multiple else ""]
    return names, " ".join(filter(None, said)), _default(option)


def _takes(option: click.Option, context: click.Context) -> list[str]:
    """What follows the name; choices in braces, since a bar would end the table's cell."""
    if option.is_flag:
        return []
    if isinstance(option.type, click.Choice):
        return [f"{{{','.join(option.type.choices)}}}"]
    return [option.make_metavar(context).removesuffix(" RANGE")]


def _default(option: click.Option) -> str:
    if option.required:
        return "required"
    value = option.to_info_dict()["default"]
    if option.is_flag or value is None or value == ():
        return ""
    return f"`{' '.join(map(str, value)) if isinstance(value, tuple | list) else value}`"


def _paragraphs(text: str) -> str:
    """The text with one line for each paragraph."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _table(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [titles, tuple("---" for _ in titles), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page())
