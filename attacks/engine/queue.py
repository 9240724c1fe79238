"""Rows that wait for a slot, run by run, and what came out of the slots."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from darht.attacks.engine.batch_sizes import SMALLEST, Sizes
from darht.attacks.engine.query_model import Precision
from darht.attacks.engine.state import Attack, Rows, Rule, State

PATIENCE = 8  # looks on a GPU between two questions after rows that are fooled


def looks_between(device: torch.device) -> int:
    """After how many looks a device is asked who may leave."""
    return 1 if device.type == "cpu" else PATIENCE


@dataclass
class Results:
    """What came out of the slots, by row; all on the device of the images."""

    x_adv: Tensor
    hit: Tensor
    run: Tensor
    kept: Tensor  # the run that x_adv is of; -1 before there is one
    score: Tensor
    logits: Tensor
    first_hit: Tensor
    zero_gradient: Tensor
    forwards: Tensor  # [N, runs]
    backwards: Tensor  # [N, runs]

    @classmethod
    def empty(cls, x: Tensor, classes: int, runs: int) -> "Results":
        """No row has come out yet: every row is its own clean image."""
        n = len(x)
        whole = torch.full((n,), runs, dtype=torch.int64, device=x.device)
        no = torch.zeros(n, dtype=torch.bool, device=x.device)
        counts = torch.zeros(n, runs, dtype=torch.int64, device=x.device)
        return cls(
            x_adv=x.clone(), hit=no, run=whole, kept=torch.full_like(whole, -1),
            score=x.new_full((n,), float("-inf")), logits=x.new_zeros(n, classes),
            first_hit=torch.full_like(whole, -1), zero_gradient=no.clone(), forwards=counts, backwards=counts.clone(),
        )  # fmt: skip

    def counted(self, counts: Tensor) -> Tensor:
        """Evaluations per row, `[N]`: those of the runs up to the one that hit, whatever ran beside them."""
        runs = torch.arange(counts.shape[1], device=counts.device)
        return (counts * (runs[None] <= self.run[:, None])).sum(1)

    def retake(self, rows: Tensor, second: "Results") -> None:
        """Put a second attempt in the place of the first for the rows at these positions; both attempts are counted."""
        for first, other in ((self.forwards, second.forwards), (self.backwards, second.backwards)):
            both = self.counted(first) + second.counted(other)
            first[rows] = 0
            first[rows, 0] = both[rows]
        for name in ("x_adv", "hit", "run", "kept", "score", "logits", "first_hit", "zero_gradient"):
            getattr(self, name)[rows] = getattr(second, name)[rows]


class Queue:
    """Rows that wait, run by run; shared by the lanes."""

    def __init__(
        self,
        attack: Attack,
        rows: Rows,
        todo: Tensor,
        *,
        rule: Rule,
        slots: int,
        restarts: int = 1,
        constant: bool = False,
        precision: Precision = "float32",
    ) -> None:
        self.attack, self.rule, self.slots, self.precision = attack, rule, slots, precision
        patience = looks_between(rows.x.device)
        self.constant = constant or patience > 1
        few = todo[:SMALLEST]
        self.sizes = Sizes(rows.x[few], rows.y[few], slots, precision, constant=self.constant)
        classes = rows.clean.shape[1]
        self.runs = runs = (attack.runs(classes) if rows.targets is None else 1) * restarts
        self.every = 1 if attack.looks is None else patience  # rows that end when they like must be asked
        self.judged = rule == "first_hit" or runs > 1  # whether a result must be looked at before it is kept
        self.results = Results.empty(rows.x, classes, runs)
        self.lock = threading.Lock()
        self.failed = False  # a lane has raised: the others stop at their next look
        self.most = min(slots, len(todo) * runs)  # slots that can be filled: runs of a row may live beside one another
        self._chunks = self._prepare(rows, todo, runs)
        self._state: State | None = None
        self._rows, self._run, self._next = todo[:0], 0, 0

    def _prepare(self, rows: Rows, todo: Tensor, runs: int) -> Iterator[tuple[State, Tensor, int]]:
        for run in range(runs):
            for chunk in torch.split(todo, self.slots):
                left = chunk[~self.results.hit[chunk]] if self.rule == "first_hit" else chunk
                if len(left):
                    yield self.attack.start(rows[left].in_run(run), run), left, run

    def take(self, count: int) -> tuple[State, Tensor, int] | None:
        """Up to `count` rows with their positions and run; None when nobody waits."""
        with self.lock:
            if self._next >= len(self._rows):
                chunk = next(self._chunks, None)
                if chunk is None:
                    return None
                self._state, self._rows, self._run = chunk
                self._next = 0
            assert self._state is not None
            index = torch.arange(self._next, min(self._next + count, len(self._rows)), device=self._rows.device)
            self._next += len(index)
            return self._state.take(index), self._rows[index], self._run

    def give(self, state: State, rows: Tensor, run: Tensor, seen: dict[str, Tensor]) -> None:
        """Keep a result if it beats what the row has: under `first_hit` the earliest run that hits, else the score.

        Of equal scores the earlier run's counts, whichever lane ends first.
        """
        with self.lock:
            numbers = [0] if self.runs == 1 else run.unique().tolist()
            if len(numbers) == 1:
                return self._keep(state, rows, numbers[0], seen)
            for number in numbers:  # two runs of a row may end together
                of = (run == number).nonzero().squeeze(1)
                self._keep(state.take(of), rows[of], number, {name: value[of] for name, value in seen.items()})
        return None

    def _keep(self, state: State, rows: Tensor, run: int, seen: dict[str, Tensor]) -> None:
        best, hit = self.results, state.hit
        best.forwards[rows, run], best.backwards[rows, run] = seen["forwards"], seen["backwards"]
        score, had_score = state.score, best.score[rows]
        better = (score > had_score) | ((score == had_score) & (run < best.kept[rows]))
        if self.rule == "first_hit":
            had = best.hit[rows]
            better = (hit & ~had) | (hit & had & (run < best.run[rows])) | (~hit & ~had & better)
        fresh = {
            "x_adv": state.best, "kept": torch.full_like(rows, run), "score": score, "logits": state.logits, "hit": hit,
            "first_hit": seen["first_hit"], "zero_gradient": seen["zero_gradient"],
        }  # fmt: skip
        for name, value in fresh.items():
            kept = getattr(best, name)
            kept[rows] = torch.where(better.view(-1, *(1,) * (value.ndim - 1)), value, kept[rows])
        if self.rule == "first_hit":
            best.run[rows] = torch.where(better & hit, run, best.run[rows])
