"""Networks of timm, torchvision and the user's own modules."""

import subprocess
import sys
import textwrap

import pytest
import torch

from darht.core.errors import ConfigError, ModelError
from darht.core.nets import backbone, build, head_name

USER_MODULE = """
    from torch import nn

    from darht.core.errors import ConfigError

    number = 3


    def plain(num_classes, width=4):
        return nn.Sequential(nn.Flatten(), nn.Linear(4, width), nn.Linear(width, num_classes))


    def anything(**kwargs):
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, kwargs["num_classes"]))
        model.given = kwargs
        return model


    def fixed(width=4):
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 3))


    def headless():
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


    def positional(num_classes, /, width=4):
        return nn.Linear(width, num_classes)


    def listing():
        return []


    def broken():
        raise KeyError("first\\nsecond")


    def refusing():
        raise ConfigError("its own words")
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """A module that exists for one test; its name is returned."""
    name = f"nets_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(USER_MODULE))
    (tmp_path / f"{name}_cut.py").write_text("def half(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_timm():
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = build("timm:vit_tiny_patch16_224", 5, kwargs)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)


def test_torchvision():
    model = build("torchvision:mobilenet_v2", 5, {"width_mult": 0.1})
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize(
    ("arch", "kwargs", "message"),
    [
        ("timm:vit_tinny_patch16_224", {}, "nearest names are vit_tiny_patch16_224"),
        ("timm:hf_hub:someone/vit", {}, "timm has no model 'hf_hub:someone/vit'"),
        ("timm:%", {}, "no known name is near it"),
        ("timm:vit_tiny_patch16_224", {"colour": 1}, "unexpected keyword argument 'colour'; change its kwargs"),
        ("timm:vit_tiny_patch16_224", {"pretrained": True}, "pretrained cannot be set in kwargs"),
        ("timm:vit_tiny_patch16_224", {"checkpoint_path": "a"}, "checkpoint_path cannot be set"),
        ("timm:vit_tiny_patch16_224.no_such_tag", {}, "Invalid pretrained tag"),
        ("torchvision:resnet19", {}, "no classifier 'resnet19'; the nearest names are resnet1"),
        ("torchvision:fcn_resnet50", {}, "torchvision has no classifier 'fcn_resnet50'"),
        ("torchvision:resnet18", {"colour": 1}, "unexpected keyword argument 'colour'"),
        ("torchvision:resnet18", {"weights": "DEFAULT", "num_classes": 3}, "num_classes, weights cannot be set"),
    ],
)
def test_refused(arch, kwargs, message):
    with pytest.raises(ModelError, match=message) as caught:
        build(arch, 5, kwargs)
    assert "\n" not in str(caught.value)


def test_python_callable_gets_the_class_count_where_it_accepts_it(user_module):
    assert build(f"python:{user_module}:plain", 5, {"width": 6})[2].out_features == 5
    assert build(f"python:{user_module}:anything", 5, {"a": 1}).given == {"a": 1, "num_classes": 5}
    assert build(f"python:{user_module}:fixed", 5)[4].out_features == 3


def test_python_callable_with_its_own_class_count_has_a_backbone(user_module):
    module, num_features = backbone(f"python:{user_module}:fixed", {"width": 6})
    assert num_features == 6
    assert module(torch.zeros(2, 3, 8, 8)).shape == (2, 6)
    assert head_name(build(f"python:{user_module}:fixed", 3, {"width": 3}), 3) == "4"


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("plan", {}, "has no callable 'plan'; the nearest names are plain"),
        ("number", {}, "has no callable 'number'"),
        ("listing", {}, "must return a torch.nn.Module; it returned list"),
        ("listing", {"a": 1}, "does not know a; its kwargs are none"),
        ("plain", {"depth": 1}, "does not know depth; its kwargs are width"),
        ("positional", {}, "missing 1 required positional argument"),
        ("broken", {}, r"KeyError: 'first\\nsecond'"),
    ],
)
def test_refused_python(user_module, name, kwargs, message):
    with pytest.raises(ModelError, match=message) as caught:
        build(f"python:{user_module}:{name}", 5, kwargs)
    assert "\n" not in str(caught.value)


def test_an_error_of_darht_in_a_python_callable_passes_unchanged(user_module):
    with pytest.raises(ConfigError, match=r"^its own words$"):
        build(f"python:{user_module}:refusing", 5)


@pytest.mark.parametrize(("suffix", "kind"), [("_absent", "ModuleNotFoundError"), ("_cut", "SyntaxError")])
def test_python_module_that_cannot_be_imported(user_module, suffix, kind):
    with pytest.raises(ModelError, match=f"cannot import .*{suffix}' .*{kind}.*PYTHONPATH"):
        build(f"python:{user_module}{suffix}:net", 5)


def test_a_callable_without_signature_is_called_all_the_same():
    # Python cannot tell the signature of `type`, which takes one or three arguments.
    with pytest.raises(ModelError, match="python:builtins:type cannot be built"):
        build("python:builtins:type", 5, {"a": 1})


def test_backbone_without_a_classifier(user_module):
    with pytest.raises(ModelError, match="headless has no single linear layer"):
        backbone(f"python:{user_module}:headless")


def test_a_python_module_that_imports_timm_first_is_given_a_working_torchvision() -> None:
    code = (
        "from darht.core.nets import build\n"
        "kwargs = {'layers': [1], 'channels': [32], 'basic': True, 'bottle_ratio': 1.0, 'stem_chs': 32}\n"
        "print(sum(p.numel() for p in build('python:timm.models.resnetv2:ResNetV2', 10, kwargs).parameters()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 0
