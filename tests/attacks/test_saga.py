"""SAGA: the rollout, the blend, and that attention is used."""

import pytest
import torch
from tiny import Tiny, images, labelled, rng
from torch import nn

from darht.attacks import FGSM, PGD, SAGA, SET_ATTACKS, AutoSAGA
from darht.attacks import rollout as rollouts
from darht.attacks.rollout import Watched, is_transformer, rollout
from darht.core.errors import ConfigError, ModelError


def vit(pool="token", registers=0, seed=0, **more):
    import timm

    torch.manual_seed(seed)
    net = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, embed_dim=24, num_heads=3, num_classes=5,
        global_pool=pool, class_token=pool == "token", reg_tokens=registers, **more,
    )  # fmt: skip
    with torch.no_grad():  # a fresh network attends evenly and answers almost nothing
        for block in net.blocks:
            block.attn.qkv.weight.mul_(20.0)
        net.head.weight.normal_()
    return net.eval()


def slow_rollout(attention, row, pooled_from):
    """One image, by the whole matrix."""
    product = None
    for layer in attention:
        mean = layer[row].mean(0) + torch.eye(layer.shape[-1])
        mean = mean / mean.sum(-1, keepdim=True)
        product = mean if product is None else mean @ product
    return product[0] if pooled_from is None else product[pooled_from:].mean(0)


@pytest.mark.parametrize(("pool", "registers"), [("token", 0), ("token", 2), ("avg", 0)])
def test_the_rollout_equals_a_loop_over_images(pool, registers):
    watched = Watched(vit(pool, registers))
    x = images(5, side=32)
    watched(x)
    pooled_from = None if pool == "token" else 0
    fast = rollout(watched.attention, pooled_from)
    for row in range(5):
        torch.testing.assert_close(fast[row], slow_rollout(watched.attention, row, pooled_from), rtol=0, atol=1e-6)
    weights = watched.weights((32, 32))
    assert weights.shape == (5, 1, 32, 32)
    assert float(weights.min()) > 0 and torch.equal(weights.amax((1, 2, 3)), torch.ones(5))
    assert not weights.requires_grad


def test_the_watched_copy_answers_as_the_model_and_leaves_it_alone():
    model, x = vit(), images(3, side=32)
    fused = [block.attn.fused_attn for block in model.blocks]
    torch.testing.assert_close(Watched(model)(x), model(x), rtol=1e-4, atol=1e-5)
    assert [block.attn.fused_attn for block in model.blocks] == fused
    assert all(not block.attn.attn_drop._forward_hooks for block in model.blocks)
    assert is_transformer(model) and not is_transformer(Tiny())
    with pytest.raises(ModelError, match="no timm vision transformer"):
        Watched(Tiny())


def test_one_transformer_alone_equals_the_basic_iterative_method():
    model, x = vit(), images(6, side=32)
    y = labelled(model, x)
    bim = PGD(eps=4, step=1, steps=5, random_start=False)(model, x, y, generator=rng(6))
    assert float((SAGA(eps=4, step=1, steps=5)([model], x, y, generator=rng(6)) != bim).float().mean()) < 1e-3


def test_attention_changes_the_result_of_a_set(monkeypatch):
    members = [vit(), Tiny(side=32)]
    x = images(6, side=32)
    y = labelled(members[0], x)
    attack = SAGA(eps=4, step=1, steps=4)
    with_attention = attack(members, x, y, generator=rng(6))
    monkeypatch.setattr(rollouts.Watched, "weights", lambda self, size: torch.ones(1, 1, *size))
    without = attack(members, x, y, generator=rng(6))
    assert float((with_attention != without).float().mean()) > 0.01


@pytest.mark.parametrize("kind", ["saga", "auto-saga"])
def test_batch_size_does_not_change_the_blend(kind):
    members = [vit(), Tiny(side=32)]
    x = images(20, side=32)
    y = labelled(members[1], x)
    attack = SET_ATTACKS[kind](eps=4, step=1, steps=4)
    whole = attack(members, x, y, generator=rng(20))
    part = torch.tensor([3, 17, 8])
    assert torch.equal(attack(members, x[part], y[part], generator=rng(20)), whole[part])
    levels = (whole - x) * 255
    assert float(levels.abs().max()) <= 4 + 1e-3 and float((levels - levels.round()).abs().max()) < 1e-3


