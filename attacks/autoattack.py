"""AutoAttack (Croce & Hein 2020, arXiv 2003.01690): four attacks, the worst case per image, and what looks suspicious.

The package `pyautoattack` is the oracle that this is checked against; `reference` runs that instead.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from darht.attacks.apgd import APGD, APGDT
from darht.attacks.engine.engine import Engine, Outcome, Prepared
from darht.attacks.engine.query_model import NoGradientError
from darht.attacks.engine.slots import forward_all
from darht.attacks.engine.state import Attack, Rows
from darht.attacks.fab import FABT
from darht.attacks.objectives import Model
from darht.attacks.square import Square
from darht.attacks.threat import Norm, Threat
from darht.attacks.validate import alert, as_labels, check_labels, is_probability, is_random, stream_of
from darht.core.config import fingerprint, to_plain
from darht.core.errors import ConfigError, SpecMismatchError
from darht.core.rng import RowRng
from darht.core.tensors import hash_weights, load_tensors, save_tensors

Version = Literal["standard", "rand"]
Ask = Callable[[str, Attack, Tensor], Tensor]
_SQUARE_WINS = 0.002  # of all images; more says that the gradients mislead (the authors' threshold)
_BY_CHANCE = 2  # images that Square may win where that is less than one


def on_survivors(parts: Mapping[str, Attack], left: Tensor, ask: Ask) -> Iterator[tuple[str, Tensor]]:
    """The chain itself: each part on the images that the parts before left.

    Args:
        parts: attacks by name, in order.
        left: positions of the images to begin with, int64 `[n]`.
        ask: runs a part on positions `[m]`, at least one, and says which withstood, bool `[m]`.

    Yields:
        The part's name and the positions it left.
    """
    for name, attack in parts.items():
        if len(left):
            left = left[ask(name, attack, left)]
        yield name, left


def square_warning(after: Mapping[str, int], count: int) -> str | None:
    """What there is to say when Square takes many images from those that the gradients could not fool, or None.

    Args:
        after: robust images after each part, Square the last of several.
        count: images in all, also those that are wrong when clean.
    """
    *_, before, now = after.values()
    if before - now <= max(_BY_CHANCE, _SQUARE_WINS * count):
        return None
    return (
        f"square fooled {before - now} of {count} images that withstood the white-box attacks: the gradients mislead, "
        "so the true accuracy is lower still; attack adaptively"
    )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The worst case per image over the parts.

    Attributes:
        x_adv: pixels; the first part's example that fools, else the image.
        clean_correct: bool `[N]`.
        robust: bool `[N]`, right when clean and under every part.
        after: the number of robust rows when clean and after each part, in order.
        warnings: signs that the numbers deceive.
        backwards: backward passes per row, all parts together.
        forwards: forward passes per row.
        record: attack, engine, device and versions.
    """

    x_adv: Tensor
    clean_correct: Tensor
    robust: Tensor
    after: dict[str, int]
    backwards: Tensor
    forwards: Tensor
    warnings: tuple[str, ...] = ()
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def robust_accuracy(self) -> float:
        """The share of robust rows, in [0, 1]."""
        return float(self.robust.double().mean())


