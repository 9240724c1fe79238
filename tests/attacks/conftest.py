"""Real networks and images, where they are there."""

import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from scripts import load_script
from torch import Tensor, nn

from darht.core.vision import torchvision

sys.path.insert(0, str(Path(__file__).parent))  # tiny.py, which the tests share
torchvision()  # libraries that the tests compare with import torchvision plainly

WEIGHTS = Path(__file__).resolve().parents[3] / "shared" / "data" / "weights"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small only lose by threads that wait for each other; the tests about threads set their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def zoo() -> Callable[[str], nn.Module]:
    """Load one of the small real networks for CIFAR-10."""
    path = WEIGHTS / "zoo.py"
    if not path.is_file():
        pytest.skip(f"no networks in {WEIGHTS}")
    return load_script(path).load


@pytest.fixture(scope="session")
def cifar_test(cifar_root: Path) -> tuple[Tensor, Tensor]:
    """The test images of CIFAR-10 in [0, 1] and their labels."""
    with (cifar_root / "cifar-10-batches-py" / "test_batch").open("rb") as file:
        held = pickle.load(file, encoding="bytes")
    images = torch.tensor(held[b"data"]).view(-1, 3, 32, 32)
    return images.float() / 255, torch.tensor(held[b"labels"])
