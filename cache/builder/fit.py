"""How many images a GPU takes at once: measured on the teachers of a build, before its first unit."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol

import torch
from torch import nn

from darht.attacks.engine.batch_sizes import SMALLEST

CPU_BATCH = 256  # images in a forward pass on a CPU; a cache's last bits there come with it
SHARE = 0.6  # of the memory; the rest is for the images, the answers and what torch's allocator splits
ITERATE = 24  # copies of an image in float32 that the greediest attack keeps beside the network's own tensors
_FEW, _MANY = 16, 64  # images in the two passes whose difference is what an image costs


def measures(device: torch.device) -> bool:
    """Whether batches are as large as the device has room for; on a CPU they are as they always were."""
    return device.type != "cpu"


class Memory(Protocol):
    """The memory of a device."""

    def total(self) -> int:
        """Bytes that it has, whoever has them now."""
        ...

    def peak(self, run: Callable[[], None]) -> int:
        """The most bytes that `run` takes beyond what is taken already."""
        ...


class CudaMemory:
    """The memory of a GPU, as torch counts it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def total(self) -> int:
        """Bytes of the card."""
        return int(torch.cuda.get_device_properties(self.device).total_memory)

    def peak(self, run: Callable[[], None]) -> int:
        """From torch's own peak, which counts tensors and not what its allocator keeps."""
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        torch.cuda.synchronize(self.device)
        return int(torch.cuda.max_memory_allocated(self.device)) - before


def fitting_batch(
    models: Iterable[nn.Module], image: tuple[int, ...], rows: int, device: torch.device, memory: Memory
) -> int:
    """The batch size of a build: a shard in the fewest equal batches that fit, a multiple of 16.

    It depends on the card and not on who else works there, so that a build goes on with the size it began with.

    Args:
        models: the teachers, on their device.
        image: the shape of an image, `(3, H, W)`.
        rows: of a shard.
        device: where the teachers are.
        memory: of that device.
    """
    each = bytes_of_an_image(models, image, device, memory)
    most = max(1, int(SHARE * memory.total()) // each // SMALLEST) * SMALLEST
    pieces = -(-rows // most)
    return -(-rows // (pieces * SMALLEST)) * SMALLEST


def bytes_of_an_image(models: Iterable[nn.Module], image: tuple[int, ...], device: torch.device, memory: Memory) -> int:
    """What one more image costs an attack on the greediest teacher: a pass forward and back, and the iterate."""
    pixels = 4 * image[0] * image[1] * image[2]
    return max((_bytes_of(model, image, device, memory) for model in models), default=0) + ITERATE * pixels


def _bytes_of(model: nn.Module, image: tuple[int, ...], device: torch.device, memory: Memory) -> int:
    few, many = (memory.peak(partial(_pass, model, (count, *image), device)) for count in (_FEW, _MANY))
    return max(0, many - few) // (_MANY - _FEW)


def _pass(model: nn.Module, shape: tuple[int, ...], device: torch.device) -> None:
    with torch.enable_grad():
        x = torch.zeros(shape, device=device, requires_grad=True)
        torch.autograd.grad(model(x).sum(), x)
