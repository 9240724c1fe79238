"""Builds that are killed: a server that imports and plans once and forks a child for each build, and its client.

    with CrashServer(Path("cache.yaml")) as server:
        server.build(out, fault=Fault("commit", "half", 3))   # killed in the middle of writing the third record
        server.build(out)                                     # goes on, and seals

The server is single-threaded, so that forking it is safe. Faults are patched into the child; production code has no
hook for them. Shared by the tests and by bench/crash.py.
"""

import contextlib
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forking import ForkServer

FILES = ("spec", "metadata", "origin", "shard", "commit", "manifest")
MOMENTS = ("half", "before rename", "after rename")


@dataclass(frozen=True)
class Fault:
    """Where a build kills itself: at a moment of writing the `count`-th file of a kind, or of `seal`'s `count`-th look.

    Kinds are FILES with MOMENTS ('half': cut to half before its fsync), and ('seal', 'looks').
    """

    file: str
    moment: str
    count: int = 1

    def __str__(self) -> str:
        return f"{self.moment}, {self.file} {self.count}"


@dataclass(frozen=True)
class Ended:
    """How a build ended: by a signal, with an error, or with a root hash."""

    signal: int = 0
    error: str = ""
    exit_code: int = 0
    root_hash: str = ""
    computed: int = 0
    reused: int = 0
    seconds: float = 0.0


class CrashServer(ForkServer):
    """The client's side."""

    def __init__(self, config: Path) -> None:
        super().__init__(__file__, str(config))

    def build(self, out: Path, **options: Any) -> Ended:
        """Build and seal in a child.

        Args:
            out: the cache.
            options: `fault` (a Fault), `kill_after` (seconds from the fork to SIGKILL), `file_limit` (bytes,
                RLIMIT_FSIZE), `unprivileged` (no capabilities: permissions hold for root as well), `clock`
                ('backwards').
        """
        return self.together([out], **options)[0]

    def together(self, outs: list[Path], **options: Any) -> list[Ended]:
        """Builds that run at the same time, each in a child of its own."""
        if "fault" in options:
            options["fault"] = dataclasses.astuple(options["fault"])
        return [Ended(**ended) for ended in self.ask({"outs": [str(out) for out in outs], **options})]


@dataclass(frozen=True)
class Recovery:
    """What was there after a kill, and what came out of going on."""

    killed: bool
    done: int
    ended: Ended
    problems: tuple[str, ...]


def kill_and_recover(server: CrashServer, out: Path, reference: Path, **kill: Any) -> Recovery:
    """Kill a build of `out`, check what counts as done, go on, and compare each byte with an uninterrupted build."""
    killed = server.build(out, **kill)
    done, problems = count_done(out, reference)
    ended = server.build(out)
    if (ended.reused, ended.error) != (done, ""):
        problems.append(f"{ended.reused} units reused, {done} were done; {ended.error}")
    if contents(out) != contents(reference):
        problems.append("other bytes than without the kill")
    return Recovery(killed.signal == signal.SIGKILL, done, ended, tuple(problems))


def count_done(out: Path, reference: Path) -> tuple[int, list[str]]:
    """How many units count as done, and every one of them that is not: whose bytes are not the reference's."""
    from darht.cache.format.commit import State, unit_state
    from darht.cache.format.layout import layouts, shard_key
    from darht.cache.format.manifest import read_spec
    from darht.core.storage import open_storage

    units = [(array, shard) for array in layouts(read_spec(reference)).values() for shard in range(array.shards)]
    done = [(array, shard) for array, shard in units if unit_state(open_storage(out), array, shard)[0] is State.DONE]
    keys = [shard_key(array, shard) for array, shard in done]
    problems = [f"{key} is not done" for key in keys if (out / key).read_bytes() != (reference / key).read_bytes()]
    if (out / "manifest.json").exists() and len(done) < len(units):
        problems.append("sealed before all was done")
    return len(done), problems


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but what killed writes leave; of those that tell of time and place, only that they are there."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".tmp"))
    keys = {path.relative_to(folder).as_posix(): path for path in files}
    return {
        key: b"" if key.startswith("commits/") or key == "origin.json" else path.read_bytes()
        for key, path in keys.items()
    }


def plan_of_a_mortal(config: Path, marker: Path, *, device: Any) -> Any:
    """A plan whose first teacher kills the process that asks it, unless `marker` is there; it makes that first."""
    from torch import Tensor, nn

    from darht.cache.builder.build import plan_build

    class Mortal(nn.Module):
        def __init__(self, teacher: nn.Module) -> None:
            super().__init__()
            self.teacher = teacher

        def forward(self, x: Tensor) -> Tensor:
            with contextlib.suppress(FileExistsError):
                os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
                os.kill(os.getpid(), signal.SIGKILL)
            answer: Tensor = self.teacher(x)
            return answer

    plan = plan_build(config, device=device)
    return dataclasses.replace(plan, teachers={name: Mortal(teacher).eval() for name, teacher in plan.teachers.items()})


