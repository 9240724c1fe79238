"""`teachers: live`: the published algorithms with the teachers loaded, by hand and against wrong folders."""

import math

import pytest
import torch
import torch.nn.functional as F
from runs import CPU, assert_same_bits, changed

from darht.attacks.threat import Threat
from darht.cache.builder.teachers import load_teacher
from darht.cache.export.webdataset import export_webdataset
from darht.cache.format.apply_views import apply_views
from darht.cache.read.reader import open_cache
from darht.cache.read.sampler import draw_choices
from darht.cache.read.stream import Feed
from darht.cache.read.webdataset import open_shards
from darht.core.errors import ConfigError, ModelError
from darht.core.preprocessing import Preprocessing
from darht.core.rng import RowRng
from darht.trainer.config import InnerConfig
from darht.trainer.state.checkpoint import LAST, load_student
from darht.trainer.student.losses import AdaAd
from darht.trainer.student.model import Student
from darht.trainer.student.setup import feed_plan, live_teachers, make_student
from darht.trainer.student.step import Step
from darht.trainer.student.targets import live_answer
from darht.trainer.student.train import train

LIVE = changed(
    teachers="live",
    inner=vars(InnerConfig(eps=32, step=8, steps=3)),
    optim={"epochs": 1, "batch_size": 89, "schedule": "constant", "warmup": 0.0, "clip_norm": None, "lr": 0.1},
    loss={"phases": (0.0, 1.0), "clean_share": 0.0},
)


@pytest.fixture(scope="module")
def cache(tiny_cache):
    return open_cache(tiny_cache)


def batch_of(config, cache):
    """The student before its first step, and the only batch of the epoch: images, labels, and source indices."""
    with Feed(cache, feed_plan(config, cache, CPU, 1.0), seed=config.seed, epochs=1) as feed:
        student = make_student(config, feed, cache.spec.data.classes)
        ((data, at),) = feed.batches(0)
        views = draw_choices(at, len(data.offsets), config.seed, 0, "view")
        return student, apply_views(data.images[at], data.offsets[views]).float(), data.labels[at], at


def pgd_by_hand(student, levels, y, rows, seed):
    """Three steps of 8 levels on the student's cross-entropy in eval mode, from noise of 32 levels, inside 0..255."""
    student.eval()
    start = Threat(eps=32).random_start(levels.shape, RowRng.create(seed, "inner", 0, rows=rows)).float()
    adversarial = (levels + start).clamp(0, 255)
    for _ in range(3):
        x = (adversarial / 255).requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(student(x).logits, y, reduction="sum"), x)
        moved = adversarial + 8 * gradient.sign()
        adversarial = torch.minimum(torch.maximum(moved, levels - 32), levels + 32).clamp(0, 255)
    student.train()
    return adversarial / 255


