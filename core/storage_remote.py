"""Object stores and HTTP servers, through obstore: S3, Google Cloud, Azure, http(s).

Files are read in pieces, many at a time, so that no request is so long that it could not have a time limit, and
latency costs little. obstore works with threads of its own, which a fork does not copy: a process that was forked from
one that has read from a URL says so, and does not hang.
"""

import functools
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

from darht.core.errors import ConfigError, DarhtError
from darht.core.files import sha256_bytes
from darht.core.hub import hub_credentials
from darht.core.retry import LOG, RETRY_FOR, TransientError, patiently

SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "adl", "http", "https")
PIECE = 1 << 20  # bytes of one request
IN_FLIGHT = 32  # requests of one process at a time for pieces of files
SHA256 = "sha256"  # of a file, in the metadata that object stores keep of it
_TIMEOUT, _CONNECT, _WHOLE = 30, 10, 600  # seconds: a request, its connection, and a file from a server without ranges
_LASTING = re.compile(r"status code: (4(?!08|25|29)\d\d)|certificate|redirect without LOCATION", re.IGNORECASE)
_CAUSES = {
    "ConnectionRefused": "connection refused",
    "dns error": "no such host, or no name server",
    "InvalidCertificate": "its certificate is not valid",
    "TimedOut": "no answer in time",
    "ConnectionReset": "connection reset",
    "kind: Body": "half an answer",
    "UnexpectedEof": "half an answer",
}
_used_by: set[int] = set()  # processes in which obstore has threads; a forked one inherits it
_without_ranges: set[str] = set()  # hosts that send whole files whatever they are asked for
T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """Bytes of a file: the size of the whole, and a tag that changes with its contents as far as the server tells."""

    data: bytes
    size: int
    tag: str


