"""What a run leaves behind: the student's folder in the hub layout, and a checkpoint to go on from."""

import csv
import fnmatch
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from darht.cache.builder import students
from darht.core.bounded import read_json
from darht.core.config import canonical_json, fingerprint, parse, spec_diff, to_plain
from darht.core.errors import CacheError, ConfigError, CorruptError, ModelError, SpecMismatchError
from darht.core.files import is_free, is_inside, sha256_bytes, write_atomic
from darht.core.nets.weights import fit_state, load_safetensors
from darht.core.preprocessing import Preprocessing
from darht.core.rng import borrowed_generator
from darht.core.sealed import Sealed, check_named, read_sealed, write_sealed
from darht.core.tensors import load_tensors
from darht.core.trust import check_trusted, remember
from darht.trainer.config import TrainConfig
from darht.trainer.student.losses import RECIPES
from darht.trainer.student.model import Dropout, Student

WEIGHTS, CONFIG, RUN, CHECKPOINT = students.WEIGHTS, students.CONFIG, students.RUN, "checkpoint.pt"
MEMORY = "memory-{}.pt"  # of `inner: warm`, after so many epochs; the checkpoint names it
PAUSED = "paused.pt"  # a checkpoint in the middle of an epoch; gone when that epoch is finished
BEST, LAST = students.BEST, "last"
_AGAIN = "restore it, or go on with darht-train --resume, which writes it with the next epoch that it keeps"
_RUN_AGAIN = "restore it, or remove it and give the same darht-train command with another --out"


@dataclass(frozen=True)
class StudentCard:
    """What is needed to build a student again, and where it came from.

    Attributes:
        arch, kwargs: of the backbone.
        teachers: names of the map's rows; none for a plain student, whoever supervised it.
        num_classes: C.
        preprocessing: of pixels in [0, 1].
        classes: their names.
        cache_root_hash: of the cache that it was trained from.
        recipe: all of it, as plain data.
        epoch: after which it was saved.
        selection: accuracies on the held-out training rows, in per cent.
        image_size: H and W of the images it was trained on.
        mc_dropout, mc_samples: Monte-Carlo dropout; 0 for none.
        run: fingerprint of the identity of the run that it comes from; empty in cards of earlier versions.
    """

    arch: str
    kwargs: dict[str, Any]
    teachers: tuple[str, ...]
    num_classes: int
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    cache_root_hash: str
    recipe: dict[str, Any]
    epoch: int
    selection: dict[str, Any] = field(default_factory=dict)
    image_size: tuple[int, ...] = ()
    mc_dropout: float = 0.0
    mc_samples: int = 1
    run: str = ""
    format_version: int = 1

    @property
    def clean_only(self) -> bool:
        """Whether the student was trained on clean images alone.

        Raises:
            ConfigError: the recipe is none of this version's.
        """
        name = str(self.recipe.get("recipe"))
        if name not in RECIPES:
            raise ConfigError(f"the card's recipe must be one of {', '.join(RECIPES)}; got {name!r}")
        return parse(RECIPES[name], self.recipe.get("loss", {}), f"loss of recipe {name}").clean_mix()[0] == 1


@dataclass
class Progress:
    """Where a run stands: finished epochs, their log, the best score so far, and how often `inner: warm` collapsed."""

    epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: float = -1.0
    collapses: int = 0

    @property
    def pgd_share(self) -> float:
        """The share of the warm steps that are PGD steps instead: half after one collapse, all after two."""
        return min(1.0, self.collapses / 2)


def save_student(folder: Path, student: Student, card: StudentCard) -> None:
    """Write `model.safetensors` and then `config.json`, which names its sha256, each atomically.

    Who saves a student has made its network, so its card is trusted on this machine from now on.
    """
    save_weights(folder, student.state_dict(), card)


def save_weights(folder: Path, weights: dict[str, Tensor], card: StudentCard) -> None:
    """As `save_student`, of a student's weights."""
    remember(card.arch, card.num_classes, card.kwargs)
    data = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()})
    write_atomic(folder / WEIGHTS, data)
    write_sealed(folder / CONFIG, json.loads(canonical_json(card)), {WEIGHTS: sha256_bytes(data)})


