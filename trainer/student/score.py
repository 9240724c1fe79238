"""How good a student is on held-out rows while it is trained."""

from weakref import WeakKeyDictionary

import torch
from torch import nn

from darht.attacks import PGD, Engine
from darht.cache.read.stream import Feed
from darht.cache.sources.load import Source
from darht.core.errors import DarhtError, ModelError
from darht.core.nets.classifier import Classifier
from darht.core.rng import RowRng, borrowed_generator
from darht.trainer.config import TrainConfig
from darht.trainer.student.model import Student

DIVERGED_HINT = "lower optim.lr, or set optim.clip_norm or optim.warmup"
_SCORED = 1000  # images on the device at once; a GPU has room for ten times as many
_FOLDED: WeakKeyDictionary[Student, Classifier] = WeakKeyDictionary()  # networks that are made once in a run


def holdout_source(feed: Feed) -> Source:
    """The rows held out of the training split, in memory for the whole run."""
    images, labels = feed.fetch(feed.holdout)
    return Source("holdout", "train", images.numpy(), labels.numpy(), classes=(), sha256="")


def collapse_probe_source(feed: Feed, config: TrainConfig) -> Source:
    """The first rows to train on, of which single-step training is checked for collapse; none for other modes."""
    images, labels = feed.fetch(feed.training[: config.inner.probed_rows])
    return Source("training", "train", images.numpy(), labels.numpy(), classes=(), sha256="")


def _engine(device: torch.device, *, draws: bool) -> tuple[Engine, int]:
    """How a student is attacked, and how many images are on the device at once; for each such part it is prepared.

    A GPU searches in bfloat16, and every hit is confirmed in float32. What `draws` at inference needs an order.
    """
    lanes = 1 if draws else None
    if device.type == "cuda":
        return Engine(slots=256, lanes=lanes, precision="bf16"), 10 * _SCORED
    return Engine(lanes=lanes), _SCORED


def _folded(student: Student) -> nn.Module:
    """The folded student; its network is made once, and takes the weights of the moment over."""
    if student.dropout.p:
        return student.fold().eval()
    if student not in _FOLDED:
        _FOLDED[student] = student.plain().eval()
    else:
        student.copy_into(_FOLDED[student])
    return _FOLDED[student]


def score(student: Student, source: Source, attack: PGD, device: torch.device, seed: int) -> tuple[float, float]:
    """Clean accuracy and accuracy under `attack` in per cent of a student on a source that is not empty.

    Images leave the attack as soon as they are misclassified, and the folded student is asked: selection is to cost
    little beside training.

    Raises:
        DarhtError: the student has diverged.
    """
    engine, at_once = _engine(device, draws=student.dropout.p > 0)
    images, labels, net = torch.from_numpy(source.images), torch.from_numpy(source.labels), _folded(student)
    clean = robust = 0
    try:
        with borrowed_generator(seed, "holdout"):
            for rows in torch.arange(len(labels)).split(at_once):
                x, y = images[rows].to(device).float() / 255, labels[rows].to(device)
                generator = RowRng.create(seed, "evaluate", rows=rows.to(device))
                outcome = engine.run(attack, net, x, y, generator=generator)
                clean += int(outcome.clean_correct.sum())
                robust += int(outcome.robust.sum())
    except ModelError as error:  # it took every batch before: only its numbers can have gone
        raise DarhtError(f"the student diverged ({error}): {DIVERGED_HINT}") from error
    return round(100 * clean / len(labels), 3), round(100 * robust / len(labels), 3)
