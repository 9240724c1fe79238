"""Which device to compute on."""

import os

import torch

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
