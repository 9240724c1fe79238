"""What lies where a cache is copied to: nothing, a state of the same cache, or something that is left alone."""

from collections.abc import Mapping

from darht.cache.format.manifest import MANIFEST, SPEC
from darht.cache.format.spec import CacheSpec
from darht.cache.format.tar_index import INDEX, Index
from darht.cache.read.reader import Cache
from darht.core.config import parse_canonical
from darht.core.errors import ConfigError, SpecMismatchError
from darht.core.storage import Readable, Storage

WHOLE = (MANIFEST, INDEX)  # either of them makes a folder look whole


def check_target(there: Readable, cache: Cache) -> None:
    """See that no cache or export of other data lies there, over which nothing may be pushed.

    Raises:
        SpecMismatchError: one does, or what nobody can tell.
    """
    own = cache.spec.data.sha256
    for key in (SPEC, INDEX):
        data = there.read(key)
        found = own if data is None else _data_of(key, data)
        if found != own:
            what = f"data {found[:12]}" if found else "what this version does not know"
            raise SpecMismatchError(
                f"{there.name(key)} describes {what}, {cache.folder} holds data {own[:12]}: push to another URL"
            )


def _data_of(key: str, data: bytes) -> str:
    """The sha256 of the data that a spec or an index is about; empty where it is neither."""
    try:
        spec = parse_canonical(Index, data, key).spec if key == INDEX else parse_canonical(CacheSpec, data, key)
    except ConfigError:
        return ""
    return spec.data.sha256


def unseal(place: Storage, described: Mapping[str, bytes]) -> None:
    """Let another state of a cache not look whole until all of the new one is there."""
    for key in WHOLE:
        if place.read(key) not in (None, described.get(key)):
            place.remove(key)
