"""How far a reader goes for a cache behind a URL: how long it waits for the server, and where it keeps a copy."""

from collections.abc import Iterable
from dataclasses import dataclass

from darht.cache.read.local_copy import CopiedStorage, CopySettings
from darht.core.retry import RETRY_FOR
from darht.core.storage import Storage
from darht.core.storage_remote import RemoteStorage


@dataclass(frozen=True)
class Reach:
    """Settings for caches behind URLs; folders of this machine need none.

    Attributes:
        copy: where shards are copied to; None to fetch what is needed whenever it is.
        retry_for: seconds for which a request that fails is tried again.
    """

    copy: CopySettings | None = None
    retry_for: float = RETRY_FOR

    def through_copy(self, folder: Storage, files: Iterable[tuple[str, int, str]]) -> Storage:
        """A folder whose files, given as key, bytes and sha256, are read from local copies where they may be."""
        if self.copy is None or not isinstance(folder, RemoteStorage):
            return folder
        return CopiedStorage(folder, self.copy, {key: (size, sha256) for key, size, sha256 in files})