@dataclass(frozen=True)
class RemoteStorage:
    """A folder behind a URL of an object store, or of an HTTP server, which can only be read.

    Settings and credentials come from the environment (`AWS_ENDPOINT_URL`, `AWS_PROFILE`, `GOOGLE_...`, `AZURE_...`),
    with boto3 where it is installed. To HTTP servers goes the token in `DARHT_TOKEN`, where it is set, or else what
    `~/.netrc` has for the host.

    Attributes:
        url: of the folder.
        retry_for: seconds for which a request that fails is tried again.
    """

    url: str
    retry_for: float = RETRY_FOR

    def __str__(self) -> str:
        return self.url

    @property
    def host(self) -> str:
        """The server, or the bucket."""
        return urlsplit(self.url).netloc.rpartition("@")[2]

    def name(self, key: str) -> str:
        """What to call a file in a message."""
        return f"{self.url}/{key}"

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes | None:
        """The bytes [start, stop) of a file, or None where there is none."""
        found = self.read_tagged(key, start, stop)
        return None if found is None else found[0]

    def read_tagged(self, key: str, start: int = 0, stop: int | None = None) -> tuple[bytes, str] | None:
        """As `read`, and the tag of the file that all of these bytes belong to; see `_tag`."""
        for _ in range(3):
            if not self.sends_ranges:
                break
            first = self.part(key, start, start + PIECE if stop is None else min(start + PIECE, stop))
            if first is None:
                return None
            end = first.size if stop is None else min(stop, first.size)
            starts = range(start + len(first.data), end, PIECE)
            if not starts:
                return first.data, first.tag
            fetch = functools.partial(self.part, key)
            rest = list(piece_pool(os.getpid()).map(fetch, starts, [min(at + PIECE, end) for at in starts]))
            if all(part is not None and part.tag == first.tag for part in rest):
                return b"".join([first.data, *(part.data for part in rest if part is not None)]), first.tag
        else:
            raise DarhtError(f"{self.name(key)} changes while it is read; see that nobody writes it, and run again")
        found = self._try("read", key, lambda: self._get(key))
        return None if found is None else (found.data[start:stop], found.tag)

    def part(self, key: str, start: int, stop: int) -> Part | None:
        """The bytes [start, stop) of a file in one request, or None where there is none.

        A server that knows no ranges gives the first of them at the cost of the whole file; see `sends_ranges`.
        """
        if stop <= start:
            return Part(b"", 0, "")

        def fetch() -> Part | None:
            import obstore

            try:
                found = obstore.get(self._store(), key, options={"range": (start, stop)})
                return Part(bytes(found.bytes()), found.meta["size"], _tag(found))
            except obstore.exceptions.NotSupportedError:
                self._note_no_ranges()
            except obstore.exceptions.BaseError as error:
                if "status code: 416" not in str(error):  # the file ends before, or is empty
                    raise
            whole = self._get(key)
            return replace(whole, data=whole.data[start:stop])

        return self._try("read", key, fetch)

    @property
    def sends_ranges(self) -> bool:
        """Whether parts of files can be had, as far as is known."""
        return self.host not in _without_ranges

    @property
    def buffer(self) -> int:
        """The bytes to ask for at a time of a file that is read through."""
        return PIECE * IN_FLIGHT // 2 if self.sends_ranges else 1 << 62

    def _note_no_ranges(self) -> None:
        if self.sends_ranges:
            _without_ranges.add(self.host)
            LOG.warning(f"{self.host} sends whole files where a part is asked for: a local copy fetches each file once")

    def _get(self, key: str) -> Part:
        """A file in one request: for servers that send no less."""
        import obstore

        found = obstore.get(_open(self.url, _WHOLE, os.getpid()), key)
        return Part(bytes(found.bytes()), found.meta["size"], _tag(found))

    def size(self, key: str) -> int | None:
        """The bytes of a file, or None where there is none."""
        found = self._head(key)
        return None if found is None else int(found["size"])

    def modified(self, key: str) -> float | None:
        """When a file was written, in seconds since the epoch, or None where there is none."""
        found = self._head(key)
        return None if found is None else float(found["last_modified"].timestamp())

    def write(self, key: str, data: bytes) -> None:
        """Replace a file and note its sha256 with it; of a large one, which goes in parts, nobody sees some alone."""
        import obstore

        if self.url.startswith("http"):
            raise DarhtError(
                f"cannot write {self.name(key)}: http:// does not replace files at once; give a folder or an s3:// URL"
            )
        noted = {SHA256: sha256_bytes(data)}
        if self._try("write", key, lambda: obstore.put(self._store(), key, data, attributes=noted)) is None:
            raise DarhtError(f"cannot write {self.name(key)}: there is no such bucket or folder; make it first")

    def remove(self, key: str) -> None:
        """Remove a file; nothing happens where there is none."""
        import obstore

        self._try("remove", key, lambda: obstore.delete(self._store(), key))

    def listing(self, prefix: str = "") -> dict[str, tuple[int, str]]:
        """Bytes and ETag of every file under a folder of the place, by key in order: one request for a thousand."""
        import obstore

        if self.url.startswith("http"):
            raise DarhtError(f"cannot list {self.url}: HTTP servers list no files; use a folder or an s3:// URL")

        def ask() -> dict[str, tuple[int, str]]:
            listed = (item for items in obstore.list(self._store(), prefix or None) for item in items)
            return {item["path"]: (item["size"], (item["e_tag"] or "").strip('"')) for item in listed}

        return dict(sorted((self._try("list", prefix, ask) or {}).items()))

    def keys(self, prefix: str = "") -> list[str]:
        """Every file under a folder of the place, in order."""
        return list(self.listing(prefix))

    def is_free(self) -> bool:
        """Whether nothing is there."""
        return not self.keys()

    def _head(self, key: str) -> Any:
        import obstore

        return self._try("read", key, lambda: obstore.head(self._store(), key))

    def _store(self) -> Any:
        return _open(self.url, _TIMEOUT, os.getpid())

    def _try(self, what: str, key: str, action: Callable[[], T]) -> T | None:
        """What `action` gives, or None when the file is not there."""

        def once() -> T | None:
            from obstore import exceptions

            try:
                return action()
            except (FileNotFoundError, exceptions.NotFoundError):
                return None
            except (exceptions.BaseError, OSError) as error:
                if "status code: 404" in str(error):  # listing what is not there, which obstore knows no class for
                    return None
                raise self._explained(error, what, key) from error

        return patiently(once, f"{what} {self.name(key)}", self.host, self.retry_for)

    def _explained(self, error: Exception, what: str, key: str) -> Exception:
        """A TransientError, or a DarhtError with the fix of what cannot get better."""
        from obstore import exceptions

        text, name = str(error), self.name(key)
        if isinstance(error, exceptions.UnauthenticatedError):
            return DarhtError(f"cannot {what} {name}: 401, no valid credentials; {self._credentials_fix}")
        if isinstance(error, exceptions.PermissionDeniedError | PermissionError):
            return DarhtError(f"cannot {what} {name}: 403, permission denied; {self._permission_fix}")
        lasting = _LASTING.search(text)
        if not lasting:
            return TransientError(_cause(text))
        if "certificate" in lasting[0].lower():
            fix = "trust its authority by SSL_CERT_FILE=CA.pem, or have the server's certificate renewed"
            return DarhtError(f"cannot {what} {name}: the certificate of {self.host} is not valid; {fix}")
        if "redirect" in lasting[0]:
            return DarhtError(f"cannot {what} {name}: the bucket is in another region; set AWS_REGION to its own")
        return DarhtError(f"cannot {what} {name}: the server refuses with {lasting[1]}; see that the URL is right")

    @property
    def _credentials_fix(self) -> str:
        if self.url.startswith("http"):
            return f"set DARHT_TOKEN, or write a line for {self.host} into ~/.netrc"
        return "set the credentials of the store, for S3 AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"

    @property
    def _permission_fix(self) -> str:
        if self.url.startswith("http"):
            return f"{self._credentials_fix} for a user who may read it"
        return (
            "allow s3:GetObject on it and s3:ListBucket on its bucket (s3:PutObject and s3:DeleteObject to write), or "
            "use other credentials"
        )


