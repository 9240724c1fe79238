"""A sealed cache made from arrays: planted perturbations and answers, without a network."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from darht.cache.builder.seal import seal
from darht.cache.format.commit import Commit, write_commit
from darht.cache.format.layout import layouts
from darht.cache.format.manifest import SPEC
from darht.cache.format.spec import AttackSpec, CacheSpec, DataSpec, PrecisionSpec, StoreSpec, TeacherSpec, ViewSpec
from darht.cache.format.store import Store
from darht.cache.sources.load import content_sha256
from darht.core.config import canonical_json
from darht.core.files import write_atomic
from darht.core.preprocessing import Preprocessing
from darht.core.storage import open_storage
from darht.tools.vectors import Floats

PGD = {"eps": 8.0, "step": 2.0, "steps": 10, "random_start": True, "norm": "linf", "objective": "ce"}


def write_cache(
    folder: Path,
    *,
    images: np.ndarray,
    labels: np.ndarray,
    deltas: dict[str, np.ndarray],
    logits: dict[str, dict[str, np.ndarray]],
    rows_per_shard: int = 1000,
    vanilla: tuple[str, ...] = (),
) -> Path:
    """Seal a cache whose attack `pgd-T` was crafted on teacher T.

    Args:
        folder: where it goes.
        images: uint8 `[N, 3, H, W]`.
        labels: `[N]`.
        deltas: by teacher, int8 `[N, 3, H, W]`.
        logits: by teacher, `[N, C]` by `clean` and by the name of each attack.
        rows_per_shard: S.
        vanilla: teachers that are not robust.
    """
    N, C = len(images), next(iter(logits.values()))["clean"].shape[1]
    classes = tuple(f"class {c}" for c in range(C))
    teacher = TeacherSpec("resnet18", {}, Preprocessing(), C, "", "robust")
    spec = CacheSpec(
        data=DataSpec("npz", "train", N, images.shape[1:], classes, content_sha256(images, labels, classes), 0.0),
        views=ViewSpec("identity", 0, False, 1),
        teachers={
            name: replace(teacher, weights_sha256=name, role="vanilla" if name in vanilla else "robust")
            for name in logits
        },
        attacks={f"pgd-{name}": AttackSpec("pgd", name, 1, PGD) for name in deltas},
        store=StoreSpec(rows_per_shard=rows_per_shard, rows_per_chunk=rows_per_shard // 8),
        precision=PrecisionSpec(),
        seed=0,
    )
    values = {"source_index": np.arange(N), "label": labels, "image": images, "views/offset": np.zeros((1, 3))}
    values |= {f"delta/pgd-{name}": delta[:, None] for name, delta in deltas.items()}
    values |= {f"logits/{t}/{kind}": value[:, None] for t, kinds in logits.items() for kind, value in kinds.items()}
    arrays, where = layouts(spec), open_storage(folder)
    store = Store(where)
    write_atomic(folder / SPEC, canonical_json(spec).encode())
    store.create(arrays)
    for name, array in arrays.items():
        for shard in range(array.shards):
            rows = array.rows(shard)
            size, sha256, _ = store.write(array, shard, np.ascontiguousarray(values[name][rows], dtype=array.dtype))
            commit = Commit(
                name, shard, (rows.start, rows.stop), array.fingerprint, size, sha256, 0.5, {"host": "here"}
            )
            write_commit(where, array, commit)
    seal(folder)
    return folder


def one_hot(classes: np.ndarray, count: int, scale: float = 6.0) -> np.ndarray:
    """Logits `[N, C]` that answer these classes."""
    return (scale * np.eye(count, dtype=np.float32)[classes]).astype(np.float16)


def levels(vectors: Floats, shape: tuple[int, ...] = (3, 8, 8)) -> np.ndarray:
    """Directions `[N, D]` as int8 perturbations of at most 127 levels, in fine steps."""
    scaled = 127 * vectors / np.abs(vectors).max(1, keepdims=True)
    return np.rint(scaled).astype(np.int8).reshape(len(vectors), *shape)
