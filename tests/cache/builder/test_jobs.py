"""A build that is shared: who gets which row block, what happens to the blocks of lost workers, and the same bytes."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import Result
from crash_server import contents, plan_of_a_mortal
from hypothesis import given
from hypothesis import strategies as st

from darht.cache.admin.status import read_status
from darht.cache.builder.build import build, claim_folder, plan_build
from darht.cache.builder.jobs import PoolConfig, build_shared, choose_part, part_of
from darht.cache.builder.pool import BlockDone, Event, Failed, Lost, Task, UnitDone, share
from darht.cache.builder.pool_processes import process_pool, serve
from darht.cache.builder.seal import seal
from darht.cache.format.commit import COMMITS
from darht.core.config import fingerprint
from darht.core.errors import CacheError, ConfigError, ModelError, SpecMismatchError
from darht.core.storage import open_storage

CPU = torch.device("cpu")
UNITS = 19
COMMAND = [sys.executable, "-c", "from darht.cache.cli import cache; cache()", "build"]


# ------------------------------------------------------------------------------------------------ which blocks


@given(st.integers(0, 200), st.integers(1, 60))
def test_the_parts_cover_every_block_once_and_evenly(shards, jobs):
    parts = [part_of(shards, index, jobs) for index in range(jobs)]
    assert sorted(sum(parts, ())) == list(range(shards))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


SLURM = {"SLURM_ARRAY_TASK_ID": "13", "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_COUNT": "4"}


@pytest.mark.parametrize(
    ("choice", "environ", "shards", "reason"),
    [
        ("1/4", {}, (1, 5), "job 1/4: 2 of 8 row blocks"),
        ("0/1", {}, tuple(range(8)), "job 0/1: 8 of 8 row blocks"),
        ("8/9", {}, (), "job 8/9: 0 of 8 row blocks"),
        ("7,3,3", {}, (3, 7), "row blocks 3,7: 2 of 8"),
        ("5", {}, (5,), "row blocks 5: 1 of 8"),
        (
            "auto",
            SLURM,
            (3, 7),
            "job 3/4 (SLURM_ARRAY_TASK_ID=13, SLURM_ARRAY_TASK_MIN=10, SLURM_ARRAY_TASK_COUNT=4): 2 of 8 row blocks",
        ),
        (
            "auto",
            {**SLURM, "SLURM_ARRAY_TASK_ID": "16", "SLURM_ARRAY_TASK_STEP": "2"},
            (3, 7),
            "job 3/4 (SLURM_ARRAY_TASK_ID=16, SLURM_ARRAY_TASK_MIN=10, SLURM_ARRAY_TASK_COUNT=4): 2 of 8 row blocks",
        ),
        ("auto/20", SLURM, (), "job 13/20 (SLURM_ARRAY_TASK_ID=13): 0 of 8 row blocks"),
        ("auto/6", {"JOB_COMPLETION_INDEX": "1"}, (1, 7), "job 1/6 (JOB_COMPLETION_INDEX=1): 2 of 8 row blocks"),
        ("auto", {"RANK": "2", "WORLD_SIZE": "3"}, (2, 5), "job 2/3 (RANK=2, WORLD_SIZE=3): 2 of 8 row blocks"),
        ("auto/4", {"RANK": "2", "WORLD_SIZE": "3"}, (2, 6), "job 2/4 (RANK=2): 2 of 8 row blocks"),
    ],
)
def test_what_a_job_builds(choice, environ, shards, reason):
    part = choose_part(choice, 8, {"PATH": "/bin", **environ})
    assert (part.shards, part.reason) == (shards, reason)


@pytest.mark.parametrize(
    ("choice", "environ", "error"),
    [
        ("4/4", {}, "--shard counts jobs from 0: I/N needs 0 <= I < N; got 4/4"),
        ("0/0", {}, "--shard counts jobs from 0: I/N needs 0 <= I < N; got 0/0"),
        ("-1/4", {}, "--shard I/N, in whole numbers; got '-1'"),
        ("1/", {}, "--shard I/N, in whole numbers; got ''"),
        ("1/2/3", {}, "--shard I/N, in whole numbers; got '2/3'"),
        ("8", {}, "--shard: row blocks lie in 0..7; got 8; for job I of N write I/N"),
        ("3,x", {}, "--shard takes I/N, auto, auto/N or row blocks such as 3,7,9, in whole numbers; got 'x'"),
        ("", {}, "--shard takes I/N, auto, auto/N or row blocks such as 3,7,9, in whole numbers; got ''"),
        (
            "auto",
            {},
            "--shard auto needs the variable of one scheduler, found none of SLURM_ARRAY_TASK_ID, "
            "JOB_COMPLETION_INDEX, RANK: write --shard I/N",
        ),
        (
            "auto/4",
            {"RANK": "0", "JOB_COMPLETION_INDEX": "1"},
            "--shard auto needs the variable of one scheduler, found JOB_COMPLETION_INDEX and RANK: write --shard I/N",
        ),
        (
            "auto",
            {"JOB_COMPLETION_INDEX": "3"},
            "JOB_COMPLETION_INDEX=3, but Kubernetes does not tell how many jobs there are: --shard auto/N",
        ),
        ("auto", {"RANK": "1"}, "--shard auto reads WORLD_SIZE, in whole numbers; got ''"),
        ("auto", {"RANK": "one"}, "--shard auto reads RANK, in whole numbers; got 'one'"),
        ("auto", {"RANK": "3", "WORLD_SIZE": "3"}, "got 3/3 (RANK=3, WORLD_SIZE=3)"),
        ("auto/13", SLURM, "--shard counts jobs from 0: I/N needs 0 <= I < N; got 13/13 (SLURM_ARRAY_TASK_ID=13)"),
        ("auto/x", SLURM, "--shard auto/N, in whole numbers; got 'x'"),
        ("auto", {**SLURM, "SLURM_ARRAY_TASK_ID": "17"}, "the numbers of the job array are not evenly spaced ("),
    ],
)
def test_a_part_that_cannot_be_told(choice, environ, error):
    with pytest.raises(ConfigError) as caught:
        choose_part(choice, 8, environ)
    assert error in str(caught.value)


# ---------------------------------------------------------------------------------------------- who takes them


class FakePool:
    """Workers that finish in the order in which they were given work, and die where they are told to."""

    def __init__(self, deadly: dict[int, int], fail: int | None = None) -> None:
        self.deadly, self.fail = deadly, fail
        self.started, self.ended = 0, False
        self.queue: list[tuple[int, int]] = []
        self.stopped: list[int] = []

    def start(self) -> int:
        self.started += 1
        return self.started - 1

    def submit(self, worker: int, shard: int) -> None:
        assert worker not in [busy for busy, _ in self.queue] and worker not in self.stopped
        self.queue.append((worker, shard))

    def wait(self) -> list[Event]:
        worker, shard = self.queue.pop(0)
        if shard == self.fail:
            return [Failed(ModelError("no such luck"))]
        if self.deadly.get(shard, 0):
            self.deadly[shard] -= 1
            return [UnitDone("label", shard, 1.0), Lost(worker, f"worker {worker} died")]
        return [UnitDone("label", shard, 1.0), UnitDone("image", shard, 1.0), BlockDone(worker)]

    def stop(self, worker: int) -> None:
        self.stopped.append(worker)

    def end(self) -> None:
        self.ended = True


def shared(pool: FakePool, shards: Sequence[int], size: int) -> tuple[list[UnitDone], list[str]]:
    done: list[UnitDone] = []
    notices: list[str] = []
    try:
        share(shards, pool, size, on_unit=done.append, on_notice=notices.append)
    finally:
        assert pool.ended
    return done, notices


@given(st.lists(st.integers(0, 30), unique=True), st.integers(1, 5), st.data())
def test_every_block_is_built_whoever_dies(shards, size, data):
    deadly = {shard: data.draw(st.integers(0, 2)) for shard in shards}
    losses = sum(deadly.values())
    pool = FakePool(dict(deadly))
    done, notices = shared(pool, shards, size)
    assert sorted(unit.shard for unit in done if unit.array == "image") == sorted(shards)
    assert len(notices) == losses
    assert pool.started == min(size, len(shards)) + losses
    assert len(pool.stopped) == pool.started - losses


def test_a_block_that_takes_three_workers_along():
    pool = FakePool({2: 3})
    with pytest.raises(CacheError, match=r"row block 2 took 3 workers along, the last: worker \d died; most often"):
        shared(pool, range(5), 2)


def test_a_lost_worker_is_told_in_one_line():
    _, notices = shared(FakePool({2: 1}), range(5), 1)
    assert notices == ["worker 0 died in row block 2: another worker takes it"]


def test_an_error_of_one_worker_ends_all():
    pool = FakePool({}, fail=1)
    with pytest.raises(ModelError, match="no such luck"):
        shared(pool, range(5), 2)
    assert pool.stopped == []


def test_a_worker_refuses_another_spec(quick_config, tmp_path):
    task = Task(
        load=partial(plan_build, quick_config), fingerprint="0" * 64, out=open_storage(tmp_path), batch_size=256
    )
    with pytest.raises(SpecMismatchError, match=r"changed while .* was being built"):
        task.worker(CPU, torch.get_num_threads())


# --------------------------------------------------------------------------------------------------- processes


@pytest.fixture
def built(quick_config: Path, tmp_path: Path) -> Callable[..., tuple[Path, list[str]]]:
    """`built(workers=2)` shares a build of the quick config; gives its folder and what was noticed."""

    def run(load: Callable[..., object] = plan_build, **options) -> tuple[Path, list[str]]:
        out, notices = tmp_path / "cache", []
        units = []
        pool_config = PoolConfig(**{"device": "cpu", **options})
        plan = plan_build(quick_config, device=CPU)
        report = build_shared(
            plan,
            partial(load, quick_config),
            out,
            pool_config,
            on_unit=lambda *unit: units.append(unit),
            on_notice=notices.append,
        )
        assert len(units) == report.computed + report.reused == UNITS
        return out, notices

    return run


def records(out: Path) -> list[dict]:
    return [json.loads(path.read_bytes()) for path in sorted((out / COMMITS).rglob("*.json"))]


def mortal(folder: Path) -> Callable[..., object]:
    """Plans for workers, the first of which to ask a teacher is killed."""
    return partial(plan_of_a_mortal, marker=folder / "marker")


def test_two_workers_one_of_which_is_killed(built, reference, tmp_path):
    out, notices = built(mortal(tmp_path), workers=2)
    assert len(notices) == 1
    assert notices[0].startswith("worker ") and "was killed by SIGKILL in row block" in notices[0]
    assert multiprocessing.active_children() == []
    seal(out)
    assert contents(out) == contents(reference)
    facts = [record["environment"] for record in records(out)]
    assert {fact["engine"] for fact in facts} == {"processes"}
    assert len({fact["worker"] for fact in facts}) == len({fact["pid"] for fact in facts}) > 1


def test_workers_go_round_the_gpus_and_share_the_threads(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    task = Task(load=plan_build, fingerprint="", out=open_storage(tmp_path), batch_size=256)
    both = [torch.device("cuda", 0), torch.device("cuda", 1)]
    pool = process_pool(task, "auto", 4)
    assert (pool.devices, pool.threads) == (both, 2)
    assert process_pool(task, "cuda:1", 20).devices == [torch.device("cuda", 1)]
    assert (process_pool(task, "cpu", 20).devices, process_pool(task, "cpu", 20).threads) == ([CPU], 1)


def test_an_error_in_a_worker_is_one_line(invoke, quick_config, tmp_path):
    """Found only when it is asked about an image: logits too large for their type."""
    from darht.cache.builder.teachers import Card, save_teacher
    from darht.core.nets import build as network

    kwargs = {"width": 4, "blocks": [1, 1, 1, 1]}
    net = network("resnet18", 10, kwargs)
    for parameter in list(net.parameters())[-2:]:
        parameter.data.fill_(1e6)
    save_teacher(tmp_path / "loud", net, Card(arch="resnet18", kwargs=kwargs, num_classes=10, weights_sha256=""))
    config = yaml.safe_load(quick_config.read_text())
    config["teachers"]["cnn"]["path"] = str(tmp_path / "loud")
    config["store"] = {"rows_per_shard": 36, "rows_per_chunk": 12}  # one block: one worker is enough
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(config))
    result: Result = invoke(
        "build", tmp_path / "spec.yaml", "--out", tmp_path / "out", "--workers", 2, "--device", "cpu", "--allow", "cnn"
    )
    assert result.exit_code == 2
    assert result.stderr.startswith("error: teacher 'cnn' gave logits that are not finite in float16 on rows 0..35;")
    assert result.stderr.count("\n") == 1
    assert multiprocessing.active_children() == []


def wait_for(condition: Callable[[], object], what: str) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail(f"{what} did not happen in two minutes")


def gone(pid: int) -> bool:
    """Whether a process has ended; one whose parent never asks stays as a zombie."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (ProcessLookupError, FileNotFoundError):
        return True


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "killed"])
def test_workers_end_with_their_builder(how, quick_config, tmp_path, invoke):
    """The build has ten times the rows, so that it is not over before the signal comes."""
    config, out = tmp_path / "longer.yaml", tmp_path / "cache"
    longer = yaml.safe_load(quick_config.read_text())
    longer["data"]["limit"] = 360
    config.write_text(yaml.safe_dump(longer, sort_keys=False))
    command = [*COMMAND, config, "--out", out, "--workers", "2", "--device", "cpu", "--allow", "cnn"]
    builder = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: records(out), "the first unit")
    workers = {record["environment"]["pid"] for record in records(out)}
    if how == signal.SIGINT:
        os.killpg(builder.pid, how)  # a terminal sends Ctrl-C to all
    else:
        builder.kill()
    printed = b"".join(builder.communicate())
    assert b"Traceback" not in printed
    assert builder.returncode == (130 if how == signal.SIGINT else -how)
    wait_for(lambda: all(gone(pid) for pid in workers), "the end of the workers")
    for folder in (out, tmp_path / "whole"):
        assert invoke("build", config, "--out", folder, "--device", "cpu", "--allow", "cnn").exit_code == 0
    assert contents(out) == contents(tmp_path / "whole")


