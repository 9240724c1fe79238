"""The offline stage: the same bytes every time, perturbations that stay inside, answers that are the teachers' own."""

import dataclasses
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from darht.attacks.encoding import encode
from darht.cache.builder import compute
from darht.cache.builder.build import claim_folder
from darht.cache.builder.compute import Worker
from darht.cache.builder.config import attack_spec
from darht.cache.builder.seal import seal
from darht.cache.builder.teachers import load_teacher
from darht.cache.format.apply_views import apply_views
from darht.cache.format.commit import Commit, commit_key, write_commit
from darht.cache.format.layout import layouts, shard_key
from darht.cache.format.spec import PrecisionSpec
from darht.cache.format.store import Store
from darht.cache.read.reader import open_cache
from darht.core.config import fingerprint
from darht.core.errors import CacheError, ConfigError, CorruptError, SpecMismatchError
from darht.core.rng import RowRng
from darht.core.storage import open_storage

CPU = torch.device("cpu")


def contents(folder: Path) -> dict[str, object]:
    """Every file of a cache: its bytes, or for a commit record what does not depend on time and place."""
    found: dict[str, object] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        key = path.relative_to(folder).as_posix()
        found[key] = path.read_bytes()
        if key.startswith("commits/"):
            record = json.loads(path.read_bytes())
            found[key] = {name: value for name, value in record.items() if name not in ("seconds", "environment")}
    return found


class Stop(Exception):
    """Raised by a test to interrupt a build."""


def stop_after(units: int):
    done = []

    def on_unit(array, shard, seconds):
        done.append((array.name, shard))
        if len(done) == units:
            raise Stop

    return on_unit


def test_the_same_spec_gives_the_same_bytes(small, build_into, tmp_path):
    folders = [build_into(small(), tmp_path / name) for name in ("one", "two")]
    hashes = [seal(folder).root_hash for folder in folders]
    assert hashes[0] == hashes[1]
    assert contents(folders[0]) == contents(folders[1])


def computed(plan, name: str, shard: int = 0, batch_size: int = 256) -> np.ndarray:
    """The values of a unit that needs no stored one."""
    return Worker(plan, Store(Path("unused")), CPU, batch_size).compute(plan.arrays[name], shard)


def one_after_the_other(plan, array, shard: int, stored: dict[str, np.ndarray]) -> np.ndarray:
    """A unit by what the format says: batches of 256 rows of one view, on the host, written down before the next."""
    rows, spec = array.rows(shard), plan.spec
    images, labels = (torch.from_numpy(part[rows]) for part in (plan.source.images, plan.source.labels))
    plain = {"source_index": np.arange(rows.start, rows.stop), "label": labels.numpy(), "image": images.numpy(),
             "views": plan.offsets.numpy()}  # fmt: skip
    if array.kind in plain:
        return plain[array.kind].astype(array.dtype)
    found, numbers = np.empty((len(labels), *array.shape[1:]), dtype=array.dtype), torch.arange(rows.start, rows.stop)
    for view in range(array.shape[1]):
        x = apply_views(images, plan.offsets[[view]].expand(len(images), -1))
        if array.kind == "delta":
            attack, x = spec.attacks[array.attack].attack(), x.float() / 255
            keys = RowRng.create(spec.seed, "attack", array.attack, rows=numbers, views=torch.full_like(numbers, view))
            x_adv = attack(plan.teachers[spec.attacks[array.attack].teacher], x, labels, generator=keys)
            found[:, view] = encode(x_adv, x, attack.threat, spec.attacks[array.attack].scale)
        else:
            added = 0.0 if array.attack is None else torch.from_numpy(stored[f"delta/{array.attack}"][:, view]).float()
            with torch.no_grad():
                found[:, view] = plan.teachers[array.teacher]((x + added).float() / 255)
    return found


def test_a_build_on_a_cpu_has_the_root_hash_of_units_made_one_after_the_other(small, build_into, tmp_path):
    """Whatever is kept on a device, batched to its size or written by a thread: the bytes are these."""
    plan, folder = small(), open_storage(tmp_path / "plain")
    claim_folder(folder, plan)
    store, stored = Store(folder), {}
    for array, shard in plan.units:
        stored[array.name] = one_after_the_other(plan, array, shard, stored)
        size, sha256, _ = store.write(array, shard, stored[array.name])
        rows = array.rows(shard)
        write_commit(
            folder, array, Commit(array.name, shard, (rows.start, rows.stop), array.fingerprint, size, sha256, 1.0)
        )
    assert seal(tmp_path / "plain").root_hash == seal(build_into(plan, tmp_path / "built")).root_hash


