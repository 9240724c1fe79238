"""The networks behind a cache, for the questions that stored answers cannot settle: they need a gradient or new pixels.

Nothing else in inspection loads a network, and no command fails because one has moved: what needs it is left out.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from darht.attacks import PGD
from darht.attacks.encoding import encode
from darht.attacks.engine.slots import forward_all
from darht.cache.builder.known_teachers import load_known_teacher, teacher_folders
from darht.cache.read.reader import Cache
from darht.cache.sources.load import Source, load_source
from darht.cache.sources.open import load_centred
from darht.core.device import device_of
from darht.core.errors import DarhtError, ModelError
from darht.core.files import sha256_file
from darht.core.nets.classifier import Classifier
from darht.core.rng import RowRng
from darht.tools.vectors import Features, Floats, read_rows, sample_rows
from darht.trainer.state.checkpoint import BEST, CONFIG, WEIGHTS, load_student
from darht.trainer.student.model import Student

_BATCH = 128  # as large as pays on a CPU, and small enough for a GPU beside another job
_PGD_STEPS = 10


@dataclass(frozen=True)
class Loaded:
    """The teachers of a cache that could be loaded, by name, and why the others could not."""

    teachers: dict[str, Classifier]
    missing: dict[str, str]


def load_teachers(cache: Cache, folders: dict[str, Path], device: torch.device) -> Loaded:
    """Load teachers from where they lay when the cache was built, or from `folders`.

    Raises:
        ConfigError: `folders` names a teacher that the cache does not have.
        ModelError: a folder that was given holds another teacher than the cache was built with.
    """
    known = teacher_folders(cache.spec, cache.origin(), folders)
    teachers, missing = {}, {}
    for name in cache.spec.teachers:
        if name not in known:
            missing[name] = "where it lies is not noted in the cache"
            continue
        try:
            teachers[name] = load_known_teacher(name, known[name], cache.spec, device)
        except DarhtError as error:
            if name in folders:
                raise
            missing[name] = str(error)
    return Loaded(teachers, missing)


def ask(model: nn.Module, images: NDArray[np.uint8]) -> Floats:
    """Logits `[n, C]` of images uint8 `[n, 3, H, W]`."""
    x = torch.from_numpy(images).to(device_of(model)).float() / 255
    logits: Floats = forward_all([model], x, _BATCH).cpu().numpy()
    return logits


def craft(cache: Cache, attack: str, model: nn.Module, image: NDArray[np.uint8], label: int) -> NDArray[np.int8]:
    """The perturbation `[1, 3, H, W]` that the cache's attack finds for an image that is not in the cache."""
    spec, device = cache.spec.attacks[attack], device_of(model)
    x = torch.from_numpy(image[None]).to(device).float() / 255
    outside = torch.tensor([cache.rows], device=device)  # a row that no stored perturbation has drawn numbers for
    generator = RowRng.create(cache.spec.seed, "attack", attack, rows=outside)
    method = spec.attack()
    x_adv = method(model, x, torch.tensor([label], device=device), generator=generator)
    delta: NDArray[np.int8] = encode(x_adv, x, method.threat, spec.scale).cpu().numpy()
    return delta


def open_test(cache: Cache, root: Path | None) -> tuple[Source | None, str]:
    """The test split, with images of the cache's shape; or None and the reason.

    Raises:
        DataError: `root` was given, and the split is not there.
    """
    data, origin = cache.spec.data, cache.origin()
    known = origin.get("data_root")
    if data.split != "train":
        return None, f"the cache holds the {data.split} split"
    try:
        where = root or (Path(known) if known else None)
        how: dict[str, Any] = {"skip_broken": data.skipped > 0, "rules": data.rules}
        how |= {"image_size": origin.get("image_size")}
        size = cache.spec.views.size
        source = (
            load_centred(size, data.source, where, "test", **how)
            if size
            else load_source(data.source, where, "test", **how)
        )
    except DarhtError as error:
        if root is not None:
            raise
        return None, str(error)
    if source.images.shape[1:] != cache.spec.view_shape:
        return None, f"its images have the shape {source.images.shape[1:]}, those of the cache {cache.spec.view_shape}"
    if source.classes != tuple(data.classes):
        return None, "its classes are others than the cache's, or in another order"
    return source, ""


def find_student(run: Path) -> Path:
    """The student's folder of a run, or the folder itself when it is one.

    Raises:
        ModelError: it is neither.
    """
    for folder in (run, run / BEST):
        if (folder / CONFIG).is_file():
            return folder
    raise ModelError(f"{run} holds no student: darht-train --out RUN makes RUN/{BEST}")


def student_of(run: Path, cache: Cache, device: torch.device) -> Student:
    """The student of a run.

    Raises:
        ModelError: there is none, or it has other classes than the cache.
    """
    student, card = load_student(find_student(run), device)
    if card.classes != cache.spec.data.classes:
        raise ModelError(f"the student of {run} has {len(card.classes)} classes that are not those of {cache.folder}")
    return student


def student_hash(run: Path) -> str:
    """The sha256 of a student's weights."""
    return sha256_file(find_student(run) / WEIGHTS)


def student_features(student: Student, shape: tuple[int, ...]) -> tuple[int, Features]:
    """How many features the backbone has, and the function from images to them."""
    backbone = nn.Sequential(student.preprocess, student.backbone).eval()

    def features(images: NDArray[np.uint8]) -> Floats:
        return ask(backbone, images)

    return features(np.zeros((1, *shape), dtype=np.uint8)).shape[1], features


def student_transfer(
    cache: Cache, student: Student, teachers: dict[str, Classifier], *, count: int = 500
) -> dict[str, tuple[int, int]]:
    """How often PGD-10 examples made on the student fool each teacher: (fooled, rows that both get right) by name.

    Source: the sample-wise transferability of SAAD (arXiv 2512.10275), as a share over rows.
    """
    rows, device = sample_rows(cache, count, labelled=True), device_of(student)
    x = torch.from_numpy(read_rows(cache, "image", rows)).to(device).float() / 255
    labels = torch.from_numpy(cache.read("label")[rows]).to(device).long()
    folded = student.fold().requires_grad_(False).eval()
    eps = max((a.parameters["eps"] for a in cache.spec.attacks.values() if a.parameters["norm"] == "linf"), default=8.0)
    attack = PGD(eps=eps, step=max(1.0, eps // 4), steps=_PGD_STEPS)
    generator = RowRng.create(cache.spec.seed, "select", rows=torch.from_numpy(rows).to(device))
    x_adv = attack(folded, x, labels, generator=generator)
    student_right = forward_all([folded], x, _BATCH).argmax(1) == labels
    found = {}
    for name, teacher in teachers.items():
        both = student_right & (forward_all([teacher], x, _BATCH).argmax(1) == labels)
        fooled = both & (forward_all([teacher], x_adv, _BATCH).argmax(1) != labels)
        found[name] = int(fooled.cpu().sum()), int(both.cpu().sum())
    return found
