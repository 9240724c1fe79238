"""The momentum iterative method (Dong et al. 2018, arXiv 1710.06081)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from darht.attacks.engine.query_model import Oracle
from darht.attacks.engine.state import Rows, State, observe
from darht.attacks.objectives import ObjectiveName
from darht.attacks.pgd import LevelState, OnLevels, check_sign_attack, climb, start_on_levels
from darht.attacks.threat import Norm
from darht.core.errors import ConfigError


@dataclass(kw_only=True)
class MomentumState(LevelState):
    """Rows with the running sum of their normalised gradients."""

    momentum: Tensor


@dataclass(frozen=True, kw_only=True)
class MIM(OnLevels):
    """Sign steps along an accumulated gradient, each gradient first divided by its L1 norm.

    The paper's step is eps / steps (0.8 levels for 8 and 10); the default here is 1, which stays on whole levels.

    Attributes:
        eps: radius in pixel levels.
        step: step size in pixel levels.
        steps: gradient steps.
        decay: what remains of the momentum at each step (the paper's mu).
        norm: `linf` or `l2`.
        objective: what is maximised: `ce`, `dlr` or `margin`.
    """

    eps: float = 8.0
    step: float = 1.0
    steps: int = 10
    decay: float = 1.0
    norm: Norm = "linf"
    objective: ObjectiveName = "ce"

    def __post_init__(self) -> None:
        check_sign_attack(self.eps, self.step, self.steps, self.norm)
        if not self.decay >= 0:
            raise ConfigError(f"decay must be at least 0; got {self.decay:g}")

    @property
    def looks(self) -> int:
        """One for each step."""
        return self.steps

    def start(self, rows: Rows, run: int) -> MomentumState:
        """At the image, at rest."""
        zero = torch.zeros_like(rows.x)
        return start_on_levels(MomentumState, self.threat, rows, zero, momentum=zero.clone())

    def look(self, oracle: Oracle, state: State) -> None:
        """The objective's gradient at the iterate."""
        state.score = observe(oracle, state, lambda logits: state.objective(self.objective, logits))

    def move(self, oracle: Oracle, state: State) -> None:
        """Add the gradient to the momentum and take a step along it."""
        assert isinstance(state, MomentumState)
        size = state.gradient.flatten(1).abs().sum(1).clamp(min=1e-12)[:, None, None, None]
        state.momentum = self.decay * state.momentum + state.gradient / size
        direction = self.threat.direction(state.momentum)
        state.go(climb(state.clean, state.delta, direction, threat=self.threat, step=self.step), self.steps)
