"""The loop that every attack runs in: rows wait in a queue, live in slots of constant shape, and leave.

A batch on the CPU is a multiple of 16 rows, filled up with copies: convolutions and matrix products then give a row the
same bits wherever it stands and whatever stands beside it. A fooled row leaves (where the rule is `first_hit`) and the
next one takes its slot; when the queue is empty the batch shrinks, at last to 12, 8 or 4 rows where `sizes.py` finds
that the bits stay the same. On a GPU, and compiled, it does not shrink.
"""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from darht.attacks.engine.batch_sizes import SMALLEST, Sizes, padded
from darht.attacks.engine.query_model import Oracle, Precision
from darht.attacks.engine.state import Attack, Rows, Rule, State
from darht.attacks.objectives import Model

_NOBODY = -1


@dataclass
class Results:
    """What came out of the slots, by row; all on the device of the images."""

    x_adv: Tensor
    hit: Tensor
    run: Tensor
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
            x_adv=x.clone(), hit=no, run=whole, score=x.new_full((n,), float("-inf")), logits=x.new_zeros(n, classes),
            first_hit=torch.full_like(whole, -1), zero_gradient=no.clone(), forwards=counts, backwards=counts.clone(),
        )  # fmt: skip

    def counted(self, counts: Tensor) -> Tensor:
        """Evaluations per row, `[N]`: those of the runs up to the one that hit, whatever ran beside them."""
        runs = torch.arange(counts.shape[1], device=counts.device)
        return (counts * (runs[None] <= self.run[:, None])).sum(1)


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
        self.constant = constant or rows.x.is_cuda
        few = todo[:SMALLEST]
        self.sizes = Sizes(rows.x[few], rows.y[few], slots, precision, constant=self.constant)
        classes = rows.clean.shape[1]
        runs = (attack.runs(classes) if rows.targets is None else 1) * restarts
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
        """Keep a result if it beats what the row has: under `first_hit` the earliest run that hits, else the score."""
        with self.lock:
            numbers = run.unique().tolist()
            if len(numbers) == 1:
                return self._keep(state, rows, numbers[0], seen)
            for number in numbers:  # two runs of a row may end together
                of = (run == number).nonzero().squeeze(1)
                self._keep(state.take(of), rows[of], number, {name: value[of] for name, value in seen.items()})
        return None

    def _keep(self, state: State, rows: Tensor, run: int, seen: dict[str, Tensor]) -> None:
        best, hit = self.results, state.hit
        best.forwards[rows, run], best.backwards[rows, run] = seen["forwards"], seen["backwards"]
        better = state.score > best.score[rows]
        if self.rule == "first_hit":
            had = best.hit[rows]
            better = (hit & ~had) | (hit & had & (run < best.run[rows])) | (~hit & ~had & better)
        to = rows[better]
        best.x_adv[to], best.score[to], best.logits[to] = state.best[better], state.score[better], state.logits[better]
        best.hit[to], best.first_hit[to] = hit[better], seen["first_hit"][better]
        best.zero_gradient[to] = seen["zero_gradient"][better]
        if self.rule == "first_hit":
            best.run[rows[better & hit]] = run


