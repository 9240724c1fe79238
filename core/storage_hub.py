"""A dataset of the hub as a folder of files: read over HTTP at one commit, and written in commits of many files."""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from darht.core.errors import ConfigError, DarhtError
from darht.core.hub import ask_hub, commit_of, endpoint, forget_commits, hub_api, parse_hub
from darht.core.retry import RETRY_FOR
from darht.core.storage_remote import RemoteStorage

_FILES = 200  # of one commit: what was sent stays when the next one fails


@dataclass(frozen=True)
class HubStorage(RemoteStorage):
    """A folder of a dataset of the hub.

    Attributes:
        address: as the user wrote it, `hf://datasets/USER/NAME`.
    """

    address: str = ""

    def __str__(self) -> str:
        return self.address

    def name(self, key: str) -> str:
        """What to call a file in a message."""
        return f"{self.address}/{key}"

    def write(self, key: str, data: bytes) -> None:
        """Refused: a commit for each file would take hours."""
        raise DarhtError(
            f"cannot write {self.name(key)}: build into a folder, and darht-cache push it to {self.address}"
        )


def open_hub(address: str, retry_for: float = RETRY_FOR) -> HubStorage:
    """The folder behind a name such as `hf://datasets/USER/NAME`, at the commit that its revision stands for now.

    Raises:
        ConfigError: a name of another form, or the package is not installed.
        DarhtError, UnreachableError: the hub does not have it, or does not answer.
    """
    name = parse_hub(address)
    kind = "datasets/" if name.kind == "dataset" else ""
    url = f"{endpoint()}/{kind}{name.repo}/resolve/{commit_of(name, retry_for)}"
    return HubStorage(f"{url}/{name.folder}".rstrip("/"), retry_for, str(name))


def hub_files(address: str) -> dict[str, str]:
    """What a dataset holds, by key: the sha256 of large files and git's hash of others; made, private, if absent.

    Raises:
        DarhtError, UnreachableError: the hub refuses, or does not answer.
    """
    name, api = parse_hub(address), hub_api()
    if name.kind != "dataset":
        raise ConfigError(f"a cache goes to a dataset of the hub, hf://datasets/USER/NAME; got {address}")
    about = {"repo_type": name.kind, "revision": name.revision or None}
    if not name.revision:
        ask_hub(lambda: api.create_repo(name.repo, repo_type=name.kind, private=True, exist_ok=True), f"make {name}")
    info = ask_hub(lambda: api.repo_info(name.repo, files_metadata=True, **about), f"list {name}")
    within = f"{name.folder}/" if name.folder else ""
    files = [file for file in info.siblings or () if file.rfilename.startswith(within)]
    return {file.rfilename.removeprefix(within): file.lfs.sha256 if file.lfs else file.blob_id for file in files}


def git_hash(data: bytes) -> str:
    """The hash that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def commit_files(
    address: str,
    files: Mapping[str, Path | bytes],
    *,
    removed: Sequence[str] = (),
    on_file: Callable[[str], None],
) -> None:
    """Send files to a dataset of the hub, in their order, in commits of some hundred.

    Args:
        address: of the dataset.
        files: paths or contents by key.
        removed: keys that the first commit removes, but for those that it replaces.
        on_file: told each key that is done.

    Raises:
        DarhtError, UnreachableError: the hub refuses, or does not answer; earlier commits stay.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    name, api, keys = parse_hub(address), hub_api(), list(files)
    about = {"repo_type": name.kind, "revision": name.revision or None}

    def path(key: str) -> str:
        return f"{name.folder}/{key}".lstrip("/")

    for at in range(0, len(keys), _FILES):
        part = keys[at : at + _FILES]
        gone = [] if at else [CommitOperationDelete(path(key)) for key in removed if key not in part]
        changes = [*gone, *(CommitOperationAdd(path(key), files[key]) for key in part)]
        commit = functools.partial(api.create_commit, name.repo, changes, commit_message="darht-cache push", **about)
        ask_hub(commit, f"write {name}")
        for key in part:
            on_file(key)
    forget_commits()
