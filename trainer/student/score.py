"""How good a student is on held-out rows while it is trained."""

import torch

from darht.attacks import PGD, Engine
from darht.cache.read.stream import Feed
from darht.cache.sources.load import Source
from darht.core.errors import DarhtError, ModelError
from darht.core.rng import RowRng, borrowed_generator
from darht.trainer.config import TrainConfig
from darht.trainer.student.model import Student

DIVERGED_HINT = "lower optim.lr, or set optim.clip_norm or optim.warmup"
_SCORED = 1000  # images on the device at once


def holdout_source(feed: Feed) -> Source:
    """The rows held out of the training split, in memory for the whole run."""
    images, labels = feed.fetch(feed.holdout)
    return Source("holdout", "train", images.numpy(), labels.numpy(), classes=(), sha256="")


def collapse_probe_source(feed: Feed, config: TrainConfig) -> Source:
    """The first rows to train on, of which single-step training is checked for collapse; none for other modes."""
    rows = config.inner.warm.check_rows if config.inner.single_step else 0
    images, labels = feed.fetch(feed.training[:rows])
    return Source("training", "train", images.numpy(), labels.numpy(), classes=(), sha256="")


def score(student: Student, source: Source, attack: PGD, device: torch.device, seed: int) -> tuple[float, float]:
    """Clean accuracy and accuracy under `attack` in per cent of a student on a source that is not empty.

    Images leave the attack as soon as they are misclassified, and the folded student is asked: selection is to cost
    little beside training.

    Raises:
        DarhtError: the student has diverged.
    """
    lanes = 1 if student.dropout.p else None  # what draws at inference needs an order
    engine = Engine(slots=256 if device.type == "cuda" else 64, lanes=lanes)
    images, labels, net = torch.from_numpy(source.images), torch.from_numpy(source.labels), student.fold().eval()
    clean = robust = 0
    try:
        with borrowed_generator(seed, "holdout"):
            for rows in torch.arange(len(labels)).split(_SCORED):
                x, y = images[rows].to(device).float() / 255, labels[rows].to(device)
                generator = RowRng.create(seed, "evaluate", rows=rows.to(device))
                outcome = engine.run(attack, net, x, y, generator=generator)
                clean += int(outcome.clean_correct.sum())
                robust += int(outcome.robust.sum())
    except ModelError as error:  # it took every batch before: only its numbers can have gone
        raise DarhtError(f"the student diverged ({error}): {DIVERGED_HINT}") from error
    return round(100 * clean / len(labels), 3), round(100 * robust / len(labels), 3)
