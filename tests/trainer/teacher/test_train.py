"""Teachers: every algorithm learns, FAT stops where it should, and nothing of the caller's is touched."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import darht.trainer.teacher.train as teacher_module
from darht.attacks import PGD
from darht.cache.builder.teachers import CARD, WEIGHTS, load_teacher, save_teacher
from darht.cache.sources.load import load_source
from darht.core.config import to_plain
from darht.core.errors import CacheError, ConfigError, ModelError, SpecMismatchError
from darht.core.rng import RowRng
from darht.trainer.config import OptimConfig
from darht.trainer.state.checkpoint import CHECKPOINT
from darht.trainer.teacher.config import TeachConfig
from darht.trainer.teacher.train import check_free, craft, expected_card, is_finished, outer_loss, teach

CPU = torch.device("cpu")
ARCH, KWARGS = "resnet18", {"width": 4, "blocks": [1, 1, 1, 1]}
VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
ALGORITHMS = ("standard", "pgd-at", "trades", "fat")
OPTIM = OptimConfig(epochs=4, batch_size=64, lr=0.05, schedule="constant")


@pytest.fixture(scope="module")
def digits():
    return load_source("digits", None, "train", limit=256)


def settings(algorithm, **changes):
    values = {"optim": OPTIM, "eps": 8, "step": 4, "steps": 2, "padding": 1, "flip": False, "beta": 1.0}
    return TeachConfig(algorithm=algorithm, **{**values, **changes})


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_lowers_its_loss(algorithm, digits):
    told = []
    teacher, card = teach(
        settings(algorithm), digits, ARCH, KWARGS, device=CPU, on_step=lambda *step: told.append(step)
    )
    assert [step[:3] for step in told] == [(n, 16, 64) for n in range(1, 17)]
    losses = [step[3] for step in told]
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert card.training["algorithm"] == algorithm


def test_the_card_says_how_and_on_what(digits):
    config = settings("fat", optim=OptimConfig(epochs=1, batch_size=128), tau=2, seed=5)
    teacher, card = teach(config, digits, ARCH, KWARGS, resize=12, device=CPU)
    assert (card.arch, card.kwargs, card.num_classes) == (ARCH, KWARGS, 10)
    assert card.training == to_plain(config)
    assert card.data == {"source": "digits", "split": "train", "rows": 256, "sha256": digits.sha256}
    assert card.preprocessing.resize == 12
    pixels = digits.images / 255
    np.testing.assert_allclose(card.preprocessing.mean, pixels.mean((0, 2, 3)), atol=1e-4)
    np.testing.assert_allclose(card.preprocessing.std, pixels.std((0, 2, 3)), atol=1e-4)
    assert card.accuracy == {}
    assert teacher.preprocess(torch.zeros(1, 3, 8, 8)).shape == (1, 3, 12, 12)


def weights(teacher):
    return {name: value.clone() for name, value in teacher.state_dict().items()}


@pytest.mark.parametrize(
    ("arch", "kwargs"),
    [(ARCH, KWARGS), ("timm:vit_tiny_patch16_224", {**VIT, "proj_drop_rate": 0.3})],
    ids=["resnet18", "dropout"],
)
def test_the_seed_decides_and_the_caller_s_generator_is_left_alone(digits, arch, kwargs):
    optim = OptimConfig(epochs=1, batch_size=64, lr=0.01)

    def run(seed, caller):
        torch.manual_seed(caller)
        before = torch.get_rng_state()
        teacher, _ = teach(settings("pgd-at", optim=optim, seed=seed), digits, arch, kwargs, device=CPU)
        assert torch.equal(torch.get_rng_state(), before)
        return weights(teacher)

    first, again, other = run(1, 0), run(1, 99), run(2, 0)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_network_that_does_not_take_the_images_is_refused(digits):
    with pytest.raises(ModelError, match="timm:vit_tiny_patch16_224 does not take images of 8x8 pixels"):
        teach(settings("standard"), digits, "timm:vit_tiny_patch16_224", {"depth": 1}, device=CPU)


class Linear(nn.Module):
    """Classes from one linear layer, in float64."""

    def __init__(self, seed=0):
        super().__init__()
        self.layer = nn.Linear(3 * 4 * 4, 5).double()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(5, 48, generator=generator, dtype=torch.float64))
            self.layer.bias.zero_()

    def forward(self, x):
        return self.layer(x.flatten(1).double())


def batch(count=32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 4, 4), generator=generator)
    x = images.float() / 255
    y = Linear()(x).argmax(1)
    y[::8] = (y[::8] + 1) % 5  # some are wrong from the start
    return images, x, y, RowRng.create(0, "inner", rows=torch.arange(count))


def friendly_by_hand(model, image, y, start, config):
    """One row of friendly adversarial training, as its authors' loop does it; also how many steps it took."""
    image = image.double()
    levels, patience = (image + start).clamp(0, 255), config.tau
    for step in range(config.steps):
        if int(model(levels[None] / 255).argmax()) != y:
            if patience == 0:
                return levels, step
            patience -= 1
        pixels = (levels / 255).requires_grad_()
        loss = nn.functional.cross_entropy(model(pixels[None]), torch.tensor([y]))
        (gradient,) = torch.autograd.grad(loss, pixels)
        moved = (levels - image + config.step * gradient.sign()).clamp(-config.eps, config.eps)
        levels = (image + moved).clamp(0, 255)
    return levels, config.steps


