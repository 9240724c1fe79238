"""Names of the Hugging Face hub: `hf://datasets/USER/NAME` for caches, `hf://USER/NAME` for teachers and students.

`@REVISION` may follow the name, and a folder in the repository. A branch is looked up once in a process and stands for
its commit from then on, so that nothing that is read changes underneath.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from darht.core.errors import ConfigError, DarhtError
from darht.core.retry import RETRY_FOR, TransientError, patiently

SCHEME = "hf://"
FILES = ("teacher.json", "teacher.safetensors", "config.json", "model.safetensors", "README.md")
_NAME = re.compile(r"(datasets/)?((?!datasets/|spaces/)[\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/([\w./-]+))?")
_COMMITS: dict["HubName", str] = {}
T = TypeVar("T")


@dataclass(frozen=True)
class HubName:
    """What a name means: a repository, its revision, and a folder in it; each may be empty but the repository."""

    kind: str
    repo: str
    revision: str
    folder: str

    def __str__(self) -> str:
        kind, at = "datasets/" if self.kind == "dataset" else "", f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}{kind}{self.repo}{at}" + (f"/{self.folder}" if self.folder else "")


def is_hub(name: str | Path) -> bool:
    """Whether this is a name of the hub, also where a path made one slash of two."""
    return re.match("hf:/", str(name)) is not None


def parse_hub(name: str | Path) -> HubName:
    """What a name of the hub means.

    Raises:
        ConfigError: it has another form.
    """
    found = _NAME.fullmatch(re.sub("^hf:/+", "", str(name)).rstrip("/"))
    if found is None or ".." in str(name):
        raise ConfigError(f"a name of the hub reads hf://datasets/USER/NAME or hf://USER/NAME; got '{name}'")
    datasets, repo, revision, folder = found.groups()
    return HubName("dataset" if datasets else "model", repo, revision or "", folder or "")


def endpoint() -> str:
    """The hub's address: `HF_ENDPOINT`, or the public one."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def hub_credentials(url: str) -> dict[str, str] | None:
    """Headers for a URL of the hub, which gets its own token and no other; None for other hosts."""
    if urlsplit(url).netloc != urlsplit(endpoint()).netloc:
        return None
    try:
        token = _library().get_token()
    except ConfigError:  # a plain https:// URL, without the package
        token = os.environ.get("HF_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}


def hub_api() -> Any:
    """The hub's API, with the token of `HF_TOKEN` or `hf auth login`.

    Raises:
        ConfigError: the package is not installed.
    """
    library = _library()
    library.utils.disable_progress_bars()  # the commands show their own
    return library.HfApi(endpoint=endpoint())


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConfigError("hf:// needs a package that is not installed: pip install 'darht[hub]'") from error
    return huggingface_hub


def commit_of(name: HubName, retry_for: float = RETRY_FOR) -> str:
    """The commit that a name stands for in this process.

    Raises:
        DarhtError: no such repository or revision, or nobody may read it.
        UnreachableError: the hub does not answer.
    """
    if name not in _COMMITS:
        about = {"repo_type": name.kind, "revision": name.revision or None}
        found = ask_hub(lambda: hub_api().repo_info(name.repo, **about).sha, f"read {name}", retry_for)
        _COMMITS[name] = str(found)
    return _COMMITS[name]


def forget_commits() -> None:
    """Look every name up again: this process has written to the hub."""
    _COMMITS.clear()


def ask_hub(action: Callable[[], T], what: str, retry_for: float = RETRY_FOR) -> T:
    """What a call of the hub's API gives, tried again while it may get better.

    Raises:
        DarhtError: the hub refuses.
        UnreachableError: it does not answer.
    """
    errors = _library().errors

    def once() -> T:
        try:
            return action()
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.GatedRepoError) as error:
            raise DarhtError(
                f"cannot {what}: the hub has no such repository or revision, or you may not read it; see the name, "
                "and set HF_TOKEN or run hf auth login for a private one"
            ) from error
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            if status in (408, 429) or status >= 500:
                raise TransientError(f"{status} {error.response.reason_phrase}") from error
            fix = "set HF_TOKEN to a token that may write" if status in (401, 403) else "see that the name is right"
            raise DarhtError(f"cannot {what}: the hub refuses with {status}; {fix}") from error
        except errors.OfflineModeIsEnabled as error:
            raise DarhtError(f"cannot {what}: HF_HUB_OFFLINE keeps the hub from being asked; unset it") from error
        except (errors.HTTPError, OSError) as error:
            raise TransientError(" ".join(f"{type(error).__name__}: {error}".split())) from error

    return patiently(once, what, urlsplit(endpoint()).netloc, retry_for)


def fetched(folder: Path) -> Path:
    """A folder as it is; of a teacher or a student on the hub, that in which its files lie after they were fetched.

    They lie in the hub's own cache (`HF_HOME`), one folder for each commit.

    Raises:
        ConfigError: a name of another form, or of a dataset.
        DarhtError, UnreachableError: the hub does not have it, or does not answer.
    """
    if not is_hub(folder):
        return folder
    name = parse_hub(folder)
    if name.kind != "model":
        raise ConfigError(f"{name} is a dataset, so a cache; a teacher or a student is hf://USER/NAME")
    patterns = [f"{name.folder}/{file}" if name.folder else file for file in FILES]
    wanted = {"revision": commit_of(name), "allow_patterns": patterns}
    return Path(ask_hub(lambda: hub_api().snapshot_download(name.repo, **wanted), f"read {name}")) / name.folder
