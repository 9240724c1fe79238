"""Which device a name means."""

import os

import pytest
import torch

from darht.core.device import arithmetic, constant, pick_device, repeatability
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


@pytest.mark.parametrize(("device", "deterministic", "flags"), [
    ("cpu", False, (False, False, False)),
    ("cpu", True, (True, True, False)),
    ("cuda", True, (True, True, False)),
    ("cuda", False, (False, False, True)),
])  # fmt: skip
def test_arithmetic_is_set_for_a_run_and_given_back(device, deterministic, flags, monkeypatch):
    """Torch's algorithms, cuDNN's, and whether cuDNN tries which of its kernels is fastest."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)

    def now():
        cudnn = torch.backends.cudnn
        return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark

    before = now()
    with pytest.raises(KeyError), arithmetic(torch.device(device), deterministic=deterministic):
        assert now() == flags
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is deterministic
        raise KeyError
    assert now() == before
    promised = repeatability(torch.device(device), deterministic=deterministic)
    assert (promised == "same bits") is (device == "cpu" or deterministic)


def test_constants_are_sent_once():
    assert constant((0, 2), torch.device("cpu")) is constant((0, 2), torch.device("cpu"))
    assert constant((0, 2), torch.device("meta")).device.type == "meta"
