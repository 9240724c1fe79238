"""The gradient of one step: examples, what they cost, and on request the loss at adversarially perturbed weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from darht.cache.read.loader import TrainingSet
from darht.trainer.config import TrainConfig, WarmConfig
from darht.trainer.progress.metrics import Metrics
from darht.trainer.student.distributed import Ranks
from darht.trainer.student.inner import Examples
from darht.trainer.student.run import TrainState
from darht.trainer.student.single_step import jensen_shannon
from darht.trainer.student.step import Loss, Step


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

    def draw(at: Tensor) -> Step:
        with _precision(config, at):
            return examples.draw(
                state.forward, data, at, epoch=state.progress.epoch, number=number, done=done, pgd_share=pgd_share
            )

    pieces = [at for at in ranks.part(batch).tensor_split(config.compute.accumulate) if len(at)]
    if not examples.recipe.awp:
        for at in pieces:
            _add(state, examples, draw(at), metrics, share=len(at) / len(batch))
        return
    steps = [draw(at) for at in pieces]
    with _worst_weights(state, examples, ranks, steps, rows=len(batch)):
        for step in steps:
            held = step if step.start is None else step._replace(start=step.start.detach())
            _add(state, examples, held, metrics, share=len(step.y) / len(batch))


def _precision(config: TrainConfig, at: Tensor) -> torch.autocast:
    return torch.autocast(at.device.type, torch.bfloat16, enabled=config.compute.precision == "bf16")


def _add(state: TrainState, examples: Examples, step: Step, metrics: Metrics | None, *, share: float) -> None:
    """Add the gradient of one piece, a `share` of the global batch; without metrics nothing else is noted either."""
    config, recipe = examples.config, examples.recipe
    learned = state.learned if metrics is not None else dict(state.learned)
    with _precision(config, step.y):
        out = state.forward(step.x)
        loss: Loss = recipe.loss(state.forward, step, out, learned)
        value = loss.value
        if step.start is not None:
            value = value + _consistency(config.inner.warm, step.start, out.logits, step.done)
    (value * share).backward()
    if metrics is None:
        return
    metrics.count(out, step, step.known)
    if loss.clean is not None:
        metrics.count(loss.clean, step._replace(x=step.clean), step.known)
    metrics.add(value, share)


def _consistency(warm: WarmConfig, start: Tensor, logits: Tensor, done: float) -> Tensor:
    """What the logits at the two ends of the step must pay for differing (`start` is that of the last rows).

    FGSM-MEP: the mean squared distance, with one weight. LIET: the Jensen-Shannon divergence, whose weight grows.
    """
    end = logits[-len(start) :]
    if warm.start == "label":
        return warm.consistency * done * jensen_shannon(start, end).mean()
    return warm.consistency * (end - start).square().mean()


@contextmanager
def _worst_weights(
    state: TrainState, examples: Examples, ranks: Ranks, steps: list[Step], *, rows: int
) -> Iterator[None]:
    """Adversarial weight perturbation (Wu et al. 2020, equation 8): for the block every layer's weights are `w + v`.

    `v = awp * |w| * g / |g|` with the gradient g of the loss on the whole batch, of every tensor of more than one
    dimension. Then the weights are what they were, to the bit, and the gradient is that at `w + v`. The pass that gives
    g counts nowhere: batch norm's statistics and the recipe's own are those of the second one, in which the consistency
    of `inner: warm` takes the logits at the step's start as given.
    """
    student, awp = state.student, examples.recipe.awp
    buffers = [buffer.clone() for buffer in student.buffers()]
    for step in steps:
        _add(state, examples, step, None, share=len(step.y) / rows)
    ranks.add_gradients(student, stop=False)
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
