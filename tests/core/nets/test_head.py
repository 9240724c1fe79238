"""The classifier layer: found, removed and filled so that a folded network gives the same logits."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from darht.core.errors import ModelError
from darht.core.nets import Backbone, backbone, build, fold_head, head_name

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
# architecture, kwargs, name of the head, features
NETS = [
    ("resnet18", {"width": 4, "blocks": [1, 1, 1, 1]}, "linear", 32),
    ("preact_resnet18", {"width": 4, "blocks": [1, 1, 1, 1], "bn_before_fc": True}, "linear", 32),
    ("wrn-10-2", {"width": 4}, "fc", 32),
    ("mobilenetv2", {"width_multiplier": 0.1}, "linear", 128),
    ("timm:vit_tiny_patch16_224", VIT, "head", 16),
    ("timm:resnetv2_18", {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 64]}, "head.fc", 64),
    ("timm:mixer_s32_224", {"img_size": 32}, "head", 512),
    ("torchvision:resnet18", {}, "fc", 512),
    ("torchvision:mobilenet_v2", {"width_mult": 0.1}, "classifier.1", 1280),
]
IDS = [arch for arch, *_ in NETS]


@pytest.mark.parametrize(("arch", "kwargs", "name", "features"), NETS, ids=IDS)
def test_folded_network_gives_the_logits_of_backbone_and_head(arch, kwargs, name, features):
    generator = torch.Generator().manual_seed(3)
    body = backbone(arch, kwargs)
    assert isinstance(body, Backbone)
    assert body.num_features == features
    plain = build(arch, 5, kwargs)
    assert head_name(plain, 5) == name

    weight = torch.randn(5, features, dtype=torch.float64, generator=generator)
    bias = torch.randn(5, dtype=torch.float64, generator=generator)
    state = body.module.state_dict()
    head = {key: value for key, value in plain.state_dict().items() if key in (f"{name}.weight", f"{name}.bias")}
    assert len(head) == 2
    plain.load_state_dict({**state, **head}, strict=True)
    plain.double().eval()
    body.module.double().eval()
    fold_head(plain, name, weight, bias)

    x = torch.rand(2, 3, 32, 32, dtype=torch.float64, generator=generator)
    h = body.module(x)
    assert h.shape == (2, features)
    torch.testing.assert_close(plain(x), F.linear(h, weight, bias), rtol=1e-12, atol=1e-12)


def test_head_is_the_last_layer_with_the_class_count():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 4))
    assert head_name(model, 5) == "1"
    assert head_name(model, 4) == "2"


def test_head_may_be_a_pointwise_convolution_only():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 4, 3))
    assert head_name(model, 4) == "0"


def test_a_timm_network_is_asked_for_its_head():
    model = build("timm:vit_tiny_patch16_224", 16, VIT)  # as many classes as features: other layers fit as well
    assert head_name(model, 16) == "head"
    with pytest.raises(ModelError, match="with 10 outputs"):
        head_name(model, 10)


def test_no_head():
    with pytest.raises(ModelError, match="with 10 outputs; Sequential has none"):
        head_name(nn.Sequential(nn.Linear(3, 5)), 10)
    with pytest.raises(ModelError, match="Linear has none"):
        head_name(nn.Linear(3, 10), 10)


def test_a_network_that_names_two_heads_has_none():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 5))
    model.get_classifier = lambda: (model[0], model[1])
    with pytest.raises(ModelError, match="Sequential has none"):
        head_name(model, 5)


@pytest.mark.parametrize(
    ("tail", "named"),
    [
        ([nn.ReLU()], "ReLU"),
        ([nn.Dropout(), nn.Flatten(), nn.Softmax(1)], "Softmax"),
        ([nn.Flatten()], None),
        ([], None),
    ],
)
def test_an_activation_after_the_classifier_is_refused(tail, named, monkeypatch):
    monkeypatch.setattr(
        nn, "tailed", lambda num_classes: nn.Sequential(nn.Linear(3, num_classes), *tail), raising=False
    )
    if named is None:
        assert backbone("python:torch.nn:tailed").num_features == 3
        return
    with pytest.raises(ModelError, match=f"puts {named} after its classifier '0'"):
        backbone("python:torch.nn:tailed")


def test_fold_leaves_gradients_as_they_were():
    model = nn.Sequential(nn.Linear(3, 2))
    weight, bias = torch.ones(2, 3, requires_grad=True), torch.ones(2)
    fold_head(model, "0", weight, bias)
    assert model[0].weight.is_leaf
    assert model[0].weight.requires_grad
    assert torch.equal(model[0].weight, weight)


def test_fold_takes_a_transposed_weight():
    model = nn.Sequential(nn.Conv2d(3, 2, 1))
    weight = torch.arange(6.0).view(3, 2).t()
    fold_head(model, "0", weight, torch.zeros(2))
    assert torch.equal(model[0].weight[:, :, 0, 0], weight)


@pytest.mark.parametrize(
    ("layer", "name", "sizes", "message"),
    [
        (nn.Linear(3, 2), "1", (2, 3, 2), "'1' must be a linear layer or a 1x1 convolution; it is NoneType"),
        (nn.ReLU(), "0", (2, 3, 2), "it is ReLU"),
        (nn.Conv2d(3, 2, 3), "0", (2, 3, 2), "it is Conv2d"),
        (nn.Linear(3, 2, bias=False), "0", (2, 3, 2), "must have a bias"),
        (nn.Linear(3, 2), "0", (3, 2, 2), r"takes weight \[2, 3\] and bias \[2\]; got \[3, 2\] and \[2\]"),
        (nn.Linear(3, 2), "0", (2, 3, 1), r"got \[2, 3\] and \[1\]"),
    ],
)
def test_fold_refuses(layer, name, sizes, message):
    model = nn.Sequential(layer)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ModelError, match=message):
        fold_head(model, name, torch.zeros(sizes[:2]), torch.zeros(sizes[2]))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
