"""Kill builds, at random moments and at every point of their protocol, and see what is left of them.

    python bench/crash.py --kills 200

Every build is killed with SIGKILL (every fourth one twice), then run again to its end. A row of the table says at which
moment it was killed, how many units were done by then, whether the restart computed exactly the others, and whether all
bytes are those of a build that nobody killed. Exits with 1 when any differ.
"""

import argparse
import itertools
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from crash_server import CrashServer, Ended, Fault, kill_and_recover


def faults(units: int, metadata: int, rng: random.Random) -> list[Fault]:
    """Every named point once; for files that there are many of, which of them is drawn."""
    moments = ("half", "before rename", "after rename")
    many = {"shard": units, "commit": units, "metadata": metadata}
    single = [Fault(file, moment) for file in ("spec", "origin", "manifest") for moment in moments]
    drawn = [Fault(file, moment, rng.randint(1, count)) for file, count in many.items() for moment in moments]
    return [*single, *drawn, Fault("commit", "after rename", units), Fault("seal", "looks", rng.randint(1, units))]


def write_config(folder: Path) -> Path:
    """120 digits in shards of 24, nine views, one small teacher, one attack: 31 units, about a second."""
    import torch

    from darht.cache.builder.teachers import Card, save_teacher
    from darht.core.nets import build

    torch.manual_seed(0)
    kwargs = {"width": 4, "blocks": [1, 1, 1, 1]}
    card = Card(arch="resnet18", kwargs=kwargs, num_classes=10, weights_sha256="")
    save_teacher(folder / "teacher", build("resnet18", 10, kwargs), card)
    config = {
        "data": {"source": "digits", "limit": 120},
        "views": {"padding": 1, "flip": False},
        "teachers": {"cnn": {"path": "teacher"}},
        "attacks": {"pgd": {"kind": "pgd", "teacher": "cnn", "eps": 32, "step": 8, "steps": 3}},
        "store": {"rows_per_shard": 24, "rows_per_chunk": 8},
    }
    (folder / "cache.yaml").write_text(yaml.safe_dump(config))
    return folder / "cache.yaml"


def kills(count: int, whole: Ended, metadata: int, rng: random.Random) -> list[tuple[str, dict[str, Any]]]:
    """Half of them random moments, the other half named points, each with what to call it."""
    named = itertools.chain.from_iterable(faults(whole.computed, metadata, rng) for _ in itertools.count())
    chosen: list[tuple[str, dict[str, Any]]] = []
    for i in range(count):
        if i % 2:
            fault = next(named)
            chosen.append((str(fault), {"fault": fault}))
        else:
            moment = rng.uniform(0, whole.seconds)
            chosen.append((f"after {moment:.3f} s", {"kill_after": moment}))
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, tally, start = random.Random(options.seed), Counter[str](), time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with CrashServer(write_config(folder)) as server:
            reference = folder / "reference"
            whole = server.build(reference)
            metadata = len(list(reference.rglob("zarr.json")))
            print(f"reference: {whole.computed} units in {whole.seconds:.2f} s, root hash {whole.root_hash}\n")
            print("| killed | units done | recovered | same bytes |\n|---|---|---|---|")
            for i, (moment, kill) in enumerate(kills(options.kills, whole, metadata, rng)):
                out = folder / f"cache-{i}"
                if i % 4 == 0:
                    server.build(out, kill_after=rng.uniform(0, whole.seconds))
                result = kill_and_recover(server, out, reference, **kill)
                wrong, right = "; ".join(result.problems), result.ended.root_hash == whole.root_hash
                tally["killed" if result.killed else "ended before the kill"] += 1
                tally["wrong"] += bool(wrong) or not right
                recovered = wrong or f"{result.ended.computed} computed"
                when = moment if result.killed else f"{moment}: had ended"
                print(f"| {when} | {result.done} | {recovered} | {'yes' if right else 'NO'} |", flush=True)
    print(f"\n{dict(tally)} in {time.perf_counter() - start:.0f} s")
    sys.exit(tally["wrong"] > 0)


if __name__ == "__main__":
    main()