class UnreadableTask:
    """A task that no worker can load."""

    def worker(self, device: torch.device, threads: int) -> None:
        raise CacheError("no plan")


class IdleTask:
    def worker(self, device: torch.device, threads: int) -> None:
        return None


@pytest.mark.parametrize(("task", "unread"), [(UnreadableTask, False), (IdleTask, False), (IdleTask, True)])
def test_a_worker_whose_builder_is_gone_ends_without_a_word(
    task: type, unread: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The pipe says it by an end of file, by a refused event, or, with an event unread, by a reset."""
    monkeypatch.setattr("darht.cache.builder.pool_processes.end_with_spawner", lambda: None)
    ours, theirs = multiprocessing.Pipe()
    if unread:
        theirs.send("an event that nobody took")
    ours.close()
    with pytest.raises(SystemExit) as ended:
        serve(theirs, task(), CPU, 1, 0)
    assert ended.value.code is None and theirs.closed
    assert capfd.readouterr() == ("", "")


def test_a_cache_in_memory_has_one_worker(built, quick_config):
    plan = plan_build(quick_config, device=CPU)
    with pytest.raises(ConfigError, match="memory of one process: leave out --workers"):
        build_shared(
            plan,
            partial(plan_build, quick_config),
            "memory://test_distribute/cache",
            PoolConfig(workers=2),
            on_unit=print,
            on_notice=print,
        )


# ----------------------------------------------------------------------------------------------------- threads


def test_the_bytes_do_not_depend_on_threads(quick_config, reference, tmp_path):
    plan, before = plan_build(quick_config, device=CPU), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = tmp_path / str(threads)
            build(plan, out, device=CPU, on_unit=lambda array, shard, seconds: None)
            seal(out)
            assert contents(out) == contents(reference)
            assert {record["environment"]["threads"] for record in records(out)} == {threads}
    finally:
        torch.set_num_threads(before)


# -------------------------------------------------------------------------------------------------- job arrays


def test_a_job_array(invoke, quick_config, reference, tmp_path, monkeypatch):
    """Each job tells what is left; the last one seals; a job that ran already has nothing to do."""
    out = tmp_path / "cache"
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    command = ("build", quick_config, "--out", out, "--device", "cpu", "--shard", "auto", "--allow", "cnn")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    second = invoke(*command)
    assert second.exit_code == 0
    assert second.output.startswith("job 1/2 (SLURM_ARRAY_TASK_ID=2, ") and ": 1 of 3 row blocks\n" in second.output
    assert second.output.endswith(" s, 0 reused; 13 of 19 units left in all\n")
    again = invoke(*command)
    assert again.output.endswith("0 units computed in 0.0 s, 6 reused; 13 of 19 units left in all\n")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    first = invoke(*command)
    root = json.loads((reference / "manifest.json").read_bytes())["root_hash"]
    assert first.output.endswith(f" s, 0 reused; sealed\nroot hash {root}\n")
    assert contents(out) == contents(reference)


def test_the_list_of_a_job_array_mends_a_cache(invoke, quick_config, reference, tmp_path):
    """`status` lists the row blocks that need work, and `--shard` takes them one by one, or all together."""
    out = tmp_path / "cache"
    plan = plan_build(quick_config, device=CPU)
    build(plan, out, device=CPU, shards=[1], on_unit=lambda array, shard, seconds: None)
    listed = json.loads(invoke("status", out, "--json").output)["shards"]
    assert listed == [0, 2]
    assert read_status(out).left == 13
    for shard in listed:
        assert (
            invoke("build", quick_config, "--out", out, "--device", "cpu", "--shard", shard, "--allow", "cnn").exit_code
            == 0
        )
    assert read_status(out).sealed
    assert contents(out) == contents(reference)


def test_units_that_do_not_fit_their_records_are_left(invoke, quick_config, reference, tmp_path):
    """Damage in two row blocks: the job that mends the first leaves the other to the next, which seals."""
    out = Path(shutil.copytree(reference, tmp_path / "cache"))
    for shard in (0, 2):
        (out / f"data.zarr/label/c/{shard}").write_bytes(b"cut")
    command = ("build", quick_config, "--out", out, "--device", "cpu", "--allow", "cnn", "--shard")
    first = invoke(*command, "0")
    assert first.exit_code == 0 and first.output.endswith("6 reused; 1 of 19 units left in all\n")
    last = invoke(*command, "2")
    assert last.exit_code == 0 and "; sealed\n" in last.output
    assert contents(out) == contents(reference)


def test_jobs_that_extend_views_leave_the_others_units(invoke, quick_config, reference, tmp_path):
    """The units of the former spec have the keys of the new ones, and their records do not count."""
    out = Path(shutil.copytree(reference, tmp_path / "cache"))
    config = yaml.safe_load(quick_config.read_text())
    config["views"]["count"] = 3
    larger = tmp_path / "larger.yaml"
    larger.write_text(yaml.safe_dump(config, sort_keys=False))
    command = ("extend", out, larger, "--device", "cpu", "--allow", "cnn", "--shard")
    for job in range(3):
        ended = invoke(*command, f"{job}/3")
        assert ended.exit_code == 0
        assert (f"; {2 - job} of 19 units left in all\n" if job < 2 else "; sealed\n") in ended.output


def test_two_builders_that_begin_at_once(quick_config, tmp_path, monkeypatch):
    """The other one writes its spec between this one's looks: it is found, and another spec is refused."""
    plan = plan_build(quick_config, device=CPU)
    other = dataclasses.replace(plan, spec=dataclasses.replace(plan.spec, seed=plan.spec.seed + 1))
    folder = open_storage(tmp_path / "cache")
    looked: list[object] = []

    def is_free(self) -> bool:
        if not looked:
            looked.append(self)
            claim_folder(folder, rival)
        return not self.keys()

    monkeypatch.setattr(type(folder), "is_free", is_free)
    rival = plan
    claim_folder(folder, plan)
    looked.clear()
    folder = open_storage(tmp_path / "another")
    rival = other
    with pytest.raises(SpecMismatchError, match="seed: 11 -> 10"):
        claim_folder(folder, plan)
    assert fingerprint(plan.spec) != fingerprint(other.spec)


# --------------------------------------------------------------------------------------------------------- Ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of this machine alone, small and quiet."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # so that actors import this darht
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=80 * 2**20,
            log_to_driver=False,
            logging_level="ERROR",
        )
        yield
        ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_ray_with_an_actor_that_is_killed(built, reference, tmp_path):
    out, notices = built(mortal(tmp_path), engine="ray", workers=2)
    assert len(notices) == 1 and notices[0].startswith("Ray's actor ") and "was lost (" in notices[0]
    seal(out)
    assert contents(out) == contents(reference)
    facts = [record["environment"] for record in records(out)]
    assert {fact["engine"] for fact in facts} == {"ray"}
    assert len({fact["pid"] for fact in facts}) > 1


@pytest.mark.parametrize(("device", "error"), [("cuda:0", "gives every actor its own GPU; got --device cuda:0"),
                                               ("cuda", "Ray's cluster has no GPU")])  # fmt: skip
@pytest.mark.usefixtures("cluster")
def test_ray_without_the_gpu_that_is_asked_for(built, device, error):
    with pytest.raises(ConfigError, match=error):
        built(engine="ray", device=device)


def test_ray_that_is_not_installed(built, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'darht\[ray\]'"):
        built(engine="ray")


def test_ray_is_imported_only_when_it_is_used():
    code = "import darht.cache.builder.jobs, darht.cache.cli, sys; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
