"""One student judged, and one set of targets held against the teachers themselves; each prints one JSON object.

python bench/quality_judge.py attack RUN --data DIR --images 300
python bench/quality_judge.py targets RUN --cache CACHE
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from attack_models import load_images

from darht.attacks import PGD, AutoAttack, Engine
from darht.cache.read.reader import open_cache
from darht.cache.read.stream import Feed
from darht.core.rng import RowRng
from darht.trainer.config import TrainConfig
from darht.trainer.state.checkpoint import load_student
from darht.trainer.student.distances import kl_rows
from darht.trainer.student.inner import Examples
from darht.trainer.student.losses import Darht
from darht.trainer.student.setup import feed_plan, live_teachers
from darht.trainer.student.targets import live_answer

PGD_IMAGES = 1000


def attacked(run: Path, data: Path, first: int, images: int) -> dict[str, object]:
    """Which test images the selected student gets right: under AutoAttack those from `first` to `images`, and, with the
    first part, clean and under PGD-20.

    What becomes of an image does not depend on those beside it, so parts can be put together.
    """
    student, _ = load_student(run / "student", torch.device("cpu"))
    net = student.fold().eval()
    x, y = load_images(data, "test_batch", max(PGD_IMAGES, images))
    engine = Engine(precision="bf16")
    found: dict[str, object] = {}
    if first == 0:
        generator = RowRng.create(0, "pgd", rows=torch.arange(len(y)))
        pgd = engine.run(PGD(eps=8, step=2, steps=20), net, x, y, generator=generator)
        found = {"clean": _bits(pgd.clean_correct), "pgd-20": _bits(pgd.robust)}
    few = slice(first, images)
    start = time.process_time()
    generator = RowRng.create(0, "autoattack", rows=torch.arange(first, images))
    worst = AutoAttack(eps=8, engine=engine).run(net, x[few], y[few], generator=generator)
    return found | {
        "autoattack": _bits(worst.robust),
        "warnings": list(worst.warnings),
        "judge_seconds": time.process_time() - start,
    }


def _bits(right: torch.Tensor) -> str:
    return "".join(str(int(one)) for one in right)


def closeness(run: Path, folder: Path, batches: int = 4) -> dict[str, object]:
    """How far each stand-in lies from the live teachers on the student's own PGD-10 examples of training rows.

    Mean KL(teacher || stand-in) in nats over teachers and rows, and how often both have the same class on top.
    """
    student, _ = load_student(run / "student", torch.device("cpu"))
    cache, result = open_cache(folder), {}
    base = TrainConfig(loss={"clean_share": 0.0})
    teachers = live_teachers(replace(base, teachers="live"), cache, {}, torch.device("cpu"))
    for targets in ("clean", "nearest", "first-order"):
        config = replace(base, targets=targets)
        examples = Examples(config, Darht(clean_share=0.0))
        distances, agree = [], []
        with Feed(cache, feed_plan(config, cache, torch.device("cpu"), 8.0), seed=0, epochs=1) as feed:
            for number, (data, at) in zip(range(batches), feed.batches(0), strict=False):
                step = examples.draw(student, data, at, epoch=0, number=number, done=0.5, pgd_share=0.0)
                with torch.no_grad():
                    said = live_answer(teachers)(step.x)
                distances.append(kl_rows(said, step.targets).flatten())
                agree.append((said.argmax(-1) == step.targets.argmax(-1)).flatten())
        result[targets] = {
            "kl": float(torch.cat(distances).mean()),
            "agreement": float(torch.cat(agree).double().mean()),
            "rows": sum(len(one) for one in distances) // len(teachers),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("attack", "targets"))
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--images", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "attack":
        print(json.dumps(attacked(options.run, options.data, options.first, options.images)))
    else:
        print(json.dumps(closeness(options.run, options.cache)))


if __name__ == "__main__":
    main()