@pytest.mark.parametrize("tau", [0, 1, 2, 9])
def test_friendly_examples_stop_tau_steps_after_they_are_misclassified_first(tau):
    images, x, y, generator = batch()
    config, model = settings("fat", tau=tau, eps=24, step=3, steps=9), Linear()
    found = craft(model, x, y, config, generator)
    start = config.pgd().threat.random_start(x.shape, generator)
    delta = (x * 255 + start).clamp(0, 255) - x * 255
    in_one_shape = teacher_module._friendly_in_one_shape(model, x * 255, y, delta, config)  # as on a GPU
    assert torch.equal((x * 255 + in_one_shape).round(), (found * 255).round())
    steps = []
    for row in range(len(x)):
        expected, taken = friendly_by_hand(model, images[row], int(y[row]), start[row], config)
        assert torch.equal((found[row] * 255).round().long(), expected.long()), row
        steps.append(taken)
    if tau == 9:
        assert set(steps) == {9}
    else:
        assert min(steps) == tau  # wrong from the start: tau steps and no more
        assert len(set(steps)) > 2


@pytest.mark.parametrize("algorithm", ["pgd-at", "trades", "fat"])
def test_examples_stay_in_the_ball_in_the_range_and_on_the_grid(algorithm):
    images, x, y, generator = batch()
    x_adv = craft(Linear(), x, y, settings(algorithm, eps=16, step=5, steps=4), generator)
    levels = x_adv.double() * 255
    assert (levels - levels.round()).abs().max() < 1e-4
    assert (levels.round() - images).abs().max() <= 16
    assert levels.round().min() >= 0
    assert levels.round().max() <= 255


def test_pgd_at_trains_on_pgd(digits):
    _, x, y, generator = batch()
    config, model = settings("pgd-at", eps=16, step=5, steps=4), Linear().eval()
    expected = PGD(eps=16, step=5, steps=4)(model, x, y, generator=generator)
    assert torch.equal(craft(model, x, y, config, generator), expected)
    loss = nn.functional.cross_entropy(model(expected), y)
    assert outer_loss(model, x, y, config, generator).item() == loss.item()


def softmax(logits):
    powers = [math.exp(value) for value in logits]
    return [power / sum(powers) for power in powers]


def test_trades_is_cross_entropy_plus_beta_times_the_divergence():
    _, x, y, generator = batch()
    config, model = settings("trades", beta=6.0, eps=16, step=4, steps=5), Linear()
    x_adv = craft(model, x, y, config, generator)
    clean, robust = (model(pixels).tolist() for pixels in (x, x_adv))
    natural = np.mean([-math.log(softmax(row)[label]) for row, label in zip(clean, y.tolist(), strict=True)])
    divergence = np.mean(
        [
            sum(p * math.log(p / q) for p, q in zip(softmax(a), softmax(b), strict=True))
            for a, b in zip(clean, robust, strict=True)
        ]
    )
    assert divergence > 0.01
    found = outer_loss(model, x, y, config, generator)
    assert found.item() == pytest.approx(natural + 6 * divergence, rel=1e-9)


