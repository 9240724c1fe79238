"""A student as a teacher: the folded network of what `darht-train` left, read from its folder as a teacher's is.

A run holds its best student in `student/`; a student's folder holds `model.safetensors` and `config.json`. Map and head
are two linear layers, so that the plain network of the architecture has the student's function; dropout is off.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from darht.core.config import parse
from darht.core.errors import ConfigError, CorruptError, ModelError
from darht.core.files import sha256_file
from darht.core.nets import build, fold_head, head_name
from darht.core.nets.head import folded
from darht.core.nets.weights import load_safetensors
from darht.core.preprocessing import Preprocessing
from darht.core.sealed import check_named, read_sealed

RUN, BEST, CONFIG, WEIGHTS = "run.json", "student", "config.json", "model.safetensors"


def student_folder(folder: Path) -> Path | None:
    """The folder of the student that `folder` is, or holds as a run does; None where there is none."""
    for place in (folder / BEST, folder) if (folder / RUN).is_file() else (folder,):
        if (place / CONFIG).is_file() and (place / WEIGHTS).is_file():
            return place
    return None


def student_facts(place: Path) -> dict[str, Any]:
    """What a teacher's card says of the student in `place`, by field.

    Raises:
        ModelError: `config.json` is not that of a student, or was changed, or the weights are not those it names.
    """
    path = place / CONFIG
    try:
        sealed = read_sealed(path, "restore it, or train the student again")
        check_named(path, sealed, WEIGHTS, "restore it, or train the student again")
        said = sealed.value
        return {
            "arch": str(said["arch"]),
            "kwargs": dict(said["kwargs"]),
            "num_classes": int(said["num_classes"]),
            "classes": tuple(map(str, said["classes"])),
            "preprocessing": parse(Preprocessing, said["preprocessing"], f"{path}: preprocessing"),
            "training": {
                "algorithm": str(said["recipe"]["recipe"]),
                "cache_root_hash": str(said["cache_root_hash"]),
                **{key: float(value) for key, value in said["recipe"].get("inner", {}).items() if key == "eps"},
            },
            "weights_sha256": sha256_file(place / WEIGHTS),
        }
    except (CorruptError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise ModelError(f"{path} is not a student's card: {error}") from error


def load_folded(place: Path, arch: str, num_classes: int, kwargs: dict[str, Any]) -> nn.Module:
    """The plain network with the function of the student in `place`.

    Raises:
        ModelError: the weights do not fit.
    """
    path = place / WEIGHTS
    state, net = load_safetensors(path), build(arch, num_classes, kwargs)
    name, own = head_name(net, num_classes), net.state_dict()
    head = {f"{name}.weight", f"{name}.bias"}
    wrong = [key for key, value in own.items() if key not in head and _shape(state, f"backbone.{key}") != value.shape]
    if wrong or "head.weight" not in state or "head.bias" not in state:
        raise ModelError(f"{path} does not fit {arch}: {', '.join(wrong[:3]) or 'its head is missing'}; train it again")
    net.load_state_dict({key: value if key in head else state[f"backbone.{key}"] for key, value in own.items()})
    mapped = (state["map.weight"], state["map.bias"]) if "map.weight" in state else None
    fold_head(net, name, *folded((state["head.weight"], state["head.bias"]), mapped))
    return net


def _shape(state: dict[str, Tensor], key: str) -> torch.Size | None:
    return state[key].shape if key in state else None
