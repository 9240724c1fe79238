"""The public calls that train, evaluate and load; `import darht` has them by name."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from darht.cache.builder.teachers import Card, read_card
from darht.cache.builder.teachers import load_teacher as load_teacher_and_card
from darht.cache.read.reader import Cache
from darht.cache.read.webdataset import open_shards
from darht.cache.sources.load import FileSource, Source
from darht.core.config import override, parse
from darht.core.device import pick_device
from darht.core.hub import fetched
from darht.core.nets.classifier import Classifier
from darht.core.storage import Location
from darht.core.trust import trusting
from darht.trainer.config import TrainConfig, load_recipe
from darht.trainer.evaluation.config import EvalConfig
from darht.trainer.evaluation.report.write import EvalReport
from darht.trainer.evaluation.run import evaluate as evaluate_target
from darht.trainer.state.checkpoint import BEST, RUN, Progress
from darht.trainer.state.checkpoint import load_student as load_student_and_card
from darht.trainer.student.distributed import rank_and_world
from darht.trainer.student.train import Callbacks
from darht.trainer.student.train import train as train_student
from darht.trainer.teacher.check import check_teacher
from darht.trainer.teacher.config import TeachConfig, load_teaching, teacher_data, teacher_network
from darht.trainer.teacher.train import finish, open_split, teach, unfinished


def train(
    recipe: str | Path | Mapping[str, Any] | TrainConfig,
    cache: Cache | Location,
    out: str | Path,
    *,
    device: str = "auto",
    memory_gib: float = 8.0,
    resume: bool = False,
    on_epoch: Callable[[dict[str, Any]], None] = lambda row: None,
    trust_code: bool = False,
) -> Progress:
    """Train a student from a sealed cache and leave it in `out`, as `darht-train` does.

    Args:
        recipe: a YAML file, the name of a recipe that comes with darht (`darht`, `darht-warm`, `rslad`, ...), a file's
            contents as a mapping, or a `TrainConfig`; keys that are left out have their defaults.
        cache: an opened cache, or where one lies.
        out: the run's folder: `student/` (best on held-out rows), `last/`, `log.csv`, `checkpoint.pt`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        memory_gib: the most that the cache may take in memory; a larger one is streamed.
        resume: go on with a run that was stopped; it ends with the bits of one that was not.
        on_epoch: told the row of the log after each epoch.
        trust_code: call what `python:` names in cards name that were not made here.

    Returns:
        The log's rows as `history`, and the `best` accuracy on held-out rows under PGD, per cent.

    Raises:
        ConfigError, ModelError: recipe and cache do not go together, or the network and the images.
        CacheError: the folder cannot be used as asked.
    """
    opened = cache if isinstance(cache, Cache) else open_shards(cache)
    config, where = _recipe(recipe), pick_device(device)
    with trusting(trust_code):
        return train_student(
            config,
            opened,
            Path(out),
            device=where,
            memory_gib=memory_gib,
            resume=resume,
            callbacks=Callbacks(on_epoch=on_epoch),
        )


def _recipe(recipe: str | Path | Mapping[str, Any] | TrainConfig) -> TrainConfig:
    if isinstance(recipe, TrainConfig):
        return recipe
    if isinstance(recipe, Mapping):
        return parse(TrainConfig, override(dict(recipe), ()), "recipe")
    return load_recipe(Path(recipe), ())


def train_teacher(
    config: TeachConfig | Mapping[str, Any],
    data: Mapping[str, Any],
    network: str | Mapping[str, Any],
    out: str | Path,
    *,
    device: str = "auto",
    memory_gib: float = 8.0,
    resume: bool = False,
    on_epoch: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Card:
    """Train a teacher on the training split of a data set and measure it on the test split, as `darht-teacher` does.

    Args:
        config: algorithm and schedule: a `TeachConfig`, or a mapping of its fields; what is left out is as on the
            command line.
        data: `source`, and where it has them `root`, `limit`, `image_size` and `skip_broken`, as `cache.yaml` has them
            under `data`.
        network: the architecture's name, or a mapping of `arch`, `kwargs` and `resize`.
        out: the teacher's folder, which a cache's `teachers` may name.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        memory_gib: the most that the training set may take in memory; a larger one is streamed.
        resume: go on with a training that was stopped; a teacher that is there, measured, stays as it is.
        on_epoch: told the row of the log after each epoch.

    Returns:
        The card: `arch`, `training`, `weights_sha256`, and in `accuracy` what was measured, per cent.

    Raises:
        ConfigError, ModelError, DataError: something is missing or does not fit.
        CacheError: the folder cannot be used as asked.
    """
    teaching = config if isinstance(config, TeachConfig) else load_teaching(config)
    images, net, folder, where = teacher_data(data), teacher_network(network), Path(out), pick_device(device)

    def split(name: str) -> Source | FileSource:
        limit = images.limit if name == "train" else None
        root = None if images.place is None else Path(images.place)
        how = {"limit": limit, "image_size": images.image_size, "skip_broken": images.skip_broken}
        return open_split(images.source, root, name, **how)

    splits = unfinished(teaching, net, folder, split, resume=resume)
    if splits is None:
        return read_card(folder)
    told = Callbacks(on_epoch=on_epoch)
    card = teach(teaching, splits[0], net, folder, device=where, memory_gib=memory_gib, resume=resume, callbacks=told)
    if rank_and_world()[0] > 0:
        return card
    model = load_teacher_and_card(folder, where)[0]
    check_teacher(folder, model, splits[1], eps=teaching.inner.eps, device=where)
    finish(folder)
    return read_card(folder)


def evaluate(
    model: str | Path | nn.Module,
    data: str | None = None,
    *,
    root: str | Path | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    workers: int = 1,
    config: EvalConfig | None = None,
    trust_code: bool = False,
    **options: Any,
) -> EvalReport:
    """Measure a model on a test split as `darht-eval` does, and write `eval.json`, `eval.md` and `report.html`.

    Args:
        model: a module from pixels `[B, 3, H, W]` in [0, 1] to logits `[B, C]`, of which a copy is evaluated; or what
            `darht-eval` takes: a run, a student's or teacher's folder, `timm:NAME`, `python:module:callable`.
        data: the data set's name; None for the one that a run or a teacher belongs to.
        root: where it lies.
        out: the report's folder; None for the run itself, or `eval-NAME` in the current folder.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        workers: processes that share the images, with the numbers of one; they go round the GPUs of `cuda`. A script
            that asks for more than one needs `if __name__ == "__main__":` around what it does.
        config: everything else that can be chosen.
        trust_code: call what `python:` names in cards name that were not made here.
        options: fields of `EvalConfig` to change, such as `tier="standard"`, `eps=8` (pixel levels), `limit=500`; None
            is a value like any other: `teachers=None` leaves transfer out.

    Returns:
        The report: `scores`, each with `accuracy` in per cent and an `interval`; `masking`; `record`, what
        `eval.json` holds.

    Raises:
        ConfigError, ModelError, DataError, CacheError: something is missing or does not fit.
    """
    given: dict[str, Any] = {} if data is None else {"data": data}
    given |= {} if root is None else {"root": Path(root)}
    chosen = replace(config or EvalConfig(), **given, **options)
    text = str(model) if isinstance(model, Path) else model
    folder = None if out is None else Path(out)
    with trusting(trust_code):
        return evaluate_target(text, chosen, out=folder, device=pick_device(device), workers=workers)


def load_teacher(folder: str | Path, device: str = "auto", *, trust_code: bool = False) -> Classifier:
    """A teacher, frozen, in eval mode: pixels `[B, 3, H, W]` in [0, 1] to raw logits `[B, C]`.

    Args:
        folder: of the teacher, or `hf://USER/NAME`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        trust_code: call what a `python:` name in its card names, also where the card was not made here.

    Raises:
        ModelError: files are missing, or the weights are not those that the card names; or the card names code.
    """
    with trusting(trust_code):
        return load_teacher_and_card(fetched(Path(folder)), pick_device(device))[0]


def load_student(folder: str | Path, device: str = "auto", *, trust_code: bool = False) -> Classifier:
    """The student of a run (its best epoch) or of a student's folder, folded: pixels in [0, 1] to raw logits `[B, C]`.

    Args:
        folder: of the run or the student, or `hf://USER/NAME`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        trust_code: as in `load_teacher`.

    Raises:
        ModelError: files are missing or do not fit; or the card names code.
    """
    path = fetched(Path(folder))
    with trusting(trust_code):
        student, _ = load_student_and_card(path / BEST if (path / RUN).is_file() else path, pick_device(device))
    return student.fold().requires_grad_(False)
