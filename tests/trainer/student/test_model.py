"""The student: shapes, the plain form, and folding into a network of the same architecture."""

import pytest
import torch
from torch import nn

from darht.core.errors import ConfigError, ModelError
from darht.core.nets import build
from darht.core.preprocessing import Preprocessing
from darht.core.rng import borrowed_generator
from darht.trainer.config import StudentConfig
from darht.trainer.student.model import Dropout, Student, StudentOutput, check_folds, mean_of_passes

PREPROCESSING = Preprocessing(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
SMALL = {"width": 4, "blocks": [1, 1, 1, 1]}
VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
NETS = {
    "resnet18": SMALL,
    "preact_resnet18+bn": {**SMALL, "bn_before_fc": True, "out_shortcut": False},
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


# Foreign networks whose classifiers are of other kinds; larger, so they are folded in one test only.
FOREIGN = {
    "timm:resnet10t": {},
    "timm:mobilenetv3_small_050": {},
    "torchvision:mobilenet_v2": {"width_mult": 0.1},
}
NO_DROPOUT = Dropout()


def make(arch, teachers=3, num_classes=5, preprocessing=PREPROCESSING, dropout=NO_DROPOUT):
    sizes = {"teachers": teachers, "num_classes": num_classes, "preprocessing": preprocessing, "dropout": dropout}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        student = Student(arch.partition("+")[0], {**NETS, **FOREIGN}[arch], **sizes)
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


@pytest.mark.parametrize("arch", FOREIGN)
def test_foreign_networks_fold(arch):
    student = make(arch).double().eval()
    x = pixels(torch.float64, count=2, side=32)
    with torch.no_grad():
        expected, found = student(x).logits, student.fold()(x)
        assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()
        expected, found = student.float()(x.float()).logits, student.fold()(x.float())
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("arch", NETS)
def test_folded_weights_load_into_the_plain_network(arch):
    student = make(arch).eval()
    folded = student.fold()
    plain = build(student.arch, 5, NETS[arch]).eval()
    plain.load_state_dict(folded.net.state_dict(), strict=True)
    x = pixels()
    with torch.no_grad():
        torch.testing.assert_close(plain(folded.preprocess(x)), student(x).logits, rtol=1e-4, atol=1e-5)
    own = sum(p.numel() for p in plain.parameters())
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


class ScaledHead(nn.Module):
    """What no list of layers shows: the forward pass scales what comes out of the classifier by its size."""

    def __init__(self, num_classes):
        super().__init__()
        self.fc = nn.Linear(3 * 8 * 8, num_classes)

    def forward(self, x):
        out = self.fc(x.flatten(1))
        return out / out.norm(dim=1, keepdim=True)


def test_squeezenet_is_refused_for_the_activation_after_its_classifier():
    with pytest.raises(
        ModelError, match=r"squeezenet1_1 puts ReLU after its classifier 'classifier\.1'.*choose another"
    ):
        Student("torchvision:squeezenet1_1", {}, teachers=2, num_classes=5, preprocessing=PREPROCESSING)


def test_what_does_not_fold_is_told_by_asking_it(monkeypatch):
    import torch.nn

    monkeypatch.setattr(torch.nn, "ScaledHead", ScaledHead, raising=False)
    arch = "python:torch.nn:ScaledHead"
    student = Student(arch, {}, teachers=2, num_classes=5, preprocessing=PREPROCESSING)
    with pytest.raises(ModelError, match=r"does not fold: its plain network answers .* apart from the student"):
        check_folds(student, pixels())
    assert student.training
    check_folds(make("resnet18", dropout=Dropout(0.5, 4)), pixels())


DROPOUT = Dropout(0.3, 5)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_dropout_changes_no_parameter_and_none_is_the_student_without():
    plain, dropped = make("resnet18"), make("resnet18", dropout=DROPOUT)
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in dropped.state_dict().items()}
    assert all(torch.equal(plain.state_dict()[name], value) for name, value in dropped.state_dict().items())
    none = make("resnet18", dropout=Dropout(0.0, 5)).eval()
    before = torch.get_rng_state()
    assert torch.equal(none(pixels()).logits, plain.eval()(pixels()).logits)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("teachers", [3, 0])
def test_inference_averages_probabilities_over_passes(teachers):
    student = make("resnet18", teachers, dropout=DROPOUT).double().eval()
    x = pixels(torch.float64)
    out = student(x, seeded())
    kept = torch.empty(5, 4, 32, dtype=torch.float64).bernoulli_(0.7, generator=seeded())
    h = student.backbone(student.preprocess(x))
    maps = [student.map(h * mask / 0.7) if teachers else h * mask / 0.7 for mask in kept]
    passes = [student.head(rows) for rows in maps]
    mean = torch.stack([logits.softmax(-1) for logits in passes]).mean(0)
    torch.testing.assert_close(out.logits.exp(), mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.logits.exp().sum(1), torch.ones(4, dtype=torch.float64))
    if teachers:
        torch.testing.assert_close(out.feature_map, torch.stack(maps).mean(0).view(4, 3, 5), rtol=1e-12, atol=1e-12)
    assert out.feature_map.shape == (4, teachers, 5)
    torch.testing.assert_close(mean_of_passes(torch.stack(passes)), out.logits)


def test_training_makes_one_pass_that_scales_what_it_keeps():
    student = make("resnet18", dropout=DROPOUT)
    student.backbone.eval()  # so that batch statistics do not blur the comparison
    x = pixels()
    out = student(x, seeded())
    kept = torch.empty(1, 4, 32).bernoulli_(0.7, generator=seeded())[0]
    rows = student.map(student.backbone(student.preprocess(x)) * kept / 0.7)
    torch.testing.assert_close(out.logits, student.head(rows))
    torch.testing.assert_close(out.feature_map, rows.view(4, 3, 5))


def test_the_same_draws_give_the_same_answer_and_others_another():
    student, x = make("resnet18", dropout=DROPOUT).eval(), pixels()
    assert torch.equal(student(x, seeded(1)).logits, student(x, seeded(1)).logits)
    assert not torch.equal(student(x, seeded(1)).logits, student(x, seeded(2)).logits)
    answers = []
    for _ in range(2):
        torch.rand(3)  # the caller's generator stands somewhere else
        with borrowed_generator(7, "evaluate"):
            answers.append(student(x).logits)
    assert torch.equal(*answers)


@pytest.mark.parametrize("teachers", [3, 0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_a_folded_student_with_dropout_gives_the_same_answer_for_the_same_draws(teachers, dtype, tolerance):
    student, x = make("resnet18", teachers, dropout=DROPOUT).to(dtype).eval(), pixels(dtype)
    folded = student.fold()
    with torch.no_grad(), borrowed_generator(3, "fold"):
        expected = student(x).logits
    with torch.no_grad(), borrowed_generator(3, "fold"):
        found = folded(x)
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    with torch.no_grad():
        assert not torch.equal(folded(x), folded(x))
        assert torch.equal(student.plain()(x), student.plain()(x))  # dropout is off there
        mean = student.head(student.map(student.backbone(student.preprocess(x)))) if teachers else None
        if mean is not None:
            torch.testing.assert_close(student.plain()(x), mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("p", "samples"), [(1.0, 1), (-0.1, 1), (float("nan"), 1), (0.5, 0)])
def test_dropout_refuses(p, samples):
    with pytest.raises(ConfigError, match=r"mc_dropout is a share in \[0, 1\) and mc_samples at least 1 pass"):
        StudentConfig(mc_dropout=p, mc_samples=samples)
