"""The one loop of an evaluation: run an attack on some images, batch by batch, and keep the books.

An image is alive while it was answered rightly when clean and under everything that ran. Robust accuracy without more
words is the share of images alive at the end.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from darht.attacks.engine.engine import FULL, Engine
from darht.attacks.engine.query_model import NoGradientError
from darht.attacks.engine.slots import forward_all
from darht.attacks.threat import Threat
from darht.cache.sources.load import FileSource, Source
from darht.core.rng import RowRng, borrowed_generator
from darht.trainer.evaluation.ledger import Arrays, Entry, Ledger
from darht.trainer.evaluation.score import EVERYONE, Score

Family = Literal["white-box", "transfer", "adaptive", "black-box", "check"]
Craft = Callable[[Tensor, Tensor, RowRng], Tensor]
OnBatch = Callable[[str, int, int, int], None]
SHOWN = 12  # pictures in the report's gallery; a batch keeps so many of its examples


@dataclass(frozen=True, kw_only=True)
class AttackStep:
    """One attack of an evaluation.

    Attributes:
        name: as it stands in the report.
        family: which heading it stands under.
        craft: pixels, labels and row generator to adversarial pixels, `[B, 3, H, W]`.
        about: kind and parameters; with the seed and the rows they decide the result.
        threat: the ball that the attack stays in.
        stream: folded into the rows' random numbers; empty for the evaluation's own stream.
    """

    name: str
    family: Family
    craft: Craft
    about: dict[str, Any]
    threat: Threat
    stream: tuple[object, ...] = ()


@dataclass(frozen=True)
class Example:
    """An image that fell, for the gallery: its perturbation in pixel levels, how sure the model was of its error."""

    row: int
    attack: str
    prediction: int
    confidence: float
    delta: np.ndarray


@dataclass(frozen=True, kw_only=True)
class EvalSetup:
    """What is asked: a model, about images, inside a ball, and how.

    Attributes:
        model: pixels to logits, in eval mode, frozen; already an `Expectation` when the target is random.
        source: images and labels.
        threat: the ball of the evaluation; an attack in a smaller ball counts as well.
        device: where to compute.
        seed: of everything random.
        engine: how attacks run.
        transfer_engine: how attacks on other models run, whose examples this one is asked about.
        ledger: where results are kept.
        random: the target draws random numbers; each batch is then seeded.
        seeded: the seed fixes what it draws; nothing else can be measured twice.
        samples: draws that an answer is the mean of.
        batch: images that are attacked, stored and told at a time.
        on_batch: told attack, images done, images in all and images alive.
    """

    model: nn.Module
    source: Source | FileSource
    threat: Threat
    device: torch.device
    seed: int = 0
    engine: Engine = field(default_factory=Engine)
    transfer_engine: Engine = FULL
    ledger: Ledger = field(default_factory=lambda: Ledger(None, {}))
    random: bool = False
    seeded: bool = True
    samples: int = 1
    batch: int = 500
    on_batch: OnBatch = lambda name, done, total, alive: None

    @property
    def count(self) -> int:
        """How many images."""
        return len(self.source.images)

    def tensors(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Pixels in [0, 1] and labels of these images."""
        x = torch.from_numpy(self.source.images[rows]).to(self.device).float() / 255
        return x, torch.from_numpy(self.source.labels[rows]).to(self.device)

    def ask(self, x: Tensor) -> Tensor:
        """The model's logits `[B, C]`, with the same bits wherever a row stands."""
        return forward_all([self.model], x, self.engine.slots)

    def generator(self, step: AttackStep, rows: np.ndarray) -> RowRng:
        """The random numbers of these images under a step."""
        stream = RowRng.create(self.seed, "evaluate", rows=torch.from_numpy(rows).to(self.device))
        return stream.fold(*step.stream) if step.stream else stream

    @contextmanager
    def drawing(self, name: str, rows: np.ndarray) -> Iterator[None]:
        """For a random model: the batch's own draws, whatever ran before it."""
        if not self.random:
            yield
            return
        with borrowed_generator(self.seed, "draws", name, int(rows[0]), len(rows)):
            yield

    def clean(self, rows: np.ndarray) -> Entry:
        """The logits `[n, C]` of these images, as a piece of the ledger."""

        def answer() -> Arrays:
            with self.drawing("clean", rows):
                return {"logits": self.ask(self.tensors(rows)[0]).cpu().numpy()}

        return Entry("clean", self._facts({}, rows), answer)

    def attack(self, step: AttackStep, rows: np.ndarray) -> Entry:
        """What a step does to these images, as a piece of the ledger."""

        def attack() -> Arrays:
            x, y = self.tensors(rows)
            with self.drawing(step.name, rows):
                x_adv = step.craft(x, y, self.generator(step, rows)).detach()
                assert bool((step.threat.distance(x_adv, x) <= step.threat.radius * (1 + 1e-5) + 1e-7).all())
                return _judged(self.ask(x_adv), y, x_adv - x)

        facts = {**step.about, "ball": [step.threat.eps, step.threat.norm], "stream": list(map(str, step.stream))}
        return Entry(step.name, self._facts(facts, rows), attack)

    def get(self, entry: Entry) -> Arrays:
        """A piece's arrays, from the ledger where they are there."""
        return self.ledger.get(entry.name, entry.facts, entry.make)

    def share_out(self, name: str, entries: Sequence[Entry], count: int, alive: int) -> None:
        """Make these pieces of `count` images together with the other processes; alone nothing is done."""
        with suppress(NoGradientError):  # raised again by the piece whose turn it is
            self.ledger.share_out(
                entries, lambda done: self.on_batch(name, min(done * self.batch, count), count, alive)
            )

    def _facts(self, about: dict[str, Any], rows: np.ndarray) -> dict[str, Any]:
        return {"about": about, "rows": rows.tolist(), "seed": self.seed}

    def counts(self, ball: Threat) -> bool:
        """Whether an example in this ball lies in the evaluation's as well."""
        return ball.norm == self.threat.norm and ball.eps <= self.threat.eps

    def batches(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """The rows, `batch` at a time."""
        for start in range(0, len(rows), self.batch):
            yield rows[start : start + self.batch]


@dataclass(kw_only=True)
class Measurement:
    """The book of an evaluation: who was right when clean, who is still alive, who was asked. `begin` opens it.

    Attributes:
        setup: what is asked.
        logits: on the clean images, `[N, C]`.
        alive: right so far, bool `[N]`.
        adversarial: the answer that felled an image, or the clean one, int64 `[N]`.
        right: by attack, int8 `[N]`: 1 right, 0 wrong, -1 not asked.
        examples: by row, the error that the model was surest of.
        scores: one for each attack.
        left_out: by attack, why it did not run.
        warnings: signs that the numbers deceive.
        ran: the attacks that count for the worst case.
    """

    setup: EvalSetup
    logits: np.ndarray
    alive: np.ndarray = field(init=False)
    adversarial: np.ndarray = field(init=False)
    right: dict[str, np.ndarray] = field(default_factory=dict, init=False)
    examples: dict[int, Example] = field(default_factory=dict, init=False)
    scores: list[Score] = field(default_factory=list, init=False)
    left_out: dict[str, str] = field(default_factory=dict, init=False)
    warnings: list[str] = field(default_factory=list, init=False)
    ran: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.alive = self.predictions == self.setup.source.labels
        self.adversarial = self.predictions.copy()
        self.right["clean"] = self.alive.astype(np.int8)
        self.scores.append(Score("clean", int(self.alive.sum()), self.count))

    @property
    def count(self) -> int:
        """How many images."""
        return self.setup.count

    @property
    def predictions(self) -> np.ndarray:
        """The clean answers, int64 `[N]`."""
        answers: np.ndarray = self.logits.argmax(1)
        return answers

    @property
    def correct(self) -> np.ndarray:
        """The images answered rightly when clean, as positions."""
        return np.flatnonzero(self.predictions == self.setup.source.labels)

    def ask(self, step: AttackStep, rows: np.ndarray, *, on: str, quiet: bool = False) -> np.ndarray:
        """Run a step on these images; True where it was withstood, bool `[len(rows)]`.

        Args:
            step: the attack.
            rows: positions of images that are right when clean.
            on: which images these are, in words.
            quiet: write no score: the caller makes one of several steps.
        """
        known = np.full(self.count, -1, dtype=np.int8)
        if not len(rows):
            self.left_out[step.name] = f"none of {on} is left"
            return np.zeros(0, dtype=bool)
        try:
            self.setup.on_batch(step.name, 0, len(rows), int(self.alive.sum()))
            parts = [(part, self.setup.attack(step, part)) for part in self.setup.batches(rows)]
            self.setup.share_out(step.name, [entry for _, entry in parts], len(rows), int(self.alive.sum()))
            for done, (part, entry) in _accumulated(parts):
                self._book(step, part, self.setup.get(entry), known)
                if done == len(rows) or not self.setup.ledger.shared:
                    self.setup.on_batch(step.name, done, len(rows), int(self.alive.sum()))
        except NoGradientError as error:
            self.left_out[step.name] = str(error)
            return np.ones(len(rows), dtype=bool)
        if self.setup.counts(step.threat):
            self.ran.append(step.name)
        if not quiet:
            self.right[step.name] = known
            self.scores.append(self._score(step, known, rows, on))
        withstood: np.ndarray = known[rows] == 1
        return withstood

    def finish(self) -> Score:
        """The worst case over everything that ran; written after the other scores."""
        about = {
            "over": ["clean", *self.ran],
            "eps": self.setup.threat.eps,
            "norm": self.setup.threat.norm,
            "seed": self.setup.seed,
        }
        self.right["worst case"] = self.alive.astype(np.int8)
        self.scores.append(Score("worst case", int(self.alive.sum()), self.count, about))
        return self.scores[-1]

    def _book(self, step: AttackStep, rows: np.ndarray, found: Arrays, known: np.ndarray) -> None:
        known[rows] = found["right"]
        if not self.setup.counts(step.threat):
            return
        for k, position in enumerate(found["top"]):
            row, sure = int(rows[position]), float(found["confidence"][position])
            if row not in self.examples or sure > self.examples[row].confidence:
                made = found["delta"][k].astype(np.float32)
                self.examples[row] = Example(row, step.name, int(found["prediction"][position]), sure, made)
        fell = self.alive[rows] & ~found["right"]
        self.adversarial[rows[fell]] = found["prediction"][fell]
        self.alive[rows[fell]] = False

    def _score(self, step: AttackStep, known: np.ndarray, rows: np.ndarray, on: str) -> Score:
        about = {**step.about, "seed": self.setup.seed, "alive_after": int(self.alive.sum())}
        everyone = np.array_equal(rows, self.correct)
        count = self.count if everyone else len(rows)
        return Score(step.name, int((known == 1).sum()), count, about, step.family, EVERYONE if everyone else on)


def begin(setup: EvalSetup) -> Measurement:
    """Ask the model about the clean images and open the book."""
    rows, logits = np.arange(setup.count), []
    setup.on_batch("clean", 0, len(rows), len(rows))
    parts = [(part, setup.clean(part)) for part in setup.batches(rows)]
    setup.share_out("clean", [entry for _, entry in parts], len(rows), len(rows))
    for done, (_, entry) in _accumulated(parts):
        logits.append(setup.get(entry)["logits"])
        if done == len(rows) or not setup.ledger.shared:
            setup.on_batch("clean", done, len(rows), done)
    return Measurement(setup=setup, logits=np.concatenate(logits))


def _accumulated(parts: Sequence[tuple[np.ndarray, Entry]]) -> Iterator[tuple[int, tuple[np.ndarray, Entry]]]:
    """Each batch with the number of rows up to its end."""
    done = 0
    for part in parts:
        done += len(part[0])
        yield done, part


def _judged(logits: Tensor, y: Tensor, delta: Tensor) -> Arrays:
    sure, prediction = logits.double().softmax(1).max(1)
    right = prediction == y
    order = torch.argsort(torch.where(right, -1.0, sure), descending=True, stable=True)[:SHOWN]
    top = order[~right[order]]
    return {
        "right": right.cpu().numpy(),
        "prediction": prediction.cpu().numpy().astype(np.int32),
        "confidence": sure.cpu().numpy(),
        "top": top.cpu().numpy(),
        "delta": (delta[top] * 255).cpu().numpy().astype(np.float16),
    }
