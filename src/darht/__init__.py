"""darht: robust image classifiers, distilled from heterogeneous teachers whose answers were cached once, offline.

What stands in `__all__` is public; everything else may change. A name is imported when it is first used, so that
`import darht` is light: it imports neither torch nor zarr.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from darht import attacks
    from darht.cache.builder.api import build_cache
    from darht.cache.builder.config import CacheConfig
    from darht.cache.read.dataset import CacheDataset
    from darht.cache.read.local_copy import default_copy
    from darht.cache.read.reach import Reach
    from darht.cache.read.reader import Cache
    from darht.cache.read.webdataset import open_shards as open_cache
    from darht.core.errors import DarhtError
    from darht.core.nets.classifier import Classifier
    from darht.core.trust import trusting
    from darht.trainer.api import evaluate, load_student, load_teacher, train, train_teacher
    from darht.trainer.config import TrainConfig
    from darht.trainer.evaluation.config import EvalConfig
    from darht.trainer.evaluation.report.write import EvalReport
    from darht.trainer.teacher.config import TeachConfig

if not (Path(__file__).parent / "core").is_dir():
    raise ImportError(
        "the checkout of darht has no symbolic links, so that src/darht/core is a text file: run "
        "'git config core.symlinks true && git checkout -- src' on a file system that has them, and install again"
    )

from darht.core.version import VERSION

__version__ = VERSION

_HOMES = {
    "Cache": "darht.cache.read.reader",
    "CacheConfig": "darht.cache.builder.config",
    "CacheDataset": "darht.cache.read.dataset",
    "Classifier": "darht.core.nets.classifier",
    "DarhtError": "darht.core.errors",
    "EvalConfig": "darht.trainer.evaluation.config",
    "EvalReport": "darht.trainer.evaluation.report.write",
    "Reach": "darht.cache.read.reach",
    "TeachConfig": "darht.trainer.teacher.config",
    "TrainConfig": "darht.trainer.config",
    "build_cache": "darht.cache.builder.api",
    "default_copy": "darht.cache.read.local_copy",
    "evaluate": "darht.trainer.api",
    "load_student": "darht.trainer.api",
    "load_teacher": "darht.trainer.api",
    "train": "darht.trainer.api",
    "train_teacher": "darht.trainer.api",
    "trusting": "darht.core.trust",
}

__all__ = [
    "Cache",
    "CacheConfig",
    "CacheDataset",
    "Classifier",
    "DarhtError",
    "EvalConfig",
    "EvalReport",
    "Reach",
    "TeachConfig",
    "TrainConfig",
    "__version__",
    "attacks",
    "build_cache",
    "default_copy",
    "evaluate",
    "load_student",
    "load_teacher",
    "open_cache",
    "train",
    "train_teacher",
    "trusting",
]


def __getattr__(name: str) -> Any:
    if name == "attacks":
        return importlib.import_module("darht.attacks")
    if name == "open_cache":  # which opens exports as well
        return importlib.import_module("darht.cache.read.webdataset").open_shards
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'darht' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
