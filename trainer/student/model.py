"""The student: a backbone, the student-teacher feature map, and a head on the map (Deng et al. 2024).

With Monte-Carlo dropout (section 3.2 of the paper, Gal and Ghahramani 2016) the features are dropped at random before
the map, also at inference, where the answer is the mean probability over several passes, as its logarithm. The backbone
runs once for all passes: only the two linear layers see the dropped features.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darht.core.errors import ConfigError, ModelError
from darht.core.nets import backbone, build, fold_head, head_name
from darht.core.nets.classifier import Classifier
from darht.core.nets.head import folded
from darht.core.preprocessing import Preprocessing
from darht.core.rng import borrowed_generator

# Of the largest logit: float32 rounding stays below 1e-5 on the networks tried, an activation after the head is near 1.
_FOLDS = 1e-3


class StudentOutput(NamedTuple):
    """What a student says.

    Attributes:
        logits: `[B, C]`, the student's own prediction z.
        feature_map: `[B, T, C]`, its estimate of teacher t's logit for class c; T is 0 for a plain student.
    """

    logits: Tensor
    feature_map: Tensor


@dataclass(frozen=True)
class Dropout:
    """Monte-Carlo dropout of the features.

    Attributes:
        p: the share that is dropped, in [0, 1); 0 for no dropout at all.
        samples: passes whose probabilities are averaged at inference; each costs one linear layer, not one backbone.
    """

    p: float = 0.0
    samples: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1 or self.samples < 1:
            raise ConfigError(
                f"mc_dropout is a share in [0, 1) and mc_samples at least 1 pass; got {self.p:g} and {self.samples}"
            )

    def __call__(self, features: Tensor, *, passes: int, generator: torch.Generator | None) -> Tensor:
        """Features `[B, D]` as `[passes, B, D]`, each pass with its own draws; what stays is scaled by 1 / (1 - p)."""
        kept = features.new_empty(passes, *features.shape).bernoulli_(1 - self.p, generator=generator)
        return features * kept / (1 - self.p)


def mean_of_passes(logits: Tensor) -> Tensor:
    """Logits `[S, B, C]` of S passes to the logarithm of their mean probability `[B, C]`, which serves as logits."""
    return F.log_softmax(logits, dim=-1).logsumexp(0) - math.log(len(logits))


class Student(nn.Module):
    """`h = backbone(x)`, `M = map(h)` as `[B, T, C]`, `z = head(M.flatten(1))`; with T = 0, `z = head(h)`.

    Args:
        arch: of the backbone, as `darht.core.nets.build` takes it.
        kwargs: of the backbone.
        teachers: T, the rows of the map; 0 for a plain classifier.
        num_classes: C.
        preprocessing: applied to pixels in [0, 1] before the backbone.
        dropout: Monte-Carlo dropout of h; it has no parameters.

    Raises:
        ModelError: the architecture is unknown, or has no classifier to replace.
    """

    def __init__(
        self,
        arch: str,
        kwargs: Mapping[str, Any],
        *,
        teachers: int,
        num_classes: int,
        preprocessing: Preprocessing,
        dropout: Dropout = Dropout(),
    ) -> None:
        super().__init__()
        self.arch, self.kwargs, self.teachers, self.num_classes = arch, dict(kwargs), teachers, num_classes
        self.preprocessing, self.dropout = preprocessing, dropout
        base = backbone(arch, kwargs)
        self.preprocess = Classifier(base.module, preprocessing).preprocess
        self.backbone = base.module
        if teachers:
            self.map = nn.Linear(base.num_features, teachers * num_classes)
            self.head = nn.Linear(teachers * num_classes, num_classes)
        else:
            self.head = nn.Linear(base.num_features, num_classes)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> StudentOutput:
        """Pixels `[B, 3, H, W]` in [0, 1] to logits and feature map.

        With dropout, train mode makes one pass and eval mode averages `dropout.samples` of them: the logits are the
        logarithm of the mean probability then, and the map is the mean map. Draws come from `generator`, or else from
        torch's global one, which whoever wants the same answer again borrows (`core.rng.borrowed_generator`).
        """
        features = self.backbone(self.preprocess(x))
        if not self.dropout.p:
            return self._answer(features)
        passes = 1 if self.training else self.dropout.samples
        out = self._answer(self.dropout(features, passes=passes, generator=generator))
        if self.training:
            return StudentOutput(out.logits[0], out.feature_map[0])
        return StudentOutput(mean_of_passes(out.logits), out.feature_map.mean(0))

    def _answer(self, features: Tensor) -> StudentOutput:
        """Map and head on features `[..., D]`."""
        if not self.teachers:
            logits = self.head(features)
            return StudentOutput(logits, logits.new_zeros(*features.shape[:-1], 0, self.num_classes))
        rows = self.map(features)
        return StudentOutput(self.head(rows), rows.unflatten(-1, (self.teachers, self.num_classes)))

    def fold(self) -> Classifier:
        """The classifier with the same function, map and head being one linear layer.

        Without dropout it is the plain network of the architecture. With dropout it drops the features before that one
        layer: for the same draws it gives the same answer, because the two layers are linear for every draw.
        """
        if not self.dropout.p:
            return self.plain()
        net = DropoutClassifier(copy.deepcopy(self.backbone), *self._folded_head(), self.dropout)
        return Classifier(net, self.preprocessing).to(self.head.weight).train(self.training)

    @torch.no_grad()
    def plain(self) -> Classifier:
        """The plain network of the architecture, with no more parameters than it has, and dropout off.

        Without dropout it has the student's function. With dropout it is what the literature calls weight scaling: the
        answer to the mean features.
        """
        with borrowed_generator(0, "fold"):
            plain = build(self.arch, self.num_classes, self.kwargs).to(self.head.weight)
        folded = Classifier(plain, self.preprocessing).to(self.head.weight)
        self.copy_into(folded)
        return folded.train(self.training)

    @torch.no_grad()
    def copy_into(self, plain: Classifier) -> None:
        """Bring a network that `plain` made to this student's weights and statistics."""
        state, own = self.backbone.state_dict(), plain.net.state_dict()
        plain.net.load_state_dict({key: state.get(key, value) for key, value in own.items()})
        fold_head(plain.net, head_name(plain.net, self.num_classes), *self._folded_head())

    @torch.no_grad()
    def _folded_head(self) -> tuple[Tensor, Tensor]:
        mapped = (self.map.weight, self.map.bias) if self.teachers else None
        return folded((self.head.weight, self.head.bias), mapped)