@pytest.mark.parametrize("clean_share", [0.0, 1.0])
def test_darht_is_the_released_algorithm_on_a_batch(cache, tiny_teachers, tmp_path, clean_share):
    """CE plus `exp(-CE(T(X), y)) KL(T(X) || M(X))` of every teacher, asked about the student's own X; one SGD step."""
    config = changed(LIVE, loss={"phases": (0.0, 1.0), "clean_share": clean_share})
    row = train(config, cache, tmp_path, device=CPU).history[0]
    student, levels, y, rows = batch_of(config, cache)
    x = levels / 255 if clean_share else pgd_by_hand(student, levels, y, rows, config.seed)
    out = student.train()(x)
    loss = F.cross_entropy(out.logits, y)
    for t, name in enumerate(("cnn", "vit")):
        with torch.no_grad():
            said = F.softmax(load_teacher(tiny_teachers[name], CPU)[0](x), dim=1)
        weight = math.exp(float(said.gather(1, y[:, None]).log().mean()))
        kl = (said * (said.log() - F.log_softmax(out.feature_map[:, t], dim=1))).sum(1).mean()
        assert weight > 0.01 and kl > 0.1
        loss = loss + weight * kl
    assert row["loss"] == pytest.approx(loss.item(), abs=1e-5)
    loss.backward()
    trained = load_student(tmp_path / LAST, CPU)[0]
    for (name, parameter), after in zip(student.named_parameters(), trained.parameters(), strict=True):
        expected = parameter.detach() - 0.1 * (parameter.grad + 5e-4 * parameter.detach())
        torch.testing.assert_close(after, expected, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_on_clean_batches_live_teachers_say_what_the_cache_holds(mixed_cache, tmp_path):
    """On the drawn view both are the same question; the cache of this test holds float32."""
    losses = {}
    for teachers in ("live", "cached"):
        more = {"loss": {"phases": (0.0, 0.0), "clean_share": 1.0}, "optim": {"batch_size": 45}}
        config = changed(LIVE, teachers=teachers, **more)
        losses[teachers] = train(config, mixed_cache, tmp_path / teachers, device=CPU).history[0]["loss"]
    assert losses["live"] == pytest.approx(losses["cached"], abs=2e-6)


@pytest.mark.parametrize("kind", ["pgd", "warm"])
def test_adaad_asks_live_teachers_in_both_loops(mixed_cache, tmp_path, kind):
    """Two runs give the same bits, and not those of the estimate."""
    more = {"recipe": "adaad", "loss": {"igdm": 1.0}, "inner": {"kind": kind, "step": None}}
    optim = {"epochs": 2, "batch_size": 32}
    for name in ("one", "two"):
        train(changed(LIVE, **more, optim=optim), mixed_cache, tmp_path / name, device=CPU)
    assert_same_bits(tmp_path / "one", tmp_path / "two")
    config = changed(LIVE, **more, optim=optim, teachers="cached", targets="first-order")
    train(config, mixed_cache, tmp_path / "cached", device=CPU)
    weights = [(tmp_path / name / LAST / "model.safetensors").read_bytes() for name in ("one", "cached")]
    assert weights[0] != weights[1]


def test_a_live_teacher_is_a_part_of_the_inner_objective(cache, tiny_teachers):
    """The gradient that adaad climbs is that of KL(T(x) || S(x)) through both, here by finite differences."""
    teacher = load_teacher(tiny_teachers["vit"], CPU)[0].double()
    plain = {"teachers": 0, "num_classes": 10, "preprocessing": Preprocessing()}
    student = Student("resnet18", LIVE.student.kwargs, **plain).double().eval()
    x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def answer(pixels):  # live_answer, without rounding to float32
        return torch.stack([teacher(pixels)], 1)

    assert torch.allclose(live_answer([teacher])(x).double(), answer(x), atol=1e-5)
    at = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(live_answer([teacher])(at).sum(), at)
    assert slope.abs().max() > 1e-4  # the teacher's own part is there
    step = Step(x, x, torch.zeros(1), answer, answer(x), answer(x), torch.ones(1, 1), torch.tensor([True]), 0.5)
    objective = AdaAd().inner(student, step)
    at = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(student(at).logits, at).sum(), at)
    with torch.no_grad():
        for k in (0, 77, 150):
            nudge = torch.zeros(192, dtype=torch.float64).index_fill(0, torch.tensor([k]), 1e-6).view_as(x)
            up, down = (objective(student(p).logits, p).sum() for p in (x + nudge, x - nudge))
            assert float(up - down) / 2e-6 == pytest.approx(float(gradient.flatten()[k]), rel=1e-3, abs=1e-8)


def test_teachers_are_those_of_the_cache_in_its_order(cache, tiny_teachers):
    loaded = live_teachers(LIVE, cache, {"vit": tiny_teachers["vit"]}, CPU)
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for model, name in zip(loaded, ("cnn", "vit"), strict=True):
        assert torch.equal(model(x), load_teacher(tiny_teachers[name], CPU)[0](x))
        assert not any(p.requires_grad for p in model.parameters())
    assert live_teachers(changed(), cache, {}, CPU) == ()


def test_a_folder_with_other_weights_is_refused(cache, tiny_teachers, tmp_path):
    with pytest.raises(ModelError) as caught:
        train(LIVE, cache, tmp_path / "run", device=CPU, teachers={"cnn": tiny_teachers["vit"]})
    mine, theirs = (cache.spec.teachers[name].weights_sha256 for name in ("cnn", "vit"))
    assert str(caught.value).startswith(f"{tiny_teachers['vit']} is not teacher 'cnn' of the cache: ")
    assert all(part in str(caught.value) for part in ("weights_sha256: ", mine[:40], theirs[:40]))
    assert str(caught.value).endswith("; give --teacher cnn=FOLDER")
    assert not (tmp_path / "run").exists()


def test_folders_that_are_not_there_not_known_or_not_wanted(cache, tiny_teachers, tmp_path):
    with pytest.raises(ModelError, match="is not a teacher folder"):
        live_teachers(LIVE, cache, {"cnn": tmp_path}, CPU)
    with pytest.raises(ConfigError, match=r"^the cache has no teacher 'cnm'; it has cnn, vit$"):
        live_teachers(LIVE, cache, {"cnm": tiny_teachers["cnn"]}, CPU)
    with pytest.raises(ConfigError, match=r"^--teacher says where live teachers lie; set teachers: live"):
        live_teachers(changed(), cache, {"cnn": tiny_teachers["cnn"]}, CPU)


def test_an_export_does_not_know_where_teachers_lie(cache, tiny_teachers, tmp_path):
    export_webdataset(cache, tmp_path / "tars", "blocks")
    exported = open_shards(tmp_path / "tars")
    with pytest.raises(ConfigError, match=r"^teachers: live needs the folder of teacher 'cnn'; give --teacher cnn="):
        live_teachers(LIVE, exported, {}, CPU)
    assert len(live_teachers(LIVE, exported, tiny_teachers, CPU)) == 2
