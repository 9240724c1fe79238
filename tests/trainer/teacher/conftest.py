"""A teacher's folder that may be written, and images to ask it about."""

import shutil
from pathlib import Path

import pytest

from darht.cache.sources.load import Source, load_source


@pytest.fixture(scope="session")
def digits() -> Source:
    return load_source("digits", None, "test", limit=60)


@pytest.fixture
def folder(tiny_teachers: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_teachers["cnn"], tmp_path / "cnn"))