def test_a_shard_travels_to_the_device_once(small, build_into, tmp_path, monkeypatch):
    """Images and labels once for all views, teachers and attacks, and a perturbation once for all teachers."""
    sent = []

    def send(tensor, device):
        sent.append((tensor.dtype, len(tensor)))
        return tensor.to(device)

    monkeypatch.setattr(compute, "send", send)

    def two_teachers(config):
        config["attacks"]["pgd-vit"] = {**config["attacks"]["pgd-cnn"], "teacher": "vit"}

    plan = small(two_teachers)
    build_into(plan, tmp_path / "cache", shards=[0])
    assert len(plan.block(0)) == 12  # index, labels, images, views; two perturbations; six arrays of answers
    views, image, label = (torch.int8, 3), (torch.uint8, 16), (torch.int64, 16)
    assert Counter(sent) == {views: 1, image: 1, label: 1, (torch.int8, 16): 2}


def test_another_seed_gives_other_perturbations(small):
    one, two = small(), small(lambda config: config.update(seed=1))
    assert (computed(one, "delta/pgd-cnn") != computed(two, "delta/pgd-cnn")).mean() > 0.5
    np.testing.assert_array_equal(computed(one, "image"), computed(two, "image"))


def test_a_stopped_build_goes_on_to_the_same_cache(small, build_into, tmp_path):
    plan = small()
    whole = build_into(plan, tmp_path / "whole")
    expected = seal(whole).root_hash
    for units in (1, 14):
        folder = tmp_path / f"stopped-{units}"
        with pytest.raises(Stop):
            build_into(plan, folder, stop_after(units))
        reused = []
        build_into(plan, folder, lambda array, shard, seconds, reused=reused: reused.append(seconds == 0))
        assert sum(reused) == units and len(reused) == len(plan.units)
        assert seal(folder).root_hash == expected
        assert contents(folder) == contents(whole)


def test_a_build_stopped_inside_a_unit_writes_it_again(small, build_into, tmp_path):
    plan, folder = small(), tmp_path / "cache"
    build_into(plan, folder)
    expected = seal(folder).root_hash
    array = plan.arrays["delta/pgd-cnn"]
    (folder / commit_key(array, 1)).unlink()  # stopped between shard and record
    (folder / shard_key(array, 2)).write_bytes(b"half a shard")  # a file that is there is no unit that is done
    (folder / shard_key(plan.arrays["label"], 0)).unlink()
    recomputed = []
    build_into(plan, folder, lambda array, shard, seconds: seconds and recomputed.append((array.name, shard)))
    assert recomputed == [("label", 0), ("delta/pgd-cnn", 1), ("delta/pgd-cnn", 2)]
    assert seal(folder).root_hash == expected


def test_a_finished_build_computes_nothing(small, build_into, tmp_path):
    plan = small()
    folder = build_into(plan, tmp_path / "cache")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*/c/**/*")}
    build_into(plan, folder, lambda array, shard, seconds: pytest.fail("computed") if seconds else None)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*/c/**/*")}


def test_units_come_shard_by_shard_inputs_first(small):
    units = [(array.name, shard) for array, shard in small().units]
    assert units[:9] == [
        ("source_index", 0),
        ("label", 0),
        ("image", 0),
        ("views/offset", 0),
        ("delta/pgd-cnn", 0),
        ("logits/cnn/clean", 0),
        ("logits/cnn/pgd-cnn", 0),
        ("logits/vit/clean", 0),
        ("logits/vit/pgd-cnn", 0),
    ]
    assert len(units) == len(set(units)) == 8 * 3 + 1


def test_the_arrays_hold_the_source(small, build_into, tmp_path):
    plan = small()
    folder = build_into(plan, tmp_path / "cache")
    seal(folder)
    cache = open_cache(folder)
    np.testing.assert_array_equal(cache.read("source_index"), np.arange(40))
    np.testing.assert_array_equal(cache.read("label"), plan.source.labels)
    np.testing.assert_array_equal(cache.read("image"), plan.source.images)
    np.testing.assert_array_equal(cache.read("views/offset"), plan.offsets.numpy())