# ---------------------------------------------------------------------------------------------- the server's side


def serve(config: Path) -> None:
    """Fork a child, or several, for every line on stdin; answer each with a line."""
    import gc

    import torch

    from darht.cache.builder.build import plan_build

    torch.set_num_threads(1)
    plan = plan_build(config, device=torch.device("cpu"))
    gc.freeze()  # a collection in a child would copy all that it shares with this process
    answers = sys.stdout
    for line in sys.stdin:
        order = json.loads(line)
        children = [_fork(plan, Path(out), order) for out in order["outs"]]
        answers.write(json.dumps([_wait(*child, order.get("kill_after")) for child in children]) + "\n")
        answers.flush()


def _fork(plan: Any, out: Path, order: dict[str, Any]) -> tuple[int, int]:
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        return child, reading
    try:
        os.write(writing, json.dumps(_child(plan, out, order)).encode())
        os._exit(0)
    finally:
        os._exit(70)


def _wait(child: int, reading: int, kill_after: float | None) -> dict[str, Any]:
    import select

    if kill_after is not None and not select.select([reading], [], [], kill_after)[0]:
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return {"signal": os.WTERMSIG(status)}
    return json.loads(answer) if answer else {"error": f"exit status {status}: see stderr"}


def _child(plan: Any, out: Path, order: dict[str, Any]) -> dict[str, Any]:
    import gc
    import time

    import torch

    from darht.cache.builder.build import build
    from darht.cache.builder.seal import seal
    from darht.core.errors import DarhtError

    start = time.perf_counter()
    with _conditions(out, order):
        gc.disable()
        try:
            report = build(plan, out, device=torch.device("cpu"), on_unit=lambda array, shard, seconds: None)
            manifest = seal(out)
        except DarhtError as error:
            return {"error": str(error), "exit_code": error.exit_code}
    seconds = time.perf_counter() - start
    return {
        "root_hash": manifest.root_hash,
        "computed": report.computed,
        "reused": report.reused,
        "seconds": seconds,
    }


@contextlib.contextmanager
def _conditions(out: Path, order: dict[str, Any]) -> Iterator[None]:
    """Make the child's world as ordered; it ends with the child."""
    import resource

    if order.get("unprivileged"):
        drop_capabilities()
    if limit := order.get("file_limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if order.get("clock") == "backwards":
        _turn_the_clock_back()
    if fault := order.get("fault"):
        _patch(out, Fault(*fault))
    yield


def drop_capabilities() -> None:
    """Give up every capability, so that permissions hold for root too (Linux's capset, version 3, this process)."""
    import ctypes

    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")


def _turn_the_clock_back() -> None:
    """Every look at the wall clock finds it an hour earlier than the last."""
    import time

    now = [time.time()]

    def earlier() -> float:
        now[0] -= 3600
        return now[0]

    gmtime = time.gmtime
    time.time = earlier
    time.gmtime = lambda seconds=None: gmtime(earlier() if seconds is None else seconds)


def _patch(out: Path, fault: Fault) -> None:
    """Kill this process at a fault."""
    import tempfile

    from darht.cache.builder import seal

    written: dict[int, Path] = {}
    seen = [0]
    mkstemp, fsync, replace, inspect = tempfile.mkstemp, os.fsync, Path.replace, seal.inspect_unit

    def reached(file: str, moment: str) -> bool:
        seen[0] += (file, moment) == (fault.file, fault.moment)
        return (file, moment) == (fault.file, fault.moment) and seen[0] == fault.count

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def watched_mkstemp(*, prefix: str, suffix: str, dir: Path) -> tuple[int, str]:
        descriptor, name = mkstemp(prefix=prefix, suffix=suffix, dir=dir)
        written[descriptor] = dir / prefix.strip(".")
        return descriptor, name

    def watched_fsync(descriptor: int) -> None:
        if descriptor in written and reached(_kind(out, written.pop(descriptor)), "half"):
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            die()
        fsync(descriptor)

    def watched_replace(path: Path, target: Path) -> Path:
        if reached(_kind(out, target), "before rename"):
            die()
        moved = replace(path, target)
        if reached(_kind(out, target), "after rename"):
            die()
        return moved

    def watched_look(*arguments: Any, **options: Any) -> Any:
        if reached("seal", "looks"):
            die()
        return inspect(*arguments, **options)

    tempfile.mkstemp, os.fsync, Path.replace, seal.inspect_unit = (  # type: ignore[assignment,method-assign]
        watched_mkstemp, watched_fsync, watched_replace, watched_look,
    )  # fmt: skip


def _kind(out: Path, path: Path) -> str:
    key = path.relative_to(out).as_posix()
    names = {"spec.json": "spec", "origin.json": "origin", "manifest.json": "manifest"}
    if key.startswith("commits/"):
        return "commit"
    return names.get(key) or ("metadata" if path.name == "zarr.json" else "shard")


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
