"""Run an attack over many rows: batching, compaction, precision, private copies, and a record per row.

An attack is a frozen dataclass that brings `start`, `look` and `move`. The engine brings the rest: batches (`slots.py`:
fooled rows leave, the next take their slots, and empty slots may lend themselves to other searches), a private copy
with BatchNorm folded (`optimize_model.py`) and another gradient of the pixels (`first_layer.py`), and two rules: `full`
for distillation data, `first_hit` for evaluation.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from darht.attacks.encoding import store
from darht.attacks.engine.batch_sizes import SMALLEST, padded
from darht.attacks.engine.first_layer import speed_up_first_layer
from darht.attacks.engine.optimize_model import folded, kernels, private_copy, replicas
from darht.attacks.engine.query_model import Precision
from darht.attacks.engine.queue import Queue, Results
from darht.attacks.engine.slots import forward_all, run_lanes
from darht.attacks.engine.state import Attack, Rows, Rule
from darht.attacks.objectives import Model, cross_entropy, margin
from darht.attacks.validate import as_labels, check_inputs, check_labels, check_targets, stream_of
from darht.core.config import to_plain
from darht.core.errors import ConfigError
from darht.core.nets.layout import to_channels_last
from darht.core.rng import RowRng


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an attack did to each row.

    Attributes:
        x_adv: pixels `[N, 3, H, W]`, inside the ball and [0, 1].
        clean_correct: bool `[N]`, right on the clean image.
        success: bool `[N]`, the caller's model misclassifies `x_adv` in float32 (as the target, where there is one).
        first_hit: int64 `[N]`, gradient steps (queries for Square) taken when the row was first seen fooled; -1 never.
        loss: cross-entropy at `x_adv`, `[N]` nats.
        margin: largest wrong logit less the right one at `x_adv`, `[N]`.
        forwards: int64 `[N]`, forward passes whose answer counted for the row: neither copies that fill a batch up, nor
            proposals of Square that an accepted one before them made void.
        backwards: int64 `[N]`, backward passes.
        record: how it was made: attack, engine, device, versions, and what was noticed.
    """

    x_adv: Tensor
    clean_correct: Tensor
    success: Tensor
    first_hit: Tensor
    loss: Tensor
    margin: Tensor
    forwards: Tensor
    backwards: Tensor
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def robust(self) -> Tensor:
        """Right when clean *and* right when attacked, bool `[N]`."""
        return self.clean_correct & ~self.success

    @property
    def robust_accuracy(self) -> float:
        """The share of robust rows, in [0, 1]."""
        return float(self.robust.double().mean())


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A model made ready.

    `exact` answers as the caller's does; `fast` may be folded or compiled, or have another first layer.
    """

    exact: list[Model]
    fast: list[Model]
    folded: bool = False
    channels_last: bool = False

    def plain(self) -> "Prepared":
        """The same without anything that changes float rounding."""
        return Prepared(exact=self.exact, fast=self.exact)


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How attacks are run.

    Attributes:
        rule: `full` gives every row its whole budget (distillation data); `first_hit` lets a row leave once it is
            fooled, and does not attack rows that are fooled when clean (evaluation).
        restarts: how often a random attack starts anew; under `first_hit` only rows that survived do, under `full` the
            start with the highest score is kept.
        slots: rows in a batch; 64 keeps a small network's activations in cache, a GPU wants more.
        precision: `bf16` crafts under autocast; every hit is confirmed in float32 on the caller's model before it
            counts, and rows whose hit is not confirmed are attacked again in float32.
        fold: fold BatchNorm into the convolutions of a private copy.
        channels_last: memory layout of the private copy, where its forward pass works with it.
        compile: `torch.compile` the private copy, for the slots' constant shapes.
        lanes: batches worked on at once, each by one thread; by default as many as torch has threads on a CPU.
        scale: store perturbations as whole multiples of so many pixel levels (1, or eps / 127) and judge what is
            stored; None leaves them as the attack made them.
    """

    rule: Rule = "first_hit"
    restarts: int = 1
    slots: int = 64
    precision: Precision = "float32"
    fold: bool = True
    channels_last: bool = True
    compile: bool = False
    lanes: int | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.slots < 16 or self.slots % 16:
            raise ConfigError(f"slots must be a multiple of 16, which keeps a row's bits the same; got {self.slots}")
        if self.restarts < 1 or (self.lanes is not None and self.lanes < 1):
            raise ConfigError(f"restarts and lanes must be at least 1; got {self.restarts} and {self.lanes}")
        if self.scale is not None and not 0 < self.scale <= 1:
            raise ConfigError(f"scale must be above 0 and at most 1 pixel level; got {self.scale:g}")

    def run(
        self,
        attack: Attack,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        generator: RowRng | None = None,
        targets: Tensor | None = None,
        seed: int = 0,
    ) -> Outcome:
        """Attack pixels `x` `[N, 3, H, W]` with labels `y` `[N]` and tell what happened to each row.

        With `targets`, a class for each row, an attack succeeds where the model answers that class, and nowhere else.
        Without a `generator` random numbers are those of `seed`, keyed by the row's place in `x`. Labels may be of any
        integer type.

        Raises:
            ConfigError, ModelError: what `checks` refuses: train mode, NaN, pixels, labels or targets out of range, no
                gradient.
        """
        y, stream = as_labels(y), generator or stream_of(seed, x)
        with self.prepared(model, x, y) as ready:
            return self.run_prepared(attack, ready, self._rows(ready, x, y, stream, targets))

    def _rows(self, ready: Prepared, x: Tensor, y: Tensor, generator: RowRng, targets: Tensor | None) -> Rows:
        clean = forward_all(ready.exact, x, self.slots)
        check_labels(clean, y)
        check_targets(clean, y, targets)
        return Rows(x=x, y=y, clean=clean, generator=generator, targets=targets)

    def run_prepared(self, attack: Attack, ready: Prepared, rows: Rows) -> Outcome:
        """`run` after its checks, for a model that is used several times."""
        x, y = rows.x, rows.y
        todo = torch.arange(len(y), device=y.device)
        if self.rule == "first_hit":
            todo = todo[~rows.fooled(rows.clean)]
        results = self._craft(attack, ready, rows, todo)
        logits = forward_all(ready.exact, results.x_adv, self.slots)
        again = (results.hit & ~rows.fooled(logits)).nonzero().squeeze(1)
        if self.rule == "first_hit" and len(again):
            second = replace(self, precision="float32")._craft(attack, ready.plain(), rows, again)
            results.retake(again, second)
            logits[again] = forward_all(ready.exact, results.x_adv[again], self.slots)
        noticed = {
            "folded": ready.folded,
            "channels_last": ready.channels_last,
            "repeated_in_float32": len(again),
            "saved_by_rounding": 0,
        }
        results.x_adv, moved = store(results.x_adv, x, attack.threat, self.scale, whole=attack.whole_levels)
        if bool(moved.any()):
            fooled = rows.fooled(logits)
            logits = forward_all(ready.exact, results.x_adv, self.slots)
            noticed["saved_by_rounding"] = int((fooled & ~rows.fooled(logits)).sum())
        return self._outcome(attack, rows, results, logits, noticed)

    def craft(
        self,
        attack: Attack,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        generator: RowRng | None = None,
        targets: Tensor | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Adversarial pixels only: `run` without the passes that judge the result."""
        y, stream = as_labels(y), generator or stream_of(seed, x)
        with self.prepared(model, x, y) as ready:
            rows = self._rows(ready, x, y, stream, targets)
            results = self._craft(attack, ready, rows, torch.arange(len(y), device=y.device))
        return store(results.x_adv, x, attack.threat, self.scale, whole=attack.whole_levels)[0]

    @contextmanager
    def prepared(self, model: Model, x: Tensor, y: Tensor) -> Iterator[Prepared]:
        """Check the inputs, copy and speed up the model, and choose the kernels until the block ends."""
        check_inputs(model, x, y)
        ready = self._prepare(model, x)
        with kernels(x.device):
            yield ready

    def _prepare(self, model: Model, x: Tensor) -> Prepared:
        copied = private_copy(model)
        if copied is None:
            return Prepared(exact=[model], fast=[model])
        lanes = self.lanes or (torch.get_num_threads() if x.device.type == "cpu" else 1)
        lanes = max(1, min(lanes, -(-len(x) // SMALLEST)))
        exact, probe = replicas(copied, lanes), x[:SMALLEST].clone()
        fused = folded(copied, probe) if self.fold else None
        if fused is None and not self.compile and not self.channels_last:
            return Prepared(exact=exact, fast=exact)
        quick = copy.deepcopy(copied) if fused is None else fused
        if x.device.type == "cpu" and not self.compile:
            quick = speed_up_first_layer(quick)
        last = self.channels_last and to_channels_last(quick, probe)
        fast = replicas(quick, lanes)
        if self.compile:
            fast = [torch.compile(part, dynamic=False) for part in fast]
        return Prepared(exact=exact, fast=fast, folded=fused is not None, channels_last=last)

    def _craft(self, attack: Attack, ready: Prepared, rows: Rows, todo: Tensor) -> Results:
        share = max(1, -(-len(todo) // len(ready.fast)))  # few rows are spread over the lanes
        slots = padded(share, self.slots, constant=self.compile or rows.x.is_cuda)
        queue = Queue(
            attack, rows, todo, rule=self.rule, slots=slots, restarts=self.restarts, constant=self.compile,
            precision=self.precision,
        )  # fmt: skip
        return run_lanes(queue, ready.fast)

    def _outcome(
        self, attack: Attack, rows: Rows, results: Results, logits: Tensor, noticed: dict[str, int]
    ) -> Outcome:
        attacked = ~rows.fooled(rows.clean) | (self.rule == "full")
        record = {
            "attack": {"kind": type(attack).__name__, **to_plain(attack)},
            "engine": to_plain(self),
            "device": str(rows.x.device),
            "torch": torch.__version__,
            "targeted": rows.targets is not None,
            "zero_gradient": int(results.zero_gradient.sum()),
            **noticed,
        }
        return Outcome(
            x_adv=results.x_adv,
            clean_correct=rows.clean.argmax(1) == rows.y,
            success=rows.fooled(logits),
            first_hit=torch.where(attacked, results.first_hit, 0),
            loss=cross_entropy(logits, rows.y),
            margin=margin(logits, rows.y),
            forwards=results.counted(results.forwards) + 2,  # one on the clean row, one on the result
            backwards=results.counted(results.backwards),
            record=record,
        )


FULL = Engine(rule="full", fold=False, channels_last=False)
"""What calling an attack uses: every row gets its whole budget, with the bits that the caller's own kernels give."""
