"""Build a cache from Python and train a student from it, on digits: `python examples/build_and_train.py [FOLDER]`."""

import sys
from pathlib import Path

import darht
from darht.trainer.cli import teacher as darht_teacher

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/build_and_train")
network = '--arch resnet18 --kwargs {"width":8,"blocks":[1,1,1,1]}'
recipe = "--algorithm pgd-at --set inner.eps=32 --set inner.step=16 --set inner.steps=3"
recipe += " --set optim.epochs=2 --set optim.batch_size=64 --set views.padding=1 --set views.flip=false"
darht_teacher(f"train --data digits {network} {recipe} --out {folder}/teacher".split(), standalone_mode=False)

spec = {
    "data": {"source": "digits", "limit": 300, "holdout": 0.1},
    "views": {"padding": 1, "flip": False, "count": 4},
    "teachers": {"resnet": {"path": str((folder / "teacher").resolve())}},
    "attacks": {"pgd": {"kind": "pgd", "teacher": "resnet", "eps": 32, "step": 16, "steps": 3}},
}
cache = darht.build_cache(spec, folder / "cache")
print(f"{cache.rows} rows, teachers {', '.join(cache.teachers)}, root hash {cache.root_hash[:12]}")

student = {"arch": "resnet18", "kwargs": {"width": 8, "blocks": [1, 1, 1, 1]}}
inner = {"kind": "pgd", "eps": 32, "step": 16, "steps": 3}
config = {"recipe": "rslad", "student": student, "inner": inner, "optim": {"epochs": 2, "batch_size": 64}}
darht.train(config, cache, folder / "run")
print(f"the student lies in {folder / 'run' / 'student'}")
