"""AutoAttack: against the authors', resumed, and on models planted to deceive."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from tiny import LinearModel, Tiny, images, labelled, library, rng
from torch import nn

from darht.attacks import AutoAttack, Engine
from darht.attacks.autoattack import reference
from darht.attacks.validate import AttackWarning
from darht.core.errors import ConfigError, SpecMismatchError


class Planted(nn.Module):
    """A tiny network with something between it and its caller."""

    def __init__(self, answer, classes=5):
        super().__init__()
        self.net, self.answer = Tiny(classes=classes), answer
        self.eval()

    def forward(self, x):
        return self.answer(self.net, x)


def small(**kwargs) -> AutoAttack:
    return AutoAttack(**{"eps": 3, "steps": 10, "queries": 60, **kwargs})


def run_quietly(suite, model, x, y, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttackWarning)
        return suite.run(model, x, y, generator=rng(len(x)), **kwargs)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_worst_case_is_never_above_its_parts(norm):
    model, x = Tiny(), images(40)
    y = labelled(model, x)
    y[:4] = (y[:4] + 1) % 5
    suite = small(norm=norm, eps=3 if norm == "linf" else 60)
    found = run_quietly(suite, model, x, y)
    assert list(found.after) == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert found.after["clean"] == 36
    counts = list(found.after.values())
    assert counts == sorted(counts, reverse=True)
    assert int(found.robust.sum()) == counts[-1]
    for name, part in suite.parts(5).items():
        own = rng(40).fold("autoattack", name)
        alone = Engine().run(part, model, x, y, generator=own)
        assert bool((found.robust <= alone.robust).all()), name
    with torch.no_grad():
        assert torch.equal((model(found.x_adv).argmax(1) == y) & found.clean_correct, found.robust)
    assert float(suite.threat.distance(found.x_adv, x).max()) <= suite.threat.radius + 1e-6


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    model, x = Tiny(), images(30)
    y = labelled(model, x)
    whole = run_quietly(small(), model, x, y)

    def stop(name, accuracy):
        if name == "apgd-t":
            raise KeyboardInterrupt

    state = tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        run_quietly(small(), model, x, y, state=state, on_part=stop)
    done = []
    resumed = run_quietly(small(), model, x, y, state=state, on_part=lambda name, accuracy: done.append(name))
    assert torch.equal(resumed.x_adv, whole.x_adv)
    assert torch.equal(resumed.robust, whole.robust)
    assert torch.equal(resumed.backwards, whole.backwards)
    assert resumed.after == whole.after
    for suite, other in ((small(eps=4), x), (small(), x.flip(0))):
        with pytest.raises(SpecMismatchError, match="belongs to another run"):
            run_quietly(suite, model, other, y, state=state)


def test_a_state_is_not_taken_for_another_model_that_answers_alike(tmp_path):
    model, x = Tiny(), images(30)
    y, state = labelled(model, x), tmp_path / "state.pt"
    run_quietly(small(), model, x, y, state=state)
    with torch.no_grad():
        model.head.weight *= 2
        model.head.bias *= 2
    with pytest.raises(SpecMismatchError, match="belongs to another run"):
        run_quietly(small(), model, x, y, state=state)
    run_quietly(small(), Planted(lambda net, x: net(x)), x, y, state=tmp_path / "other.pt")


def test_random_models_are_told_to_use_rand():
    torch.manual_seed(0)
    model = Planted(lambda net, x: net.head(F.dropout(torch.tanh(net.bn(net.conv(x))).flatten(1), 0.3, training=True)))
    x = images(24)
    y = labelled(model.net, x)
    with pytest.warns(AttackWarning, match="random: use version rand"):
        small().run(model, x, y, generator=rng(24))
    found = run_quietly(small(version="rand", steps=5), model, x, y)
    assert list(found.after) == ["clean", "apgd-ce", "apgd-dlr"]
    assert not any("random" in text for text in found.warnings)


def test_probabilities_are_noticed():
    model = Planted(lambda net, x: net(x).softmax(1))
    x = images(24)
    with pytest.warns(AttackWarning, match="probabilities"):
        small().run(model, x, labelled(model, x), generator=rng(24))


def test_input_rounding_is_noticed_and_does_not_fool_the_worst_case():
    coarse = Planted(lambda net, x: net((x * 7).round() / 7))
    x = images(40)
    y = labelled(coarse, x)
    with pytest.warns(AttackWarning) as seen:
        found = AutoAttack(eps=24, steps=5, queries=200).run(coarse, x, y, generator=rng(40))
    texts = [str(one.message) for one in seen]
    assert any("gradient is zero for" in text for text in texts)
    assert any("square fooled" in text for text in texts)
    assert found.robust_accuracy < 0.7


def test_a_model_without_gradients_is_left_to_square():
    hidden = Planted(lambda net, x: net(x.detach()))
    x = images(24)
    y = labelled(hidden, x)
    with pytest.warns(AttackWarning) as seen:
        found = AutoAttack(eps=24, steps=3, queries=200).run(hidden, x, y, generator=rng(24))
    texts = " ".join(str(one.message) for one in seen)
    assert "apgd-ce cannot run" in texts and "fab-t cannot run" in texts and "square fooled" in texts
    assert found.robust_accuracy < 0.7


def test_three_classes_do_without_dlr():
    model = Tiny(classes=3)
    x = images(24)
    y = labelled(model, x)
    with pytest.warns(AttackWarning, match="3 classes are too few for DLR"):
        found = small(eps=8).run(model, x, y, generator=rng(24))
    assert found.robust_accuracy < 0.5


def test_huge_logits_do_not_fool_the_worst_case():
    x = images(40)
    plain, loud = Tiny(), Planted(lambda net, x: net(x) * 1e4)
    y = labelled(plain, x)
    with pytest.warns(AttackWarning, match="gradient is zero for"):
        masked = small(eps=4).run(loud, x, y, generator=rng(40))
    honest = run_quietly(small(eps=4), plain, x, y)
    assert int(masked.robust.sum()) <= int(honest.robust.sum()) + 1


def test_honest_models_raise_no_warning():
    model, x = LinearModel(), images(24, side=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = small(eps=1).run(model, x, labelled(model, x), generator=rng(24))
    assert found.warnings == ()


def test_only_first_hit_evaluates():
    with pytest.raises(ConfigError, match="first_hit"):
        AutoAttack(engine=Engine(rule="full"))


@pytest.mark.real_data
def test_accuracy_equals_the_authors(zoo, cifar_test):
    library("pyautoattack")
    from pyautoattack import AutoAttack as Theirs

    model, x, y = zoo("cnn_a_adv4"), cifar_test[0][:48], cifar_test[1][:48]
    theirs = Theirs(model, eps=4 / 255, seed=0, version="standard")
    for part in (theirs.apgd, theirs.apgd_targeted, theirs.fab):
        part.n_iter = 10
    for part in (theirs.apgd, theirs.apgd_targeted):
        part.n_iter_2, part.n_iter_min, part.size_decr = 2, 1, 1
    theirs.square.n_queries = 50
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x_adv, _ = theirs.run_standard_evaluation(x, y, batch_size=48)
    ours = run_quietly(AutoAttack(eps=4, steps=10, queries=50), model, x, y)
    with torch.no_grad():
        assert abs(int((model(x_adv).argmax(1) == y).sum()) - int(ours.robust.sum())) <= 1


def test_the_reference_is_one_call_away(monkeypatch):
    package = library("pyautoattack")
    asked = {}

    class Fake:
        def __init__(self, model, **settings):
            asked.update(settings)

        def run_standard_evaluation(self, x, y, *, batch_size):
            return x + 1 / 255, y

    monkeypatch.setattr(package, "AutoAttack", Fake)
    x = images(4) * 0.9
    torch.testing.assert_close(reference(Tiny(), x, torch.zeros(4, dtype=torch.long), eps=8), x + 1 / 255)
    assert asked["eps"] == 8 / 255 and asked["norm"] == "Linf" and asked["version"] == "standard"