def read_student_card(folder: Path) -> StudentCard:
    """`config.json` of a hub-layout folder.

    Raises:
        ModelError: it is missing, is no student's card, or was changed.
    """
    return _read_card(folder)[0]


def _read_card(folder: Path) -> tuple[StudentCard, Sealed]:
    path = folder / CONFIG
    if not path.is_file():
        raise ModelError(f"{folder} holds no student: {path} is missing; darht-train --out RUN makes RUN/{BEST}")
    try:
        sealed = read_sealed(path, _AGAIN)
        return parse(StudentCard, sealed.value, CONFIG), sealed
    except (CorruptError, ConfigError) as error:
        raise ModelError(f"{path} is not a student's card: {error}") from error


def load_student(folder: Path, device: torch.device) -> tuple[Student, StudentCard]:
    """The student of a hub-layout folder, frozen, in eval mode.

    Raises:
        ModelError: files are missing or do not fit, or the weights are not those that the card names; or the card names
            code and is not trusted.
    """
    card, sealed = _read_card(folder)
    check_trusted(card.arch, card.num_classes, card.kwargs, str(folder / CONFIG))
    try:
        check_named(folder / CONFIG, sealed, WEIGHTS, _AGAIN)
    except CorruptError as error:
        raise ModelError(str(error)) from error
    with borrowed_generator(0, "load"):
        student = Student(
            card.arch,
            card.kwargs,
            teachers=len(card.teachers),
            num_classes=card.num_classes,
            preprocessing=card.preprocessing,
            dropout=Dropout(card.mc_dropout, card.mc_samples),
        )
    fit_state(student, load_safetensors(folder / WEIGHTS), str(folder / WEIGHTS))
    return student.to(device).eval().requires_grad_(False), card


def claim_run(out: Path, identity: dict[str, Any], *, resume: bool) -> None:
    """Make `out` the folder of this run, or check that it may be gone on with.

    Raises:
        CacheError: it holds a run and `resume` was not asked for, or it is not empty, or `run.json` was changed.
        SpecMismatchError: it holds a run of another recipe or cache.
    """
    path = out / RUN
    if path.is_file():
        differences = identity_diff(read_run(out)["identity"], identity)
        if differences:
            raise SpecMismatchError(f"{out} holds another run: {'; '.join(differences)}; choose another --out folder")
        if not resume:
            raise CacheError(f"{out} holds a run of this recipe already: add --resume, or choose another --out folder")
    elif not is_free(out):
        raise CacheError(f"{out} is not empty and holds no run: choose a new or empty --out folder")


def identity_diff(recorded: dict[str, Any], identity: dict[str, Any]) -> list[str]:
    """In what a run that was recorded differs from one that is to go on, as lines.

    A setting that the record does not know came later, with a default that leaves what was there before as it was.
    """
    now = json.loads(canonical_json(identity))
    name = recorded.get("recipe", {}).get("recipe")
    if name in RECIPES and "recipe" in now:
        plain = to_plain(TrainConfig(recipe=name)) | {"loss": to_plain(RECIPES[name]())}
        defaults = json.loads(canonical_json(plain))
        recorded = recorded | {"recipe": _filled(recorded["recipe"], now["recipe"], defaults)}
    return spec_diff(recorded, now)