@pytest.mark.parametrize("kind", ["saga", "auto-saga"])
def test_rows_do_not_depend_on_batch_order_or_threads(kind):
    members = [vit(), Tiny(side=32), vit("avg", seed=1)]
    x = images(70, side=32)
    y = labelled(members[1], x)
    attack = SET_ATTACKS[kind](eps=4, step=1, steps=3)
    whole = attack(members, x, y, generator=rng(70))
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    assert torch.equal(attack(members, x[order], y[order], generator=rng(70)[order]), whole[order])
    for count in (1, 9, 33):
        assert torch.equal(attack(members, x[:count], y[:count], generator=rng(count)), whole[:count])
    for threads in (2, 3):
        torch.set_num_threads(threads)  # the fixture `one_thread` puts it back
        assert torch.equal(attack(members, x, y, generator=rng(70)), whole)
        assert torch.equal(attack(members, x[:9], y[:9], generator=rng(9)), whole[:9])


def test_the_resize_may_lie_inside_the_model():
    class Enlarged(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = vit()

        def forward(self, x):
            return self.net(nn.functional.interpolate(x, size=(32, 32), mode="bilinear"))

    model, x = Enlarged().eval(), images(4, side=16)
    made = SAGA(eps=4, step=1, steps=2)([model, Tiny(side=16)], x, labelled(model, x), generator=rng(4))
    assert made.shape == x.shape and not torch.equal(made, x)


def test_members_are_fooled_together():
    members = [vit(), Tiny(side=32), Tiny(side=32, seed=1)]
    x = images(16, side=32)
    y = labelled(members[0], x)
    right = [labelled(m, x) == y for m in members]
    for attack in (SAGA(eps=8, steps=15), AutoSAGA(eps=8, steps=15)):
        made = attack(members, x, y, generator=rng(16))
        fooled = [labelled(m, made) != y for m in members]
        assert all(
            float(f[r].float().mean() if bool(r.any()) else 1.0) >= 0.5 for f, r in zip(fooled, right, strict=True)
        )


def test_automatic_weights_differ_from_fixed_ones():
    members = [vit(), Tiny(side=32)]
    x = images(6, side=32)
    y = labelled(members[0], x)
    learned = AutoSAGA(eps=8, steps=8, rate=0.5)(members, x, y, generator=rng(6))
    equal = SAGA(eps=8, steps=8)(members, x, y, generator=rng(6))
    assert not torch.equal(learned, equal)


def test_alphas_are_the_papers_fixed_weights():
    members = [Tiny(side=32), Tiny(side=32, seed=1)]
    x = images(6, side=32)
    y = labelled(members[0], x)
    only_first = SAGA(eps=4, step=4, steps=1, alphas=(1.0, 0.0))(members, x, y, generator=rng(6))
    assert torch.equal(only_first, FGSM(eps=4)(members[0], x, y, generator=rng(6)))


def test_errors():
    x, y = images(2, side=32), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ConfigError, match="one alpha for each"):
        SAGA(alphas=(1.0, 2.0))([Tiny(side=32)], x, y, generator=rng(2))
    with pytest.raises(ConfigError, match="members"):
        SAGA()([], x, y, generator=rng(2))
    with pytest.raises(ConfigError, match="alphas"):
        SAGA(alphas=(-1.0,))
    with pytest.raises(ConfigError, match="L-inf"):
        SAGA(norm="l2")
    with pytest.raises(ConfigError, match="rate"):
        AutoSAGA(rate=0.0)
    with pytest.raises(ModelError, match="train mode"):
        SAGA()([Tiny(side=32).train()], x, y, generator=rng(2))


def test_sets_take_targets():
    model, x = Tiny(), images(70)
    y = labelled(model, x)
    targets = (y + 1 + torch.arange(70) % 4) % 5
    for attack in (SAGA(eps=48, step=4, steps=20), AutoSAGA(eps=48, step=4, steps=20)):
        made = attack([model, Tiny()], x, y, generator=rng(70), targets=targets)
        assert float((labelled(model, made) == targets).float().mean()) > 0.8
