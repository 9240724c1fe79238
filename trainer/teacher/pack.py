"""Make a small folder of a teacher, to be given to others: half of the bytes, and a card that says how it came about.

What is packed is a teacher's folder or a run of `darht-train`. Matrices and kernels are rounded to float16; vectors
(biases, statistics of normalisation layers) stay as they are, because they are few and their range is wide.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from darht.cache.builder.students import student_folder
from darht.cache.builder.teachers import Card, load_teacher, save_teacher
from darht.cache.read.webdataset import open_shards
from darht.core.errors import CacheError
from darht.core.files import is_free
from darht.core.zoo import in_zoo
from darht.trainer.state.checkpoint import RUN, cache_of, load_student


def pack_teacher(folder: Path, out: Path) -> Card:
    """Write the teacher of `folder` into `out` in half precision; its accuracies are to be measured anew.

    Args:
        folder: a teacher's, a student's or a run's.
        out: a new or empty folder.

    Returns:
        The new card. Of a run it has the recipe, epsilon and what is known of the images it was trained on.

    Raises:
        CacheError: `out` is not empty.
        ModelError: `folder` holds no teacher.
    """
    if not is_free(out):
        raise CacheError(f"{out} is not empty: choose a new or empty --out folder")
    model, card = load_teacher(folder, torch.device("cpu"))
    halve(model.net)
    place = None if in_zoo(folder) else student_folder(folder)
    known = {} if place is None else _facts_of_run(folder, place)
    return save_teacher(out, model.net, dataclasses.replace(card, **known, accuracy={}))


def halve(net: nn.Module) -> None:
    """Round parameters with two axes or more to float16, in place."""
    for parameter in net.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.half()


def _facts_of_run(folder: Path, place: Path) -> dict[str, Any]:
    """Fields of the card that a run knows of itself: how it was trained, and on what."""
    _, card = load_student(place, torch.device("cpu"))
    training = {
        "algorithm": card.recipe["recipe"],
        "eps": card.recipe["inner"]["eps"],
        "recipe": card.recipe,
        "epoch": card.epoch,
        "cache_root_hash": card.cache_root_hash,
    }
    location = cache_of(folder) if (folder / RUN).is_file() else None
    if location is None:
        return {"training": training}
    data = open_shards(location).spec.data
    return {
        "training": training,
        "data": {"source": data.source, "split": data.split, "rows": data.rows, "sha256": data.sha256},
    }
