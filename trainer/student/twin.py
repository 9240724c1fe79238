"""The student as an attack sees it: its weights are given, and only pixels have a gradient."""

import copy

from torch import nn


def frozen_twin(student: nn.Module) -> nn.Module:
    """A copy in eval mode that lies on the student's own weights and buffers and asks for no gradient of the weights.

    What an optimizer step or batch norm writes there is the twin's at once: nothing is copied. A compiled network
    computes the gradient of every weight that asks for one, also where only that of the pixels is taken.
    """
    shared: dict[int, object] = {id(weight): _given(weight) for weight in student.parameters()}
    shared |= {id(buffer): buffer for buffer in student.buffers()}
    return copy.deepcopy(student, shared).eval()


def _given(weight: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(weight.detach(), requires_grad=False)
