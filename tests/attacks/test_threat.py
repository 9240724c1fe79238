"""Epsilon, the grid of whole levels, and what is stored."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Tiny, images, labelled, rng

from darht.attacks import ATTACKS, Engine, Threat, parse_eps
from darht.attacks.encoding import decode, encode
from darht.attacks.threat import describe_eps
from darht.cache.admin.verify import delta_faults
from darht.cache.format.spec import AttackSpec
from darht.core.config import canonical_json, parse, to_plain
from darht.core.errors import ConfigError

BUDGETS = {"steps": 3, "queries": 8, "targets": 2, "searches": 2}


@pytest.mark.parametrize(
    ("text", "norm", "levels"),
    [
        ("8", "linf", 8), ("8/255", "linf", 8), (" 4 ", "linf", 4), ("16/255", "linf", 16), ("8.0", "linf", 8),
        ("1", "linf", 1), ("1/255", "linf", 1), ("255", "linf", 255), ("16", "l2", 16), ("128/255", "l2", 128),
        ("127.5", "l2", 127.5), ("1/255", "l2", 1), ("127.5/255", "l2", 127.5), ("0.5/255", "l2", 0.5),
    ],
)  # fmt: skip
def test_epsilon_on_the_command_line(text, norm, levels):
    assert parse_eps(text, norm) == levels


@pytest.mark.parametrize(
    ("text", "norm", "message"),
    [
        ("0.031", "linf", r"0.031 levels are not whole, and 0.031 is 7.9 levels as a share of 1: write 8 or 8/255"),
        (".031", "linf", r"got '.031': .* is 7.9 levels as a share of 1: write 8 or 8/255"),
        ("0.0314", "linf", "write 8 or 8/255"),
        ("0.05", "linf", "is 12.8 levels as a share of 1: write 13 or 13/255"),
        ("0.001", "linf", "is 0.3 levels as a share of 1: write 1 or 1/255"),
        ("3.5", "linf", "3.5 levels are not whole, and 3.5 is 892.5 levels as a share of 1: write 4 or 4/255"),
        ("0.5/255", "linf", "epsilon must be a whole number of pixel levels"),
        ("256", "linf", "epsilon is in pixel levels of 255; got 256"),
        ("1.0", "l2", r"1 pixel levels are 0.0039, and 1 as a share of 1 is 255 levels: write 1/255 or 255/255"),
        ("0.5", "l2", r"0.5 as a share of 1 is 127.5 levels: write 0.5/255 or 127.5/255"),
        ("15.9", "l2", "an L2 epsilon below 16 has two readings"),
        *((text, norm, "epsilon reads 8 or 8/255, in pixel levels above 0") for norm in ("linf", "l2") for text in (
            "eight", "0", "0/255", "-1", "1/0", "", "1/32", "8/", "nan", "inf", "1e3", "8/255/2", "9" * 500, "x" * 9999
        )),
    ],
)  # fmt: skip
def test_an_epsilon_with_two_readings_or_none_is_one_line(text, norm, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_eps(text, norm)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@given(st.integers(1, 255))
def test_both_ways_to_write_an_epsilon_are_the_same(levels):
    assert parse_eps(str(levels)) == parse_eps(f"{levels}/255") == parse_eps(f"{levels}/255", "l2") == levels


def test_an_epsilon_in_both_units():
    assert describe_eps(8.0) == "eps 8 levels = 0.0314" and describe_eps(127.5) == "eps 127.5 levels = 0.5000"


@pytest.mark.parametrize("kind", ["pgd", "mim"])
def test_files_may_write_levels_as_a_share_of_255(kind):
    found = parse(ATTACKS[kind], {"eps": "8/255", "step": " 2/255 "}, kind)
    assert (found.eps, found.step) == (8, 2) and to_plain(found)["eps"] == 8.0
    for wrong in ("8/256", "0.031", "x/255", "0.5/255"):
        with pytest.raises(ConfigError):
            parse(ATTACKS[kind], {"eps": wrong}, kind)


def test_a_spec_still_refuses_a_fraction():
    for kind, attack in ATTACKS.items():
        with pytest.raises(ConfigError, match="levels"):
            attack(eps=0.03 if attack().norm == "linf" else 0.0)
        assert to_plain(attack())["eps"] > 0, kind


@pytest.mark.parametrize("kind", list(ATTACKS))
def test_fields_go_through_json_and_back(kind):
    attack = ATTACKS[kind]()
    plain = to_plain(attack)
    assert parse(ATTACKS[kind], plain, kind) == attack
    assert canonical_json(attack) == canonical_json(plain)
    assert hash(attack) == hash(ATTACKS[kind]())


def build(kind, norm, eps):
    fields = {field: value for field, value in BUDGETS.items() if field in ATTACKS[kind].__dataclass_fields__}
    if "step" in ATTACKS[kind].__dataclass_fields__:
        fields["step"] = max(1, eps // 3)
    return ATTACKS[kind](eps=eps, norm=norm, **fields)


NORMS = [
    (kind, norm)
    for kind in ATTACKS
    for norm in ("linf", "l2")
    if (kind, norm) not in {("cw", "linf"), ("cw-linf", "l2")}
]


@pytest.mark.parametrize(("kind", "norm"), NORMS)
@settings(max_examples=4, deadline=None)
@given(
    eps=st.integers(1, 40), seed=st.integers(0, 99), count=st.integers(1, 5), double=st.booleans(),
    side=st.sampled_from([(8, 8), (7, 9), (16, 12)]), rule=st.sampled_from(["full", "first_hit"]),
)  # fmt: skip
def test_no_attack_leaves_the_ball_or_the_pixel_range(kind, norm, eps, seed, count, double, side, rule):
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 5)).eval()
    noise = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (count, 3, *side), generator=noise).float() / 255
    if double:
        x, model = (x.double() * 255).round() / 255, model.double()
    y = torch.randint(0, 5, (count,), generator=noise)
    attack = build(kind, norm, eps)
    found = Engine(rule=rule).run(attack, model, x, y, generator=rng(count, seed))
    assert found.x_adv.dtype == x.dtype and found.x_adv.shape == x.shape
    assert float(found.x_adv.min()) >= 0 and float(found.x_adv.max()) <= 1
    assert float(attack.threat.distance(found.x_adv, x).max()) * 255 <= eps * (1 + 1e-5)
    if attack.whole_levels:
        levels = (found.x_adv - x).double() * 255
        assert float((levels - levels.round()).abs().max()) < 1e-3


@settings(max_examples=40, deadline=None)
@given(eps=st.floats(0.1, 3000), side=st.sampled_from([1, 8, 64]), seed=st.integers(0, 99))
def test_an_l2_start_lies_on_the_sphere_however_large_the_image(eps, side, seed):
    start = Threat(eps=eps, norm="l2").random_start(torch.Size((3, 3, side, side)), rng(3, seed)).flatten(1)
    norms = torch.linalg.vector_norm(start.double(), dim=1)
    assert float(norms.max()) <= eps * (1 + 1e-5)
    if side > 1 and eps < 255:
        assert float(norms.min()) >= eps * (1 - 1e-5) and not torch.equal(start[0], start[1])


@settings(max_examples=40, deadline=None)
@given(
    eps=st.integers(1, 100), unit=st.sampled_from(["whole", "fine"]), norm=st.sampled_from(["linf", "l2"]),
    seed=st.integers(0, 999), excess=st.floats(0.1, 3.0),
)  # fmt: skip
def test_stored_codes_stay_in_the_ball_and_in_range(eps, unit, norm, seed, excess):
    noise = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (4, 3, 5, 5), generator=noise, dtype=torch.uint8)
    x = image.float() / 255
    threat = Threat(eps=eps, norm=norm)
    x_adv = (x + excess * eps / 255 * (2 * torch.rand(x.shape, generator=noise) - 1)).clamp(0, 1)
    size = 1.0 if unit == "whole" else eps / 127
    codes = encode(x_adv, x, threat, size)
    spec = AttackSpec("pgd", "t", 1, {"eps": float(eps), "norm": norm})
    assert list(delta_faults(codes.double().numpy() * size, image.numpy(), spec)) == []
    assert codes.dtype == torch.int8
    assert float(threat.distance(decode(codes, x, size), x).max()) <= threat.radius * (1 + 1e-5)


def test_robust_accuracy_does_not_rise_with_epsilon():
    model, x = Tiny(), images(60)
    y = labelled(model, x)
    for kind in ("pgd", "apgd", "apgd-t", "square", "cw-linf"):
        shares = [
            Engine().run(build(kind, "linf", eps), model, x, y, generator=rng(60)).robust_accuracy for eps in (1, 4, 16)
        ]
        assert shares == sorted(shares, reverse=True), (kind, shares)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "clean", "under", "eps"),
    [
        ("cnn_sgd", 76.10, 15.0, 2),
        ("cnn_a_adv4", 60.07, 24.0, 8),
        ("resnet2b_adv", 69.25, 41.2, 4),
        ("cnn_deep_kw", 55.31, 37.6, 4),
    ],
)
def test_real_networks_reproduce_their_accuracies(name, clean, under, eps, zoo, cifar_test):
    x, y = cifar_test[0][:500], cifar_test[1][:500]
    found = Engine().run(ATTACKS["pgd"](eps=eps, step=max(1, eps // 4), steps=20), zoo(name), x, y, generator=rng(500))
    for measured, stated in ((found.clean_correct, clean), (found.robust, under)):
        share = stated / 100
        error = 100 * (share * (1 - share) / 500) ** 0.5
        assert abs(100 * float(measured.float().mean()) - stated) < 3 * error + 1
