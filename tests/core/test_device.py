"""Which device a name means."""

import pytest
import torch

from darht.core.device import pick_device
from darht.core.errors import ConfigError


def devices(monkeypatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_the_cpu_is_always_there(monkeypatch):
    devices(monkeypatch, 0)
    assert pick_device("cpu") == pick_device("auto") == torch.device("cpu")


def test_auto_prefers_cuda(monkeypatch):
    devices(monkeypatch, 2)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("auto") == torch.device("cuda:1")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(("name", "count"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_a_cuda_device_that_is_not_there(monkeypatch, name, count):
    devices(monkeypatch, count)
    with pytest.raises(ConfigError) as caught:
        pick_device(name)
    assert str(caught.value) == f"device {name} is not there: torch sees {count} CUDA devices; use --device cpu or auto"


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cuda:-1"])
def test_a_name_that_torch_does_not_know(name):
    with pytest.raises(ConfigError) as caught:
        pick_device(name)
    assert str(caught.value) == f"unknown device '{name}': use auto, cpu, cuda or cuda:N"


@pytest.mark.parametrize("name", ["mps", "meta", "xpu"])
def test_a_device_that_darht_does_not_compute_on(name):
    with pytest.raises(ConfigError, match=f"device {name} is not supported: use auto, cpu, cuda or cuda:N"):
        pick_device(name)
