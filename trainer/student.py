"""The student: a backbone, the student-teacher feature map, and a head on the map (Deng et al. 2024)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from darht.cache.teachers import Preprocessing, Teacher
from darht.core.nets import backbone, build, fold_head, head_name
from darht.core.rng import borrowed_generator


class StudentOutput(NamedTuple):
    """What a student says.

    Attributes:
        logits: `[B, C]`, the student's own prediction z.
        feature_map: `[B, T, C]`, its estimate of teacher t's logit for class c; T is 0 for a plain student.
    """

    logits: Tensor
    feature_map: Tensor


class Student(nn.Module):
    """`h = backbone(x)`, `M = map(h)` as `[B, T, C]`, `z = head(M.flatten(1))`; with T = 0, `z = head(h)`.

    Args:
        arch: of the backbone, as `darht.core.nets.build` takes it.
        kwargs: of the backbone.
        teachers: T, the rows of the map; 0 for a plain classifier.
        num_classes: C.
        preprocessing: applied to pixels in [0, 1] before the backbone.

    Raises:
        ModelError: the architecture is unknown or has no classifier to replace.
    """

    def __init__(
        self, arch: str, kwargs: Mapping[str, Any], *, teachers: int, num_classes: int, preprocessing: Preprocessing
    ) -> None:
        super().__init__()
        self.arch, self.kwargs, self.teachers, self.num_classes = arch, dict(kwargs), teachers, num_classes
        self.preprocessing = preprocessing
        base = backbone(arch, kwargs)
        self.preprocess = Teacher(base.module, preprocessing).preprocess
        self.backbone = base.module
        if teachers:
            self.map = nn.Linear(base.num_features, teachers * num_classes)
            self.head = nn.Linear(teachers * num_classes, num_classes)
        else:
            self.head = nn.Linear(base.num_features, num_classes)

    def forward(self, x: Tensor) -> StudentOutput:
        """Pixels `[B, 3, H, W]` in [0, 1] to logits and feature map."""
        features = self.backbone(self.preprocess(x))
        if not self.teachers:
            logits = self.head(features)
            return StudentOutput(logits, logits.new_zeros(len(x), 0, self.num_classes))
        rows = self.map(features)
        return StudentOutput(self.head(rows), rows.view(len(x), self.teachers, self.num_classes))

    @torch.no_grad()
    def fold(self) -> Teacher:
        """The plain classifier with the same function and no more parameters than its architecture has.

        Map and head are linear with nothing between them, so they are one linear layer: `W = W_head W_map`,
        `b = W_head b_map + b_head`. Products are taken in float64.
        """
        with borrowed_generator(0, "fold"):
            plain = build(self.arch, self.num_classes, self.kwargs).to(self.head.weight)
        name = head_name(plain, self.num_classes)
        weight, bias = self.head.weight.double(), self.head.bias.double()
        if self.teachers:
            bias = weight @ self.map.bias.double() + bias
            weight = weight @ self.map.weight.double()
        state = self.backbone.state_dict()
        plain.load_state_dict({key: state.get(key, value) for key, value in plain.state_dict().items()})
        fold_head(plain, name, weight.to(self.head.weight.dtype), bias.to(self.head.bias.dtype))
        folded = Teacher(plain, self.preprocessing).to(self.head.weight)
        return folded.train(self.training)