def test_trades_climbs_the_divergence_and_needs_no_labels():
    _, x, y, generator = batch()
    config, model = settings("trades", eps=16, step=4, steps=5), Linear()
    x_adv = craft(model, x, y, config, generator)
    assert torch.equal(x_adv, craft(model, x, (y + 1) % 5, config, generator))


class Modes(nn.Module):
    """Notes the mode in which it was asked."""

    def __init__(self):
        super().__init__()
        self.inside, self.modes = Linear(), []

    def forward(self, x):
        self.modes.append(self.training)
        return self.inside(x)


@pytest.mark.parametrize(
    ("algorithm", "asked"), [("standard", 1), ("pgd-at", 1), ("trades", 2), ("fat", 1)], ids=ALGORITHMS
)
def test_examples_are_crafted_in_eval_mode_and_the_loss_taken_in_train_mode(algorithm, asked):
    _, x, y, generator = batch()
    model = Modes().train()
    loss = outer_loss(model, x, y, settings(algorithm), generator)
    assert all(model.modes[-asked:])
    assert not any(model.modes[:-asked])
    loss.backward()
    assert model.inside.layer.weight.grad.abs().sum() > 0


def test_a_saved_teacher_comes_back(digits, tmp_path):
    teacher, card = teach(settings("standard"), digits, ARCH, KWARGS, device=CPU)
    saved = save_teacher(tmp_path, teacher.net, card)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CARD, WEIGHTS]
    loaded, found = load_teacher(tmp_path, CPU)
    assert found == saved
    assert len(saved.weights_sha256) == 64
    x = torch.from_numpy(digits.images[:8]).float() / 255
    assert torch.equal(loaded(x), teacher(x))


def test_what_is_free_to_train_into(tmp_path):
    check_free(tmp_path)
    check_free(tmp_path / "new", resume=True)  # a script may ask for it from the start
    (tmp_path / "file").write_text("")
    for folder, said in (
        (tmp_path, "is not empty"),
        (tmp_path / "file", "is a file: choose a new or empty --out folder"),
    ):
        with pytest.raises(CacheError, match=said):
            check_free(folder, resume=True)
    (tmp_path / CHECKPOINT).write_bytes(b"")
    check_free(tmp_path, resume=True)
    with pytest.raises(CacheError, match="--resume goes on with it"):
        check_free(tmp_path)


def test_a_teacher_is_finished_when_its_checkpoint_is_gone(digits, tmp_path):
    config = settings("standard", optim=OptimConfig(epochs=1, batch_size=128))
    expected = expected_card(config, digits, ARCH, KWARGS)
    assert not is_finished(tmp_path, expected)
    model, card = teach(config, digits, ARCH, KWARGS, device=CPU)
    assert card == expected
    save_teacher(tmp_path, model.net, replace(card, accuracy={"digits test": {}}))
    check_free(tmp_path, resume=True)
    assert is_finished(tmp_path, expected)
    with pytest.raises(SpecMismatchError, match=r"data\.rows: 256 -> 255"):
        is_finished(tmp_path, replace(expected, data=expected.data | {"rows": 255}))
    (tmp_path / CHECKPOINT).write_bytes(b"")  # measuring was stopped
    assert not is_finished(tmp_path, expected)


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="by one process and torchrun has started 4"):
        check_free(tmp_path)


DROPOUT = {"arch": "timm:vit_tiny_patch16_224", "kwargs": {**VIT, "proj_drop_rate": 0.3}}
ADAMW = OptimConfig(epochs=3, batch_size=64, lr=0.01, optimizer="adamw", schedule="cosine", warmup=0.1)


def stop_at(wanted, made):
    def on_step(step, total, images, loss):
        made.append(step)
        if step == wanted:
            raise KeyboardInterrupt

    return on_step


