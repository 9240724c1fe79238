"""Clusters tried as clusters, on one machine: nodes, jobs and ranks are killed, and the bits must be the same.

    python bench/clusters.py --work build/clusters

Three Ray nodes build the cache of `make demo` while one of them is killed; eight jobs of an array build it onto one S3
bucket while three of them are killed; two `torchrun` nodes train from `darht-cache serve` while one of them is killed.
Killed is SIGKILL. Exits with 1 when any bits differ. `--work` keeps teachers and reference for the next time.
"""

import argparse
import contextlib
import json
import logging
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from cluster_processes import PATIENCE, answers, finish, free_port, kill, program, started, wait_for

from darht.cache.admin.verify import verify
from darht.cache.format.commit import COMMITS
from darht.cache.read.reader import open_cache
from darht.core.files import sha256_file
from darht.core.storage import Location, open_storage
from darht.tools.experiment import plan_stages, write_inputs
from darht.tools.experiment_config import load_experiment

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENT, STUDENT = ROOT / "recipes" / "digits-demo.yaml", "darht"


@dataclass(frozen=True)
class Demo:
    """What `make demo` builds its cache from, and the root hash that one process gives it."""

    folder: Path
    root_hash: str

    @property
    def spec(self) -> Path:
        """The cache's YAML."""
        return self.folder / "cache.yaml"


def units(out: Location) -> list[str]:
    """The commit records of a cache."""
    return list(open_storage(out).keys(COMMITS))


def prepare(work: Path) -> Demo:
    """The demo's teachers, its spec, and its cache as one process builds it."""
    folder = work / "demo"
    config = load_experiment(EXPERIMENT)
    write_inputs(config, folder, None)
    for stage in plan_stages(config, folder, None) if not (folder / "cache" / "manifest.json").is_file() else ():
        if stage.name.startswith("teacher ") or stage.name == "cache":
            subprocess.run(program(*stage.words), check=True)
    return Demo(folder, open_cache(folder / "cache").root_hash)


# ---------------------------------------------------------------------------------------------------- Ray's nodes


def ray_nodes(demo: Demo, work: Path) -> tuple[list[str], bool]:
    """Three nodes with a CPU each, one of which is killed when it has done its first unit."""
    from ray.cluster_utils import Cluster

    out, log = fresh(work / "ray"), work / "ray.log"
    small = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    try:
        others = [cluster.add_node(**small) for _ in range(2)]
        cluster.wait_for_nodes()
        raylets = {node.all_processes["raylet"][0].process.pid: node for node in others}
        words = program("darht-cache", "build", demo.spec, "--out", out, "--engine", "ray", "--workers", 3)
        with started([*words, "--device", "cpu"], log, RAY_ADDRESS=cluster.address) as builder:
            raylet = wait_for("a unit of a node", lambda: _node_with_a_unit(out, set(raylets)))
            before = len(units(out))
            pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
            workers = [pid for pid in pids if parent(pid) == raylet]
            for pid in (raylet, *workers):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            cluster.remove_node(raylets[raylet], allow_graceful=False)
            said = finish(builder, log)
    finally:
        cluster.shutdown()
    notices = [line for line in said.splitlines() if "was lost" in line]
    lines = [f"{before} units were done when the node was killed", *notices, totals(said), judged(out, demo.root_hash)]
    return lines, right(out, demo.root_hash) and bool(notices)


def _node_with_a_unit(out: Path, raylets: set[int]) -> int | None:
    for key in units(out):
        raylet = parent(json.loads((out / key).read_bytes())["environment"]["pid"])
        if raylet in raylets:
            return raylet
    return None


def parent(pid: int) -> int:
    """The process that started another, 0 when that is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return 0


# -------------------------------------------------------------------------------------------------- a job array


def job_array(demo: Demo, work: Path, jobs: int = 8, killed: int = 3) -> tuple[list[str], bool]:
    """Jobs of one array on one S3 bucket, the first of which are killed at their first unit and run again."""
    spec = yaml.safe_load(demo.spec.read_text())
    spec["store"] = {"rows_per_shard": 128, "rows_per_chunk": 64}  # more row blocks than jobs
    path, reference = demo.folder / "array.yaml", work / "array-reference"
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    if not (reference / "manifest.json").is_file():
        subprocess.run(program("darht-cache", "build", path, "--out", reference, "--device", "cpu"), check=True)
    root_hash, url = open_cache(reference).root_hash, "s3://bucket/cache"
    words = program("darht-cache", "build", path, "--out", url, "--shard", "auto", "--device", "cpu")
    logs = [work / f"job-{index}.log" for index in range(jobs)]

    def job(index: int) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
        slurm = {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": str(jobs)}
        return started(words, logs[index], **slurm)

    with bucket(), contextlib.ExitStack() as stack:
        running, alive = [stack.enter_context(job(index)) for index in range(jobs)], list[int]()
        for index, process in enumerate(running[:killed]):
            wait_for(
                "a unit of a job", lambda index=index: any(int(Path(key).stem) % jobs == index for key in units(url))
            )
            alive += [index] if process.poll() is None else []
            kill(process)
        for index in range(killed, jobs):
            finish(running[index], logs[index])
        done = len(units(url))
        for index in range(killed):
            with job(index) as again:
                said = finish(again, logs[index])
        lines = [
            f"jobs {', '.join(map(str, alive))} were killed after their first unit; {done} units were done then",
            f"the last of those that ran again: {totals(said)}",
            judged(url, root_hash),
        ]
        return lines, right(url, root_hash) and len(alive) == killed


@contextlib.contextmanager
def bucket() -> Iterator[None]:
    """An S3 server in this process, which the environment names."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }
    try:
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield
    finally:
        server.stop()


