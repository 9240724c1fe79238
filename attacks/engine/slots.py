"""The loop that every attack runs in: rows wait in a queue, live in slots of constant shape, and leave.

A batch on the CPU is a multiple of 16 rows, filled up with copies: convolutions and matrix products then give a row the
same bits wherever it stands and whatever stands beside it. A fooled row leaves (where the rule is `first_hit`) and the
next one takes its slot; when the queue is empty the batch shrinks, at last to 12, 8 or 4 rows where `batch_sizes.py`
finds that the bits stay the same. On a GPU, and compiled, it does not shrink.

On a GPU nobody asks after each look who may leave, which would wait for the device: when a budget of so many looks ends
is known without asking, and a row that is fooled before keeps what it was fooled by until the next question.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from darht.attacks.engine.batch_sizes import padded
from darht.attacks.engine.query_model import Oracle
from darht.attacks.engine.queue import Queue, Results
from darht.attacks.engine.state import State
from darht.attacks.objectives import Model

_NOBODY = -1


class Lane:
    """One batch of slots, worked through until the queue is empty."""

    def __init__(self, queue: Queue, oracle: Oracle) -> None:
        self.queue, self.oracle, self.attack = queue, oracle, queue.attack
        self.patient = oracle.patient = queue.every > 1
        self.looks, self.ends = 0, set[int]()  # so far, and the looks after which a budget is spent
        self.living, self.fresh = 0, True  # rows in the slots, and whether some have not looked yet
        self.kept: dict[str, Tensor] = {}  # by what rows were fooled that nobody has asked after yet
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
        while self.living and not self.queue.failed:
            self._look()
            self._note()
            asked = self._ask()
            if asked:
                self._leave_after_look()
            self.attack.move(self.oracle, self.state)
            if asked:
                self._leave_after_move()
                self._fill()
        self._look_last()
        self.oracle.settle()

    def _ask(self) -> bool:
        """Whether to ask the device, after this look, who may leave; what has hit until then is kept."""
        if not self.patient:
            return True
        first = self.queue.rule == "first_hit"
        if first:
            self._keep_hits()
        if self.looks in self.ends:
            self.oracle.settle()
            return True
        return first and self.looks % self.queue.every == 0

    def _keep_hits(self) -> None:
        state, kept = self.state, self.kept
        fresh = state.hit & ~kept["hit"]
        for name, now in (("best", state.query), ("score", state.score), ("logits", state.logits)):
            kept[name] = torch.where(fresh.view(-1, *(1,) * (now.ndim - 1)), now, kept[name])
        for name, count in (("forwards", self.oracle.forwards), ("backwards", self.oracle.backwards)):
            kept[name] = torch.where(fresh, count, kept[name])
        kept["hit"] = kept["hit"] | fresh

    def _recall_hits(self) -> None:
        """Give rows that were fooled since the last question what they were fooled by, and the counts of then."""
        state, kept, hit = self.state, self.kept, self.kept["hit"]
        state.best = torch.where(hit[:, None, None, None], kept["best"], state.best)
        state.score = torch.where(hit, kept["score"], state.score)
        state.logits = torch.where(hit[:, None], kept["logits"], state.logits)
        state.hit = hit.clone()
        for name, now in (("forwards", self.oracle.forwards), ("backwards", self.oracle.backwards)):
            self.seen[name] = torch.where(hit, self.seen[name] + (now - kept[name]), self.seen[name])

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
        if self.patient:
            state = self.state
            self.kept = {"hit": no.clone(), "best": state.best, "score": state.score, "logits": state.logits,
                         "forwards": zeros, "backwards": zeros}  # fmt: skip
        self._seated(len(rows))
        return True

    def _seated(self, count: int) -> None:
        """So many rows have come into the slots."""
        self.living, self.fresh = self.living + count, True
        if self.attack.looks is not None:
            self.ends.add(self.looks + self.attack.looks)

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
        self.looks += 1
        if self.patient:
            return self.attack.look(self.oracle, self.state)
        before = self.state.looks.clone()
        self.attack.look(self.oracle, self.state)
        self.seen["forwards"] -= self.state.looks - before - 1
        return None

    def _note(self) -> None:
        seen, state = self.seen, self.state
        fresh = state.looks == 1
        if self.fresh if self.patient else bool(fresh.any()):
            self.fresh = False
            seen["zero_gradient"] = torch.where(fresh, state.gradient.abs().amax((1, 2, 3)) == 0, seen["zero_gradient"])
        seen["first_hit"] = torch.where((seen["first_hit"] < 0) & state.hit, state.looks - 1, seen["first_hit"])

    def _leave_after_look(self) -> None:
        state = self.state
        if self.patient and self.queue.rule == "first_hit":
            self._recall_hits()
            return self._leave(state.done | state.hit)
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
        if self.queue.runs > 1:
            self._leave(self._overtaken())
        if not self.patient or self.looks in self.ends:
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
        self.living -= len(slots)
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
        constant, before = self.queue.constant, self.oracle.forwards
        chunks = torch.split(points, size)
        answers = torch.cat([forward_padded(self.oracle, chunk, size, constant=constant) for chunk in chunks])
        self.oracle.forwards = before  # rows in the slots have no part in these
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
        while self.living < len(self.rows):
            taken = self.queue.take(len(self.rows) - self.living)
            if taken is None:
                return self._shrink()
            fresh, rows, run = taken
            slots = (self.rows == _NOBODY).nonzero().squeeze(1)[: len(rows)]
            self.state.put(slots, fresh)
            self.changed = True
            self.rows[slots], self.run[slots] = rows, run
            self.seen["first_hit"][slots] = -1
            self.seen["forwards"][slots], self.seen["backwards"][slots] = self.oracle.forwards, self.oracle.backwards
            if self.patient:
                self.kept["hit"][slots] = False
            self._seated(len(rows))
        return None

    def _shrink(self) -> None:
        size = self._size(self.living) if self.living else len(self.rows)
        if size >= len(self.rows):
            return
        living = (self.rows != _NOBODY).nonzero().squeeze(1)
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
