"""Rows of a teacher's Jacobian: against torch's own, through the build, the loader, the stream and the exports."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from built import sealed_cache
from torch import nn

from darht.cache.admin.verify import verify
from darht.cache.builder.compute import Worker
from darht.cache.builder.jacobian import jacobian_rows
from darht.cache.builder.plan import Plan
from darht.cache.builder.seal import seal
from darht.cache.builder.teachers import Card, load_teacher, save_teacher
from darht.cache.export.webdataset import export_webdataset
from darht.cache.format.layout import layouts
from darht.cache.format.store import Store
from darht.cache.read.feed_plan import plan_feed
from darht.cache.read.loader import GIB, load_training_set
from darht.cache.read.reader import Cache, open_cache
from darht.cache.read.sizes import needed_bytes
from darht.cache.read.stream import Feed
from darht.cache.read.webdataset import open_shards
from darht.core.errors import ConfigError, ModelError
from darht.core.nets import build as build_net

CPU = torch.device("cpu")
PARTS = ("jacobian", "jacobian-scale", "jacobian-class")


def net_of(classes: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(classes)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 4, classes))
    return net.requires_grad_(False)


def pixels(rows: int = 6) -> torch.Tensor:
    return torch.rand(rows, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def exact(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Logits per pixel level, `[B, C, 3, H, W]`, one image at a time."""
    rows = [torch.autograd.functional.jacobian(model, image[None])[0, :, 0] for image in x]
    return torch.stack(rows) / 255


@pytest.mark.parametrize(("classes", "count"), [(10, 10), (3, 3), (25, 10), (25, 1), (25, 25), (2, 1)])
def test_rows_are_those_of_torch_s_jacobian_up_to_half_a_unit_of_int8(classes: int, count: int) -> None:
    model, x = net_of(classes), pixels()
    y = torch.arange(6) % classes
    values, scales, told = jacobian_rows(model, x, y, count)
    assert (values.dtype, scales.dtype, told.dtype) == (torch.int8, torch.float32, torch.int16)
    assert values.shape == (6, count, 3, 4, 4) and scales.shape == told.shape == (6, count)
    everything = exact(model, x)
    for b in range(6):
        for k in range(count):
            row = everything[b, told[b, k]]
            found = values[b, k].double() * float(scales[b, k])
            assert (found - row).abs().max() <= 0.5 * float(scales[b, k]) * (1 + 1e-4)
            assert int(values[b, k].abs().max()) == 127  # the whole range is used
            assert float(scales[b, k]) == pytest.approx(float(row.abs().max()) / 127, rel=1e-5)


def test_all_classes_stand_in_order_and_some_begin_with_the_true_one() -> None:
    model, x = net_of(25), pixels()
    logits, y = model(x), torch.tensor([0, 24, 3, 3, 7, 11])
    assert jacobian_rows(model, x, y, 25)[2].tolist() == [list(range(25))] * 6
    told = jacobian_rows(model, x, y, 10)[2]
    for b in range(6):
        order = sorted((c for c in range(25) if c != y[b]), key=lambda c: -float(logits[b, c]))
        assert told[b].tolist() == [int(y[b]), *order[:9]]


def test_a_gradient_of_zero_has_scale_zero() -> None:
    class Dead(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = x.flatten(1)
            return torch.stack([flat.sum(1), 0 * flat.sum(1), flat[:, 0] * 1e-42], dim=1)

    values, scales, _ = jacobian_rows(Dead(), pixels(), torch.zeros(6, dtype=torch.int64), 3)
    assert (values[:, 0] == 127).all()
    assert not values[:, 1].any() and not scales[:, 1].any()
    estimate = values[:, 2].double() * scales[:, 2].double()[:, None, None, None]
    assert estimate.abs().max() < 1e-40 and torch.isfinite(scales).all()  # below what float32 can divide by


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ModelError, match=r"^a gradient is not finite, so that there is no Jacobian$"):
        jacobian_rows(lambda x: torch.stack([x.flatten(1).sum(1) * bad, x.flatten(1).sum(1)], dim=1), pixels(),
                      torch.zeros(6, dtype=torch.int64), 2)  # fmt: skip


