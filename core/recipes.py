"""The recipes that come with darht, by name: `recipes/NAME.yaml`, in a checkout and in an installed package."""

import difflib
import importlib.resources
from pathlib import Path

from darht.core.errors import ConfigError

_SUFFIXES = (".yaml", ".yml", ".json")


def built_in_recipes() -> dict[str, Path]:
    """The files by name: recipes of a student, and whole experiments."""
    folder = Path(str(importlib.resources.files("darht"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(path: Path) -> Path:
    """The file that a person means by a path, or by the name of a recipe that comes with darht; files come first.

    Raises:
        ConfigError: there is neither.
    """
    known = built_in_recipes()
    if path.is_file():
        return path
    if path.name == str(path) and path.name in known:
        return known[path.name]
    if path.suffix in _SUFFIXES or path.name != str(path):
        own = f"; the recipe that comes with darht is called {path.stem}" if path.stem in known else ""
        raise ConfigError(f"cannot read {path}: there is no such file{own}")
    close = difflib.get_close_matches(path.name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"they are {', '.join(known)}"
    raise ConfigError(f"there is no file {path}, and no recipe of that name comes with darht; {hint}")
