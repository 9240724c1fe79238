"""Build a cache from Python and train a student from it, on digits: `python examples/build_and_train.py [FOLDER]`."""

import sys
from pathlib import Path

import darht

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/build_and_train")
network = {"arch": "resnet18", "kwargs": {"width": 8, "blocks": [1, 1, 1, 1]}}
inner = {"kind": "pgd", "eps": 32, "step": 16, "steps": 3}
optim = {"epochs": 2, "batch_size": 64}
teaching = {"algorithm": "pgd-at", "inner": inner, "optim": optim, "views": {"padding": 1, "flip": False}}
card = darht.train_teacher(teaching, {"source": "digits"}, network, folder / "teacher")
print(f"the teacher is right on {card.accuracy['digits test']['clean']:.1f} % of the test images")

spec = {
    "data": {"source": "digits", "limit": 300, "holdout": 0.1},
    "views": {"padding": 1, "flip": False, "count": 4},
    "teachers": {"resnet": {"path": str((folder / "teacher").resolve())}},
    "attacks": {"pgd": {"kind": "pgd", "teacher": "resnet", "eps": 32, "step": 16, "steps": 3}},
}
cache = darht.build_cache(spec, folder / "cache")
print(f"{cache.rows} rows, teachers {', '.join(cache.teachers)}, root hash {cache.root_hash[:12]}")

config = {"recipe": "rslad", "student": network, "inner": inner, "optim": optim}
darht.train(config, cache, folder / "run")
print(f"the student lies in {folder / 'run' / 'student'}")
