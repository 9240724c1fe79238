"""Fixtures shared by all tests. Real data are unpacked once into `build/data`, which git ignores."""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
REAL_DATA = REPOSITORY.parent / "shared" / "data"
PREPARED = REPOSITORY / "build" / "data"


def prepared(name: str, fill: Callable[[Path], None]) -> Path:
    """The folder `build/data/NAME`; when absent, `fill` fills a temporary one beside it, which is then renamed."""
    target = PREPARED / name
    if target.is_dir():
        return target
    PREPARED.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{name}.", suffix=".tmp", dir=PREPARED))
    try:
        fill(unfinished)
        try:
            unfinished.rename(target)
        except OSError:  # another run of the tests was quicker
            assert target.is_dir()
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


@pytest.fixture(scope="session")
def cifar_root() -> Path:
    """A folder with the official `cifar-10-batches-py` (whole) and `cifar-100-python` (what the packs hold of it)."""
    packs = REAL_DATA / "packs"
    images = sorted(packs.glob("cifar*.webp"))
    if not images:
        pytest.skip(f"the packs of CIFAR are not in {REAL_DATA}")

    def unpack(folder: Path) -> None:
        script = REAL_DATA / "unpack_cifar.py"
        subprocess.run([sys.executable, str(script), str(packs), str(folder)], check=True, capture_output=True)

    return prepared(f"cifar-{len(images)}", unpack)


@pytest.fixture(scope="session")
def tiny_imagenet_root() -> Path:
    """A folder with `tiny-imagenet-200/{wnids.txt,words.txt,val/}`: 10,000 images of 64x64, no training images."""
    pack = REAL_DATA / "packs" / "tin_val.tar.xz"
    if not pack.is_file():
        pytest.skip(f"the pack of Tiny ImageNet is not in {REAL_DATA}")

    def unpack(folder: Path) -> None:
        with tarfile.open(pack) as archive:
            archive.extractall(folder, filter="data")
        shutil.copyfile(pack.parent / "tin_words200.txt", folder / "tiny-imagenet-200" / "words.txt")

    return prepared("tiny-imagenet", unpack)
