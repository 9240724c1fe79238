"""The transfer attack: examples crafted on surrogates, judged on a model that is never differentiated.

Papernot et al. 2016 (arXiv 1605.07277) craft on one substitute; several, and the worst case over them, follow Liu et
al. 2017 (arXiv 1611.02770).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from darht.attacks.apgd import APGD
from darht.attacks.engine.engine import FULL, Engine, Outcome
from darht.attacks.engine.slots import forward_all
from darht.attacks.engine.state import is_fooled
from darht.attacks.objectives import Model, cross_entropy, lead, margin
from darht.attacks.threat import Threat
from darht.attacks.validate import check_inputs, check_labels, check_targets
from darht.core.errors import ConfigError
from darht.core.rng import RowRng


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Run an attack with its full budget on each surrogate, and keep for each row what the target likes least.

    Attributes:
        attack: any attack against one model.
        engine: how it runs; always by the rule `full`.
    """

    attack: Any = field(default_factory=lambda: APGD(objective="dlr"))
    engine: Engine = FULL

    def __post_init__(self) -> None:
        if self.engine.rule != "full":
            raise ConfigError("an example that stops when it fools the surrogate seldom transfers: use the rule full")

    @property
    def threat(self) -> Threat:
        """The ball that the attack stays in."""
        threat: Threat = self.attack.threat
        return threat

    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        surrogates: Sequence[Model],
        generator: RowRng,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Adversarial pixels `[B, 3, H, W]`: of one example for each surrogate, the one that fools best."""
        return self.run(model, x, y, surrogates=surrogates, generator=generator, targets=targets).x_adv

    def run(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        surrogates: Sequence[Model],
        generator: RowRng,
        targets: Tensor | None = None,
    ) -> Outcome:
        """As `Engine.run`; forward passes are the target's, backward passes the surrogates'.

        Raises:
            ConfigError: no surrogates; and what `checks` refuses.
        """
        if not surrogates:
            raise ConfigError("a transfer attack needs at least one surrogate")
        check_inputs(model, x, y)
        oracle: list[Model] = [model]
        clean = forward_all(oracle, x, self.engine.slots)
        check_labels(clean, y)
        check_targets(clean, y, targets)
        best, logits = x.clone(), clean.clone()
        backwards = torch.zeros_like(y)
        for number, surrogate in enumerate(surrogates):
            stream = generator if number == 0 else generator.fold("surrogate", number)
            made = self.engine.run(self.attack, surrogate, x, y, generator=stream, targets=targets)
            answer = forward_all(oracle, made.x_adv, self.engine.slots)
            worse = lead(answer, y, targets) > lead(logits, y, targets)
            worse |= number == 0
            best[worse], logits[worse] = made.x_adv[worse], answer[worse]
            backwards += made.backwards
        record = {"attack": {"kind": "Transfer", "surrogates": len(surrogates), "attack": made.record["attack"]}}
        fooled = is_fooled(logits, y, targets)
        return Outcome(
            x_adv=best,
            clean_correct=clean.argmax(1) == y,
            success=fooled,
            first_hit=torch.where(fooled, 0, -1),
            loss=cross_entropy(logits, y),
            margin=margin(logits, y),
            forwards=torch.full_like(y, 1 + len(surrogates)),
            backwards=backwards,
            record={**made.record, **record},
        )
