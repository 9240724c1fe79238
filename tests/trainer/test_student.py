"""The student: shapes, the plain form, and folding into a network of the same architecture."""

import pytest
import torch

from darht.cache.teachers import Preprocessing
from darht.core.errors import ModelError
from darht.core.nets import build
from darht.trainer.student import Student, StudentOutput

PREPROCESSING = Preprocessing(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
SMALL = {"width": 4, "blocks": [1, 1, 1, 1]}
VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
NETS = {
    "resnet18": SMALL,
    "preact_resnet18": SMALL,
    "wrn-10-1": {"width": 4},
    "mobilenetv2": {"width_multiplier": 0.1},
    "timm:vit_tiny_patch16_224": VIT,
    "python:timm.models.resnetv2:ResNetV2": {
        "layers": [1, 1],
        "channels": [32, 64],
        "basic": True,
        "bottle_ratio": 1.0,
    },
}


def make(arch, teachers=3, num_classes=5, preprocessing=PREPROCESSING):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        student = Student(arch, NETS[arch], teachers=teachers, num_classes=num_classes, preprocessing=preprocessing)
    return settled(student)


def settled(student):
    """Statistics of batch norms and biases that are not those of a fresh network."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, tensor in [*student.named_parameters(), *student.named_buffers()]:
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0, generator=generator)
            elif name.endswith(("bias", "running_mean")):
                tensor.uniform_(-0.5, 0.5, generator=generator)
    return student


def pixels(dtype=torch.float32, count=4, side=8):
    return torch.rand(count, 3, side, side, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("arch", NETS)
def test_output_is_named_and_shaped(arch):
    out = make(arch)(pixels())
    assert isinstance(out, StudentOutput)
    assert out._fields == ("logits", "feature_map")
    assert out.logits.shape == (4, 5)
    assert out.feature_map.shape == (4, 3, 5)


@pytest.mark.parametrize("arch", NETS)
@pytest.mark.parametrize("teachers", [3, 0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_folded_student_gives_the_same_logits(arch, teachers, dtype, tolerance):
    student = make(arch, teachers).to(dtype).eval()
    folded = student.fold()
    x = pixels(dtype)
    with torch.no_grad():
        expected, found = student(x).logits, folded(x)
    assert found.dtype == dtype
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("arch", NETS)
def test_folded_weights_load_into_the_plain_network(arch):
    student = make(arch).eval()
    folded = student.fold()
    plain = build(arch, 5, NETS[arch]).eval()
    plain.load_state_dict(folded.net.state_dict(), strict=True)
    x = pixels()
    with torch.no_grad():
        torch.testing.assert_close(plain(folded.preprocess(x)), student(x).logits, rtol=1e-4, atol=1e-5)
    own = sum(p.numel() for p in build(arch, 5, NETS[arch]).parameters())
    assert sum(p.numel() for p in folded.parameters()) == own


def test_head_acts_on_the_map_row_by_row():
    student = make("resnet18").double().eval()
    x = pixels(torch.float64)
    h = student.backbone(student.preprocess(x))
    out = student(x)
    for t in range(3):
        rows = slice(5 * t, 5 * t + 5)
        row = h @ student.map.weight[rows].T + student.map.bias[rows]
        torch.testing.assert_close(out.feature_map[:, t], row, rtol=1e-12, atol=1e-12)
    z = sum(out.feature_map[:, t] @ student.head.weight[:, 5 * t : 5 * t + 5].T for t in range(3)) + student.head.bias
    torch.testing.assert_close(out.logits, z, rtol=1e-12, atol=1e-12)


def test_preprocessing_is_inside():
    student = make("resnet18", preprocessing=Preprocessing()).eval()
    normalised = make("resnet18").eval()
    x = pixels()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PREPROCESSING.mean, PREPROCESSING.std))
    torch.testing.assert_close(normalised(x).logits, student((x - mean) / std).logits, rtol=1e-5, atol=1e-6)


def test_without_teachers_the_student_is_the_plain_classifier():
    student = make("resnet18", teachers=0)
    out = student(pixels())
    assert out.feature_map.shape == (4, 0, 5)
    assert not hasattr(student, "map")
    assert student.head.in_features == 32


@pytest.mark.parametrize("training", [True, False])
def test_folding_leaves_the_student_and_the_caller_alone(training):
    student = make("resnet18").train(training)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    random = torch.get_rng_state()
    folded = student.fold()
    assert torch.equal(torch.get_rng_state(), random)
    assert student.training is training
    assert folded.training is training
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())
    with torch.no_grad():
        folded.net.linear.weight.zero_()
        folded.net.conv1.weight.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())


def test_an_architecture_without_a_classifier_is_refused():
    with pytest.raises(ModelError, match="has no single linear layer or 1x1 convolution as its classifier"):
        Student("python:torch.nn:ReLU", {}, teachers=1, num_classes=5, preprocessing=PREPROCESSING)
