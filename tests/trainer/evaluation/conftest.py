"""A small classifier of digits that is sound, frauds made of it, and two runs of the trainer."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from darht.cache.read.reader import open_cache
from darht.cache.sources.load import load_source
from darht.trainer.config import InnerConfig, OptimConfig, StudentConfig, TrainConfig
from darht.trainer.student.train import train

sys.path.insert(0, str(Path(__file__).parent))  # frauds.py, which `python:frauds:NAME` names

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digits():
    return load_source("digits", None, "test", limit=120)


@pytest.fixture(scope="session")
def sound():
    """Two layers trained on digits for a second: right on most, with honest gradients."""
    import frauds

    source = load_source("digits", None, "train")
    x, y = torch.from_numpy(source.images).float() / 255, torch.from_numpy(source.labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 10))
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    frauds.HONEST = net.eval().requires_grad_(False)
    return frauds.HONEST


@pytest.fixture(scope="session")
def trained(tiny_cache, tmp_path_factory):
    """Two runs of one epoch: `cached` and `pgd`."""
    root, cache = tmp_path_factory.mktemp("runs"), open_cache(tiny_cache)
    for kind in ("cached", "pgd"):
        config = TrainConfig(
            student=StudentConfig(arch="resnet18", kwargs={"width": 4, "blocks": [1, 1, 1, 1]}),
            inner=InnerConfig(kind=kind, eps=32, step=8, steps=1),
            optim=OptimConfig(epochs=1, batch_size=32, lr=0.01),
        )
        train(config, cache, root / kind, device=CPU)
    return root


@pytest.fixture
def runs(trained):
    """The two runs as trained: no test finds another's evaluation, which it might not be strong enough to replace."""
    for report in trained.glob("*/eval*.*"):
        report.unlink()
    return trained


@pytest.fixture
def greys():
    """Uniform images of ten levels, whose labels are what `frauds.Brightness` says but for the last one's."""
    import frauds

    return frauds.greys(np.array([100, 118, 121, 124, 127, 128, 131, 134, 137, 200]))