# ---------------------------------------------------------------------------------------------- torchrun's nodes


def torchrun_nodes(demo: Demo, work: Path) -> tuple[list[str], bool]:
    """Two nodes train from a server; the second is killed after two epochs, and both go on with --resume."""
    token, port = work / "token.txt", free_port()
    token.write_text(secrets.token_hex(16))
    words = program("darht-cache", "serve", demo.folder / "cache", "--port", port, "--token-file", token)
    with started(words, work / "serve.log"):
        wait_for("the server", lambda: answers(f"http://127.0.0.1:{port}/healthz"))
        shards = f"http://127.0.0.1:{port}/cache"
        train = program("darht-train", "--shards", shards, "--recipe", demo.folder / "recipes" / "darht.yaml")
        train += ["--set", "optim.epochs=4", "--device", "cpu", "--cache-dir", str(fresh(work / "copies"))]
        environment = {"DARHT_TOKEN": token.read_text(), "OMP_NUM_THREADS": "1"}

        @contextlib.contextmanager
        def nodes(name: str, *more: str) -> Iterator[list[subprocess.Popen[bytes]]]:
            at = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
            torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", *at, "--nproc-per-node", "1"]
            out = ["--out", str(work / name), *more]
            with contextlib.ExitStack() as stack:
                yield [
                    stack.enter_context(
                        started(
                            [*torchrun, "--node-rank", str(rank), "--no-python", *train, *out],
                            work / f"{'resumed' if more else name}-{rank}.log",
                            **environment,
                        )
                    )
                    for rank in range(2)
                ]

        for name in ("whole", "killed"):
            fresh(work / name)
        with nodes("whole") as both:
            for rank, node in enumerate(both):
                finish(node, work / f"whole-{rank}.log")
        with nodes("killed") as (first, second):
            wait_for("two epochs", lambda: epochs(work / "killed") >= 2)
            kill(second)
            code = first.wait(PATIENCE)
        kept, told = epochs(work / "killed"), last_line(work / "killed-0.log")
        with nodes("killed", "--resume") as both:
            for rank, node in enumerate(both):
                finish(node, work / f"resumed-{rank}.log")
    hashes = [sha256_file(work / name / "student" / "model.safetensors") for name in ("whole", "killed")]
    fetched = re.findall(r'"GET (\S*/data.zarr/\S*/c/\S*) ', (work / "serve.log").read_text())
    lines = [
        f"the node that was left ended with {code} after {kept} of 4 epochs: {told}",
        f"weights after --resume: sha256 {hashes[1][:12]}, without the kill {hashes[0][:12]}",
        f"the server sent {len(fetched)} shards, {len(set(fetched))} different ones, for three runs of two processes",
    ]
    return lines, hashes[0] == hashes[1]


def epochs(run: Path) -> int:
    """How many epochs a run's log has."""
    log = run / "log.csv"
    return len(log.read_text().splitlines()) - 1 if log.is_file() else 0


def last_line(log: Path) -> str:
    """The last thing that darht itself said in a log, among what torchrun and gloo say."""
    lines = [line for line in log.read_text().splitlines() if line.startswith(("error:", "go on"))]
    return lines[-1] if lines else "it said nothing"


# --------------------------------------------------------------------------------------------------- what is said


def fresh(folder: Path) -> Path:
    """A folder's path, of which nothing is left."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def totals(said: str) -> str:
    """The line of a build that tells what it did."""
    return next(line for line in said.splitlines() if " units computed in " in line)


def right(out: Location, root_hash: str) -> bool:
    """Whether a cache is sealed, whole, and has this root hash."""
    return open_cache(out).root_hash == root_hash and verify(out) == []


def judged(out: Location, root_hash: str) -> str:
    """That in words."""
    return f"root hash {open_cache(out).root_hash[:12]}, of one process {root_hash[:12]}; {len(verify(out))} complaints"


TRIALS = {"ray": ray_nodes, "array": job_array, "torchrun": torchrun_nodes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/clusters"))
    parser.add_argument("trials", nargs="*", choices=[*TRIALS, []], help="ray, array, torchrun; all by default")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    work = arguments.work.resolve()
    demo, failed = prepare(work), []
    for name in arguments.trials or TRIALS:
        start = time.perf_counter()
        lines, good = TRIALS[name](demo, work)
        print(f"{name}: {'the same bits' if good else 'OTHER BITS'}, {time.perf_counter() - start:.0f} s")
        print("\n".join(f"  {line}" for line in lines), flush=True)
        failed += [] if good else [name]
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
