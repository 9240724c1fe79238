"""Caches behind URLs: a running S3-compatible server, and a network that fails in front of it."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from fsspec.implementations.memory import MemoryFileSystem
from servers import FaultProxy, served
from torch.utils.data import DataLoader

from darht.cache.admin.status import read_status
from darht.cache.admin.verify import verify
from darht.cache.builder.build import build, plan_build
from darht.cache.builder.jobs import PoolConfig, build_shared
from darht.cache.builder.plan import Plan
from darht.cache.builder.seal import seal
from darht.cache.format.commit import State
from darht.cache.read.dataset import CacheDataset
from darht.cache.read.loader import GIB, load_training_set
from darht.cache.read.reach import Reach
from darht.cache.read.reader import open_cache
from darht.cache.read.sizes import needed_bytes
from darht.cache.read.webdataset import open_shards
from darht.core import retry
from darht.core.errors import CorruptError, DarhtError, UnreachableError
from darht.core.storage import open_storage
from darht.core.storage_remote import _open

moto_server = pytest.importorskip("moto.server")
boto3 = pytest.importorskip("boto3")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network() -> Iterator[FaultProxy]:
    """An S3 server with the bucket `bucket`, behind a proxy that is told when to fail."""
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch, FaultProxy((host, port)) as proxy:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": proxy.url,
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        _open.cache_clear()
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield proxy
        _open.cache_clear()
    server.stop()


@pytest.fixture
def failing(network: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The network, which a test may let fail; it works again afterwards."""
    monkeypatch.setattr(retry, "_FIRST_WAIT", 0.01)
    yield network
    network.rate, network.flip = 0.0, False


def one_shard(config: dict[str, Any]) -> None:
    config["store"]["rows_per_shard"] = 40
    del config["teachers"]["vit"]


def quiet(array: object, shard: int, seconds: float) -> None:
    pass


def upload(folder: Path, url: str) -> str:
    """What a person does with `aws s3 cp --recursive`."""
    there = open_storage(url)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            there.write(path.relative_to(folder).as_posix(), path.read_bytes())
    return url


def test_a_build_onto_s3_has_the_root_hash_of_one_on_a_disk(network: FaultProxy, small, tmp_path: Path):
    plan, url = small(one_shard), "s3://bucket/built"
    build(plan, tmp_path / "disk", device=CPU, on_unit=quiet)
    build(plan, url, device=CPU, on_unit=quiet)
    assert read_status(url).state is State.MISSING  # not sealed yet
    assert seal(url).root_hash == seal(tmp_path / "disk").root_hash
    assert read_status(url).state is State.DONE and verify(url) == []
    assert build(plan, url, device=CPU, on_unit=quiet).computed == 0
    local, remote = open_cache(tmp_path / "disk"), open_cache(url)
    for name in local.arrays:
        np.testing.assert_array_equal(remote.read(name), local.read(name))
    np.testing.assert_array_equal(
        remote.read("delta/pgd-cnn", slice(10, 20)), local.read("delta/pgd-cnn", slice(10, 20))
    )


def test_a_process_of_its_own_builds_onto_s3(
    network: FaultProxy, small: Callable[..., Plan], build_into: Callable[..., Path], tmp_path: Path
):
    plan, url, notices = small(one_shard), "s3://bucket/shared", list[str]()
    load = partial(plan_build, tmp_path / "spec.yaml")  # where `small` wrote it
    build_shared(plan, load, url, PoolConfig(workers=2, device="cpu"), on_unit=quiet, on_notice=notices.append)
    assert seal(url).root_hash == seal(build_into(plan, tmp_path / "disk")).root_hash
    assert notices == []


def test_a_memory_cache_has_it_too(small, tmp_path: Path):
    plan = small(one_shard)
    for where in (tmp_path / "disk", "memory://remote/cache"):
        build(plan, where, device=CPU, on_unit=quiet)
    assert seal("memory://remote/cache").root_hash == seal(tmp_path / "disk").root_hash
    MemoryFileSystem.store.clear()


def test_a_network_that_fails_costs_time_and_nothing_else(failing: FaultProxy, small, tmp_path: Path):
    plan, url = small(one_shard), "s3://bucket/failing"
    failing.rate = 0.2
    build(plan, url, device=CPU, on_unit=quiet)
    sealed = seal(url)
    data = load_training_set(open_cache(url), device=CPU, adversarial=True, budget_gib=1)
    failing.rate = 0.0
    assert all(failing.faults[kind] > 0 for kind in failing.faults), failing.faults
    build(plan, tmp_path / "disk", device=CPU, on_unit=quiet)
    assert sealed.root_hash == seal(tmp_path / "disk").root_hash
    local = load_training_set(open_cache(tmp_path / "disk"), device=CPU, adversarial=True, budget_gib=1)
    assert torch.equal(data.clean, local.clean) and torch.equal(data.deltas[0], local.deltas[0])


def test_a_network_that_changes_bytes_is_noticed(failing: FaultProxy, tiny_cache: Path):
    cache = open_cache(upload(tiny_cache, "s3://bucket/flipped"))
    failing.flip = True
    with pytest.raises(DarhtError, match=r"(does not have the sha256|did not match|Checksum|after 5 tries)"):
        cache.read("image")
    failing.flip = False
    assert cache.read("image").shape == (100, 3, 8, 8)