@dataclass(frozen=True, kw_only=True)
class AutoAttack:
    """`standard`: APGD-CE, APGD-T, FAB-T and Square, each on the survivors; `rand`: APGD-CE and -DLR with averaging.

    Attributes:
        eps: radius in pixel levels.
        norm: `linf` or `l2`.
        version: `rand` is for models that draw random numbers.
        engine: how the parts run; always by the rule `first_hit`.
        steps: iterations of APGD and FAB; the paper's 100.
        queries: of Square; the paper's 5,000.
    """

    eps: float = 8.0
    norm: Norm = "linf"
    version: Version = "standard"
    engine: Engine = field(default_factory=Engine)
    steps: int = 100
    queries: int = 5000

    def __post_init__(self) -> None:
        if self.engine.rule != "first_hit":
            raise ConfigError("AutoAttack evaluates by the rule first_hit; got full")
        self.parts(10)

    @property
    def threat(self) -> Threat:
        """The ball that the parts stay in."""
        return Threat(eps=self.eps, norm=self.norm)

    def parts(self, classes: int) -> dict[str, Attack]:
        """The attacks in order, the cheap ones first. Below 4 classes the margin stands in for DLR."""
        ball: dict[str, Any] = {"eps": self.eps, "norm": self.norm}
        few = classes < 4
        if self.version == "rand":
            second = APGD(**ball, steps=self.steps, objective="margin" if few else "dlr", eot=20)
            return {"apgd-ce": APGD(**ball, steps=self.steps, eot=20), "apgd-dlr": second}
        return {
            "apgd-ce": APGD(**ball, steps=self.steps),
            "apgd-t": APGDT(**ball, steps=self.steps, objective="margin" if few else "dlr"),
            "fab-t": FABT(**ball, steps=self.steps),
            "square": Square(**ball, queries=self.queries),
        }

    def run(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        generator: RowRng | None = None,
        state: Path | None = None,
        on_part: Callable[[str, float], None] = lambda name, accuracy: None,
        seed: int = 0,
    ) -> Evaluation:
        """Evaluate a model on pixels `x` `[N, 3, H, W]` with labels `y` `[N]`.

        Args:
            model: logits, in eval mode.
            x: clean pixels in [0, 1].
            y: labels, of any integer type.
            generator: keyed by row; each part draws from its own stream.
            state: a file that is written after each part; a run that finds it goes on where it stopped.
            on_part: told the robust accuracy after each part.
            seed: of the random numbers where there is no `generator`.

        Raises:
            ConfigError, ModelError: see `Engine.run`.
            SpecMismatchError: `state` belongs to other images, labels, random numbers or settings.
            CacheError: `state` is damaged.
        """
        y, stream = as_labels(y), generator or stream_of(seed, x)
        with self.engine.prepared(model, x, y) as ready:
            clean = forward_all(ready.exact, x, self.engine.slots)
            check_labels(clean, y)
            run = _Run(self, ready, Rows(x=x, y=y, clean=clean, generator=stream), state)
            run.check_model()
            for name in run.chain(self.parts(clean.shape[1])):
                on_part(name, float(run.robust.double().mean()))
            return run.finish()


