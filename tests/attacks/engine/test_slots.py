"""Few rows in many slots: small batches, runs side by side, and empty slots that help a random search."""

from dataclasses import dataclass

import pytest
import torch
from tiny import Tiny, images, labelled, rng
from torch.utils._python_dispatch import TorchDispatchMode

from darht.attacks import APGD, APGDT, FABT, FGSM, MIM, PGD, CWLinf, Engine, Square
from darht.attacks.engine import queue
from darht.attacks.engine.batch_sizes import Sizes
from darht.attacks.engine.engine import Outcome
from darht.attacks.engine.queue import Queue
from darht.attacks.engine.slots import run_lanes
from darht.attacks.engine.state import Rows
from darht.core.errors import ModelError

X = images(40)
Y = labelled(Tiny(), X)


@dataclass(frozen=True, kw_only=True)
class Lonely(Square):
    """Square as it would be in slots that nobody lends it."""

    @property
    def helped(self) -> bool:
        return False


class Calls:
    """A model that notes how large its batches are."""

    def __init__(self) -> None:
        self.model, self.sizes = Tiny(), []

    def __call__(self, x):
        self.sizes.append(len(x))
        return self.model(x)


def equal(first: Outcome, second: Outcome) -> bool:
    names = ("x_adv", "success", "first_hit", "loss", "margin", "forwards", "backwards")
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in names)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 3), ("l2", 150)])
@pytest.mark.parametrize("rule", ["first_hit", "full"])
@pytest.mark.parametrize(("count", "targeted"), [(1, False), (5, True), (23, False)])
def test_helped_square_is_the_search_of_each_row_alone(norm, eps, rule, count, targeted):
    x, y = X[:count], Y[:count]
    engine, made = Engine(rule=rule, slots=32), {"eps": eps, "norm": norm, "queries": 80, "area": 0.3}
    targets = (y + 1) % 5 if targeted else None
    alone = engine.run(Lonely(**made), Tiny(), x, y, generator=rng(count), targets=targets)
    helped = engine.run(Square(**made), Tiny(), x, y, generator=rng(count), targets=targets)
    assert equal(helped, alone)
    if rule == "full":
        assert bool((helped.forwards == 83).all())  # the start, 80 proposals, the clean row and the judge


def test_searches_of_some_length_are_compared():
    """The test above would prove nothing if every row fell at once, or if no proposal were ever accepted."""
    found = Engine().run(Square(eps=3, queries=80, area=0.3), Tiny(), X[:23], Y[:23], generator=rng(23))
    start = Engine().run(Square(eps=3, queries=1, area=0.3), Tiny(), X[:23], Y[:23], generator=rng(23))
    assert 0 < int(found.success.sum()) < 23 and int((found.first_hit > 2).sum()) > 2
    assert bool((found.margin >= start.margin).all()) and bool((found.margin > start.margin).any())


def test_helpers_save_passes():
    quiet = X[:1], labelled(Tiny(), X[:1])
    passes = {}
    for kind in (Lonely, Square):
        model = Calls()
        Engine(rule="full").run(kind(eps=1, queries=200, area=0.1), model, *quiet, generator=rng(1))
        passes[kind] = len(model.sizes)
    assert passes[Square] < passes[Lonely] / 2


@pytest.mark.parametrize("attack", [APGDT(eps=3, steps=8, targets=4), FABT(eps=3, steps=8, targets=4)])
@pytest.mark.parametrize("rule", ["first_hit", "full"])
def test_runs_beside_one_another_equal_runs_one_after_the_other(attack, rule):
    """In 16 slots 13 rows take turns; a row alone has all its runs in the slots at once."""
    engine, stream = Engine(rule=rule, slots=16, restarts=2), rng(13)
    together = engine.run(attack, Tiny(), X[:13], Y[:13], generator=stream)
    for row in range(0, 13, 4):
        at = torch.tensor([row])
        alone = engine.run(attack, Tiny(), X[at], Y[at], generator=stream[at])
        assert torch.equal(alone.x_adv, together.x_adv[at]) and torch.equal(alone.loss, together.loss[at])
        assert torch.equal(alone.first_hit, together.first_hit[at])
        assert torch.equal(alone.backwards, together.backwards[at])


def sizes_of(slots: int = 64, *, constant: bool = False) -> Sizes:
    return Sizes(X[:16], Y[:16], slots, "float32", constant=constant)


def settled(count: int, model) -> int:
    """The size once few rows have been left for long."""
    sizes = sizes_of()
    return [sizes.padded(count, model) for _ in range(20)][-1]


def test_small_batches_are_those_that_keep_the_bits():
    model = Tiny()
    for count in range(1, 17):
        size = settled(count, model)
        assert count <= size <= 16
        with torch.no_grad():
            assert torch.equal(model(X[:size]), model(X[:16])[:size])


