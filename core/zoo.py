"""The teachers that come with darht: `zoo:NAME` stands for the folder `zoo/NAME` of the package."""

import difflib
import importlib.resources
from pathlib import Path

from darht.core.errors import ConfigError
from darht.core.files import expanded
from darht.core.hub import fetched, is_hub

PREFIX = "zoo:"


def zoo() -> dict[str, Path]:
    """The teachers' folders by name."""
    folder = Path(str(importlib.resources.files("darht"))) / "zoo"
    return {path.parent.name: path.parent for path in sorted(folder.glob("*/teacher.json"))}


def in_zoo(folder: Path | str) -> bool:
    """Whether a teacher is named by the zoo, not by a folder."""
    return str(folder).startswith(PREFIX)


def teacher_path(folder: Path) -> Path:
    """The folder that a person means by a path or by `zoo:NAME`.

    Raises:
        ConfigError: the zoo has no such teacher.
    """
    if not in_zoo(folder):
        return folder
    name, known = str(folder).removeprefix(PREFIX), zoo()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {PREFIX}{close[0]}?" if close else f"it has {', '.join(known) or 'none'}"
        raise ConfigError(f"no teacher '{name}' comes with darht; {hint} (darht-teacher list prints them)")
    return known[name]


def teacher_at(text: str, base: Path) -> Path:
    """The place of a teacher that a file names: relative to the file's folder, `base`, or on the hub, and then fetched.

    Raises:
        DarhtError, UnreachableError: the hub does not have it, or does not answer.
    """
    if is_hub(text):
        return fetched(Path(text))
    return Path(text) if in_zoo(text) else base / expanded(text)


def absolute(folder: Path) -> str:
    """A teacher's place as it may be written down for later."""
    return str(folder if in_zoo(folder) else folder.resolve())