class _Run:
    """One evaluation in progress."""

    def __init__(self, suite: AutoAttack, ready: Prepared, rows: Rows, state: Path | None) -> None:
        self.suite, self.ready, self.rows, self.state = suite, ready, rows, state
        self.x_adv = rows.x.clone()
        self.correct = rows.clean.argmax(1) == rows.y
        self.robust = self.correct.clone()
        self.after = {"clean": int(self.correct.sum())}
        self.warnings: list[str] = []
        self.forwards, self.backwards = torch.ones_like(rows.y), torch.zeros_like(rows.y)
        self.identity = "" if state is None else self._identity()
        if state is not None and state.exists():
            self._resume(state)

    def check_model(self) -> None:
        """The signs that show before any attack."""
        size = self.suite.engine.slots
        first = self.rows.clean[:size]
        second = forward_all(self.ready.exact, self.rows.x[:size], size)
        if self.suite.version == "standard" and is_random(first, second):
            self._warn("the model's output is random: use version rand, which averages gradients")
        if is_probability(first):
            self._warn("the model returns probabilities: attacks need logits, remove the softmax")
        if first.shape[1] < 4:
            self._warn(f"{first.shape[1]} classes are too few for DLR: the margin stands in for it")

    def chain(self, parts: Mapping[str, Attack]) -> Iterator[str]:
        """Run the parts that a resumed state does not have; yields the name of each, also of those."""
        yield from (name for name in parts if name in self.after)
        todo = {name: attack for name, attack in parts.items() if name not in self.after}
        for name, left in on_survivors(todo, self.robust.nonzero().squeeze(1), self._ask):
            self.after[name] = len(left)
            if name == "square" and (text := square_warning(self.after, len(self.rows.y))):
                self._warn(text)
            self._save()
            yield name

    def _ask(self, name: str, attack: Attack, left: Tensor) -> Tensor:
        own = self.rows[left]
        own = replace(own, generator=own.generator.fold("autoattack", name))
        try:
            outcome = self.suite.engine.run_prepared(attack, self.ready, own)
        except NoGradientError as error:
            self._warn(f"{name} cannot run: {error}")
        else:
            self._take(name, outcome, left)
        return self.robust[left]

    def _take(self, name: str, outcome: Outcome, left: Tensor) -> None:
        fooled = left[outcome.success]
        self.x_adv[fooled] = outcome.x_adv[outcome.success]
        self.robust[fooled] = False
        self.forwards[left] += outcome.forwards - 1  # the clean pass is shared by all parts
        self.backwards[left] += outcome.backwards
        dead = outcome.record["zero_gradient"]
        if dead:
            self._warn(f"{name}: the gradient is zero for {dead} of {len(left)} images: the model may mask it")

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(alert(text))

    def finish(self) -> Evaluation:
        """The result."""
        record = {
            "attack": {"kind": "AutoAttack", **{k: v for k, v in vars(self.suite).items() if k != "engine"}},
            "engine": to_plain(self.suite.engine),
            "device": str(self.rows.x.device),
            "torch": torch.__version__,
            "after": self.after,
            "warnings": self.warnings,
        }
        return Evaluation(
            x_adv=self.x_adv,
            clean_correct=self.correct,
            robust=self.robust,
            after=self.after,
            warnings=tuple(self.warnings),
            forwards=self.forwards,
            backwards=self.backwards,
            record=record,
        )

    def _identity(self) -> str:
        rows, suite = self.rows, self.suite
        pixels = rows.x.double()
        weights = torch.arange(1, pixels[0].numel() + 1, device=pixels.device, dtype=torch.float64)
        facts = {
            "suite": suite,
            "labels": rows.y.tolist(),
            "key": list(rows.generator.key),
            "rows": rows.generator.rows.tolist(),
            "views": rows.generator.views.tolist(),
            "pixels": (pixels.flatten(1) @ weights).tolist(),
            "predictions": rows.clean.argmax(1).tolist(),
            "model": hash_weights(model) if isinstance(model := self.ready.exact[0], nn.Module) else "",
        }
        return fingerprint(facts)

    def _save(self) -> None:
        if self.state is None:
            return
        tensors = {name: getattr(self, name) for name in ("x_adv", "robust", "forwards", "backwards")}
        facts = {"identity": self.identity, "after": self.after, "warnings": self.warnings}
        save_tensors(self.state, facts | tensors)

    def _resume(self, state: Path) -> None:
        held = load_tensors(state, self.rows.x.device)
        if held["identity"] != self.identity:
            raise SpecMismatchError(
                f"{state} belongs to another run (other images, labels, model, seed or settings): "
                "remove it, or give another file"
            )
        self.after, self.warnings = dict(held["after"]), list(held["warnings"])
        for name in ("x_adv", "robust", "forwards", "backwards"):
            setattr(self, name, held[name])


def reference(
    model: torch.nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float = 8.0,
    norm: Norm = "linf",
    version: Version = "standard",
    seed: int = 0,
    batch_size: int = 250,
) -> Tensor:
    """The adversarial pixels `[N, 3, H, W]` of the authors' own AutoAttack, the package `pyautoattack`.

    Its random numbers depend on the batch, and it sets torch's global seed.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        from pyautoattack import AutoAttack as Reference
    except ImportError as error:
        raise ConfigError("the reference needs the package pyautoattack: pip install 'darht[eval]'") from error
    threat = Threat(eps=eps, norm=norm)
    name = {"linf": "Linf", "l2": "L2"}[norm]
    suite = Reference(model, norm=name, eps=threat.radius, seed=seed, version=version, device=x.device)
    x_adv: Tensor = suite.run_standard_evaluation(x, y, batch_size=batch_size)[0]
    return x_adv