class DropoutClassifier(nn.Module):
    """Normalised pixels to logits, by a backbone and one linear layer with Monte-Carlo dropout between them."""

    def __init__(self, features: nn.Module, weight: Tensor, bias: Tensor, dropout: Dropout) -> None:
        super().__init__()
        self.backbone, self.dropout = features, dropout
        self.head = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0])
        self.head.weight, self.head.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 3, H, W]` to `[B, C]`: one pass in train mode, the mean of the passes in eval mode."""
        passes = 1 if self.training else self.dropout.samples
        logits: Tensor = self.head(self.dropout(self.backbone(x), passes=passes, generator=None))
        return logits[0] if self.training else mean_of_passes(logits)


@torch.no_grad()
def check_folds(student: Student, pixels: Tensor) -> None:
    """Ask the student and its plain network about pixels `[B, 3, H, W]`, before hours go into what cannot be folded.

    Raises:
        ModelError: they answer differently: the architecture does more than pooling after its classifier layer.
    """
    was_training = student.training
    student.eval()
    try:
        want = student._answer(student.backbone(student.preprocess(pixels))).logits
        found = student.plain()(pixels)
    finally:
        student.train(was_training)
    apart = float((found - want).abs().max() / want.abs().max().clamp(min=1e-12))
    if not apart <= _FOLDS:
        raise ModelError(
            f"{student.arch} does not fold: its plain network answers {apart:.1%} apart from the student, because its "
            "forward is not linear after the classifier layer; choose another architecture"
        )