def _filled(old: dict[str, Any], new: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """`old` with what `new` has and it lacks taken from `defaults`, at every depth."""
    filled = {key: defaults[key] for key in new if key not in old and key in defaults} | old
    for key, value in old.items():
        if all(isinstance(one.get(key), dict) for one in (old, new, defaults)):
            filled[key] = _filled(value, new[key], defaults[key])
    return filled


def write_run(out: Path, identity: dict[str, Any], notes: dict[str, Any]) -> None:
    """Write `run.json`: what identifies the run, and notes (paths) that do not."""
    write_sealed(out / RUN, {"identity": identity, **notes})


def read_run(out: Path) -> dict[str, Any]:
    """Read `run.json`.

    Raises:
        CacheError: the folder holds no run, or `run.json` was changed.
    """
    path = out / RUN
    if not path.is_file():
        raise CacheError(f"{out} is not a run: {path} is missing; darht-train --shards CACHE --out DIR makes one")
    facts = read_sealed(path, _RUN_AGAIN).value
    if not isinstance(facts.get("identity"), dict) or not isinstance(facts.get("cache", ""), str):
        raise CacheError(f"{path} is not that of a run: it must hold 'identity' and 'cache'; {_RUN_AGAIN}")
    return facts


def cache_of(run: Path, typed: str | None = None) -> Path | str | None:
    """Where the cache of a run lies; None when the run names a URL and nobody typed it: no folder has a URL fetched.

    Args:
        run: its folder.
        typed: by the user, instead of what the run says.

    Raises:
        CacheError: the folder holds no run, or does not say where its cache lay.
    """
    said = typed or read_run(run).get("cache")
    if said is None:
        raise CacheError(f"{run / RUN} does not say where its cache lay: give --shards CACHE")
    if "://" in said:
        return typed
    return Path(typed) if typed else (run / said).resolve()


def check_of_run(card: StudentCard, run: Path, which: str) -> None:
    """See that a student in a run's folder is that run's.

    Raises:
        CacheError: it is another's.
    """
    if card.run and card.run != fingerprint(read_run(run)["identity"]):
        raise CacheError(f"{run / which} holds the student of another run than {run / RUN} describes: {_AGAIN}")


def load_checkpoint(
    path: Path, student: Student, optimizer: torch.optim.Optimizer, identity: dict[str, Any]
) -> tuple[Progress, dict[str, Any]]:
    """Go on where the checkpoint stands, and give what else it holds, the memory included; nothing when there is none.

    Raises:
        CacheError: it is damaged.
        SpecMismatchError: it belongs to another run than that of `identity`.
    """
    if not path.is_file():
        return Progress(), {}
    state = load_tensors(path)
    differences = identity_diff(state.pop("identity"), identity)
    if differences:
        raise SpecMismatchError(f"{path} belongs to another run: {'; '.join(differences)}; remove it")
    if isinstance(state.get("memory"), str):  # in checkpoints of earlier versions and in pauses it lies inside
        state["memory"] = _load_memory(path, state["memory"])
    return restore(state, student, optimizer)


def _load_memory(checkpoint: Path, name: str) -> dict[str, Any]:
    """The memory in the file that a checkpoint names, left on the disk until it is copied from."""
    path = checkpoint.parent / name
    if not fnmatch.fnmatchcase(name, MEMORY.format("*")) or not is_inside(name) or not path.is_file():
        raise CacheError(f"{checkpoint} needs {name!r} beside it, which is not there: restore it, or remove both files")
    return load_tensors(path, lazily=True)


def restore(
    contents: dict[str, Any], student: Student, optimizer: torch.optim.Optimizer
) -> tuple[Progress, dict[str, Any]]:
    """Bring student and optimizer to where a checkpoint's contents stand, and give what else these hold."""
    rest = dict(contents)
    student.load_state_dict(rest.pop("student"))
    optimizer.load_state_dict(rest.pop("optimizer"))
    return Progress(**rest.pop("progress")), rest


def write_log(out: Path, history: list[dict[str, Any]]) -> None:
    """The log of all finished epochs as `log.jsonl` and `log.csv`; what was not measured is null, or an empty cell."""
    write_atomic(out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in history).encode())
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in history for name in row))
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_atomic(out / "log.csv", text.getvalue().encode())


def read_log(out: Path) -> list[dict[str, Any]]:
    """The rows of `log.jsonl`.

    Raises:
        CacheError: it cannot be read.
    """
    path = out / "log.jsonl"
    try:
        rows = [read_json(line, str(path)) for line in path.read_text().splitlines()]
    except (OSError, ValueError, ConfigError) as error:
        raise CacheError(
            f"{path} is damaged ({error}): go on with darht-train --resume, which writes it anew"
        ) from error
    if not all(isinstance(row, dict) and "epoch" in row for row in rows):
        raise CacheError(f"{path} is damaged: go on with darht-train --resume, which writes it anew")
    return rows
