"""Growing caches: everything is reused, a kill does no harm, and the result is the cache built at once, bit for bit."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from darht.cache.admin.status import read_status
from darht.cache.admin.verify import verify
from darht.cache.builder import build as builder
from darht.cache.builder.build import build, plan_build, spec_in
from darht.cache.builder.compute import Worker
from darht.cache.builder.extend import grow
from darht.cache.builder.history import growth_problems, read_history
from darht.cache.builder.plan import Plan
from darht.cache.builder.seal import seal
from darht.cache.format.commit import State
from darht.cache.format.manifest import read_spec
from darht.cache.format.store import Store
from darht.cache.read.reader import open_cache
from darht.core.errors import CorruptError, IncompleteError, ModelError, SpecMismatchError
from darht.core.storage import LocalStorage, open_storage

CPU = torch.device("cpu")
Change = Callable[[dict[str, Any]], object]


def base(config: dict[str, Any]) -> None:
    """40 rows in shards of 32, one teacher, one attack on one view, 3 of 9 views; logits show every bit."""
    config["data"]["limit"] = 40
    config["views"]["count"] = 3
    config["store"] = {"rows_per_shard": 32, "rows_per_chunk": 8, "logits": "float32"}
    config["teachers"] = {"cnn": config["teachers"]["cnn"]}
    config["attacks"] = {"pgd-cnn": config["attacks"]["pgd-cnn"]}


def teacher(config: dict[str, Any]) -> None:
    config["teachers"]["vit"] = {"path": str(Path(config["teachers"]["cnn"]["path"]).with_name("vit"))}


def attack(config: dict[str, Any]) -> None:
    config["attacks"]["more"] = {**config["attacks"]["pgd-cnn"], "steps": 1, "views": 2}


def views(config: dict[str, Any]) -> None:
    config["views"]["count"] = 7


def jacobians(config: dict[str, Any]) -> None:
    config["jacobians"] = {"cnn": {}}


def more_views_and_an_attack(config: dict[str, Any]) -> None:
    views(config)
    attack(config)


def everything(config: dict[str, Any]) -> None:
    teacher(config)
    attack(config)
    jacobians(config)
    views(config)
    del config["views"]["count"]  # all of them
    config["attacks"]["pgd-vit"] = {**config["attacks"]["pgd-cnn"], "teacher": "vit", "views": 5}


GROWTHS = {
    "teacher": teacher,
    "attack": attack,
    "views": views,
    "jacobians": jacobians,
    "views and attack": more_views_and_an_attack,
    "everything": everything,
}


@pytest.fixture(scope="module")
def write(tiny_cache_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder, count = tmp_path_factory.mktemp("specs"), iter(range(10**6))

    def run(*changes: Change) -> Path:
        config = yaml.safe_load(tiny_cache_config.read_text())
        for change in (base, *changes):
            change(config)
        path = folder / f"{next(count)}.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return path

    return run


@pytest.fixture(scope="module")
def plan(write: Callable[..., Path]) -> Callable[..., Plan]:
    return lambda *changes: plan_build(write(*changes), device=CPU)


def run_build(plan: Plan, folder: Path) -> builder.BuildReport:
    return build(plan, folder, device=CPU, on_unit=lambda array, shard, seconds: None)


@pytest.fixture(scope="module")
def small_cache(plan: Callable[..., Plan], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "cache"
    run_build(plan(), folder)
    seal(folder)
    return folder


@pytest.fixture(scope="module")
def at_once(plan: Callable[..., Plan], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The root hash of a cache that was built from the larger spec in the first place."""
    known: dict[str, str] = {}

    def root_hash(growth: str) -> str:
        if growth not in known:
            folder = tmp_path_factory.mktemp("whole") / growth
            run_build(plan(GROWTHS[growth]), folder)
            known[growth] = seal(folder).root_hash
        return known[growth]

    return root_hash


@pytest.fixture
def cache(small_cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_cache, tmp_path / "cache"))


