"""Which device to compute on."""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from darht.core.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one and the CPU elsewhere; `cpu`, `cuda` and `cuda:N` are what torch calls them.

    Raises:
        ConfigError: a device that torch does not know, darht does not compute on, or this machine does not have.
    """
    if name == "auto" and torch.cuda.is_available():
        rank = os.environ.get("LOCAL_RANK")  # torchrun's number of the process on this machine
        return torch.device("cuda") if rank is None else torch.device("cuda", int(rank))
    if name == "auto":
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device '{name}': use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name} is not supported: use auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(f"device {name} is not there: torch sees {count} CUDA devices; use --device cpu or auto")
    return device


@contextmanager
def arithmetic(device: torch.device, *, deterministic: bool) -> Iterator[None]:
    """How a run is computed: by deterministic kernels, or on a GPU by the fastest that cuDNN finds for its shapes.

    torch's and cuDNN's settings are the caller's again at the end. What torch has no deterministic kernel for is an
    error of torch's while they are on. cuBLAS reads its setting from the environment when it is used first, where it
    stays.
    """
    cudnn, strict = torch.backends.cudnn, torch.are_deterministic_algorithms_enabled()
    before, only_warns = (cudnn.deterministic, cudnn.benchmark), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            cudnn.deterministic, cudnn.benchmark = True, False
        elif device.type == "cuda":
            cudnn.benchmark = not cudnn.deterministic
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=only_warns)
        cudnn.deterministic, cudnn.benchmark = before


def repeatability(device: torch.device, *, deterministic: bool) -> str:
    """What a run promises to one that is started again with the same seed on the same kind of hardware."""
    if device.type == "cpu" or deterministic:
        return "same bits"
    return "same draws, rounding may differ"


def device_of(model: nn.Module) -> torch.device:
    """Where a network's weights are, and so where its images have to be; the CPU for one without any."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def keep_memory() -> None:
    """Bring the C library to keep what is freed, by freeing one block of 31 MiB that is never written to.

    glibc gives freed memory back to the system from twice the size of the largest block (up to 32 MiB) that it has
    seen freed. By default a network's activations lie above that: page faults took a third of FAB's time, and 10 to
    25 % of a float32 training step on a CPU.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor on another device; a GPU is not waited for."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@functools.cache
def constant(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Whole numbers that never change, int64 on a device, which they are sent to once."""
    return torch.tensor(values, dtype=torch.int64, device=device)