def pixels(cache, attack: str | None, views: int) -> torch.Tensor:
    """Stored pixels uint8 `[N * views, 3, H, W]`, computed without the builder."""
    images, offsets = torch.from_numpy(cache.read("image")), torch.from_numpy(cache.read("views/offset"))
    stack = torch.stack([apply_views(images, offsets[[view]].expand(len(images), -1)) for view in range(views)], dim=1)
    if attack is not None:
        moved = stack.short() + torch.from_numpy(cache.read(f"delta/{attack}"))
        assert int(moved.min()) >= 0 and int(moved.max()) <= 255
        stack = moved.to(torch.uint8)
    return stack.flatten(0, 1)


@pytest.mark.parametrize("teacher", ["cnn", "vit"])
@pytest.mark.parametrize(("attack", "views"), [(None, 9), ("pgd-cnn", 1), ("pgd-vit", 2)])
def test_stored_logits_are_the_live_answers_on_the_stored_pixels(tiny_cache, tiny_teachers, teacher, attack, views):
    cache = open_cache(tiny_cache)
    model, _ = load_teacher(tiny_teachers[teacher], CPU)
    with torch.no_grad():
        live = model(pixels(cache, attack, views).float() / 255).view(100, views, 10)
    stored = torch.from_numpy(cache.read(f"logits/{teacher}/{attack or 'clean'}")).float()
    assert stored.shape == live.shape
    torch.testing.assert_close(stored, live, rtol=2**-10, atol=2e-4)


def test_float32_logits_are_exact(small, build_into, tmp_path, tiny_teachers):
    folder = build_into(
        small(lambda config: config["store"].update(logits="float32")), tmp_path / "cache", batch_size=7
    )
    seal(folder)
    cache = open_cache(folder)
    model, _ = load_teacher(tiny_teachers["cnn"], CPU)
    with torch.no_grad():
        live = model(pixels(cache, "pgd-cnn", 1).float() / 255)
    torch.testing.assert_close(torch.from_numpy(cache.read("logits/cnn/pgd-cnn"))[:, 0], live, rtol=1e-5, atol=1e-5)


def test_the_perturbations_work(tiny_cache):
    """PGD lowers the victim's confidence in the label and does more to it than to the other teacher."""
    cache = open_cache(tiny_cache)
    labels = cache.read("label").astype(np.int64)

    def loss(teacher: str, kind: str) -> float:
        logits = torch.from_numpy(cache.read(f"logits/{teacher}/{kind}")).float()[:, 0]
        return nn.functional.cross_entropy(logits, torch.from_numpy(labels)).item()

    gains = {teacher: loss(teacher, "pgd-cnn") - loss(teacher, "clean") for teacher in ("cnn", "vit")}
    assert gains["cnn"] > 0 and gains["cnn"] > gains["vit"]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    norm_and_eps=st.one_of(
        st.tuples(st.just("linf"), st.integers(1, 127)),
        st.tuples(st.just("l2"), st.floats(1, 5000)),
    ),
    step=st.integers(1, 40),
    steps=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_deltas_never_leave_the_ball_or_the_pixel_range(shared_plan, norm_and_eps, step, steps, seed):
    norm, eps = norm_and_eps
    attack = shared_plan.spec.attacks["pgd-cnn"]
    parameters = {**attack.parameters, "norm": norm, "eps": float(eps), "step": float(step), "steps": steps}
    check_stored_delta(shared_plan, dataclasses.replace(attack, parameters=parameters), seed)


@pytest.mark.parametrize("kind", ["fgsm", "mim", "apgd", "apgd-t", "fab-t", "cw", "cw-linf", "square"])
def test_every_attack_can_be_stored_without_leaving_the_ball(shared_plan, kind):
    short = {"steps": 3} if kind not in ("fgsm", "square") else {}
    short |= {"queries": 20} if kind == "square" else {}
    spec = attack_spec("pgd-cnn", {"kind": kind, "teacher": "cnn", "eps": 32, **short}, ("cnn", "vit"))
    delta = check_stored_delta(shared_plan, spec, seed=0)
    assert delta.any() or kind in ("fab-t", "cw")  # minimal attacks move nothing where the image is already wrong


