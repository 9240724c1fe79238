"""What the engine and an attack share: the rows in the slots, and the protocol of an attack."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor

from darht.attacks.engine.query_model import Oracle
from darht.attacks.objectives import Model, ObjectiveName, margin_of, objective_of
from darht.attacks.threat import Norm, Threat
from darht.core.rng import RowRng

Rule = Literal["full", "first_hit"]
Settings = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows as an attack gets them.

    Attributes:
        x: clean pixels `[B, 3, H, W]` in [0, 1].
        y: labels `[B]`.
        clean: the model's logits at `x`, `[B, C]`.
        generator: their random numbers.
        targets: the class that each row shall be taken for, `[B]`; None where any wrong class will do.
    """

    x: Tensor
    y: Tensor
    clean: Tensor
    generator: RowRng
    targets: Tensor | None = None

    def __getitem__(self, index: Tensor) -> "Rows":
        """The rows at these positions."""
        targets = None if self.targets is None else self.targets[index]
        return Rows(
            x=self.x[index], y=self.y[index], clean=self.clean[index], generator=self.generator[index], targets=targets
        )

    def fooled(self, logits: Tensor) -> Tensor:
        """Whether an attack has succeeded: a wrong class, or the target; bool `[B]`."""
        return is_fooled(logits, self.y, self.targets)

    def in_run(self, run: int) -> "Rows":
        """The same rows with the random numbers of another run; run 0 draws from the generator as it is."""
        return self if run == 0 else dataclasses.replace(self, generator=self.generator.fold("run", run))


@dataclass(kw_only=True)
class State:
    """The rows in the slots; every tensor has the slots as its first dimension.

    Attributes:
        x: clean pixels in [0, 1].
        y: labels.
        target: the class that somebody chose as target; the label where any wrong class will do.
        query: where the attack looks next, pixels.
        best: the pixels that would be returned now; a row that leaves because it is hit returns `query` instead.
        score: how good `best` is; among restarts the highest score is returned.
        logits: what the model said at the last look.
        hit: `query` was misclassified (as the target, when targeted), inside the ball, at the last look.
        done: the whole budget is spent.
        looks: how often the attack has looked.
        gradient: at the last look, NaN where none was computed yet.
        targeted: whether somebody chose the targets.
    """

    x: Tensor
    y: Tensor
    target: Tensor
    query: Tensor
    best: Tensor
    score: Tensor
    logits: Tensor
    hit: Tensor
    done: Tensor
    looks: Tensor
    gradient: Tensor
    targeted: bool = False

    @classmethod
    def begin(cls, rows: Rows, query: Tensor, **more: Tensor) -> Self:
        """Rows that have not looked yet and will look at `query` first."""
        no = torch.zeros(len(rows.x), dtype=torch.bool, device=rows.x.device)
        return cls(
            x=rows.x,
            y=rows.y,
            target=rows.y if rows.targets is None else rows.targets,
            targeted=rows.targets is not None,
            query=query,
            best=query.clone(),
            score=rows.x.new_full((len(rows.x),), float("-inf")),
            logits=rows.clean.clone(),
            hit=no,
            done=no.clone(),
            looks=torch.zeros_like(rows.y),
            gradient=torch.full_like(rows.x, torch.nan),
            **more,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        names = [field.name for field in dataclasses.fields(self)]
        return {name: getattr(self, name) for name in names if name != "targeted"}

    def fooled(self) -> Tensor:
        """Whether the last look saw a wrong class, or the target where one was chosen; bool `[S]`."""
        return is_fooled(self.logits, self.y, self.target if self.targeted else None)

    def margin(self, logits: Tensor) -> Tensor:
        """The margin, above 0 where the attack has succeeded, `[S]`."""
        return margin_of(logits, self.y, self.target if self.targeted else None)

    def objective(self, name: ObjectiveName, logits: Tensor) -> Tensor:
        """The objective of this name, towards the target where one was chosen, `[S]`."""
        return objective_of(name, logits, self.y, self.target if self.targeted else None)

    def take(self, index: Tensor) -> Self:
        """The rows at these positions, copied."""
        taken: dict[str, Any] = {name: value[index] for name, value in self.tensors().items()}
        return dataclasses.replace(self, **taken)

    def put(self, slots: Tensor, fresh: "State") -> None:
        """Write the rows of `fresh` into these slots."""
        for name, value in fresh.tensors().items():
            getattr(self, name)[slots] = value


class Attack(Protocol):
    """A frozen dataclass that brings start, look and move; the engine brings everything else."""

    @property
    def eps(self) -> float:
        """The radius in pixel levels."""

    @property
    def norm(self) -> Norm:
        """`linf` or `l2`."""

    @property
    def threat(self) -> Threat:
        """The ball that the attack stays in."""

    @property
    def whole_levels(self) -> bool:
        """Whether the perturbations are whole pixel levels without rounding."""

    def __call__(
        self, model: Model, x: Tensor, y: Tensor, *, generator: RowRng, targets: Tensor | None = None
    ) -> Tensor:
        """Adversarial pixels `[B, 3, H, W]` in [0, 1]; every row gets its whole budget."""

    @property
    def looks(self) -> int | None:
        """After how many looks a row is done, whatever it saw; None where that depends on the row."""

    def runs(self, classes: int) -> int:
        """How many independent runs a row gets between restarts: one for each wrong class that it tries, say.

        Always one where targets were chosen.
        """

    def start(self, rows: Rows, run: int) -> State:
        """The state of new rows in run number `run`; restarts count on beyond `runs`."""

    @property
    def helped(self) -> bool:
        """Whether empty slots can shorten the searches of other rows."""

    def lend(self, state: State, living: Tensor) -> None:
        """Give the slots that hold no row (bool `[S]`: those that do) something to try; before a look, where helped.

        It must not change what comes out for a row, `looks` included: that counts questions whose answer was used.
        """

    def look(self, oracle: Oracle, state: State) -> None:
        """Ask the model at `state.query`; update `logits`, `gradient`, `hit`, `looks`, and `best` and `score`."""

    def move(self, oracle: Oracle, state: State) -> None:
        """Set the next `query`, and `done` where the budget is spent."""


def observe(oracle: Oracle, state: State, objective: Callable[[Tensor], Tensor], passes: int = 1) -> Tensor:
    """Look at `state.query` with the gradient of an objective of its logits; marks fooled rows.

    Returns:
        The objective, `[S]`.
    """
    state.logits, loss, state.gradient = oracle.gradient(state.query, objective, passes)
    state.hit = state.fooled()
    state.looks += 1
    return loss


def is_fooled(logits: Tensor, y: Tensor, targets: Tensor | None) -> Tensor:
    """Whether logits `[B, C]` choose a wrong class, or the target where there is one; bool `[B]`."""
    return logits.argmax(1) != y if targets is None else logits.argmax(1) == targets
