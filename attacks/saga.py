"""The self-attention gradient attack on a set of models (Mahmood et al. 2021, arXiv 2104.02610), and Auto-SAGA.

`x <- P(x + step * sign(sum over CNNs a_m g_m + sum over transformers a_m (phi_m * g_m)))`, where g is the gradient of
a member's summed loss and phi the attention rollout of the same forward pass.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from darht.attacks.engine.batch_sizes import padded
from darht.attacks.engine.optimize_model import kernels, private_copy, replicas
from darht.attacks.engine.query_model import Oracle
from darht.attacks.engine.slots import forward_all
from darht.attacks.objectives import Model, objective_of
from darht.attacks.pgd import check_sign_attack, climb
from darht.attacks.rollout import Watched, is_transformer
from darht.attacks.threat import LEVELS, Norm, Threat, to_levels
from darht.attacks.validate import as_labels, check_inputs, check_labels, check_targets
from darht.core.errors import ConfigError
from darht.core.rng import RowRng

_SLOTS = 64
_TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class SAGA:
    """Steps along the sign of the members' blended gradients; the transformers' weighted by their own attention.

    Each member's part is divided by its mean absolute value in every row, so that none dominates; the paper instead
    fixes the weights by hand, which `alphas` does. The step is in whole levels, which the paper's is not.

    Attributes:
        eps: radius in pixel levels.
        step: step size in pixel levels.
        steps: gradient steps.
        alphas: the paper's fixed weights, one for each member in order; empty for equal parts.
        norm: `linf`.
    """

    eps: float = 8.0
    step: float = 1.0
    steps: int = 20
    alphas: tuple[float, ...] = ()
    norm: Norm = "linf"

    def __post_init__(self) -> None:
        check_sign_attack(self.eps, self.step, self.steps, self.norm)
        if self.norm != "linf":
            raise ConfigError(f"saga takes sign steps in L-inf; got norm {self.norm}")
        if self.alphas and (min(self.alphas) < 0 or not any(self.alphas)):
            raise ConfigError(f"alphas must not be negative, nor all 0; got {self.alphas}")

    @property
    def threat(self) -> Threat:
        """The ball that the attack stays in."""
        return Threat(eps=self.eps, norm=self.norm)

    def __call__(
        self,
        models: Sequence[Model],
        x: Tensor,
        y: Tensor,
        *,
        generator: RowRng | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Adversarial pixels `[B, 3, H, W]` in [0, 1] against all members at once; `generator` is not drawn from.

        With `targets`, a class for each row, the members are driven towards that class.

        Raises:
            ConfigError: no members, a number of alphas that does not fit, pixels, labels or targets out of range.
            ModelError: a member in train mode, or a transformer whose attention cannot be read.
        """
        if not models or (self.alphas and len(self.alphas) != len(models)):
            raise ConfigError(f"saga needs members, and one alpha for each; got {len(models)} and {len(self.alphas)}")
        y = as_labels(y)
        for model in models:
            check_inputs(model, x, y)
        teams = _teams(models, min(torch.get_num_threads(), -(-len(x) // _SLOTS)) if x.device.type == "cpu" else 1)
        with kernels(x.device):
            for member in teams[0]:
                clean = forward_all([member], x, _SLOTS)
                check_labels(clean, y)
                check_targets(clean, y, targets)
            return self._attack_all(teams, x, y, targets)

    def _attack_all(self, teams: list[tuple[Model, ...]], x: Tensor, y: Tensor, targets: Tensor | None) -> Tensor:
        """Chunks of constant size, shared out among the teams, each of which has a thread."""
        chunks = torch.split(torch.arange(len(x), device=x.device), _SLOTS)
        chosen = [None if targets is None else targets[chunk] for chunk in chunks]

        def work(lane: int) -> list[Tensor]:
            members = [Oracle(model) for model in teams[lane]]
            mine = range(lane, len(chunks), len(teams))
            return [self._attack(members, x[chunks[k]], y[chunks[k]], chosen[k]) for k in mine]

        with ThreadPoolExecutor(len(teams)) as pool:
            made = list(pool.map(work, range(len(teams))))
        return torch.cat([made[k % len(teams)][k // len(teams)] for k in range(len(chunks))])

    def _attack(self, members: list[Oracle], x: Tensor, y: Tensor, targets: Tensor | None) -> Tensor:
        index = torch.arange(padded(len(x), _SLOTS, constant=x.is_cuda), device=x.device) % len(x)
        clean, labels = to_levels(x[index]), y[index]
        chosen = None if targets is None else targets[index]
        delta = torch.zeros_like(clean)
        blend = self._blend(len(members))
        for _ in range(self.steps):
            parts = [_part(member, (clean + delta) / LEVELS, labels, chosen) for member in members]
            direction = blend.direction(parts)
            delta = climb(clean, delta, direction, threat=self.threat, step=self.step)
        return ((clean + delta) / LEVELS)[: len(x)]

    def _blend(self, members: int) -> "Blend":
        return Blend(self.alphas, members)


@dataclass(frozen=True, kw_only=True)
class AutoSAGA(SAGA):
    """SAGA that learns a weight for every pixel of every member (Rathbun et al. 2022, arXiv 2211.14669).

    The sign is taken for `tanh(sharpness * .)` when the weights are differentiated, as there. The derivative of the
    loss is taken from the gradients of the following step, which are computed anyway, and scaled to mean 1.

    Attributes:
        rate: how far a weight moves in a step, as a share of its starting value.
        sharpness: of the smooth sign, for blends of mean absolute value 1.
    """

    rate: float = 0.1
    sharpness: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.rate > 0 and self.sharpness > 0):
            raise ConfigError(f"rate and sharpness must be above 0; got {self.rate:g} and {self.sharpness:g}")

    def _blend(self, members: int) -> "Blend":
        return LearnedBlend(self.alphas, members, rate=self.rate, sharpness=self.sharpness)


@dataclass(frozen=True)
class Part:
    """What a member contributes: its gradient, and that gradient weighted by attention."""

    gradient: Tensor
    weighted: Tensor


class Blend:
    """Equal or fixed weights."""

    def __init__(self, alphas: tuple[float, ...], members: int) -> None:
        self.alphas = alphas
        self.members = members

    def direction(self, parts: list[Part]) -> Tensor:
        """The sign of the weighted sum, `[B, 3, H, W]`."""
        return torch.stack(self.weighted(parts)).sum(0).sign()

    def weighted(self, parts: list[Part]) -> list[Tensor]:
        """Each member's share, scaled to mean absolute value 1, or times its alpha."""
        if self.alphas:
            return [alpha * part.weighted for alpha, part in zip(self.alphas, parts, strict=True)]
        return [_scaled(part.weighted) for part in parts]


class LearnedBlend(Blend):
    """Weights for every pixel, moved up the gradient of the members' losses."""

    def __init__(self, alphas: tuple[float, ...], members: int, *, rate: float, sharpness: float) -> None:
        super().__init__(alphas, members)
        self.rate, self.sharpness = rate, sharpness
        self._last: tuple[Tensor, Tensor] | None = None
        self._weights: Tensor | None = None

    def direction(self, parts: list[Part]) -> Tensor:
        """The sign of the weighted sum, after the weights have learned from these gradients."""
        shares = torch.stack(self.weighted(parts))
        weights = torch.ones_like(shares) if self._weights is None else self._weights
        if self._last is not None:
            blended, before = self._last
            smooth = 1 - torch.tanh(self.sharpness * blended).square()
            ascent = torch.stack([_scaled(part.gradient) for part in parts]).sum(0) * smooth * before
            weights = weights + self.rate * torch.stack([_scaled(one) for one in ascent])
        blended = (weights * shares).sum(0)
        self._weights, self._last = weights, (_scaled(blended), shares)
        return blended.sign()


SET_ATTACKS: dict[str, type[SAGA]] = {"saga": SAGA, "auto-saga": AutoSAGA}
"""The attacks against a set of models, by `kind`."""


def _teams(models: Sequence[Model], count: int) -> list[tuple[Model, ...]]:
    """The members ready to be asked, once for each thread; one team where a member cannot be copied."""
    members = [Watched(m) if isinstance(m, nn.Module) and is_transformer(m) else private_copy(m) for m in models]
    copied = [member for member in members if member is not None]
    if len(copied) < len(members):
        return [tuple(member or model for member, model in zip(members, models, strict=True))]
    return list(zip(*(replicas(member, max(1, count)) for member in copied), strict=True))


def _part(member: Oracle, z: Tensor, y: Tensor, targets: Tensor | None) -> Part:
    _, _, gradient = member.gradient(z, lambda logits: objective_of("ce", logits, y, targets))
    if not isinstance(member.model, Watched):
        return Part(gradient, gradient)
    return Part(gradient, gradient * member.model.weights((z.shape[2], z.shape[3])))


def _scaled(value: Tensor) -> Tensor:
    return value / (value.abs().mean((1, 2, 3), keepdim=True) + _TINY)
