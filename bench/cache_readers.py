"""The readers that bench/cache.py measures: shuffled batches from a cache, and from the formats of other libraries."""

import argparse
import importlib.util
import io
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from darht.cache.read.feed_plan import plan_feed
from darht.cache.read.reader import Cache, open_cache
from darht.cache.read.stream import Feed
from darht.core.vision import torchvision

CPU = torch.device("cpu")
BATCH, TEACHERS, CLASSES = 256, ("a", "b", "c"), 10
Batches = Iterator[tuple[Tensor, ...]]


def rows_of(cache: Cache) -> Iterator[dict[str, np.ndarray]]:
    """Row by row: image, perturbation, label and six rows of logits."""
    for first in range(0, cache.rows, 1024):
        rows = slice(first, min(first + 1024, cache.rows))
        image, delta, label = (cache.read(name, rows) for name in ("image", "delta/pgd", "label"))
        logits = np.stack([cache.read(f"logits/{t}/{kind}", rows)[:, 0] for kind in ("clean", "pgd") for t in TEACHERS])
        for i in range(len(image)):
            yield {"image": image[i], "delta": delta[i, 0], "logits": logits[:, i], "label": label[i]}


# Reading: shuffled batches of 256 from each ------------------------------------------------------------------------


def gather(folder: Path, _: argparse.Namespace) -> Callable[[int], Batches]:
    """What nothing can beat: tensors in memory, and an index."""
    cache = open_cache(folder)
    logits = [cache.read(f"logits/{t}/{kind}") for kind in ("clean", "pgd") for t in TEACHERS]
    held = [torch.from_numpy(cache.read(name)) for name in ("image", "delta/pgd", "label")]
    held.append(torch.from_numpy(np.concatenate(logits, axis=1)))

    def epoch(number: int) -> Batches:
        order = torch.randperm(cache.rows, generator=torch.Generator().manual_seed(number))
        for at in order.split(BATCH):
            yield tuple(tensor.index_select(0, at) for tensor in held)

    return epoch


def darht(folder: Path, arguments: argparse.Namespace) -> Callable[[int], Batches]:
    """Every tensor of the rows of a batch, in memory or streamed, as a training step picks them."""
    from darht.cache.read.webdataset import open_shards

    cache = open_shards(folder)
    budget = arguments.budget / 1024 if arguments.workers else 8.0
    plan = plan_feed(cache, device=CPU, adversarial=True, batch=BATCH, budget_gib=budget)
    assert (plan.kind == "streamed") is bool(arguments.workers), plan
    feed = Feed(cache, plan, seed=0, epochs=arguments.epochs)

    def epoch(number: int) -> Batches:
        for data, at in feed.batches(number):
            yield tuple(tensor.index_select(0, at) for tensor in data.tensors()[1:])

    return epoch


def litdata(folder: Path, arguments: argparse.Namespace) -> Callable[[int], Batches]:
    from litdata import StreamingDataLoader, StreamingDataset

    # By default it decodes a whole run of rows for each one that is asked for, which shuffled rows waste.
    data = StreamingDataset(str(folder), shuffle=True, batch_decode=False)
    loader = StreamingDataLoader(data, batch_size=BATCH, num_workers=arguments.workers)
    return lambda number: iter(loader)


def litdata_write(cache: Cache, out: Path, chunk: int = 64 << 20) -> None:
    from litdata.streaming.cache import Cache as Writer

    out.mkdir()
    writer = Writer(str(out), chunk_bytes=chunk)
    for i, row in enumerate(rows_of(cache)):
        writer[i] = {name: torch.from_numpy(np.asarray(value)) for name, value in row.items()}
    writer.done()
    writer.merge()


def mosaicml(folder: Path, arguments: argparse.Namespace) -> Callable[[int], Batches]:
    stand_in()
    from streaming import StreamingDataset

    data = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH, num_workers=arguments.workers)
    return lambda number: iter(loader)


def mosaicml_write(cache: Cache, out: Path, chunk: int = 64 << 20) -> None:
    stand_in()
    from streaming import MDSWriter

    columns = {"image": "ndarray:uint8:3,32,32", "delta": "ndarray:int8:3,32,32", "logits": "ndarray:float16:6,10"}
    with MDSWriter(out=str(out), columns={**columns, "label": "int"}, size_limit=chunk) as writer:
        for row in rows_of(cache):
            writer.write({**row, "label": int(row["label"])})


def stand_in() -> None:
    """`streaming` imports three classes of transformers that image data never meets; empty ones do."""
    torchvision()
    if importlib.util.find_spec("transformers"):
        return
    names = {
        "feature_extraction_utils": "BatchFeature",
        "tokenization_utils_base": "BatchEncoding",
        "models.auto.tokenization_auto": "AutoTokenizer",
    }
    for module, name in names.items():
        parts = ["transformers", *module.split(".")]
        for depth in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:depth]), types.ModuleType(".".join(parts[:depth])))
        setattr(sys.modules[".".join(parts)], name, type(name, (), {}))


def webdataset(folder: Path, arguments: argparse.Namespace) -> Callable[[int], Batches]:
    import webdataset as wds

    names = ("image.npy", "delta.npy", "logits.npy", "label.npy")
    data = wds.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=100, empty_check=False)
    data = data.shuffle(2000).decode().to_tuple(*names)
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH, num_workers=arguments.workers)
    return lambda number: iter(loader)


def webdataset_write(cache: Cache, out: Path) -> None:
    import webdataset as wds

    out.mkdir()
    with wds.ShardWriter(str(out / "%05d.tar"), maxcount=2000, verbose=0) as writer:
        for i, row in enumerate(rows_of(cache)):
            writer.write({"__key__": f"{i:08d}", **{f"{name}.npy": npy(value) for name, value in row.items()}})


def npy(value: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, value)
    return buffer.getvalue()


def blocks_write(cache: Cache, out: Path) -> None:
    from darht.cache.export.webdataset import export_webdataset

    export_webdataset(cache, out, "blocks")


READERS = {
    "tensor gather": gather, "darht, resident": darht, "darht, streamed": darht, "darht, streamed from tars": darht,
    "LitData": litdata, "MosaicML Streaming": mosaicml, "WebDataset, entry per sample": webdataset,
}  # fmt: skip
WRITERS = {
    "LitData": litdata_write, "MosaicML Streaming": mosaicml_write, "WebDataset, entry per sample": webdataset_write,
    "darht, streamed from tars": blocks_write,
}  # fmt: skip
PACKAGES = {"LitData": "litdata", "MosaicML Streaming": "streaming", "WebDataset, entry per sample": "webdataset"}
WORKERS = {  # processes of the others; of ours 1 means "streamed", in threads
    "tensor gather": (0,), "darht, resident": (0,), "darht, streamed": (1,), "darht, streamed from tars": (1,),
}  # fmt: skip
