"""The gradient of one step: examples, what they cost, and on request the loss at adversarially perturbed weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from darht.cache.read.training_set import TrainingSet
from darht.core.device import device_of
from darht.core.nets.compiled import begin_step
from darht.trainer.config import TrainConfig, WarmConfig
from darht.trainer.progress.metrics import Metrics
from darht.trainer.student.distances import mean_square
from darht.trainer.student.distributed import Ranks
from darht.trainer.student.inner import Examples
from darht.trainer.student.model import StudentOutput
from darht.trainer.student.run import TrainState
from darht.trainer.student.single_step import jensen_shannon
from darht.trainer.student.step import Learned, Loss, Step


def compute_gradients(
    state: TrainState,
    examples: Examples,
    ranks: Ranks,
    metrics: Metrics,
    *,
    data: TrainingSet,
    batch: Tensor,
    number: int,
    done: float,
) -> None:
    """Leave the gradient of this process's part of a global batch in the student, a piece after the other.

    Args:
        state: the student and what its recipe has learned.
        examples: draws what is trained on.
        ranks: the processes.
        metrics: are told what the student said.
        data: rows of the cache in memory.
        batch: int64 `[B]`, positions in `data`.
        number: of the step in the whole run.
        done: share of the run that is done.
    """
    config, pgd_share = examples.config, state.progress.pgd_share
    state.optimizer.zero_grad(set_to_none=True)
    device = device_of(state.student)
    if config.compute.compile:
        begin_step(device)

    def draw(at: Tensor) -> Step:
        with _precision(config, device):
            return examples.draw(
                state.forward, data, at, epoch=state.progress.epoch, number=number, done=done, pgd_share=pgd_share
            )

    pieces = [at for at in ranks.part(batch).tensor_split(config.compute.accumulate) if len(at)]
    add = partial(_add, state, examples, rows=len(batch), processes=ranks.world)
    if not examples.recipe.awp:
        for number_of_piece, at in enumerate(pieces, start=1):
            add(draw(at), metrics, last=number_of_piece == len(pieces))
        return
    steps = [draw(at) for at in pieces]
    with _worst_weights(state, examples.recipe.awp, lambda step, last: add(step, None, last=last), steps):
        for step in steps:
            held = step if step.start is None else step._replace(start=step.start.detach())
            add(held, metrics, last=step is steps[-1])


def _precision(config: TrainConfig, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.compute.precision == "bf16")


class Cost(NamedTuple):
    """What one step costs.

    Attributes:
        value: a scalar.
        out: what the student said about `step.x`.
        clean: what it said about `step.clean`, where the loss asked for it.
    """

    value: Tensor
    out: StudentOutput
    clean: StudentOutput | None


class StepCost(nn.Module):
    """`step_cost` as the one forward pass of a step, which is what `DistributedDataParallel` is made for.

    A recipe may ask the student several times, and leave parts of it out of a step's loss.
    """

    def __init__(self, student: nn.Module, examples: Examples) -> None:
        super().__init__()
        self.student, self.examples = student, examples

    def forward(self, step: Step, learned: Learned) -> Cost:
        """Only `value` has a gradient: by it the weights are found that the loss does not reach."""
        cost = step_cost(self.student, self.examples, step, learned)
        return Cost(cost.value, _detached(cost.out), None if cost.clean is None else _detached(cost.clean))


def _detached(out: StudentOutput) -> StudentOutput:
    return StudentOutput(out.logits.detach(), out.feature_map.detach())


def step_cost(student: nn.Module, examples: Examples, step: Step, learned: Learned) -> Cost:
    """The recipe's loss, and where the step has a start, what its two ends must pay for differing."""
    out = student(step.x)
    loss: Loss = examples.recipe.loss(student, step, out, learned)
    if step.start is None:
        return Cost(loss.value, out, loss.clean)
    consistency = _consistency(examples.config.inner.warm, step.start, out.logits, step.done)
    return Cost(loss.value + consistency, out, loss.clean)


def _add(
    state: TrainState,
    examples: Examples,
    step: Step,
    metrics: Metrics | None,
    *,
    rows: int,
    processes: int,
    last: bool,
) -> None:
    """Add the gradient of one piece of a global batch of `rows`; without metrics nothing else is noted either.

    The mean over the processes is taken with the `last` piece of each, during its backward pass.
    """
    learned = state.learned if metrics is not None else dict(state.learned)
    share, shared = len(step.y) / rows, state.shared
    with shared.no_sync() if shared and not last else nullcontext():
        with _precision(examples.config, step.y.device):
            cost: Cost = shared(step, learned) if shared else step_cost(state.forward, examples, step, learned)
        weight = share * processes
        (cost.value if weight == 1 else cost.value * weight).backward()
    if metrics is None:
        return
    metrics.count(cost.out, step, step.known)
    if cost.clean is not None:
        metrics.count(cost.clean, step._replace(x=step.clean), step.known)
    metrics.add(cost.value, share)


def _consistency(warm: WarmConfig, start: Tensor, logits: Tensor, done: float) -> Tensor:
    """What the logits at the two ends of the step must pay for differing (`start` is that of the last rows).

    FGSM-MEP: the mean squared distance, with one weight. LIET: the Jensen-Shannon divergence, whose weight grows.
    """
    end = logits[-len(start) :]
    if warm.start == "label":
        return warm.consistency * done * jensen_shannon(start, end).mean()
    return warm.consistency * mean_square(end, start)


@contextmanager
def _worst_weights(
    state: TrainState, awp: float, add: Callable[[Step, bool], None], steps: list[Step]
) -> Iterator[None]:
    """Adversarial weight perturbation (Wu et al. 2020, equation 8): for the block every layer's weights are `w + v`.

    `v = awp * |w| * g / |g|` with the gradient g of the loss on the whole batch, of every tensor of more than one
    dimension. Then the weights are what they were, to the bit, and the gradient is that at `w + v`. The pass that gives
    g counts nowhere: batch norm's statistics and the recipe's own are those of the second one, in which the consistency
    of `inner: warm` takes the logits at the step's start as given.
    """
    student = state.student
    buffers = [buffer.clone() for buffer in student.buffers()]
    for step in steps:
        add(step, step is steps[-1])
    weights = [p for p in student.parameters() if p.grad is not None and p.dim() > 1]
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight.add_(perturbation(weight, awp))
        for buffer, before in zip(student.buffers(), buffers, strict=True):
            buffer.copy_(before)
    state.optimizer.zero_grad(set_to_none=True)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(list[Tensor](weights), kept)


def perturbation(weight: nn.Parameter, size: float) -> Tensor:
    """`size * |w| * g / |g|` of one tensor with its gradient g; nothing where the gradient is 0."""
    assert weight.grad is not None
    scale = size * torch.linalg.vector_norm(weight) / torch.linalg.vector_norm(weight.grad).clamp(min=1e-12)
    moved: Tensor = scale * weight.grad
    return moved