def test_the_caller_s_tensors_are_left_alone() -> None:
    model, x = net_of(5), pixels()
    with torch.no_grad():  # a caller may be inside
        jacobian_rows(model, x, torch.zeros(6, dtype=torch.int64), 5)
    assert not x.requires_grad and x.grad is None
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def with_jacobians(**counts: int | None):
    def change(config) -> None:
        config["jacobians"] = {name: {} if count is None else {"classes": count} for name, count in counts.items()}
        config["views"]["count"] = 2

    return change


@pytest.fixture(scope="module")
def sealed(tiny_cache_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """40 digits in shards of 8, with all rows of the ResNet's Jacobian and three of the ViT's."""
    import yaml

    folder, config = tmp_path_factory.mktemp("jacobian"), yaml.safe_load(tiny_cache_config.read_text())
    with_jacobians(cnn=None, vit=3)(config)
    config["data"]["limit"], config["store"] = 40, {"rows_per_shard": 8, "rows_per_chunk": 4}
    del config["attacks"]["pgd-vit"]
    return open_cache(sealed_cache(config, folder))


def test_the_arrays_of_the_format(sealed: Cache) -> None:
    found = {n: (a.dtype, a.shape, a.packed) for n, a in sealed.arrays.items() if n.endswith(PARTS)}
    assert found == {
        "logits/cnn/jacobian": ("int8", (40, 10, 3, 8, 8), True),
        "logits/cnn/jacobian-scale": ("float32", (40, 10), False),
        "logits/cnn/jacobian-class": ("int16", (40, 10), False),
        "logits/vit/jacobian": ("int8", (40, 3, 3, 8, 8), True),
        "logits/vit/jacobian-scale": ("float32", (40, 3), False),
        "logits/vit/jacobian-class": ("int16", (40, 3), False),
    }
    assert math.isnan(sealed.arrays["logits/cnn/jacobian-scale"].fill_value)
    assert {name: spec.classes for name, spec in sealed.spec.jacobians.items()} == {"cnn": 10, "vit": 3}


def test_a_cache_holds_the_jacobian_of_view_0(sealed: Cache, tiny_teachers: dict[str, Path]) -> None:
    x = torch.from_numpy(sealed.read("image")).float() / 255
    y = torch.from_numpy(sealed.read("label").astype(np.int64))
    for name, count in (("cnn", 10), ("vit", 3)):
        values, scales, told = (sealed.read(f"logits/{name}/{part}") for part in PARTS)
        expected = exact(load_teacher(tiny_teachers[name], CPU)[0], x).numpy()
        for b in range(40):
            for k in range(count):
                error = values[b, k] * np.float64(scales[b, k]) - expected[b, told[b, k]]
                assert np.abs(error).max() <= 0.501 * scales[b, k]
        assert (told[:, 0] == (0 if name == "cnn" else y.numpy())).all()


def test_a_sealed_cache_with_jacobians_verifies(sealed: Cache) -> None:
    assert verify(sealed.folder) == []


def test_a_cache_is_whole_only_with_its_jacobians(small: Callable[..., Plan], build_into, tmp_path: Path) -> None:
    """The three arrays of a teacher come from one computation, whichever of them is missing."""
    plan = small(with_jacobians(vit=2))
    folder = build_into(plan, tmp_path / "cache")
    root = seal(folder).root_hash
    removed = folder / "commits/logits/vit/jacobian-scale/00001.json"
    removed.unlink()
    again = []
    build_into(plan, folder, lambda array, shard, seconds: seconds and again.append((array.name, shard)))
    assert again == [("logits/vit/jacobian-scale", 1)]
    assert seal(folder).root_hash == root


def test_units_do_not_depend_on_their_shard_or_batch(small: Callable[..., Plan]) -> None:
    def other(config) -> None:
        with_jacobians(cnn=None, vit=3)(config)
        config["store"] = {"rows_per_shard": 40, "rows_per_chunk": 4}

    plan, one = small(with_jacobians(cnn=None, vit=3)), small(other)
    for name in (f"logits/{teacher}/{part}" for teacher in ("cnn", "vit") for part in PARTS):
        shards = [Worker(plan, Store(Path("unused")), CPU, 256).compute(plan.arrays[name], k) for k in range(3)]
        whole = Worker(one, Store(Path("unused")), CPU, 7).compute(one.arrays[name], 0)
        found = np.concatenate(shards)
        if name.endswith("scale"):
            np.testing.assert_allclose(found, whole, rtol=1e-4)
        else:  # another batch rounds sums otherwise, as logits of the existing arrays do
            assert np.abs(found.astype(int) - whole).max() <= (0 if name.endswith("class") else 1)
            assert (found != whole).mean() < 0.01


def test_jacobians_change_nothing_that_is_there(small: Callable[..., Plan]) -> None:
    before, after = small(with_jacobians()).arrays, small(with_jacobians(vit=3)).arrays
    assert set(after) - set(before) == {f"logits/vit/{part}" for part in PARTS}
    assert all(after[name].fingerprint == array.fingerprint for name, array in before.items())


def test_what_a_jacobian_depends_on(sealed: Cache) -> None:
    def changed(**fields) -> set[str]:
        old, new = sealed.arrays, layouts(dataclasses.replace(sealed.spec, **fields))
        names = [name for name in old if name.endswith(PARTS)]
        return {name.split("/")[1] for name in names if old[name].fingerprint != new[name].fingerprint}

    spec = sealed.spec
    vit = dataclasses.replace(spec.teachers["vit"], weights_sha256="0" * 64)
    assert changed(teachers={**spec.teachers, "vit": vit}) == {"vit"}
    fewer = dataclasses.replace(spec.jacobians["cnn"], classes=4)
    assert changed(jacobians={**spec.jacobians, "cnn": fewer}) == {"cnn"}
    assert changed(precision=dataclasses.replace(spec.precision, amp=True)) == {"cnn", "vit"}
    assert changed(data=dataclasses.replace(spec.data, sha256="0" * 64)) == {"cnn", "vit"}
    assert changed(views=dataclasses.replace(spec.views, count=1), seed=5, attacks={}) == set()


@pytest.mark.parametrize(
    ("jacobians", "message"),
    [
        ({"vti": {}}, "jacobians names teacher 'vti', which is not there; teachers are cnn, vit"),
        ({"vit": {"classes": 11}}, "jacobians of 'vit' asks for 11 classes, there are 10"),
        ({"vit": {"classes": 0}}, "spec.yaml.jacobians.vit: jacobians.classes must be at least 1; got 0"),
        ({"vit": {"class": 3}}, "spec.yaml.jacobians.vit: unknown key 'class'; did you mean 'classes'?"),
    ],
)
def test_mistakes_of_a_config(jacobians, message: str, refusal: Callable[..., str]) -> None:
    assert refusal(lambda config: config.update(jacobians=jacobians)) == message


@pytest.mark.parametrize("name", PARTS)
def test_no_attack_may_take_a_name_of_the_jacobian(name: str, refusal: Callable[..., str]) -> None:
    said = refusal(lambda config: config["attacks"].update({name: {"kind": "pgd", "teacher": "cnn"}}))
    assert said == f"spec.yaml: attack name '{name}' is taken by the format"


def test_a_teacher_without_a_finite_gradient(small: Callable[..., Plan], build_into, tmp_path: Path) -> None:
    kwargs = {"width": 2, "blocks": [1, 1, 1, 1]}
    net = build_net("resnet18", 10, kwargs)
    with torch.no_grad():
        net.conv1.weight.zero_()
        net.bn1.running_var.zero_()
        net.bn1.eps = 0.0
        net.bn1.bias.fill_(1.0)
        net.linear.weight.mul_(1e30)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d) and module is not net.bn1:
                module.weight.fill_(1e30)
    save_teacher(tmp_path / "steep", net, Card(arch="resnet18", kwargs=kwargs, num_classes=10, weights_sha256=""))
    plan = small(lambda config: None)
    model, x = load_teacher(tmp_path / "steep", CPU)[0], torch.zeros(2, 3, 8, 8)
    with pytest.raises(ModelError, match="not finite"):
        jacobian_rows(model, x, torch.zeros(2, dtype=torch.int64), 10)
    worker = Worker(dataclasses.replace(plan, teachers={**plan.teachers, "vit": model}), Store(tmp_path), CPU, 8)
    array = layouts(dataclasses.replace(plan.spec, jacobians=small(with_jacobians(vit=2)).spec.jacobians))
    with pytest.raises(ModelError) as caught:
        worker.compute(array["logits/vit/jacobian"], 1)
    assert str(caught.value) == (
        "teacher 'vit' on rows 16..23: a gradient is not finite, so that there is no Jacobian; "
        "leave it out of 'jacobians'"
    )


