"""Damage what runs, teachers, evaluations, indexes and exports leave on the disk, and see whether it is noticed.

    python bench/damage.py --tries 20 --out docs/benchmarks-cache.md

For every class of file that a command reads back: single bits flipped at random places, and cuts at random lengths.
After each damage `darht-train verify` reads the folder and, where there is one, the command that needs the file is
given. A damage is noticed when each of them exits with an error of one line; the table counts those, and tracebacks.
Exits with 1 unless all were noticed without a traceback.
"""

import argparse
import os
import platform
import random
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from built import sealed_cache

CPU = torch.device("cpu")
NETWORK = {"arch": "resnet18", "kwargs": {"width": 2, "blocks": [1, 1, 1, 1]}}
ATTACK = {"kind": "pgd", "teacher": "cnn", "eps": 32, "step": 16, "steps": 1}
MARK = "<!-- written by bench/damage.py -->\n", "<!-- end of bench/damage.py -->\n"


@dataclass(frozen=True)
class FileClass:
    """Files of one kind.

    Attributes:
        path: of one of them.
        verify: the words of the command that reads the whole folder.
        command: of the one that needs this file; empty where only a stopped one reads it, which then goes on without.
    """

    path: str
    verify: tuple[str, ...]
    command: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The path, with a star for what a hash names."""
        return re.sub(r"[^/]+-[0-9a-f]{24}", "*", self.path)


@dataclass
class Count:
    """How many damages there were, and what became of them."""

    flips: int = 0
    cuts: int = 0
    noticed: int = 0
    tracebacks: int = 0


def classes(folder: Path) -> Iterator[FileClass]:
    """Every class of file in what `prepare` made."""
    run, paused, teacher = "darht-train verify run", "darht-train verify paused", "darht-train verify teacher"
    resume = "darht-train --shards cache --recipe recipe.yaml --device cpu --resume --out"
    measure, again = "darht-eval --limit 60 --device cpu --no-transfer", "darht-teacher train --resume --device cpu"
    again += " --data digits --limit 40 --test-limit 60 --algorithm standard --set optim.epochs=1"
    again += (
        """ --set optim.batch_size=16 --arch resnet18 --kwargs '{"width": 2, "blocks": [1, 1, 1, 1]}' --out begun"""
    )
    near = "darht-inspect neighbours cache --row 3 --picture near.png"
    known: list[tuple[str, str, str]] = [
        ("run/checkpoint.pt", run, f"{resume} run"),
        ("paused/paused.pt", paused, f"{resume} paused"),
        ("warm/memory-1.pt", "darht-train verify warm", f"{resume} warm --set inner.kind=warm"),
        ("run/run.json", run, f"{measure} run --out again"),
        ("run/student/config.json", run, f"{measure} run --out again"),
        ("run/student/model.safetensors", run, f"{measure} run --out again"),
        ("run/last/config.json", run, "darht-train export run --which last --out export-last"),
        ("run/last/model.safetensors", run, "darht-train export run --which last --out export-last"),
        ("run/log.jsonl", run, ""),
        ("run/eval.json", run, "darht-eval compare run run"),
        ("run/eval.npz", run, "darht-eval compare run run"),
        (next((folder / "run/eval-parts").iterdir()).relative_to(folder).as_posix(), run, ""),
        ("teacher/teacher.json", teacher, f"{measure} teacher --data digits --out again"),
        ("teacher/teacher.safetensors", teacher, f"{measure} teacher --data digits --out again"),
        ("begun/training/paused.pt", "darht-train verify begun", again),
        ("cache/origin.json", "darht-cache verify cache", f"{resume} run"),
        ("cache/index/index.json", "darht-train verify cache/index", near),
        ("cache/index/image.faiss", "darht-train verify cache/index", near),
        ("cache/index/image.axes.npy", "darht-train verify cache/index", near),
        ("exported/config.json", "darht-train verify exported", ""),
        ("exported/plain.safetensors", "darht-train verify exported", ""),
    ]
    for path, verify, command in known:
        yield FileClass(path, tuple(shlex.split(verify)), tuple(shlex.split(command)))


def prepare(folder: Path) -> None:
    """A teacher, one that was stopped, a cache, a run, one that was paused, an evaluation, an index and an export."""
    from darht.cache.builder.teachers import Card, save_teacher
    from darht.cache.read.reader import open_cache
    from darht.cache.sources.load import load_source
    from darht.core.nets import build
    from darht.tools.index import IndexSettings, build_indexes
    from darht.tools.vectors import cache_spaces
    from darht.trainer.config import OptimConfig, StudentConfig, load_recipe
    from darht.trainer.evaluation.config import EvalConfig
    from darht.trainer.evaluation.run import evaluate
    from darht.trainer.export.export import export_run
    from darht.trainer.student.train import Callbacks, train
    from darht.trainer.teacher.config import TeachConfig
    from darht.trainer.teacher.train import teach

    torch.manual_seed(0)
    save_teacher(folder / "teacher", build(NETWORK["arch"], 10, NETWORK["kwargs"]),
                 Card(**NETWORK, num_classes=10, weights_sha256=""))  # fmt: skip
    source = load_source("digits", None, "train", limit=40)
    stopped = TeachConfig(algorithm="standard", optim=OptimConfig(epochs=1, batch_size=16))
    network, at_once = StudentConfig(**NETWORK, feature_map=False), Callbacks(on_step=_stop)
    _stopped(partial(teach, stopped, source, network, folder / "begun", device=CPU, callbacks=at_once))
    config = {"data": {"source": "digits", "limit": 40, "holdout": 0.2}, "teachers": {"cnn": {"path": "teacher"}},
              "attacks": {"pgd": ATTACK}, "views": {"padding": 1, "count": 2},
              "store": {"rows_per_shard": 64, "rows_per_chunk": 64}}  # fmt: skip
    cache = open_cache(sealed_cache(config, folder))
    build_indexes(cache, cache_spaces(cache), folder / "cache/index", IndexSettings(dim=8))
    recipe = {"recipe": "at", "student": NETWORK, "inner": {"kind": "pgd", "eps": 32, "step": 16, "steps": 1},
              "optim": {"epochs": 1, "batch_size": 16}}  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    wanted = load_recipe(folder / "recipe.yaml", ())
    train(wanted, cache, folder / "run", device=CPU)
    warm = load_recipe(folder / "recipe.yaml", ("inner.kind=warm",))
    train(warm, cache, folder / "warm", device=CPU)
    _stopped(partial(train, wanted, cache, folder / "paused", device=CPU, callbacks=Callbacks(on_step=_stop)))
    evaluate(str(folder / "run"), EvalConfig(limit=60, teachers=None, queries=(10, 10)), device=CPU)
    export_run(folder / "run", folder / "exported", kind="plain")


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


def _stopped(call: Callable[[], Any]) -> None:
    try:
        call()
    except KeyboardInterrupt:
        return
    raise AssertionError("it ended before it was stopped")


def ask(words: Sequence[str]) -> tuple[bool, bool]:
    """Whether a command, given in the folder, refused with a line of its own, and whether it ended in a traceback."""
    result = CliRunner().invoke(_command(words[0]), list(words[1:]))
    broken = result.exception is not None and not isinstance(result.exception, SystemExit)
    return result.exit_code != 0 and not broken, broken


def _command(name: str) -> click.Command:
    from darht.cache import cli as cache
    from darht.tools import cli as tools
    from darht.trainer import cli as trainer

    commands = {"darht-train": trainer.train, "darht-eval": trainer.evaluate, "darht-teacher": trainer.teacher}
    return (commands | {"darht-cache": cache.cache, "darht-inspect": tools.inspect})[name]


def damages(data: bytes, tries: int, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Three flipped bits for each cut, at random places."""
    for number in range(tries):
        if number % 4 == 3:
            yield "cuts", data[: rng.randrange(len(data))]
        else:
            at, bit = rng.randrange(len(data)), rng.randrange(8)
            yield "flips", bytes([*data[:at], data[at] ^ 1 << bit, *data[at + 1 :]])