@pytest.mark.parametrize("answer", ["size", "random"])
def test_models_that_answer_small_batches_otherwise_get_sixteen_rows(answer):
    net = Tiny()

    def model(x):
        noise = torch.rand(len(x), 5) if answer == "random" else float(len(x) < 16)
        return net(x) + 1e-4 * noise

    assert [settled(count, model) for count in (1, 4, 8, 12)] == [16] * 4


def test_gradients_alone_can_make_small_batches_unfit():
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * (1.0 + 1e-5 * (len(gradient) < 8))

    net = Tiny()
    assert settled(1, lambda x: net(Scaled.apply(x))) == 8


def test_constant_shapes_are_not_tried():
    model = Calls()
    assert sizes_of(constant=True).padded(1, model) == 64
    sizes = sizes_of()
    assert sizes.padded(17, model) == 32
    assert [sizes.padded(3, model) for _ in range(5)] == [16] * 5  # a few short passes are not worth a try
    assert model.sizes == []
    assert settled(3, lambda x: model(x.detach())) in (4, 8, 12, 16)  # no gradient: the logits decide


def test_the_last_rows_of_a_run_are_in_a_small_batch():
    model = Calls()
    found = Engine(slots=16).run(PGD(eps=2, step=1, steps=40), model, X[:16], Y[:16], generator=rng(16))
    few = int((found.backwards == 40).sum())
    assert 0 < few <= 12, "choose another epsilon: nobody is left, or nearly everybody"
    assert model.sizes.count(settled(few, Tiny())) > 10


class Syncs(TorchDispatchMode):
    """Counts what would wait for a GPU: values that are read, and tensors whose size depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        masks = name in ("index", "index_put", "index_put_") and any(
            one is not None and one.dtype == torch.bool for one in args[1]
        )
        if masks or name in ("_local_scalar_dense", "nonzero", "_unique2", "masked_select", "is_nonzero"):
            self.names.append(name)
        return func(*args, **kwargs)


@pytest.fixture
def patient(monkeypatch):
    """The engine as it is on a GPU: constant batches, and a question after 4 looks."""
    return lambda: monkeypatch.setattr(queue, "looks_between", lambda device: 4)


@pytest.mark.parametrize("rule", ["full", "first_hit"])
@pytest.mark.parametrize(("restarts", "targeted"), [(1, False), (3, True)])
@pytest.mark.parametrize("attack", [PGD(eps=6, steps=10), MIM(eps=3, steps=7), FGSM(eps=4), CWLinf(eps=4, steps=6),
                                    PGD(eps=200, step=40, norm="l2", steps=9), APGD(eps=4, steps=9),
                                    APGDT(eps=3, steps=6, targets=2)])  # fmt: skip
def test_asking_a_device_seldom_changes_nothing(rule, restarts, targeted, attack, patient):
    """Rows that are fooled between two questions end with what fooled them, after as many passes."""
    engine, targets = Engine(rule=rule, slots=16, restarts=restarts, lanes=1), (Y + 1) % 5 if targeted else None
    want = engine.run(attack, Tiny(), X, Y, generator=rng(40), targets=targets)
    patient()
    assert equal(engine.run(attack, Tiny(), X, Y, generator=rng(40), targets=targets), want)


@pytest.mark.parametrize("rule", ["full", "first_hit"])
@pytest.mark.parametrize("attack", [PGD(eps=1, step=1, steps=40), APGD(eps=1, steps=39)])
def test_a_device_is_waited_for_at_most_once_in_four_looks(attack, rule, patient):
    x, y, looks = X[:32], Y[:32], 40
    rows = Rows(x=x, y=y, clean=Tiny()(x), generator=rng(32))
    patient()
    waiting = Queue(attack, rows, torch.arange(32), rule=rule, slots=32)
    with Syncs() as syncs:
        run_lanes(waiting, [Tiny()])
    assert len(syncs.names) <= looks // 4 * (1 if rule == "full" else 2), syncs.names
    if rule == "full":
        assert len(syncs.names) <= 4


def test_a_model_that_turns_to_nan_is_told_late_but_told(patient):
    class Turns(Tiny):
        calls = 0

        def forward(self, x):
            Turns.calls += 1
            return super().forward(x) * (float("nan") if Turns.calls == 5 else 1.0)

    patient()
    with pytest.raises(ModelError, match="NaN or infinite for 16 of 16 rows"):
        Engine(rule="full", slots=16, fold=False, channels_last=False, lanes=1).run(
            PGD(eps=4), Turns(), X[:16], Y[:16], generator=rng(16)
        )