@pytest.mark.parametrize("network", [{"arch": ARCH, "kwargs": KWARGS}, DROPOUT], ids=["resnet18", "dropout"])
def test_a_stopped_training_goes_on_to_the_same_bits(digits, tmp_path, network):
    config, path, made = settings("fat", optim=ADAMW), tmp_path / CHECKPOINT, []
    whole, card = teach(config, digits, **network, device=CPU)
    for step in (2, 4, 9):  # within an epoch, at its end, after another one
        with pytest.raises(KeyboardInterrupt):
            teach(config, digits, **network, device=CPU, checkpoint=path, on_step=stop_at(step, made))
    again, same = teach(config, digits, **network, device=CPU, checkpoint=path, on_step=stop_at(None, made))
    assert made == list(range(1, 13))
    expected = weights(whole)
    assert all(torch.equal(expected[name], value) for name, value in weights(again).items())
    assert same == card
    done, _ = teach(config, digits, **network, device=CPU, checkpoint=path, on_step=stop_at(None, made))
    assert len(made) == 12  # what was killed before it was saved costs no step
    assert all(torch.equal(expected[name], value) for name, value in weights(done).items())


def test_a_training_that_is_killed_costs_its_epoch(digits, tmp_path):
    config, made = settings("standard"), []

    def on_step(step, total, images, loss):
        made.append(step)
        if step == 7:
            raise RuntimeError("as a kill")

    with pytest.raises(RuntimeError, match="as a kill"):
        teach(config, digits, ARCH, KWARGS, device=CPU, checkpoint=tmp_path / CHECKPOINT, on_step=on_step)
    again, _ = teach(
        config, digits, ARCH, KWARGS, device=CPU, checkpoint=tmp_path / CHECKPOINT, on_step=stop_at(None, made)
    )
    assert made == [*range(1, 8), *range(5, 17)]
    whole, _ = teach(config, digits, ARCH, KWARGS, device=CPU)
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(whole).items())


def test_another_training_is_refused_with_the_difference(digits, tmp_path):
    path = tmp_path / CHECKPOINT
    with pytest.raises(KeyboardInterrupt):
        teach(settings("trades"), digits, ARCH, KWARGS, device=CPU, checkpoint=path, on_step=stop_at(1, []))
    other = settings("trades", beta=2.0)
    with pytest.raises(SpecMismatchError, match=r"training\.beta: 1\.0 -> 2\.0; choose another --out"):
        teach(other, digits, ARCH, KWARGS, device=CPU, checkpoint=path)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bf16_is_another_arithmetic_of_the_same_training(digits, algorithm):
    told = {"float32": [], "bf16": []}
    for precision, losses in told.items():
        config = settings(algorithm, precision=precision, optim=OptimConfig(epochs=1, batch_size=64, lr=0.01))
        teacher, _ = teach(
            config, digits, ARCH, KWARGS, device=CPU, on_step=lambda *step, losses=losses: losses.append(step[3])
        )
        assert all(value.dtype == torch.float32 for value in weights(teacher).values() if value.is_floating_point())
    np.testing.assert_allclose(told["bf16"], told["float32"], rtol=0.05)
    assert told["bf16"] != told["float32"]


def test_a_compiled_training_is_the_same_training(digits, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **how: compiled.append(model) or torch.nn.Sequential(model))
    told = []
    optim = OptimConfig(epochs=1, batch_size=64, lr=0.01)
    for on in (False, True):
        teacher, _ = teach(settings("pgd-at", compile=on, optim=optim), digits, ARCH, KWARGS, device=CPU)
        told.append(weights(teacher))
    assert len(compiled) == 1
    assert all(torch.equal(told[0][name], value) for name, value in told[1].items())


def test_crops_lie_on_the_image_and_batches_in_the_data(digits):
    with pytest.raises(ConfigError, match="padding must be smaller than the image side; got 8 for images of 8 x 8"):
        teach(settings("standard", padding=8), digits, ARCH, KWARGS, device=CPU)
    with pytest.raises(ConfigError, match=r"got 257 for 256 rows: set optim.batch_size to 256 or less"):
        teach(settings("standard", optim=OptimConfig(batch_size=257)), digits, ARCH, KWARGS, device=CPU)