def check_stored_delta(shared_plan, attack, seed):
    """Compute one unit and check every stored value against the ball and the pixel range."""
    spec = dataclasses.replace(shared_plan.spec, attacks={"pgd-cnn": attack}, seed=seed)
    plan = dataclasses.replace(shared_plan, spec=spec, arrays=layouts(spec))
    stored, threat = computed(plan, "delta/pgd-cnn"), attack.attack().threat
    assert stored.dtype == np.int8 and stored.shape == (16, 1, 3, 8, 8)
    assert plan.arrays["delta/pgd-cnn"].attributes["scale"] == attack.scale
    delta = stored.astype(np.float64) * attack.scale
    adversarial = plan.source.images[:16] + delta[:, 0]
    assert adversarial.min() >= -1e-3 and adversarial.max() <= 255 + 1e-3
    sizes = np.abs(delta) if threat.norm == "linf" else np.sqrt((delta**2).sum((1, 2, 3, 4)))
    assert sizes.max() <= threat.eps * (1 + 1e-6)
    return stored


@pytest.fixture(scope="module")
def shared_plan(tiny_cache_config, tmp_path_factory):
    import yaml

    from darht.cache.builder.build import plan_build

    config = yaml.safe_load(tiny_cache_config.read_text())
    config["data"]["limit"], config["store"] = 40, {"rows_per_shard": 16, "rows_per_chunk": 4}
    del config["attacks"]["pgd-vit"]
    path = tmp_path_factory.mktemp("plan") / "spec.yaml"
    path.write_text(yaml.safe_dump(config))
    return plan_build(path, device=CPU)


def test_a_row_does_not_depend_on_its_shard_or_batch(shared_plan):
    """Other cuts change nothing but the rounding of sums, which may turn a gradient's sign where it is nearly 0."""
    spec = dataclasses.replace(shared_plan.spec, store=dataclasses.replace(shared_plan.spec.store, rows_per_shard=40))
    other = dataclasses.replace(shared_plan, spec=spec, arrays=layouts(spec))
    name = "delta/pgd-cnn"
    one = computed(other, name, batch_size=7)
    many = np.concatenate([computed(shared_plan, name, shard) for shard in range(3)])
    assert (one == many).mean() > 0.999


def test_a_perturbation_is_keyed_by_seed_attack_view_and_row(shared_plan):
    """Made again from nothing but its own row, view and seed."""
    attack = dataclasses.replace(shared_plan.spec.attacks["pgd-cnn"], views=3)
    spec = dataclasses.replace(shared_plan.spec, attacks={"pgd-cnn": attack})
    plan = dataclasses.replace(shared_plan, spec=spec, arrays=layouts(spec))
    delta = computed(plan, "delta/pgd-cnn", shard=1)
    for row, view in [(16, 0), (16, 2), (31, 1)]:
        image = apply_views(torch.from_numpy(plan.source.images[[row]]), plan.offsets[[view]])
        label = torch.from_numpy(plan.source.labels[[row]])
        rng = RowRng.create(10, "attack", "pgd-cnn", rows=torch.tensor([row]), views=torch.tensor([view]))
        adversarial = attack.attack()(plan.teachers["cnn"], image.float() / 255, label, generator=rng)
        alone = (adversarial * 255).round().short() - image.short()
        assert (alone[0].numpy() == delta[row - 16, view]).mean() > 0.95  # a sign may turn where a gradient is nearly 0


def test_nothing_of_the_caller_is_touched(shared_plan, build_into, tmp_path):
    before = torch.random.get_rng_state(), random.getstate(), torch.backends.cudnn.allow_tf32
    spec = dataclasses.replace(shared_plan.spec, precision=dataclasses.replace(shared_plan.spec.precision, tf32=False))
    build_into(dataclasses.replace(shared_plan, spec=spec), tmp_path / "cache")
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == random.getstate()
    assert torch.backends.cudnn.allow_tf32 == before[2]
    with pytest.raises(Stop):
        build_into(dataclasses.replace(shared_plan, spec=spec), tmp_path / "stopped", stop_after(1))
    assert torch.backends.cudnn.allow_tf32 == before[2]


def test_amp_is_part_of_the_answer(small):
    plans = [small(lambda config, amp=amp: config.update(precision={"amp": amp})) for amp in (False, True)]
    exact, rough = (computed(plan, "logits/cnn/clean").astype(np.float32) for plan in plans)
    assert 0 < np.abs(exact - rough).max() < 0.05


