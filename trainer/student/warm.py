"""`inner: warm`: one step on the student from the perturbation that each row had before (FGSM-MEP, Jia et al. 2022)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from darht.attacks.threat import LEVELS, Threat
from darht.cache.read.loader import TrainingSet
from darht.cache.read.sampler import draw_choices
from darht.core.device import send
from darht.core.rng import RowRng
from darht.trainer.config import InnerConfig
from darht.trainer.student.step import Recipe, Step

_MOMENTUM_UNIT = 1 / 64  # |momentum| < 1 / (1 - 0.5) fits int8 for momenta up to one half; larger ones saturate


def memory_bytes(rows: int, image_shape: tuple[int, ...], padding: int) -> int:
    """What a `WarmMemory` of images in views of this padding takes: two bytes for each value of the padded frames."""
    channels, height, width = image_shape
    return 2 * rows * channels * (height + 2 * padding) * (width + 2 * padding)


@dataclass(eq=False)
class WarmMemory:
    """A perturbation of every row, between epochs.

    It lives in the frame of the image padded by the farthest crop, so that it stays on the same pixels of the image
    under any crop and flip: what a crop does not show keeps what an earlier one left.

    Attributes:
        delta: int8 `[N, 3, H + 2p, W + 2p]` in pixel levels, where the next step starts.
        momentum: int8 of the same shape, the decayed sum of gradient signs in 1/64.
        seen: bool `[N]` on the CPU, whether a row has started.
        fresh: bool `[N]`, whether a row was written here since `join`.
        complete: whether all rows to train on have started, as `look` found.
    """

    delta: Tensor
    momentum: Tensor
    seen: Tensor
    fresh: Tensor
    complete: bool = False

    @classmethod
    def create(cls, rows: int, image_shape: tuple[int, ...], offsets: Tensor, device: torch.device) -> "WarmMemory":
        """An empty memory for `rows` rows of `image_shape` in the views `offsets`, int8 `[V, 3]`."""
        channels, height, width = image_shape
        padding = int(offsets[:, :2].abs().max())
        shape = (rows, channels, height + 2 * padding, width + 2 * padding)
        delta, momentum = (torch.zeros(shape, dtype=torch.int8, device=device) for _ in range(2))
        seen, fresh = torch.zeros(rows, dtype=torch.bool), torch.zeros(rows, dtype=torch.bool, device=device)
        return cls(delta, momentum, seen, fresh)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"delta": self.delta, "momentum": self.momentum, "seen": self.seen, "fresh": self.fresh}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what a checkpoint kept."""
        for name, tensor in state.items():
            getattr(self, name).copy_(tensor)

    def forget(self) -> None:
        """Let every row start as in the first epoch."""
        for tensor in self.state().values():
            tensor.zero_()

    def read(self, rows: Tensor, offsets: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Perturbation in levels and momentum, float `[B, 3, H, W]`, of rows in the views `offsets` `[B, 3]`."""
        index = self._index(rows, offsets, size)
        delta, momentum = self.delta[index].permute(0, 3, 1, 2), self.momentum[index].permute(0, 3, 1, 2)
        return delta.float(), momentum.float() * _MOMENTUM_UNIT

    def write(self, rows: Tensor, offsets: Tensor, delta: Tensor, momentum: Tensor) -> None:
        """Keep whole levels `delta` and `momentum` of rows in the views `offsets`."""
        index = self._index(rows, offsets, (delta.shape[2], delta.shape[3]))
        stored = (momentum / _MOMENTUM_UNIT).round().clamp(-127, 127)
        self.delta[index] = delta.permute(0, 2, 3, 1).to(torch.int8)
        self.momentum[index] = stored.permute(0, 2, 3, 1).to(torch.int8)
        self.fresh[rows] = True

    def alone(self) -> None:
        """Note that nobody waits for the rows that were written here; several processes may go on with this run."""
        self.fresh.zero_()

    def join(self, total: Callable[[Tensor], object]) -> None:
        """Take over the rows that other processes have written; `total` adds a tensor over all processes, in place."""
        theirs = self.fresh.to(torch.int8)
        total(theirs)
        written = theirs > 0
        for tensor in (self.delta, self.momentum):
            mine = tensor * self.fresh[:, None, None, None]
            total(mine)
            tensor[written] = mine[written]
        self.seen[written.to(self.seen.device)] = True
        self.fresh.zero_()

    def look(self, rows: Tensor) -> None:
        """Note, once in an epoch, whether all of `rows` have started, so that its steps need not ask."""
        self.complete = bool(self.seen[rows].all())

    def begin(self, data: TrainingSet, at: Tensor, threat: Threat, inner: InnerConfig, seed: int) -> None:
        """Give rows that have not been seen their first perturbation; `at` is on the CPU, where it is known which."""
        if self.complete:
            return
        at = at[~self.seen[data.keys[at]]]
        if not len(at):
            return
        device, size = data.images.device, data.images.shape[1:]
        rows = data.rows[send(at, device)]
        delta = torch.zeros(len(at), *size, device=device)
        if inner.warm.start == "noise":
            delta = threat.random_start(delta.shape, RowRng.create(seed, "warm", rows=rows)).float()
        elif inner.warm.start == "cached":
            choice = draw_choices(data.keys[at], len(data.deltas), seed, 0, "warm")
            for attack, (deltas, scale) in enumerate(zip(data.deltas, data.scales, strict=True)):
                mine = (choice == attack).nonzero().flatten()
                delta[send(mine, device)] = (deltas[send(at[mine], device), 0].float() * scale).round()
        upright = torch.zeros(len(at), 3, dtype=torch.int8, device=device)
        self.write(rows, upright, threat.project(delta), torch.zeros_like(delta))
        self.seen[data.keys[at]] = True

    def _index(self, rows: Tensor, offsets: Tensor, size: tuple[int, int]) -> tuple[Tensor | slice, ...]:
        """Where the pixels of views lie in the padded frame; what it selects has its channels last."""
        padding = (self.delta.shape[2] - size[0]) // 2
        dy, dx, flip = offsets.long().unbind(1)
        down = torch.arange(size[0], device=rows.device) + dy[:, None] + padding
        across = torch.arange(size[1], device=rows.device)
        across = torch.where(flip[:, None] == 1, size[1] - 1 - across, across) + dx[:, None] + padding
        return rows[:, None, None], slice(None), down[:, :, None], across[:, None, :]


def warm_step(
    student: nn.Module,
    step: Step,
    memory: WarmMemory,
    rows: Tensor,
    offsets: Tensor,
    *,
    recipe: Recipe,
    inner: InnerConfig,
) -> Step:
    """One signed step from where each row stands, and the student's logits at the start of it.

    The student is taken in the mode it is in: the pass that gives the gradient also gives the logits that the
    consistency term holds on to, so it is paid once.

    Args:
        student: trained right now.
        step: clean views.
        memory: of all rows; what `rows` have there is replaced by their next start.
        rows: int64 `[B]`, source indices.
        offsets: int8 `[B, 3]` of the views in `step`.
        recipe: whose inner objective is ascended.
        inner: radius, step size and momentum.
    """
    threat, levels = inner.pgd().threat, (step.clean * LEVELS).round()
    start, momentum = memory.read(rows, offsets, (step.clean.shape[2], step.clean.shape[3]))
    start = (levels + start).clamp(0, LEVELS) - levels
    x = ((levels + start) / LEVELS).requires_grad_()
    logits = student(x).logits
    objective = recipe.inner(student, step)(logits, x).sum()
    (gradient,) = torch.autograd.grad(objective, x, retain_graph=True)
    sign = gradient.sign()
    momentum = inner.warm.momentum * momentum + sign

    def moved(direction: Tensor) -> Tensor:
        return (levels + threat.project(start + inner.length * direction)).clamp(0, LEVELS) - levels

    memory.write(rows, offsets, moved(momentum.sign()), momentum)
    return step._replace(x=(levels + moved(sign)) / LEVELS, start=logits)
