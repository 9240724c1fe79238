"""`inner: warm`: one step on the student from the perturbation that each row had before (FGSM-MEP, Jia et al. 2022)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from darht.attacks.threat import LEVELS, Threat
from darht.cache.read.sampler import draw_choices
from darht.cache.read.training_set import TrainingSet
from darht.core.device import send
from darht.core.fused import fused
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
        pixels: int8 `[N, H + 2p, W + 2p, 6]`, six numbers for each pixel, which are read and written together: `delta`
            and `momentum` of its channels.
        seen: bool `[N]` on the CPU, whether a row has started.
        fresh: bool `[N]`, whether a row was written here since `join`.
        complete: whether all rows to train on have started, as `look` found.
    """

    pixels: Tensor
    seen: Tensor
    fresh: Tensor
    complete: bool = False

    @property
    def delta(self) -> Tensor:
        """Where the next step starts, in pixel levels, int8 `[N, 3, H + 2p, W + 2p]`."""
        return self.pixels[..., :3].permute(0, 3, 1, 2)

    @property
    def momentum(self) -> Tensor:
        """The decayed sum of gradient signs in 1/64, int8 of the same shape."""
        return self.pixels[..., 3:].permute(0, 3, 1, 2)

    @classmethod
    def create(cls, rows: int, image_shape: tuple[int, ...], offsets: Tensor, device: torch.device) -> "WarmMemory":
        """An empty memory for `rows` rows of `image_shape` in the views `offsets`, int8 `[V, 3]`."""
        channels, height, width = image_shape
        padding = int(offsets[:, :2].abs().max())
        shape = (rows, height + 2 * padding, width + 2 * padding, 2 * channels)
        seen, fresh = torch.zeros(rows, dtype=torch.bool), torch.zeros(rows, dtype=torch.bool, device=device)
        return cls(torch.zeros(shape, dtype=torch.int8, device=device), seen, fresh)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"pixels": self.pixels, "seen": self.seen, "fresh": self.fresh}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what a checkpoint kept; those of earlier versions have `delta` and `momentum` apart."""
        for name, tensor in state.items():
            getattr(self, name).copy_(tensor)

    def forget(self) -> None:
        """Let every row start as in the first epoch."""
        for tensor in self.state().values():
            tensor.zero_()

    def read(self, rows: Tensor, offsets: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Perturbation in levels and momentum, float `[B, 3, H, W]`, of rows in the views `offsets` `[B, 3]`."""
        return _read(self.pixels, rows, offsets, size)

    def write(self, rows: Tensor, offsets: Tensor, delta: Tensor, momentum: Tensor) -> None:
        """Keep whole levels `delta` and `momentum` of rows in the views `offsets`."""
        self.keep(rows, offsets, _stored(delta, momentum))

    def keep(self, rows: Tensor, offsets: Tensor, stored: Tensor) -> None:
        """Keep both of rows in the views `offsets`, as the memory has them, int8 `[B, H, W, 6]`."""
        self.pixels[_place(self.pixels, rows, offsets, stored.shape[1:3])] = stored
        self.fresh.index_fill_(0, rows, True)

    def alone(self) -> None:
        """Note that nobody waits for the rows that were written here; several processes may go on with this run."""
        self.fresh.zero_()

    def join(self, total: Callable[[Tensor], object], claim: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        """Take over the rows that other processes have written; of a row that several have, one perturbation stays.

        Args:
            total: adds a tensor over all processes, in place.
            claim: of rows that were written here, those that this process speaks for, and those written anywhere.
        """
        own, written = claim(self.fresh)
        rows = self.pixels * own[:, None, None, None]
        total(rows)
        self.pixels[written] = rows[written]
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


def _index(pixels: Tensor, rows: Tensor, offsets: Tensor, size: Sequence[int]) -> tuple[Tensor, ...]:
    """Where the pixels of views lie in the padded frame: rows, down and across, which broadcast to `[B, H, W]`."""
    padding = (pixels.shape[1] - size[0]) // 2
    dy, dx, flip = offsets.long().unbind(1)
    down = torch.arange(size[0], device=rows.device) + dy[:, None] + padding
    across = torch.arange(size[1], device=rows.device)
    across = torch.where(flip[:, None] == 1, size[1] - 1 - across, across) + dx[:, None] + padding
    return rows[:, None, None], down[:, :, None], across[:, None, :]


_place = fused(_index)


def _read(pixels: Tensor, rows: Tensor, offsets: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    delta, momentum = pixels[_index(pixels, rows, offsets, size)].permute(0, 3, 1, 2).chunk(2, dim=1)
    return delta.float(), momentum.float() * _MOMENTUM_UNIT


def _stored(delta: Tensor, momentum: Tensor) -> Tensor:
    """Whole levels and momenta `[B, 3, H, W]` as the memory has them, int8 `[B, H, W, 6]`."""
    both = torch.cat([delta, (momentum / _MOMENTUM_UNIT).round().clamp(-127, 127)], dim=1)
    return both.to(torch.int8).permute(0, 2, 3, 1)


@fused
def _begin(pixels: Tensor, rows: Tensor, offsets: Tensor, clean: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clean pixels in levels, where the rows start from them, their momentum, and the pixels at the start."""
    start, momentum = _read(pixels, rows, offsets, clean.shape[2:])
    levels = (clean * LEVELS).round()
    start = (levels + start).clamp(0, LEVELS) - levels
    return levels, start, momentum, (levels + start) / LEVELS


@fused
def _move(
    levels: Tensor, start: Tensor, momentum: Tensor, gradient: Tensor, *, threat: Threat, sizes: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """The pixels after a step along the gradient's sign; and what to keep, from a step along that of the momentum.

    `sizes` are the step's length in levels and how much of the momentum stays.
    """
    length, stays = sizes
    sign = gradient.sign()
    momentum = stays * momentum + sign

    def moved(direction: Tensor) -> Tensor:
        return (levels + threat.project(start + length * direction)).clamp(0, LEVELS) - levels

    return (levels + moved(sign)) / LEVELS, _stored(moved(momentum.sign()), momentum)


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
    levels, start, momentum, x = _begin(memory.pixels, rows, offsets, step.clean)
    x.requires_grad_()
    logits = student(x).logits
    objective = recipe.inner(student, step)(logits, x).sum()
    (gradient,) = torch.autograd.grad(objective, x, retain_graph=True)
    sizes = (inner.length, inner.warm.momentum)
    x_adv, stored = _move(levels, start, momentum, gradient, threat=inner.pgd().threat, sizes=sizes)
    memory.keep(rows, offsets, stored)
    return step._replace(x=x_adv, start=logits)