def same_jacobians(data, cache: Cache, rows: torch.Tensor, at: torch.Tensor) -> None:
    for name, jacobian in zip(data.teachers, data.jacobians, strict=True):
        for part, tensor in zip(PARTS, (jacobian.values, jacobian.scales, jacobian.classes), strict=True):
            np.testing.assert_array_equal(tensor[at], cache.read(f"logits/{name}/{part}")[rows])


def test_a_set_in_memory_holds_them_when_they_are_needed(sealed: Cache) -> None:
    everything = torch.arange(40)
    data = load_training_set(sealed, device=CPU, adversarial=False, budget_gib=1.0, jacobians=True)
    same_jacobians(data, sealed, everything, everything)
    same_jacobians(data.take(torch.tensor([7, 3])), sealed, torch.tensor([7, 3]), torch.arange(2))
    assert load_training_set(sealed, device=CPU, adversarial=True, budget_gib=1.0).jacobians == ()
    more = needed_bytes(sealed, adversarial=False, jacobians=True) - needed_bytes(sealed, adversarial=False)
    assert more == 40 * (10 + 3) * (3 * 8 * 8 + 4 + 2)


def test_a_set_needs_the_jacobian_of_every_teacher(small: Callable[..., Plan], build_into, tmp_path: Path) -> None:
    folder = build_into(small(with_jacobians(vit=2)), tmp_path / "cache")
    seal(folder)
    with pytest.raises(ConfigError, match="teacher 'cnn' has no Jacobian"):
        load_training_set(open_cache(folder), device=CPU, adversarial=False, budget_gib=1.0, jacobians=True)


@pytest.mark.parametrize("layout", ["zarr", "samples", "blocks"])
def test_a_stream_delivers_them_also_from_an_export(sealed: Cache, tmp_path: Path, layout) -> None:
    cache = sealed
    if layout != "zarr":
        export_webdataset(sealed, tmp_path / layout, layout)
        cache = open_shards(tmp_path / layout)
        for name in sealed.arrays:
            found, expected = cache.read(name), sealed.read(name)
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected)
    row = needed_bytes(sealed, adversarial=True, jacobians=True) / 40
    plan = plan_feed(cache, device=CPU, adversarial=True, jacobians=True, batch=4, budget_gib=32 * row / GIB)
    assert plan.kind == "streamed" and plan.window_rows < 40
    seen = []
    with Feed(cache, plan, seed=0, epochs=3) as feed:
        for epoch in (0, 1, 1, 0):  # a run that goes back asks for an epoch again, while another is read ahead
            seen.append([])
            for data, at in feed.batches(epoch):
                same_jacobians(data, sealed, data.rows[at], at)
                seen[-1] += data.rows[at].tolist()
            assert len(set(seen[-1])) == feed.steps * 4
    assert seen[0] == seen[3] != seen[1] == seen[2]
