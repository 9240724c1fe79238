"""Words that others chose, as Markdown: a name that holds a bar, a bracket or a tag is text and nothing else."""

import re

_MARKS = re.compile(r"[\\`*<>\[\]|]")


def escape(text: object) -> str:
    """A text on one line, without what Markdown or HTML would take for a table's edge, a link, a tag or emphasis."""
    return _MARKS.sub(lambda mark: f"\\{mark[0]}", " ".join(str(text).replace("&", "&amp;").split()))


def code(text: object) -> str:
    """A text on one line in backticks, between which nothing can be escaped: what ends them or a cell is left out."""
    return f"`{' '.join(re.sub(r'[`|]', '', str(text)).split())}`"
