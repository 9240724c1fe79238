"""Teachers that a build must refuse: for other images, with other classes, with answers that are no numbers."""

from pathlib import Path

import pytest
import torch
from torch import nn

from darht.cache.builder.seal import seal
from darht.cache.builder.teachers import Card, save_teacher
from darht.cache.format.commit import commit_key
from darht.core.errors import ModelError
from darht.core.nets import build as build_net
from darht.core.preprocessing import Preprocessing


def foreign(folder: Path, net: nn.Module, **card) -> Path:
    save_teacher(folder, net, Card(**{"num_classes": 10, "weights_sha256": "", **card}))
    return folder


def test_logits_that_are_not_finite(small, build_into, tmp_path):
    kwargs = {"width": 2, "blocks": [1, 1, 1, 1]}
    net = build_net("resnet18", 10, kwargs)
    with torch.no_grad():
        net.linear.bias[3] = 1e5  # finite in float32, infinite in float16
    foreign(tmp_path / "loud", net, arch="resnet18", kwargs=kwargs)

    def add(config):
        config["teachers"]["loud"] = {"path": "loud"}

    with pytest.raises(ModelError) as caught:
        build_into(small(add), tmp_path / "cache")
    assert str(caught.value) == (
        "teacher 'loud' gave logits that are not finite in float16 on rows 0..15; "
        "use store.logits: float32, or another teacher"
    )
    assert not (tmp_path / "cache" / commit_key(small(add).arrays["logits/loud/clean"], 0)).exists()

    def exact(config):
        add(config)
        config["store"]["logits"] = "float32"

    seal(build_into(small(exact), tmp_path / "exact"))


def test_a_teacher_of_nan(small, build_into, tmp_path):
    kwargs = {"width": 2, "blocks": [1, 1, 1, 1]}
    net = build_net("resnet18", 10, kwargs)
    nn.init.constant_(net.linear.weight, float("nan"))
    foreign(tmp_path / "nan", net, arch="resnet18", kwargs=kwargs)
    with pytest.raises(ModelError, match="teacher 'nan' gave logits that are not finite"):
        build_into(small(lambda config: config["teachers"].update(nan={"path": "nan"})), tmp_path / "cache")


def test_a_teacher_for_images_of_another_size(small, tmp_path):
    kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    arch = "timm:vit_tiny_patch16_224"
    net = build_net(arch, 10, kwargs)
    foreign(tmp_path / "big", net, arch=arch, kwargs=kwargs)

    def add(config):
        config["teachers"]["big"] = {"path": "big"}

    with pytest.raises(
        ModelError, match=r"^teacher 'big' does not take images of 8x8 pixels \(.*\); give its card the resize"
    ):
        small(add)
    foreign(tmp_path / "big", net, arch=arch, kwargs=kwargs, preprocessing=Preprocessing(resize=16))
    assert "big" in small(add).teachers


def test_a_teacher_whose_card_is_wrong_about_its_classes(small, tmp_path, monkeypatch):
    (tmp_path / "seven_classes.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 7))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    arch = "python:seven_classes:net"
    foreign(tmp_path / "seven", build_net(arch, 7), arch=arch)
    with pytest.raises(ModelError) as caught:
        small(lambda config: config["teachers"].update(seven={"path": "seven"}))
    assert str(caught.value) == (
        "teacher 'seven' must give logits of shape (1, 10), as its card says; got (1, 7) for an image of 8x8 pixels"
    )
