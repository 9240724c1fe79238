"""A run's student for use elsewhere: as it is, as the plain network of its architecture, or as ONNX.

What is converted is asked about images before its file is written.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from darht.cache.read.webdataset import open_shards
from darht.core.config import to_plain
from darht.core.errors import CacheError, ConfigError, DarhtError, ModelError
from darht.core.files import is_free, sha256_bytes, write_atomic
from darht.core.nets import build
from darht.core.nets.classifier import Classifier
from darht.core.preprocessing import Preprocessing
from darht.core.rng import RowRng
from darht.core.sealed import seal_json
from darht.core.version import VERSION
from darht.trainer.export.model_card import README, write_model_card
from darht.trainer.state.checkpoint import (
    BEST,
    CONFIG,
    WEIGHTS,
    StudentCard,
    cache_of,
    check_of_run,
    load_student,
    read_run,
)

PLAIN, ONNX = "plain.safetensors", "model.onnx"
Kind = Literal["hub", "plain", "onnx"]
_IMAGES = 16  # of each sort that a format is asked about
# Of the largest logit, where other kernels add up in another order; the networks tried stay below 1e-5.
_TOLERANCE = 1e-4


class Exported(NamedTuple):
    """What was written, and how it was checked.

    Attributes:
        files: names in the folder.
        checked: the check in words.
    """

    files: tuple[str, ...]
    checked: str


@dataclass(frozen=True)
class PlainCard:
    """`config.json` beside `plain.safetensors` or `model.onnx`: what the network is and where it came from."""

    format: str
    arch: str
    kwargs: dict[str, Any]
    num_classes: int
    classes: tuple[str, ...]
    image_size: tuple[int, ...]
    preprocessing: Preprocessing
    preprocessing_inside: bool
    monte_carlo_dropout_off: float
    cache_root_hash: str
    recipe: dict[str, Any]
    epoch: int
    selection: dict[str, Any]
    darht: str


def export_run(run: Path, out: Path, *, kind: Kind, which: str = BEST) -> Exported:
    """Write the student of `run/which` into the folder `out`.

    Args:
        run: what darht-train left.
        out: a new or empty folder; it gets `config.json`, `README.md` and one file of weights.
        kind: `hub`, the student with its map (`model.safetensors`); `plain`, the folded network of the architecture
            (`plain.safetensors`, the state_dict of `darht.core.nets.build`: resizing and normalising are the caller's);
            `onnx`, that network with its normalisation inside (`model.onnx`, `pixels` `[N, 3, H, W]` to `logits`).
        which: `student` (best on held-out rows) or `last`.

    Raises:
        CacheError: `run` is no run, or `out` is not empty.
        ConfigError: the packages that ONNX needs are not installed.
        ModelError: no student, or another run's; it cannot be exported, or what was written answers differently.
    """
    read_run(run)
    if not is_free(out):
        raise CacheError(f"{out} is not empty: choose a new or empty --out folder")
    student, card = load_student(run / which, torch.device("cpu"))
    check_of_run(card, run, which)
    if kind == "hub":
        files, checked = {name: (run / which / name).read_bytes() for name in (WEIGHTS, CONFIG)}, "copied as it is"
    else:
        plain, name = student.plain().requires_grad_(False), PLAIN if kind == "plain" else ONNX
        data, answer = (_plain if kind == "plain" else _onnx)(plain, card)
        checked = _compare(answer, plain, _probes(run, card), name)
        files = {name: data, CONFIG: _config(card, kind, {name: sha256_bytes(data)})}
    for name, data in files.items():
        write_atomic(out / name, data)
    write_model_card(run, which, folder=out, form=kind)
    return Exported((*files, README), checked)


def _config(card: StudentCard, kind: Kind, files: dict[str, str]) -> bytes:
    plain = PlainCard(
        format=kind,
        arch=card.arch,
        kwargs=card.kwargs,
        num_classes=card.num_classes,
        classes=card.classes,
        image_size=card.image_size,
        preprocessing=card.preprocessing,
        preprocessing_inside=kind == "onnx",
        monte_carlo_dropout_off=card.mc_dropout,
        cache_root_hash=card.cache_root_hash,
        recipe=card.recipe,
        epoch=card.epoch,
        selection=card.selection,
        darht=VERSION,
    )
    return seal_json(to_plain(plain), files)


Answer = Callable[[Tensor], Tensor]


def _plain(plain: Classifier, card: StudentCard) -> tuple[bytes, Answer]:
    """The state_dict's bytes, and a network of the architecture that was filled from them."""
    data = safetensors.torch.save({name: value.contiguous() for name, value in plain.net.state_dict().items()})
    net = build(card.arch, card.num_classes, card.kwargs)
    net.load_state_dict(safetensors.torch.load(data), strict=True)
    return data, Classifier(net, card.preprocessing).eval()


def _onnx(plain: Classifier, card: StudentCard) -> tuple[bytes, Answer]:
    """The ONNX file's bytes, and onnxruntime's session on them; the first axis is free."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  what torch's exporter needs
    except ImportError as error:
        raise ConfigError(
            f"--format onnx needs the packages onnx, onnxruntime and onnxscript ({error}): pip install 'darht[onnx]'"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own, about its parts
            program = torch.onnx.export(
                plain,
                (torch.zeros(2, 3, *card.image_size),),
                dynamo=True,
                verbose=False,
                input_names=["pixels"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("N")},),
            )
    except Exception as error:  # networks fail to be exported in as many ways as there are networks
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{card.arch} cannot be exported to ONNX ({reason}); use --format plain") from error
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # the exporter's notes on where in whose files the network was written
    program.model.metadata_props.update(
        {"darht": VERSION, "cache_root_hash": card.cache_root_hash, "epoch": str(card.epoch)}
    )
    data = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return data, lambda x: torch.from_numpy(session.run(["logits"], {"pixels": x.numpy()})[0])


def _probes(run: Path, card: StudentCard) -> dict[str, Tensor]:
    """Images in [0, 1] to compare answers on: random ones, and real ones where the run's cache is still there."""
    if len(card.image_size) != 2:
        raise ModelError(f"{CONFIG} of {run} has no image_size: train again, or go on with --resume")
    rows = torch.arange(_IMAGES)
    probes = {"random": RowRng.create(0, "export", rows=rows).uniform((3, *card.image_size))}
    try:
        location = cache_of(run)
        if location is None:
            return probes
        cache = open_shards(location)
        if cache.root_hash == card.cache_root_hash:
            probes["real"] = torch.from_numpy(cache.clean(slice(0, _IMAGES))).float() / 255
    except (DarhtError, OSError):
        pass  # the cache has gone or moved: random images remain
    return probes


@torch.no_grad()
def _compare(answer: Answer, plain: Classifier, probes: dict[str, Tensor], what: str) -> str:
    """How far two models are apart on the probes, in batches of different sizes.

    Raises:
        ModelError: further than float32 rounding explains.
    """
    apart = 0.0
    for x in probes.values():
        want = plain(x)
        got = torch.cat([answer(part) for part in (x[:1], x[1:4], x[4:]) if len(part)])
        apart = max(apart, float((got - want).abs().max() / want.abs().max().clamp(min=1e-12)))
    if not apart <= _TOLERANCE:
        raise ModelError(
            f"{what} answers {apart:.1e} of the largest logit apart, allowed is {_TOLERANCE:g}: not written"
        )
    sorts = " and ".join(f"{len(x)} {name}" for name, x in probes.items())
    return f"checked on {sorts} images: {apart:.1e} of the largest logit apart"
