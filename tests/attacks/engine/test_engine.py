"""The engine: what it records, leaves alone, refuses, and gives the same bits for."""

import copy

import pytest
import torch
from tiny import NAMES, SMALL, Tiny, images, labelled, rng
from torch import nn

from darht.attacks import APGD, APGDT, CW, FABT, MIM, PGD, CWLinf, Engine, Square
from darht.attacks.engine import engine
from darht.attacks.engine.batch_sizes import padded
from darht.attacks.engine.optimize_model import folded, private_copy
from darht.attacks.validate import check_inputs
from darht.core.errors import ConfigError, ModelError
from darht.core.rng import RowRng

EXACT = Engine(fold=False, channels_last=False)


@pytest.fixture(scope="module")
def scene():
    model = Tiny()
    x = images(70)
    return model, x, labelled(model, x)


@pytest.mark.parametrize("attack", SMALL, ids=NAMES)
@pytest.mark.parametrize("rule", ["full", "first_hit"])
def test_rows_do_not_depend_on_batch_order_threads_or_sharding(attack, rule, scene):
    model, x, y = scene
    engine, stream = Engine(rule=rule, lanes=1), rng(70)
    whole = engine.run(attack, model, x, y, generator=stream)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    moved = Engine(rule=rule, lanes=2, slots=32).run(attack, model, x[order], y[order], generator=stream[order])
    assert torch.equal(moved.x_adv, whole.x_adv[order])
    assert torch.equal(moved.first_hit, whole.first_hit[order])
    assert torch.equal(moved.backwards, whole.backwards[order])
    again = Engine(rule=rule, lanes=1, restarts=2).run(attack, model, x, y, generator=stream)
    other = Engine(rule=rule, lanes=3, slots=16, restarts=2).run(
        attack, model, x[order], y[order], generator=stream[order]
    )
    assert torch.equal(other.x_adv, again.x_adv[order])
    part = torch.arange(13, 34)
    alone = engine.run(attack, model, x[part], y[part], generator=stream[part])
    assert torch.equal(alone.x_adv, whole.x_adv[part])
    assert torch.equal(alone.loss, whole.loss[part])


def test_number_of_threads_does_not_change_bits(scene):
    model, x, y = scene
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(APGD(eps=4, steps=10)(model, x, y, generator=rng(70)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("attack", [PGD(steps=4), CW(eps=300, steps=8, searches=2), APGD(eps=4, steps=8)])
@pytest.mark.parametrize("count", [5, 16, 40])
def test_few_rows_of_a_larger_network_have_the_same_bits_on_any_number_of_threads(attack, count):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 16 * 16, 96), nn.GELU(), nn.Linear(96, 10),
    ).eval()  # fmt: skip
    x = images(count, side=32)
    y = labelled(model, x)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)  # the fixture `one_thread` puts it back
        found.append(
            (attack(model, x, y, generator=rng(count)), Engine().run(attack, model, x, y, generator=rng(count)))
        )
    for called, ran in found[1:]:
        assert torch.equal(called, found[0][0])
        assert torch.equal(ran.x_adv, found[0][1].x_adv)


def test_rules_are_not_mixed_up(scene):
    model, x, y = scene
    attack = PGD(eps=6, step=1, steps=15)
    first = EXACT.run(attack, model, x, y, generator=rng(70))
    whole = Engine(rule="full", fold=False, channels_last=False).run(attack, model, x, y, generator=rng(70))
    assert bool((first.backwards <= 15).all()) and bool((first.backwards < 15).any())
    assert bool((whole.backwards == 15).all())
    assert float(whole.loss.mean()) > float(first.loss.mean())
    assert torch.equal(first.first_hit >= 0, first.success)
    assert torch.equal(whole.x_adv, attack(model, x, y, generator=rng(70)))
    assert not torch.equal(whole.x_adv, first.x_adv)


def test_counts_are_what_the_model_saw(scene):
    _, x, y = scene
    model = Tiny()
    rows = []
    model.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    found = Engine(slots=16).run(PGD(eps=4, step=1, steps=5), model, x[:16], y[:16], generator=rng(16))
    assert sum(rows) >= int(found.forwards.sum())
    unseen = (found.first_hit == 5) | ~found.success  # judged after the last step
    assert bool((found.forwards == found.backwards + 2 + unseen).all())