@pytest.mark.parametrize(("growth", "computed"), [("teacher", 4), ("attack", 4), ("views", 3), ("everything", 25)])
def test_an_extended_cache_is_the_one_built_at_once(growth, computed, cache, plan, at_once):
    larger = plan(GROWTHS[growth])
    grow(cache, larger.spec)
    assert read_status(cache).state is State.MISSING
    with pytest.raises(IncompleteError):
        open_cache(cache)
    report = run_build(larger, cache)
    assert report.computed == computed  # every other unit stays as it is
    assert seal(cache).root_hash == at_once(growth)
    assert verify(cache) == []


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each forward pass of a teacher had."""
    batches: list[int] = []
    model = Worker._model

    def counting(self: Worker, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        answer = model(self, name)

        def ask(x: torch.Tensor) -> torch.Tensor:
            batches.append(len(x))
            return answer(x)

        return ask

    monkeypatch.setattr(Worker, "_model", counting)
    return batches


def test_only_the_new_views_are_asked_about(cache, plan, asked):
    larger = plan(views)
    grow(cache, larger.spec)
    run_build(larger, cache)
    assert sum(asked) == 40 * (7 - 3)


def test_an_unsealed_cache_with_holes_is_extended_too(cache, plan, at_once):
    (cache / "manifest.json").unlink()
    (cache / "commits/logits/cnn/clean/00001.json").unlink()
    shutil.rmtree(cache / "data.zarr/delta")
    larger = plan(everything)
    grow(cache, larger.spec)
    run_build(larger, cache)
    assert seal(cache).root_hash == at_once("everything")


def test_from_identity_to_crops(plan, tmp_path):
    run_build(plan(lambda config: config.update(views={"kind": "identity"})), tmp_path / "cache")
    larger = plan()
    grow(tmp_path / "cache", larger.spec)
    run_build(larger, tmp_path / "cache")
    run_build(larger, tmp_path / "whole")
    assert seal(tmp_path / "cache").root_hash == seal(tmp_path / "whole").root_hash


class Killed(BaseException):
    """Ends the process at a place of the test's choice."""


