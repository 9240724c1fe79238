"""What a build of a cache adds to its arithmetic; a part of bench/cache.py."""

import argparse
import os
import shutil
import time
from pathlib import Path

import torch
import yaml
from cache_readers import CLASSES

from darht.attacks import PGD
from darht.cache.builder import build as builder
from darht.cache.builder.seal import seal
from darht.cache.builder.teachers import Card, save_teacher
from darht.core.nets import build as build_net
from darht.core.preprocessing import Preprocessing
from darht.core.vision import torchvision

CPU = torch.device("cpu")


def building(work: Path, arguments: argparse.Namespace) -> list[str]:
    """Build the CIFAR recipe's cache with untrained teachers, whose arithmetic costs what that of trained ones does."""
    torch.set_num_threads(os.cpu_count() or 1)
    torchvision()
    recipe = yaml.safe_load(Path("recipes/cifar10-small.yaml").read_text())
    for name, teacher in recipe["teachers"].items():
        torch.manual_seed(0)
        net = build_net(teacher["arch"], CLASSES, teacher.get("kwargs", {}))
        options = {"arch": teacher["arch"], "kwargs": teacher.get("kwargs", {}), "num_classes": CLASSES}
        card = Card(**options, preprocessing=Preprocessing(), weights_sha256="")
        save_teacher(work / "teachers" / name, net, card)
    config = {
        "data": {"source": "cifar10", "root": str(arguments.data.resolve()), "limit": arguments.build_rows},
        "teachers": {name: {"path": f"teachers/{name}"} for name in recipe["teachers"]},
        **recipe["cache"],
    }
    (work / "cache.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    plan = builder.plan_build(work / "cache.yaml", device=CPU)
    folder = work / "built"
    shutil.rmtree(folder, ignore_errors=True)
    spent = [0.0]
    with arithmetic_timed(plan, spent):
        start = time.perf_counter()
        builder.build(plan, folder, device=CPU, on_unit=lambda *_: None)
        seal(folder)
        wall = time.perf_counter() - start
    rest = wall - spent[0]
    lines = ["| rows | wall s | attacks and teachers s | the rest | share | ms a row |", "|---|---|---|---|---|---|"]
    lines.append(
        f"| {arguments.build_rows} | {wall:.1f} | {spent[0]:.1f} | {rest:.2f} | {100 * rest / wall:.1f} % | "
        f"{1000 * rest / arguments.build_rows:.2f} |"
    )
    return lines


class arithmetic_timed:  # noqa: N801
    """Adds up, in the block, the seconds inside an attack and inside a teacher's own forward pass."""

    def __init__(self, plan: builder.Plan, spent: list[float]) -> None:
        self.plan, self.spent, self.inside, self.start = plan, spent, False, 0.0

    def __enter__(self) -> None:
        original = self.original = PGD.__call__

        def attack(*words: object, **options: object) -> object:
            start, self.inside = time.perf_counter(), True
            try:
                return original(*words, **options)
            finally:
                self.inside = False
                self.spent[0] += time.perf_counter() - start

        def before(*_: object) -> None:
            self.start = time.perf_counter()

        def after(*_: object) -> None:
            self.spent[0] += 0.0 if self.inside else time.perf_counter() - self.start

        PGD.__call__ = attack
        hooks = [(t.register_forward_pre_hook(before), t.register_forward_hook(after)) for t in self.teachers()]
        self.hooks = [hook for pair in hooks for hook in pair]

    def __exit__(self, *_: object) -> None:
        PGD.__call__ = self.original
        for hook in self.hooks:
            hook.remove()

    def teachers(self) -> list[torch.nn.Module]:
        return list(self.plan.teachers.values())
