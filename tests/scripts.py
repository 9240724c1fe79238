"""Python files that are run by their path and belong to no package, loaded as modules."""

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def load_script(path: Path) -> ModuleType:
    """The module that a file of the repository, named from its root, or of elsewhere makes."""
    spec = importlib.util.spec_from_file_location(path.stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
