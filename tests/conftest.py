"""Fixtures shared by all tests. Real data are unpacked once into `build/data`, which git ignores."""

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import yaml
from built import sealed_cache
from generated import save_generated
from hypothesis import settings

# No deadline: machines differ, and speed is not what tests are for. CI draws the same examples every time.
settings.register_profile("darht", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("darht")

# A shell has what it starts in the background ignore Ctrl-C; tests send it, and processes inherit what it does here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Crashes:
    """Remembers the tests whose worker process died, so that the last line of a run can name them."""

    def __init__(self) -> None:
        self.tests: list[str] = []

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str) -> None:
        self.tests.append(crashitem)

    def pytest_unconfigure(self) -> None:
        if self.tests:
            print(f"a worker process died in: {', '.join(self.tests)}")  # noqa: T201


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Crashes())
    os.environ["XDG_DATA_HOME"] = tempfile.mkdtemp(prefix="darht-data-")  # what tests train is not the user's
    config.add_cleanup(partial(shutil.rmtree, os.environ["XDG_DATA_HOME"], ignore_errors=True))


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


@pytest.fixture(scope="session")
def tiny_teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of two untrained teachers of 10 classes at 8x8 pixels: `cnn` (a ResNet) and `vit`."""
    import torch

    from darht.cache.builder.teachers import Card, save_teacher
    from darht.core.nets import build
    from darht.core.preprocessing import Preprocessing

    small_vit = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    networks: dict[str, tuple[str, dict[str, object]]] = {
        "cnn": ("resnet18", {"width": 4, "blocks": [1, 1, 1, 1]}),
        "vit": ("timm:vit_tiny_patch16_224", small_vit),
    }
    root = tmp_path_factory.mktemp("teachers")
    normalised = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    for seed, (name, (arch, kwargs)) in enumerate(networks.items()):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = build(arch, 10, kwargs)
        card = Card(arch=arch, kwargs=kwargs, num_classes=10, preprocessing=normalised, weights_sha256="")
        save_teacher(root / name, net, card)
    return {name: root / name for name in networks}


@pytest.fixture(scope="session")
def tiny_cache_config(tiny_teachers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML of `tiny_cache`: 100 digits, 9 views, both teachers, `pgd-cnn` on one view and `pgd-vit` on two."""
    path = tmp_path_factory.mktemp("config") / "cache.yaml"
    attack = {"kind": "pgd", "eps": 32, "step": 8, "steps": 2}
    config = {
        "data": {"source": "digits", "limit": 100, "holdout": 0.1},
        "teachers": {name: {"path": str(folder)} for name, folder in tiny_teachers.items()},
        "attacks": {
            "pgd-cnn": {**attack, "teacher": "cnn"},
            "pgd-vit": {**attack, "teacher": "vit", "views": 2},
        },
        "views": {"padding": 1, "flip": False},
        "store": {"rows_per_shard": 32, "rows_per_chunk": 8},
        "seed": 10,  # holds 11 rows out
    }
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


@pytest.fixture(scope="session")
def fine_cache(tiny_cache_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_cache` with one attack, in shards of 16 rows with chunks of 4: small enough to be streamed."""
    config = yaml.safe_load(tiny_cache_config.read_text()) | {"store": {"rows_per_shard": 16, "rows_per_chunk": 4}}
    del config["attacks"]["pgd-cnn"]
    return sealed_cache(config, tmp_path_factory.mktemp("fine"))


@pytest.fixture(scope="session")
def tiny_cache(tiny_cache_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed cache; read only: a test that damages it copies it first."""
    return sealed_cache(yaml.safe_load(tiny_cache_config.read_text()), tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def blend_config(tiny_cache_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML of `blend`: 60 digits on 9 views, and beside them 70 generated ones without labels on one view."""
    folder = tmp_path_factory.mktemp("blend-config")
    config = yaml.safe_load(tiny_cache_config.read_text())
    generated = save_generated(folder / "generated.npz", 70)
    config["data"] = [
        config["data"] | {"limit": 60},
        {"source": "npz", "path": str(generated), "labels": "none", "share": 0.5, "views": 1},
    ]
    config["store"] = {"rows_per_shard": 16, "rows_per_chunk": 4}
    config["attacks"] = {"pgd-cnn": config["attacks"]["pgd-cnn"]}
    del config["teachers"]["vit"]
    (folder / "blend.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder / "blend.yaml"


@pytest.fixture(scope="session")
def blend(blend_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed cache of rows with labels and rows without."""
    return sealed_cache(yaml.safe_load(blend_config.read_text()), tmp_path_factory.mktemp("blend"))