def test_products_in_bfloat16_are_summed_in_float32():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn

    def flags():
        return matmul.allow_tf32, cudnn.allow_tf32, matmul.allow_bf16_reduced_precision_reduction

    before = flags()
    for precision in (PrecisionSpec(), PrecisionSpec(tf32=True), PrecisionSpec(amp=True)):
        with compute.arithmetic(precision):
            assert flags() == (precision.tf32, precision.tf32, False)
        assert flags() == before


@pytest.mark.parametrize(("word", "flags"), [("fp32", {}), ("tf32", {"tf32": True}), ("bf16", {"amp": True})])
def test_a_precision_in_a_word_is_that_of_its_flags(word, flags, small):
    plans = [small(lambda config, p=p: config.update(precision=p)) for p in (word, flags)]
    assert fingerprint(plans[0].spec) == fingerprint(plans[1].spec)
    assert (fingerprint(plans[0].spec) == fingerprint(small().spec)) == (word == "fp32")


def test_an_unknown_precision_is_refused(small):
    with pytest.raises(ConfigError, match=r"precision must be one of fp32, tf32, bf16; got 'fp16'"):
        small(lambda config: config.update(precision="fp16"))


def test_a_folder_of_another_spec_is_left_alone(small, build_into, tmp_path):
    folder = build_into(small(), tmp_path / "cache")
    before = contents(folder)
    with pytest.raises(SpecMismatchError, match=r"attacks\.pgd-cnn\.parameters\.steps: 2 -> 3; seed: 10 -> 11; choose"):

        def change(config):
            config["attacks"]["pgd-cnn"]["steps"] = 3
            config["seed"] = 11

        build_into(small(change), folder)
    assert contents(folder) == before


@pytest.mark.parametrize("damage", [b"{", b"\xff\xfe"])
def test_a_folder_with_a_damaged_spec(small, tmp_path, damage):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "spec.json").write_bytes(damage)
    with pytest.raises(CorruptError, match=r"spec\.json is not a cache spec"):
        claim_folder(open_storage(tmp_path / "cache"), small())


def test_a_file_in_the_place_of_the_folder(small, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(CacheError, match="choose a new or empty --out folder"):
        claim_folder(open_storage(tmp_path / "cache"), small())


def test_an_empty_folder_will_do(small, build_into, tmp_path):
    (tmp_path / "cache").mkdir()
    seal(build_into(small(), tmp_path / "cache"))


def test_the_origin_moves_with_its_folder(small, build_into, tmp_path, tiny_teachers):
    project = tmp_path / "project"
    shutil.copytree(tiny_teachers["cnn"].parent, project / "teachers")

    def near(config):
        config["teachers"] = {name: {"path": f"project/teachers/{name}"} for name in tiny_teachers}

    folder = build_into(small(near), project / "cache")
    seal(folder)
    assert open_cache(folder).origin()["teachers"] == {n: str(project / "teachers" / n) for n in tiny_teachers}
    project.rename(tmp_path / "moved")
    moved = open_cache(tmp_path / "moved" / "cache").origin()
    assert moved["teachers"]["vit"] == str(tmp_path / "moved" / "teachers" / "vit")
    assert (moved["data_root"], moved["image_size"]) == (None, None)


def test_a_cache_behind_a_url_tells_no_paths(small, build_into, tmp_path, tiny_teachers, monkeypatch):
    """Who built it still knows them; names of the machine stand nowhere."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "mine"))
    monkeypatch.setattr("platform.node", lambda: "my-machine")
    url = f"memory://{tmp_path.name}/told"
    build_into(small(), url)
    seal(url)
    storage, told = open_storage(url), (str(tmp_path), str(tiny_teachers["cnn"]), "my-machine")
    for key in storage.keys(""):
        assert not any(text.encode() in (storage.read(key) or b"") for text in told), key
    assert open_cache(url).origin()["teachers"] == {name: str(path) for name, path in tiny_teachers.items()}
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "another's"))
    assert "teachers" not in open_cache(url).origin()
    MemoryFileSystem.store.clear()


def test_identity_is_one_view(small, build_into, tmp_path):
    folder = build_into(small(lambda config: config.update(views={"kind": "identity"})), tmp_path / "cache")
    seal(folder)
    assert open_cache(folder).read("views/offset").tolist() == [[0, 0, 0]]