def measure(folder: Path, kind: FileClass, tries: int, rng: random.Random) -> Count:
    """Damage one file again and again, in the current folder; it is whole again at the end."""
    path, count = folder / kind.path, Count()
    data = path.read_bytes()
    for name, damaged in damages(data, tries, rng):
        path.write_bytes(damaged)
        answers = [ask(words) for words in (kind.verify, kind.command) if words]
        setattr(count, name, getattr(count, name) + 1)
        count.noticed += all(refused for refused, _ in answers)
        count.tracebacks += any(broken for _, broken in answers)
    path.write_bytes(data)
    return count


def table(found: dict[str, Count]) -> str:
    """Markdown, a row for each class and one for all."""
    lines = ["| file | bits flipped | cuts | noticed | tracebacks |", "|---|---:|---:|---:|---:|"]
    every = Count(*(sum(values) for values in zip(*(vars(count).values() for count in found.values()), strict=True)))
    for name, count in {**found, "all": every}.items():
        lines.append(f"| {name} | {count.flips} | {count.cuts} | {count.noticed} | {count.tracebacks} |")
    return "\n".join(lines) + "\n"


def write_page(page: Path, text: str) -> None:
    """Put the text where the last one stood, or at the end."""
    before, _, rest = page.read_text().partition(MARK[0])
    page.write_text(f"{before.rstrip()}\n\n{MARK[0]}{text}{MARK[1]}{rest.partition(MARK[1])[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=20, help="Damages of each class of file.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="A page of docs that gets the table.")
    options = parser.parse_args()
    page = options.out and options.out.resolve()
    with tempfile.TemporaryDirectory() as name:
        folder, rng, start = Path(name), random.Random(options.seed), time.perf_counter()
        prepare(folder)
        os.chdir(folder)
        found = {kind.name: measure(folder, kind, options.tries, rng) for kind in classes(folder)}
    text = table(found)
    print(text, f"\n{time.perf_counter() - start:.0f} s")
    if page:
        head = "## Damage to runs, teachers, evaluations, indexes and exports\n\n`python bench/damage.py --tries "
        machine = f"{os.cpu_count()}-core {platform.machine()} CPU, no GPU"
        write_page(page, f"{head}{options.tries} --seed {options.seed}`, {machine}, {date.today()}.\n\n{text}")
    sys.exit(any(count.noticed < count.flips + count.cuts or count.tracebacks for count in found.values()))


if __name__ == "__main__":
    main()