def test_a_network_that_is_gone(failing: FaultProxy):
    failing.rate = 1.0
    with pytest.raises(UnreachableError, match=r"cannot read s3://bucket/tiny/index\.json: \d+ tries within 0\.1 s"):
        open_shards("s3://bucket/tiny", Reach(retry_for=0.1))


def test_damage_behind_a_url(network: FaultProxy, tiny_cache: Path):
    url = upload(tiny_cache, "s3://bucket/damaged")
    key = open_cache(url).manifest.shards[5].path
    data = bytearray(open_storage(url).read(key) or b"")
    data[20] ^= 1
    open_storage(url).write(key, bytes(data))
    (problem,) = verify(url)
    assert f"{url}/{key} does not have the sha256 of its record" in problem
    with pytest.raises(CorruptError, match=f"{url}/{key} .* does not have the sha256 that was sealed"):
        load_training_set(open_cache(url), device=CPU, adversarial=True, budget_gib=1)


def test_a_bucket_that_is_not_there(network: FaultProxy, small):
    with pytest.raises(DarhtError, match=r"cannot write s3://no-such-bucket/x/spec\.json: there is no such bucket"):
        build(small(), "s3://no-such-bucket/x", device=CPU, on_unit=quiet)


def test_the_commands_take_urls(network: FaultProxy, variant: Callable[..., Path], invoke: Callable[..., Result]):
    def shrink(config: dict[str, Any]) -> None:
        config["data"]["limit"], config["views"]["count"] = 40, 2
        config["attacks"] = {}

    url = "s3://bucket/commands"
    built = invoke("build", variant(shrink), "--out", url, "--allow", "cnn", "--allow", "vit")
    assert built.exit_code == 0 and f"{url}: " in built.output
    shown = json.loads(invoke("status", url, "--json").output)
    assert (shown["state"], shown["shards"]) == ("done", [])
    assert invoke("verify", url).exit_code == 0 and invoke("info", url).exit_code == 0
    open_storage(url).remove("manifest.json")
    assert invoke("status", url).exit_code == 3
    assert invoke("info", "s3://bucket/nothing").exit_code == 2


def test_an_object_tells_the_sha256_that_was_noted_with_it(network: FaultProxy, tiny_cache: Path):
    url = upload(tiny_cache, "s3://bucket/noted")
    key = f"noted/{open_cache(url).manifest.shards[0].path}"
    cache = open_cache(url)
    assert cache._is_known(cache.manifest.shards[0].array, 0)
    body = boto3.client("s3").get_object(Bucket="bucket", Key=key)["Body"].read()
    boto3.client("s3").put_object(Bucket="bucket", Key=key, Body=body)  # by another hand, which notes nothing
    cache = open_cache(url)
    assert not cache._is_known(cache.manifest.shards[0].array, 0)
    cache.check(cache.manifest.shards[0].array, 0)
    assert cache._is_known(cache.manifest.shards[0].array, 0)


def test_training_reads_from_a_url(network: FaultProxy, tiny_cache: Path, tmp_path: Path):
    from darht.trainer.config import load_recipe
    from darht.trainer.student.train import train

    url = upload(tiny_cache, "s3://bucket/trained")
    sets = (
        "optim.epochs=1",
        "optim.batch_size=64",
        "student.arch=resnet18",
        "inner.kind=cached",
        "inner.eps=32",
        "student.kwargs.width=4",
    )
    config = load_recipe(None, sets)
    for where, out in ((url, "remote"), (tiny_cache, "local")):
        train(config, open_shards(where), tmp_path / out, device=CPU)
    weights = [(tmp_path / out / "student" / "model.safetensors").read_bytes() for out in ("remote", "local")]
    assert weights[0] == weights[1]
    assert json.loads((tmp_path / "remote" / "run.json").read_text())["cache"] == url


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("context", ["spawn", "fork"])
def test_workers_are_spawned_and_a_forked_one_says_so(network: FaultProxy, fine_cache: Path, context: str):
    local, cache = open_cache(fine_cache), open_cache(upload(fine_cache, f"s3://bucket/{context}"))
    options = {"batch_size": 8, "memory_gib": 0.8 * needed_bytes(local, adversarial=False) / GIB}
    dataset = CacheDataset(cache, **options)
    assert dataset.plan.kind == "streamed"
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=context, timeout=120)
    if context == "fork":
        with pytest.raises(DarhtError, match=r"was forked from one that has read s3://bucket/fork, .*: spawn it, with"):
            next(iter(loader))
        return
    for found, expected in zip(loader, CacheDataset(local, **options), strict=True):
        assert torch.equal(found.rows, expected.rows) and torch.equal(found.teacher_logits, expected.teacher_logits)


def test_an_http_server_is_enough_for_readers(tiny_cache: Path, tmp_path: Path):
    shutil.copytree(tiny_cache, tmp_path / "cache")
    with served(tmp_path) as root:
        cache, local = open_shards(f"{root}/cache"), open_cache(tiny_cache)
        assert cache.root_hash == local.root_hash
        np.testing.assert_array_equal(cache.read("logits/vit/clean"), local.read("logits/vit/clean"))
        (tmp_path / "cache" / "manifest.json").unlink()
        with pytest.raises(DarhtError, match=r"is not sealed: http://.*/cache/manifest\.json is missing"):
            open_cache(f"{root}/cache")


def test_the_plan_is_from_a_local_config(variant: Callable[..., Path]):
    assert plan_build(variant(), device=CPU).spec.data.rows == 100
