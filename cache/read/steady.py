"""Files that may not change under a reader: what is read later belongs to the bytes that were compared first."""

from darht.core.storage import Storage


class FileChanged(Exception):  # noqa: N818 - it is no error until the new bytes turn out to be others
    """A file is not the one that was touched first: another size, time or inode, or another ETag."""


class SteadyStorage:
    """Reads of a storage, that remember for each file what tells it from the one that may replace it."""

    def __init__(self, inner: Storage) -> None:
        self._inner = inner
        self._tags: dict[str, str] = {}

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes | None:
        """The bytes [start, stop) of a file, or None where there is none.

        Raises:
            FileChanged: it is not the file of the first read, or of the first since `forget`.
        """
        found = self._inner.read_tagged(key, start, stop)
        if found is None:
            return None
        if self._tags.setdefault(key, found[1]) != found[1]:
            raise FileChanged(key)
        return found[0]

    def sha256(self, key: str) -> str:
        """Of a file that was read, as who holds it says: the last word of its tag, where that is one."""
        return self._tags.get(key, "").rpartition(" ")[2]

    def forget(self, key: str) -> None:
        """The next read of a file is the first again."""
        self._tags.pop(key, None)

    def name(self, key: str) -> str:
        """What to call a file in a message."""
        return self._inner.name(key)

    @property
    def buffer(self) -> int:
        """The bytes to ask for at a time of a file that is read through."""
        return int(getattr(self._inner, "buffer", 1 << 20))
