"""What a cache of ImageNet holds and costs, by counting: bytes of each array, operations of a build and of an epoch.

    python bench/imagenet_plan.py

Operations are counted by torch on its `meta` device, a multiplication and an addition as two; a backward pass to the
pixels and the weights is two forward passes, and one to the pixels alone is one. Nothing here is a measurement of time.
"""

import argparse
from collections.abc import Iterator

import torch
from torch.utils.flop_counter import FlopCounterMode

from darht.attacks import PGD
from darht.cache.format.layout import layouts
from darht.cache.format.spec import (
    AttackSpec,
    CacheSpec,
    DataSpec,
    PrecisionSpec,
    StoreSpec,
    TeacherSpec,
    ViewSpec,
    needed_version,
)
from darht.core.config import to_plain
from darht.core.nets import build
from darht.core.preprocessing import Preprocessing

ROWS, CLASSES, SIZE, VIEWS = 1_281_167, 1000, 224, 10
ARCHIVE = 147_897_477_120  # bytes of ILSVRC2012_img_train.tar
TEACHERS = ("wide_resnet50_2", "convnext_base", "vit_base_patch16_224", "swin_base_patch4_window7_224")
STUDENT = "resnet50"
ATTACK = PGD(eps=4, step=1, steps=3)
INNER_STEPS = 2  # of the student's own examples, in training


def imagenet(rows: int = ROWS) -> CacheSpec:
    """The spec of docs/imagenet.md, with so many rows."""
    views = ViewSpec("resized-crop", 0, True, VIEWS, SIZE, (0.25, 1.0), (0.75, 1.333))
    store = StoreSpec(rows_per_shard=1024, rows_per_chunk=128, images="jpeg")
    data = DataSpec("imagefolder", "train", rows, (3,), tuple(map(str, range(CLASSES))), "", 0.01, 3, 0, "decoder")
    card = {
        "kwargs": {},
        "preprocessing": Preprocessing(),
        "num_classes": CLASSES,
        "weights_sha256": "",
        "role": "robust",
    }
    return CacheSpec(
        data=data,
        views=views,
        teachers={arch: TeacherSpec(arch=arch, **card) for arch in TEACHERS},
        attacks={"pgd": AttackSpec("pgd", TEACHERS[0], 1, to_plain(ATTACK))},
        store=store,
        precision=PrecisionSpec(amp=True),
        seed=0,
        format_version=needed_version(data, views, store),
    )


def forward_operations(arch: str) -> int:
    """Operations of one forward pass on one image of 224 x 224 pixels."""
    with torch.device("meta"):
        net, x = build(f"timm:{arch}", CLASSES).eval(), torch.zeros(1, 3, SIZE, SIZE)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    return counter.get_total_flops()


def bytes_of_arrays(spec: CacheSpec) -> Iterator[tuple[str, float]]:
    """Bytes of every array: images as their archive has them, perturbations at 3 bits (docs/benchmarks-cache)."""
    for name, array in layouts(spec).items():
        raw = array.shape[0] * array.row_bytes
        if array.encoded:
            yield name, ARCHIVE / ROWS * spec.data.rows
        else:
            yield name, raw * (3 / 8 if array.kind == "delta" else 1)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    spec, forward = imagenet(), {arch: forward_operations(arch) for arch in (*TEACHERS, STUDENT)}
    for name, size in bytes_of_arrays(spec):
        print(f"{name:45} {size / 1e9:9.3f} GB")
    units = sum(array.shards for array in layouts(spec).values())
    print(f"units {units}, arrays {len(layouts(spec))}")
    for arch, count in forward.items():
        print(f"{arch:45} {count / 1e9:9.1f} GFLOP forward")
    asked = sum(forward[arch] for arch in TEACHERS)
    clean, attack = VIEWS * asked, ATTACK.steps * 2 * forward[TEACHERS[0]]
    rows = {"clean views": clean, "the attack": attack, "answers to it": asked, "build": clean + attack + asked}
    step = forward[STUDENT] * (2 * INNER_STEPS + 2 * 3)  # inner steps, then a clean and an adversarial pass both ways
    rows |= {"an epoch of the student": step, "the teachers, asked in every epoch": asked}
    for what, count in rows.items():
        print(f"{what:45} {count * ROWS / 1e18:9.2f} EFLOP")


if __name__ == "__main__":
    main()