def killed_at(monkeypatch: pytest.MonkeyPatch, write: int, *, before: bool) -> Callable[[], int]:
    """Let the write of this number, or the step after it, be the last thing that happens; gives a count of writes."""
    done, original = iter(range(10**6)), LocalStorage.write
    seen = [0]

    def dying(self: LocalStorage, key: str, data: bytes) -> None:
        number = seen[0] = next(done)
        if before and number == write:
            (self.folder / key).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / key).with_name(f".{key.rsplit('/', 1)[-1]}.killed.tmp").write_bytes(data[: len(data) // 2])
            raise Killed
        original(self, key, data)
        if not before and number == write:
            raise Killed

    monkeypatch.setattr(LocalStorage, "write", dying)
    return lambda: seen[0] + 1


def moments(count: int, some: int) -> Iterator[tuple[int, bool]]:
    """Before and after each of the first writes and the last, then at some that lie evenly over the others."""
    yield from ((number, before) for number in (0, 1, 2, count - 1) for before in (True, False))
    yield from ((number, number % 2 == 0) for number in range(3, count - 1, max(1, (count - 4) // some)))


def test_a_kill_at_any_write_does_no_harm(small_cache, plan, at_once, tmp_path, monkeypatch):
    """What was killed goes on with `extend` or with `build`, whichever the user tries."""
    larger, expected = plan(more_views_and_an_attack), at_once("views and attack")

    def extend(folder: Path) -> None:
        grow(folder, larger.spec)
        run_build(larger, folder)
        seal(folder)

    with monkeypatch.context() as patch:
        count = killed_at(patch, -1, before=True)
        extend(Path(shutil.copytree(small_cache, tmp_path / "whole")))
        writes = count()
    for turn, (number, before) in enumerate(moments(writes, some=6)):
        folder = Path(shutil.copytree(small_cache, tmp_path / f"{number}-{before}"))
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_at(patch, number, before=before)
            extend(folder)
        assert read_status(folder).state is not State.CORRUPT or number > 3
        if turn % 2 and read_spec(folder) == larger.spec:
            run_build(larger, folder)
            seal(folder)
        else:
            extend(folder)
        assert open_cache(folder).root_hash == expected, f"killed {'before' if before else 'after'} write {number}"


def test_growing_again_before_the_first_time_is_over(cache, plan, at_once, monkeypatch, asked):
    """Units of two former specs lie side by side, and the answers of both are kept."""
    larger, largest = plan(views), plan(everything)
    grow(cache, larger.spec)
    with pytest.raises(Killed):
        build(larger, cache, device=CPU, on_unit=stop_at("logits/cnn/clean", 0))
    before = sum(asked)
    grow(cache, largest.spec)
    assert len(list((cache / "history").iterdir())) == 2
    only_clean = [(array, shard) for array, shard in largest.units if array.name == "logits/cnn/clean"]
    worker = Worker(largest, Store(open_storage(cache)), CPU, 256)
    for array, shard in only_clean:
        worker.compute(array, shard)
    assert sum(asked) - before == 32 * (9 - 7) + 8 * (9 - 3)
    run_build(largest, cache)
    assert seal(cache).root_hash == at_once("everything")


def stop_at(name: str, number: int) -> builder.OnUnit:
    def on_unit(array, shard: int, seconds: float) -> None:
        if (array.name, shard) == (name, number):
            raise Killed

    return on_unit


def test_a_former_unit_whose_bytes_changed_is_asked_again(cache, plan, at_once):
    path = cache / "data.zarr/logits/cnn/clean/c/1/0/0"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    (cache / "commits/logits/cnn/clean/00000.json").write_text("{")
    larger = plan(views)
    grow(cache, larger.spec)
    run_build(larger, cache)
    assert seal(cache).root_hash == at_once("views")


def test_a_damaged_former_spec_is_told(cache, plan):
    larger = plan(views)
    grow(cache, larger.spec)
    (kept,) = (cache / "history").iterdir()
    kept.write_bytes(kept.read_bytes().replace(b'"seed":10', b'"seed":11'))
    with pytest.raises(CorruptError, match=r"is not the former spec that was kept: remove it"):
        run_build(larger, cache)
    kept.unlink()
    run_build(larger, cache)
    seal(cache)


REFUSED: dict[str, tuple[Change, str]] = {
    "another seed": (lambda c: c.update(seed=11), r"seed: 10 -> 11"),
    "fewer rows": (lambda c: c["data"].update(limit=39), r"data\.rows: 40 -> 39"),
    "another holdout": (lambda c: c["data"].update(holdout=0.2), r"data\.holdout: 0\.1 -> 0\.2"),
    "other cutting": (lambda c: c["store"].update(rows_per_shard=16), r"store\.rows_per_shard: 32 -> 16"),
    "other precision": (lambda c: c.update(precision={"tf32": True}), r"precision\.tf32: false -> true"),
    "a changed attack": (
        lambda c: c["attacks"]["pgd-cnn"].update(steps=3),
        r"attacks\.pgd-cnn\.parameters\.steps: 2 -> 3",
    ),
    "a removed attack": (lambda c: c["attacks"].clear(), r"attacks\.pgd-cnn: \{.*\.\.\. -> \(absent\)"),
    "a changed teacher": (
        lambda c: c["teachers"]["cnn"].update(path=str(Path(c["teachers"]["cnn"]["path"]).with_name("vit"))),
        r"teachers\.cnn\.arch: \"resnet18\" -> \"timm:vit_tiny_patch16_224\"",
    ),
    "a renamed teacher": (
        lambda c: (c["attacks"].clear(), c["teachers"].update(net=c["teachers"].pop("cnn"))),
        r"teachers\.cnn: \{.*\.\.\. -> \(absent\)",
    ),
    "fewer views": (lambda c: c["views"].update(count=2), r"views\.count: 3 -> 2: 1 of the 3 views would be lost"),
    "mirrored views in another order": (
        lambda c: (c["views"].update(padding=2, count=25), c["attacks"]["pgd-cnn"].update(views=2)),
        r"attacks\.pgd-cnn\.views: 1 -> 2",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_addition_is_refused_with_the_fields(name, cache, plan):
    change, said = REFUSED[name]
    before = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    with pytest.raises(
        SpecMismatchError, match=rf"cannot be extended: .*{said}.*; only teachers, attacks and views can"
    ):
        grow(cache, plan(change).spec)
    assert before == {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}


def test_an_attack_whose_own_views_would_be_others_is_refused(plan):
    on_two = plan(lambda c: c["attacks"]["pgd-cnn"].update(views=2))
    wider = plan(lambda c: (c["attacks"]["pgd-cnn"].update(views=2), c["views"].update(padding=2, count=25)))
    assert growth_problems(on_two.spec, wider.spec) == [
        "views.padding: 1 -> 2, views.count: 3 -> 25: attack 'pgd-cnn' runs on the first 2 views, and these would be "
        "others"
    ]
    one_view = plan(lambda c: c["views"].update(padding=2, count=25))
    assert growth_problems(plan().spec, one_view.spec) == []  # view 0 is the identity, whatever the padding


def test_all_views_and_their_number_are_the_same_cache(plan):
    every, counted = plan(lambda c: c["views"].pop("count")), plan(lambda c: c["views"].update(count=9))
    assert every.spec == counted.spec and torch.equal(every.offsets, counted.offsets)
    assert torch.equal(every.offsets[:3], plan().offsets)


def test_build_names_extend_where_it_would_do(cache, plan):
    with pytest.raises(
        SpecMismatchError, match=r"views\.count: 3 -> 7; darht-cache extend .* SPEC\.yaml adds that and"
    ):
        run_build(plan(views), cache)
    with pytest.raises(SpecMismatchError) as caught:
        run_build(plan(lambda config: config.update(seed=11)), cache)
    assert "darht-cache extend" not in str(caught.value)


def test_a_teacher_that_computes_nothing_need_not_be_there(cache, write, tiny_teachers, tmp_path, at_once):
    def gone(config: dict[str, Any]) -> None:
        config["teachers"]["cnn"]["path"] = str(tmp_path / "gone")

    def missing_teacher(*changes: Change) -> Plan:
        return plan_build(write(*changes, gone), device=CPU, known=spec_in(cache))

    with pytest.raises(ModelError, match="is not a teacher folder"):
        plan_build(write(gone), device=CPU)  # a new cache would need it
    with pytest.raises(ModelError, match="is not a teacher folder"):
        missing_teacher(lambda c: c["teachers"].update(new={"path": str(tmp_path / "gone")}))
    assert run_build(missing_teacher(), cache).computed == 0
    (cache / "data.zarr/label/c/0").unlink()
    assert run_build(missing_teacher(), cache).computed == 1  # a repair that asks nobody
    added = missing_teacher(teacher)
    grow(cache, added.spec)
    run_build(added, cache)
    assert seal(cache).root_hash == at_once("teacher")
    larger = missing_teacher(teacher, views)
    grow(cache, larger.spec)
    with pytest.raises(ModelError, match="teacher 'cnn' must compute logits/cnn/clean shard 0, but its folder is gone"):
        run_build(larger, cache)


def test_the_command(cache, write, invoke, at_once, tmp_path):
    larger = write(everything)
    refused = invoke("build", larger, "--out", cache, "--device", "cpu")
    assert refused.exit_code == 2 and f"darht-cache extend {cache} SPEC.yaml" in refused.output
    assert invoke("extend", cache, write(lambda c: c.update(seed=3))).exit_code == 2
    done = invoke("extend", cache, larger, "--device", "cpu", "--allow", "vit")
    assert done.exit_code == 0, done.output
    assert f"root hash {at_once('everything')}" in done.output and "25 units computed" in done.output
    assert "0 units computed" in invoke("extend", cache, larger, "--device", "cpu").output
    assert invoke("extend", tmp_path / "nothing", larger).exit_code == 2
    assert not (tmp_path / "nothing").exists()


def test_behind_a_url(plan, write, invoke, at_once, tmp_path):
    url = f"memory://{tmp_path.name}/cache"
    build(plan(), url, device=CPU, on_unit=lambda array, shard, seconds: None)
    seal(url)
    assert invoke("extend", url, write(views), "--device", "cpu").exit_code == 0
    assert open_cache(url).root_hash == at_once("views")
    status = json.loads(invoke("status", url, "--json").output)
    assert status["state"] == "done" and status["shards"] == []
    assert len(read_history(open_storage(url)).fingerprints("logits/cnn/clean")) == 1
