"""Counts the bytes of all tensors that live at once: what torch's allocator would count on a GPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class Live(TorchDispatchMode):
    """Adds up the storages that operators make inside the block; `most` is the largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._storages = {key: one for key, one in self._storages.items() if not one[0].expired()}
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, sum(size for _, size in self._storages.values()))
        return out


class CountedMemory:
    """A device's memory of so many bytes, for `fitting_batch`."""

    def __init__(self, total: int) -> None:
        self.size = total

    def total(self) -> int:
        return self.size

    def peak(self, run: Callable[[], None]) -> int:
        with Live() as live:
            run()
        return live.most