def _tag(found: Any) -> str:
    """The ETag of a file, or when it was written; behind it the sha256, where who wrote it noted that."""
    meta = found.meta
    tag = str(meta["e_tag"] or "").strip('"') or f"{meta['last_modified'].isoformat()} {meta['size']}"
    return f"{tag} {found.attributes.get(SHA256, '')}".strip()


def _cause(text: str) -> str:
    """The reason in an error of obstore, whose root stands deep in a nested dump."""
    status = re.search(r"status code: (\d+ [A-Za-z ]+)", text)
    if status:
        return status[1].strip()
    for pattern, cause in _CAUSES.items():
        if pattern in text:
            return cause
    return " ".join(text.partition("\n")[0].rpartition(" - ")[2].split())[:200]


_LOCK = threading.Lock()


@functools.lru_cache
def piece_pool(process: int) -> ThreadPoolExecutor:
    """The threads of this process that fetch pieces of files; none of them waits for another."""
    return ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix=f"darht-pieces-{process}")


@functools.lru_cache
def _open(url: str, timeout: float, process: int) -> Any:
    """One for each process and time limit."""
    try:
        import obstore.store
    except ImportError as error:
        raise ConfigError(f"{url} needs a package that is not installed: pip install obstore") from error
    with _LOCK:
        if _used_by and process not in _used_by:
            raise DarhtError(
                f"process {process} was forked from one that has read {url}, whose threads it lacks: spawn it, "
                "with multiprocessing_context='spawn' for a DataLoader"
            )
        _used_by.add(process)
    scheme = urlsplit(url).scheme
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3", os.environ.get("AWS_ENDPOINT_URL", ""))
    client: dict[str, Any] = {
        "timeout": timedelta(seconds=timeout),
        "connect_timeout": timedelta(seconds=_CONNECT),
        "allow_http": scheme == "http" or endpoint.startswith("http://"),
    }
    options: dict[str, Any] = {"client_options": client, "retry_config": {"max_retries": 0}}
    if scheme in ("http", "https"):
        client["default_headers"] = _credentials(url)
    elif scheme in ("s3", "s3a"):
        options |= _from_boto3()
    try:
        return obstore.store.from_url(url, **options)
    except (ValueError, obstore.exceptions.BaseError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{url} is no location that can be used: {reason}") from error


def _credentials(url: str) -> dict[str, str]:
    if (own := hub_credentials(url)) is not None:
        return own
    token = os.environ.get("DARHT_TOKEN", "").strip()
    if token:
        return {"Authorization": f"Bearer {token}"}
    import base64
    import netrc

    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(urlsplit(url).hostname or "")
    except (OSError, netrc.NetrcParseError):
        known = None
    if known is None:
        return {}
    return {"Authorization": "Basic " + base64.b64encode(f"{known[0]}:{known[2]}".encode()).decode()}


def _from_boto3() -> dict[str, Any]:
    """Profiles, single sign-on and roles, which boto3 knows; keys in the environment need no boto3."""
    if "AWS_ACCESS_KEY_ID" in os.environ or os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true"):
        return {}
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider

        return {"credential_provider": Boto3CredentialProvider()}
    except (ImportError, ValueError):  # not installed, or it knows none: the machine's own role may do
        return {}