def test_survivors_alone_are_restarted(scene):
    model, x, y = scene
    once = EXACT.run(PGD(eps=3, step=1, steps=3), model, x, y, generator=rng(70))
    more = Engine(fold=False, channels_last=False, restarts=3)
    thrice = more.run(PGD(eps=3, step=1, steps=3), model, x, y, generator=rng(70))
    kept = once.success
    assert torch.equal(thrice.x_adv[kept], once.x_adv[kept])
    assert bool((thrice.success >= once.success).all())
    assert bool((thrice.backwards[kept] == once.backwards[kept]).all())
    assert bool((thrice.backwards[~thrice.success] == 9).all())


def test_wrong_rows_are_not_attacked(scene):
    model, x, y = scene
    labels = y.clone()
    labels[::2] = (labels[::2] + 1) % 5
    found = EXACT.run(PGD(eps=4, step=1, steps=5), model, x, labels, generator=rng(70))
    assert torch.equal(found.x_adv[::2], x[::2])
    assert not bool(found.robust[::2].any())
    assert bool((found.backwards[::2] == 0).all())


class Noisy(nn.Module):
    """Raises after some calls."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls = 0
        self.eval()

    def forward(self, x):
        self.calls += 1
        if self.calls > 2:
            raise RuntimeError("the machine is on fire")
        return self.inner(x)


@pytest.mark.parametrize("hooked", [False, True])
def test_the_model_is_left_as_it_was_found(hooked, scene):
    _, x, y = scene
    model = Noisy(Tiny())
    model.inner.head.weight.requires_grad_(False)
    handle = model.register_forward_hook(lambda *_: None) if hooked else None
    before, threads = copy.deepcopy(model.state_dict()), torch.get_num_threads()
    grads = [p.requires_grad for p in model.parameters()]
    with pytest.raises(RuntimeError, match="on fire"):
        Engine(lanes=2).run(PGD(), model, x, y, generator=rng(70))
    assert not model.training
    assert [p.requires_grad for p in model.parameters()] == grads
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(model._forward_hooks) == hooked
    assert torch.get_num_threads() == threads
    assert handle is None or model.calls > 0


def test_a_copy_does_not_share_attributes_between_lanes(scene):
    _, x, y = scene

    class Remembers(Tiny):
        def forward(self, x):
            self.seen = x
            return super().forward(self.seen)

    model = Remembers()
    found = Engine(lanes=3, slots=16).run(PGD(eps=4, step=1), model, x, y, generator=rng(70))
    plain = Engine(lanes=1, slots=16).run(PGD(eps=4, step=1), Tiny(), x, y, generator=rng(70))
    assert torch.equal(found.x_adv, plain.x_adv)
    assert not hasattr(model, "seen")


def test_folding_and_layout_keep_the_answers(scene):
    model, x, y = scene
    fused = folded(private_copy(model), x[:16])
    assert fused is not None
    assert not any(isinstance(part, nn.BatchNorm2d) for part in fused.modules())
    torch.testing.assert_close(fused(x), model(x).detach(), rtol=1e-4, atol=1e-5)
    fast = Engine().run(PGD(eps=4, step=1), model, x, y, generator=rng(70))
    slow = EXACT.run(PGD(eps=4, step=1), model, x, y, generator=rng(70))
    assert fast.record["folded"] and not slow.record["folded"]
    assert abs(int(fast.robust.sum()) - int(slow.robust.sum())) <= 1


def test_what_cannot_be_folded_is_left_alone(scene):
    _, x, _ = scene

    class Branches(Tiny):
        def forward(self, x):
            return super().forward(x) if x.mean() > 0 else super().forward(x) * 2

    class Draws(Tiny):
        def forward(self, x):
            return super().forward(x + torch.rand(1))

    assert folded(Branches(), x[:16]) is None
    assert folded(Draws(), x[:16]) is None
    assert folded(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).eval(), x[:16]) is None


def test_bf16_hits_are_confirmed_in_float32(scene):
    model, x, y = scene
    found = Engine(precision="bf16").run(PGD(eps=4, step=1), model, x, y, generator=rng(70))
    slow = EXACT.run(PGD(eps=4, step=1), model, x, y, generator=rng(70))
    with torch.no_grad():
        assert torch.equal(model(found.x_adv).argmax(1) != y, found.success)
    assert abs(int(found.robust.sum()) - int(slow.robust.sum())) <= 2
    assert found.record["engine"]["precision"] == "bf16"


class Tied(nn.Module):
    """The right class leads by less than bfloat16 sees beside its size, wherever the pixels are."""

    def forward(self, x):
        logits = nn.functional.linear(x.flatten(1), torch.ones(2, x[0].numel()))
        return logits + logits.new_tensor([0.0, 1e-3])


def test_what_float32_does_not_confirm_is_no_hit_and_counts_twice():
    x = torch.full((20, 3, 8, 8), 0.5)
    y = torch.ones(20, dtype=torch.int64)
    attack = PGD(eps=4, step=1, steps=5)
    found = Engine(precision="bf16").run(attack, Tied().eval(), x, y, generator=rng(20))
    slow = Engine().run(attack, Tied().eval(), x, y, generator=rng(20))
    assert found.record["repeated_in_float32"] == 20 and not bool(found.success.any())
    assert bool((found.first_hit == -1).all()) and torch.equal(found.first_hit, slow.first_hit)
    assert bool((found.forwards > slow.forwards).all()) and torch.equal(found.x_adv, slow.x_adv)


def test_rounding_to_the_stored_code_is_recorded(scene):
    model, x, y = scene
    attack = APGD(eps=2, steps=20)
    found = Engine(scale=1.0).run(attack, model, x, y, generator=rng(70))
    levels = (found.x_adv - x) * 255
    assert float((levels - levels.round()).abs().max()) < 1e-3
    assert float(levels.abs().max()) < 2 + 1e-3
    plain = Engine().run(attack, model, x, y, generator=rng(70))
    assert found.record["saved_by_rounding"] == int((plain.success & ~found.success).sum())
    fine = Engine(scale=2 / 127).run(attack, model, x, y, generator=rng(70))
    assert fine.record["saved_by_rounding"] <= found.record["saved_by_rounding"]


def test_plain_callables_and_tiny_batches_work(scene):
    model, x, y = scene
    made = PGD(eps=4, step=1)(model.forward, x[:1], y[:1], generator=rng(1))
    assert torch.equal(made, PGD(eps=4, step=1)(model, x[:1], y[:1], generator=rng(1)))
    assert padded(1, 64) == 16 and padded(17, 64) == 32 and padded(64, 64) == 64 and padded(1, 64, constant=True) == 64


@pytest.mark.parametrize("attack", [PGD(eps=4, step=1), FABT(eps=4, steps=6, targets=2), Square(eps=4, queries=12)])
def test_compiled_copies_see_one_shape_alone(attack, scene, monkeypatch):
    """A new shape would be compiled anew, and compiling for a CPU takes longer than all other tests together."""
    model, x, y = scene
    shapes, asked = set(), []

    def compile_(part, **how):
        asked.append(how)
        return lambda z: (shapes.add(tuple(z.shape)), part(z))[1]

    monkeypatch.setattr(torch, "compile", compile_)
    found = Engine(compile=True, slots=32, restarts=2).run(attack, model, x, y, generator=rng(70))
    assert shapes == {(32, 3, 8, 8)} and asked and all(how == {"dynamic": False} for how in asked)
    monkeypatch.setattr(engine, "speed_up_first_layer", lambda model: model)  # what is compiled has none
    plain = Engine(slots=32, restarts=2).run(attack, model, x, y, generator=rng(70))
    assert torch.equal(found.success, plain.success) and torch.equal(found.x_adv, plain.x_adv)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiling for a CPU takes too long")
def test_compiled_copies_give_the_same_flags(scene):
    model, x, y = scene
    found = Engine(compile=True).run(PGD(eps=4, step=1), model, x, y, generator=rng(70))
    plain = EXACT.run(PGD(eps=4, step=1), model, x, y, generator=rng(70))
    assert abs(int(found.robust.sum()) - int(plain.robust.sum())) < 2


class Odd(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer, self.net = answer, Tiny()
        self.eval()

    def forward(self, x):
        return self.answer(self.net(x), x)


def test_clear_errors(scene):
    model, x, y = scene
    attack, stream = PGD(), rng(70)
    with pytest.raises(ModelError, match=r"train mode.*model\.eval"):
        attack(Tiny().train(), x, y, generator=stream)
    halfway = Tiny()
    halfway.bn.train()
    with pytest.raises(ModelError, match="bn is in train mode"):
        attack(halfway, x, y, generator=stream)
    with pytest.raises(ModelError, match="NaN or infinite for 64 of 64"):
        attack(Odd(lambda z, _: z * torch.nan), x, y, generator=stream)
    with pytest.raises(ConfigError, match=r"\[0, 1\]; got"):
        attack(model, x * 255, y, generator=stream)
    with pytest.raises(ConfigError, match="floating point"):
        attack(model, (x * 255).to(torch.uint8), y, generator=stream)
    with pytest.raises(ConfigError, match="below the model's 5 classes; got 7"):
        attack(model, x, y.clone().fill_(7), generator=stream)
    with pytest.raises(ConfigError, match="from 0; got -1"):
        attack(model, x, y - y.max() - 1, generator=stream) if int(y.max()) == 0 else attack(
            model, x, y * 0 - 1, generator=stream
        )
    with pytest.raises(ConfigError, match="int64"):
        attack(model, x, y.float(), generator=stream)
    with pytest.raises(ConfigError, match=r"x must be \[B, 3, H, W\]"):
        attack(model, x, y[:3], generator=stream)
    with pytest.raises(ModelError, match="Square"):
        attack(Odd(lambda z, _: z.detach()), x, y, generator=stream)
    with pytest.raises(ModelError, match=r"logits \[B, C\]"):
        attack(Odd(lambda z, _: z[:, :, None]), x, y, generator=stream)
    with pytest.raises(ConfigError, match="above 0 pixel levels"):
        PGD(eps=0)
    with pytest.raises(ConfigError, match="write eps: 8"):
        APGD(eps=0.031)
    with pytest.raises(ConfigError, match="at least 4 classes; got 3: use ce or margin"):
        three = Tiny(classes=3)
        APGD(objective="dlr", steps=2)(three, x, labelled(three, x), generator=stream)
    with pytest.raises(ConfigError, match="multiple of 16"):
        Engine(slots=20)
    with pytest.raises(ConfigError, match="scale"):
        Engine(scale=2.0)
    check_inputs(model, x, y)


def test_every_attack_checks_its_fields():
    for build in (
        lambda: PGD(steps=0), lambda: Engine(restarts=0), lambda: Engine(lanes=0), lambda: MIM(decay=-1.0),
        lambda: APGD(rho=1.0),
        lambda: APGD(eot=0), lambda: APGDT(targets=0), lambda: FABT(beta=1.0), lambda: FABT(steps=0),
        lambda: Square(queries=0), lambda: Square(area=0.0), lambda: CW(searches=0), lambda: CW(confidence=-1.0),
        lambda: CWLinf(norm="l2"), lambda: CWLinf(confidence=-1.0),
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            build()


def test_zero_gradients_are_counted(scene):
    _, x, _ = scene
    model = Odd(lambda z, x: z)
    model.net.conv.weight.data.zero_()
    found = EXACT.run(PGD(steps=2), model, x, labelled(model, x), generator=rng(70))
    assert found.record["zero_gradient"] == 70


def test_another_seed_draws_other_numbers(scene):
    model, x, y = scene
    attack = PGD(steps=1)
    first = attack(model, x, y, generator=RowRng.create(0, "a", rows=torch.arange(70)))
    second = attack(model, x, y, generator=RowRng.create(1, "a", rows=torch.arange(70)))
    assert not torch.equal(first, second)
