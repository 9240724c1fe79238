"""What the teachers would say about the student's own examples, which no cache can hold: four ways to stand in."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from darht.attacks.threat import LEVELS
from darht.cache.format.apply_views import apply_views, inverse_offsets
from darht.cache.read.draw import view_logits
from darht.cache.read.training_set import TrainingSet
from darht.core.device import constant
from darht.trainer.student.distances import mean_log_probabilities

Answer = Callable[[Tensor], Tensor]  # pixels [B, 3, H, W] in [0, 1] -> teachers' logits [B, T, C]


def clean_answer(clean_targets: Tensor) -> Answer:
    """The logits of the drawn view, whatever the perturbation (RSLAD; `[B, T, C]`)."""
    return lambda x: clean_targets


def live_answer(teachers: Sequence[nn.Module]) -> Answer:
    """The teachers themselves."""
    return lambda x: torch.stack([teacher(x) for teacher in teachers], dim=1).float()


def pseudo_labels(targets: Tensor, robust: Tensor) -> Tensor:
    """The class that teachers find most probable together, int64 `[B]`, from their logits `[B, T, C]` on clean views.

    Only robust ones are asked where there are any (`robust`, bool `[T]` on the CPU): they are who recipes listen to.
    """
    chosen = tuple(t for t, role in enumerate(robust.tolist()) if role) or tuple(range(len(robust)))
    return mean_log_probabilities(targets[:, constant(chosen, targets.device)]).argmax(1)


def nearest_answer(data: TrainingSet, at: Tensor, offsets: Tensor, clean: Tensor, clean_targets: Tensor) -> Answer:
    """The logits of the nearest image that the teachers have seen: a stored adversarial one, or the view itself.

    Stored perturbations belong to their own views; they are moved to the drawn one, and compared in Euclidean distance.

    Args:
        data: with the stored perturbations.
        at: int64 `[B]`, positions in `data`.
        offsets: int8 `[B, 3]` of the drawn views.
        clean: the drawn views, `[B, 3, H, W]` in [0, 1].
        clean_targets: `[B, T, C]`.
    """

    @functools.cache
    def table() -> tuple[Tensor, Tensor]:
        moved, answers = [torch.zeros_like(clean)], [clean_targets]
        for attack, (deltas, scale) in enumerate(zip(data.deltas, data.scales, strict=True)):
            for view in range(deltas.shape[1]):
                own = data.offsets[view].expand(len(at), 3)
                in_frame = apply_views(deltas[at, view], inverse_offsets(own))
                moved.append(apply_views(in_frame, offsets).float() * scale)
                answers.append(view_logits(data, at, torch.full_like(at, view), attack))
        return torch.stack(moved, dim=1).flatten(2), torch.stack(answers, dim=1)

    def answer(x: Tensor) -> Tensor:
        points, choices = table()
        delta = ((x.detach() - clean) * LEVELS).flatten(1)
        nearest = torch.cdist(delta[:, None], points).squeeze(1).argmin(1)
        return choices[torch.arange(len(at), device=nearest.device), nearest]

    return answer


def paired_answer(clean: Tensor, clean_targets: Tensor, x_adv: Tensor, targets: Tensor) -> Answer:
    """The logits of the view itself or of its own stored adversarial image, whichever is nearer.

    Args:
        clean: the drawn views, `[B, 3, H, W]` in [0, 1].
        clean_targets: `[B, T, C]`.
        x_adv: the stored adversarial images of these views.
        targets: `[B, T, C]` on these.
    """

    def answer(x: Tensor) -> Tensor:
        apart = [(x.detach() - point).flatten(1).norm(dim=1) for point in (clean, x_adv)]
        return torch.where((apart[1] < apart[0])[:, None, None], targets, clean_targets)

    return answer


def first_order_answer(data: TrainingSet, at: Tensor, offsets: Tensor, clean: Tensor, clean_targets: Tensor) -> Answer:
    """`T(view) + J delta` with the stored rows of each teacher's Jacobian, and with its gradient.

    The Jacobian is that of the image itself: a perturbation is moved back from the drawn view to the image's frame,
    which is what moving the Jacobian along with crop and flip comes to, at a fraction of the cost.

    Args:
        data: with `jacobians`.
        at: int64 `[B]`, positions in `data`.
        offsets: int8 `[B, 3]` of the drawn views.
        clean: the drawn views, `[B, 3, H, W]` in [0, 1].
        clean_targets: `[B, T, C]`.
    """
    back = inverse_offsets(offsets)
    parts = [jacobian.each(lambda tensor: tensor[at]) for jacobian in data.jacobians]  # K may differ between teachers
    slopes = [part.values.flatten(2).float() * part.scales[..., None] for part in parts]  # [B, K, 3HW]
    classes = [part.classes.long() for part in parts]

    def answer(x: Tensor) -> Tensor:
        delta = apply_views((x - clean) * LEVELS, back).flatten(1).float()[..., None]
        with torch.autocast(x.device.type, enabled=False):  # a small change of large logits is no matter for bfloat16
            changes = [
                torch.zeros_like(clean_targets[:, t]).scatter_add(1, classes[t], torch.bmm(slope, delta).squeeze(2))
                for t, slope in enumerate(slopes)
            ]
        return clean_targets + torch.stack(changes, dim=1)

    return answer