class Lane:
    """One batch of slots, worked through until the queue is empty."""

    def __init__(self, queue: Queue, oracle: Oracle) -> None:
        self.queue, self.oracle, self.attack = queue, oracle, queue.attack
        self.changed = True  # who is in the slots, since the empty ones were lent
        self.unseen: list[tuple[State, Tensor, Tensor, dict[str, Tensor]]] = []

    def work(self) -> None:
        """Look, let rows leave, move, let rows leave, fill the slots; until nobody is left."""
        try:
            if self._begin():
                self._fill()
                self._work()
        except BaseException:
            self.queue.failed = True
            raise

    def _work(self) -> None:
        while bool((self.rows != _NOBODY).any()) and not self.queue.failed:
            self._look()
            self._note()
            self._leave_after_look()
            self.attack.move(self.oracle, self.state)
            self._leave_after_move()
            self._fill()
        self._look_last()

    def _begin(self) -> bool:
        taken = self.queue.take(self.queue.slots)
        if taken is None:
            return False
        fresh, rows, run = taken
        size = self._size(self.queue.most)
        self.state = fresh.take(torch.arange(size, device=rows.device) % len(rows))
        self.rows = torch.full((size,), _NOBODY, device=rows.device)
        self.rows[: len(rows)] = rows
        self.run = torch.full_like(self.rows, run)
        zeros = torch.zeros_like(self.rows)
        no = torch.zeros(size, dtype=torch.bool, device=rows.device)
        self.seen = {"first_hit": zeros - 1, "zero_gradient": no, "forwards": zeros.clone(), "backwards": zeros.clone()}
        return True

    def _size(self, count: int) -> int:
        """The batch size for so many rows; with helpers, who cost next to nothing up to there, 16 at least."""
        if self.attack.helped:
            return padded(count, self.queue.slots, constant=self.queue.constant)
        return self.queue.sizes.padded(count, self.oracle.model)

    def _look(self) -> None:
        """One look of every row, or several where empty slots help; a row's forward passes are its looks."""
        if self.attack.helped and self.changed:
            self.attack.lend(self.state, self.rows != _NOBODY)
        self.changed = False
        before = self.state.looks.clone()
        self.attack.look(self.oracle, self.state)
        self.seen["forwards"] -= self.state.looks - before - 1

    def _note(self) -> None:
        seen, state = self.seen, self.state
        fresh = state.looks == 1
        if bool(fresh.any()):
            seen["zero_gradient"] = torch.where(fresh, state.gradient.abs().amax((1, 2, 3)) == 0, seen["zero_gradient"])
        seen["first_hit"] = torch.where((seen["first_hit"] < 0) & state.hit, state.looks - 1, seen["first_hit"])

    def _leave_after_look(self) -> None:
        state = self.state
        if self.queue.rule == "first_hit" and bool(state.hit.any()):
            state.best[state.hit] = state.query[state.hit]
            return self._leave(state.done | state.hit)
        return self._leave(state.done)

    def _overtaken(self) -> Tensor:
        """Rows that an earlier run has fooled meanwhile: what they still do cannot count."""
        results = self.queue.results
        if self.queue.rule == "full":
            return torch.zeros_like(self.state.done)
        return results.hit[self.rows] & (results.run[self.rows] < self.run)

    def _leave_after_move(self) -> None:
        self._leave(self._overtaken())
        self._leave(self.state.done, unseen=self.queue.judged)

    def _leave(self, leaving: Tensor, *, unseen: bool = False) -> None:
        slots = (leaving & (self.rows != _NOBODY)).nonzero().squeeze(1)
        if len(slots) == 0:
            return
        seen = {name: value[slots] for name, value in self.seen.items()}
        seen["forwards"] = self.oracle.forwards - seen["forwards"]
        seen["backwards"] = self.oracle.backwards - seen["backwards"]
        left = self.state.take(slots), self.rows[slots], self.run[slots], seen
        self.rows[slots] = _NOBODY
        self.changed = True
        if not unseen:
            return self.queue.give(*left)
        self.unseen.append(left)
        if sum(len(rows) for _, rows, _, _ in self.unseen) >= self.queue.slots:
            self._look_last()
        return None

    def _look_last(self) -> None:
        """Rows whose last move nobody has looked at yet are judged together, by a forward pass each."""
        if not self.unseen:
            return
        size = self.queue.slots
        points = torch.cat([state.best for state, _, _, _ in self.unseen])
        constant = self.queue.constant
        chunks = torch.split(points, size)
        answers = torch.cat([forward_padded(self.oracle, chunk, size, constant=constant) for chunk in chunks])
        parts = torch.split(answers, [len(rows) for _, rows, _, _ in self.unseen])
        for (state, rows, run, seen), logits in zip(self.unseen, parts, strict=True):
            state.logits = logits
            state.score = state.margin(logits)
            state.hit = state.fooled()
            seen["first_hit"] = torch.where((seen["first_hit"] < 0) & state.hit, state.looks, seen["first_hit"])
            seen["forwards"] += 1
            self.queue.give(state, rows, run, seen)
        self.unseen = []

    def _fill(self) -> None:
        free = (self.rows == _NOBODY).nonzero().squeeze(1)
        while len(free):
            taken = self.queue.take(len(free))
            if taken is None:
                return self._shrink()
            fresh, rows, run = taken
            slots, free = free[: len(rows)], free[len(rows) :]
            self.state.put(slots, fresh)
            self.changed = True
            self.rows[slots], self.run[slots] = rows, run
            self.seen["first_hit"][slots] = -1
            self.seen["forwards"][slots], self.seen["backwards"][slots] = self.oracle.forwards, self.oracle.backwards
        return None

    def _shrink(self) -> None:
        living = (self.rows != _NOBODY).nonzero().squeeze(1)
        size = self._size(len(living)) if len(living) else len(self.rows)
        if size >= len(self.rows):
            return
        self.changed = True
        empty = (self.rows == _NOBODY).nonzero().squeeze(1)
        keep = torch.cat([living, empty])[:size]
        self.state, self.rows, self.run = self.state.take(keep), self.rows[keep], self.run[keep]
        self.seen = {name: value[keep] for name, value in self.seen.items()}


def run_lanes(queue: Queue, models: Sequence[Model]) -> Results:
    """Work the queue off, one thread for each model; an exception in one lane ends them all and is raised."""
    lanes = [Lane(queue, Oracle(model, queue.precision)) for model in models]
    if len(lanes) == 1:
        lanes[0].work()
    else:
        with ThreadPoolExecutor(len(lanes)) as pool:
            for future in [pool.submit(lane.work) for lane in lanes]:
                future.result()
    return queue.results


def forward_all(models: Sequence[Model], x: Tensor, slots: int) -> Tensor:
    """Logits `[N, C]` of all rows in float32, in batches of the slots' shape."""
    chunks = torch.split(torch.arange(len(x), device=x.device), slots)

    def answer(job: tuple[Model, Sequence[Tensor]]) -> list[Tensor]:
        oracle = Oracle(job[0])
        return [forward_padded(oracle, x[chunk], slots) for chunk in job[1]]

    jobs = [(model, chunks[lane :: len(models)]) for lane, model in enumerate(models)]
    if len(models) == 1:
        return torch.cat(answer(jobs[0]))
    with ThreadPoolExecutor(len(models)) as pool:
        parts = list(pool.map(answer, jobs))
    return torch.cat([parts[k % len(models)][k // len(models)] for k in range(len(chunks))])


def forward_padded(oracle: Oracle, x: Tensor, slots: int, *, constant: bool = False) -> Tensor:
    """Logits of up to `slots` rows, in a batch filled up with copies."""
    index = torch.arange(padded(len(x), slots, constant=constant or x.is_cuda), device=x.device) % len(x)
    return oracle.logits(x[index])[: len(x)]
