"""The student as an attack sees it: its weights are given, and only pixels have a gradient.

In eval mode BatchNorm multiplies by numbers that no pixel changes. The twin has it folded into the convolutions, and
so spares each step of PGD a pass over every feature map on the way there and another on the way back. What is folded
follows the weights once before the steps; everything else lies on the student's own.
"""

import copy

import torch
from torch import Tensor, nn

from darht.core.device import device_of
from darht.core.nets.batch_norm import FoldedConvs, pairs, replace, trace
from darht.core.nets.compiled import Compiled
from darht.trainer.student.model import Student

_TOLERANCE = 1e-3  # of the largest feature: float32 folding stays below 1e-5, a trace that froze a branch is far above


class Twin:
    """What PGD ascends on.

    Args:
        student: trained meanwhile.
        probe: pixels `[B, 3, H, W]` in [0, 1]; where a folded network answers otherwise on them, none is folded.
        compiled: whether the twin is compiled.

    Attributes:
        folds: how many BatchNorms are folded.
    """

    def __init__(self, student: Student, probe: Tensor, *, compiled: bool = False) -> None:
        net = frozen_twin(student)
        folded = fold_norms(net.backbone) if _agrees(student, probe) else None
        if folded is not None:
            net.backbone = folded[0]
        self._convs = None if folded is None else folded[1]
        self.folds = 0 if folded is None else len(folded[1].folded)
        self._net = Compiled(net).eval() if compiled else net

    def current(self) -> nn.Module:
        """The network in eval mode, with the student's weights of this moment; good until these change."""
        if self._convs is not None:
            self._convs.refresh()
        return self._net


def frozen_twin(student: Student) -> Student:
    """A copy in eval mode that lies on the student's own weights and buffers and asks for no gradient of the weights.

    What an optimizer step or batch norm writes there is the twin's at once: nothing is copied. A compiled network
    computes the gradient of every weight that asks for one, also where only that of the pixels is taken.
    """
    shared: dict[int, object] = {id(weight): _given(weight) for weight in student.parameters()}
    shared |= {id(buffer): buffer for buffer in student.buffers()}
    return copy.deepcopy(student, shared).eval()


def fold_norms(backbone: nn.Module) -> tuple[nn.Module, FoldedConvs] | None:
    """A network in eval mode with `FoldedConvs` in the place of its pairs; None where it cannot be traced or has none.

    On a CPU folded weights lie channels-last, which takes a quarter less time and is safe for weights that are
    constant (`core.nets.layout`); elsewhere they lie as the network's own.
    """
    try:
        traced = trace(backbone)
    except Exception:  # tracing runs foreign code with proxies: whatever it raises means "not traceable"
        return None
    found = pairs(traced)
    if not found:
        return None
    parts = [pair.modules(traced) for pair in found]
    convs = FoldedConvs(parts, channels_last=device_of(backbone).type == "cpu")
    replace(traced, list(zip(found, convs.folded, strict=True)))
    return traced, convs


def _given(weight: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(weight.detach(), requires_grad=False)


@torch.no_grad()
def _agrees(student: Student, probe: Tensor) -> bool:
    """Whether a folded copy answers as the network does, with statistics that a network has once it was trained."""
    tried, generator = copy.deepcopy(student).eval(), torch.Generator().manual_seed(0)
    for norm in (part for part in tried.modules() if isinstance(part, nn.BatchNorm2d) and part.affine):
        for tensor, middle in ((norm.weight, 1.0), (norm.running_var, 1.0), (norm.bias, 0.0), (norm.running_mean, 0.0)):
            if tensor is not None:
                tensor.copy_(middle - 0.5 + torch.rand(tensor.shape, generator=generator))
    pixels, folded = tried.preprocess(probe), fold_norms(tried.backbone)
    if folded is None:
        return False
    folded[1].refresh()
    want = tried.backbone(pixels)
    try:
        apart = (folded[0](pixels) - want).abs().max()
    except RuntimeError:  # a view() of what is no longer contiguous
        return False
    return bool(apart <= _TOLERANCE * want.abs().max())
