"""Send a cache to the Hugging Face hub as a dataset: its files, a dataset card and Croissant metadata."""

import json
from collections.abc import Callable
from pathlib import Path

from darht.cache.admin.target import WHOLE, check_target
from darht.cache.export.croissant import CROISSANT, describe
from darht.cache.export.dataset_card import README, dataset_card
from darht.cache.format.manifest import SPEC
from darht.cache.format.tar_index import INDEX
from darht.cache.read.reader import Cache
from darht.core.errors import CorruptError
from darht.core.files import sha256_bytes
from darht.core.storage import open_storage
from darht.core.storage_hub import commit_files, git_hash, hub_files


def push_to_hub(
    cache: Cache, folder: Path, keys: list[str], address: str, on_bytes: Callable[[int], None]
) -> list[str]:
    """Send the files `keys` of a cache's folder; what the hub has with the same bytes is not sent again.

    The manifest or index of another state is gone from the first commit on, unless that replaces it. A dataset that is
    not there is made, private. Its `README.md` is written once: what people wrote there stays.

    Args:
        cache: in the folder.
        folder: where its files lie.
        keys: of its files, the manifest or the index last.
        address: `hf://datasets/USER/NAME`.
        on_bytes: told the bytes of each file that is done.

    Returns:
        The keys that were sent.

    Raises:
        SpecMismatchError: the dataset holds a cache of other data.
        ConfigError: not the name of a dataset, or the package is not installed.
        DarhtError, UnreachableError: the hub refuses, or does not answer.
    """
    there = hub_files(address)
    if SPEC in there or INDEX in there:
        check_target(open_storage(address), cache)
    files: dict[str, Path | bytes] = {} if README in there else {README: dataset_card(cache, address).encode()}
    described = (json.dumps(describe(cache), indent=2) + "\n").encode()
    if not _is_there(there.get(CROISSANT), described):
        files[CROISSANT] = described
    sizes = {}
    for key in keys:
        data = (folder / key).read_bytes()
        sizes[key] = len(data)
        if _is_there(there.get(key), data):
            on_bytes(len(data))
        else:
            files[key] = folder / key
    stale = [key for key in WHOLE if key in there and (key in files or key not in keys)]
    commit_files(address, files, removed=stale, on_file=lambda key: on_bytes(sizes.get(key, 0)))
    there = hub_files(address)
    if lacking := [key for key, data in files.items() if not _is_there(there.get(key), _bytes(data))]:
        raise CorruptError(f"{address}/{lacking[0]} does not hold what was sent; push again")
    return [key for key in files if key in sizes]


def _bytes(data: Path | bytes) -> bytes:
    return data if isinstance(data, bytes) else data.read_bytes()


def _is_there(stated: str | None, data: bytes) -> bool:
    return stated is not None and stated in (sha256_bytes(data), git_hash(data))
