"""The student's twin: the same weights and statistics, folded, of which only the pixels' gradient is asked."""

import pytest
import torch
from torch import Tensor, nn

import darht.trainer.student.twin as module
from darht.core.preprocessing import Preprocessing
from darht.trainer.student.model import Student
from darht.trainer.student.twin import Twin, frozen_twin

NORM = Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3)
SMALL = {"width": 2, "blocks": [1, 1, 1, 1]}
NETS = {"resnet18": SMALL, "preact_resnet18": SMALL, "mobilenetv2": {"width_multiplier": 0.1}, "wrn-10-1": {}}
FOLDS = {"resnet18": 12, "preact_resnet18": 4, "mobilenetv2": 54, "wrn-10-1": 3}


def a_student(arch: str = "resnet18") -> tuple[Student, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Student(arch, NETS[arch], teachers=2, num_classes=3, preprocessing=NORM), torch.rand(4, 3, 8, 8)


def train(student: Student, x: Tensor) -> None:
    """A step, which changes weights, and batch norm's statistics with them."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    student.train()(x).logits.square().sum().backward()
    optimizer.step()


def test_a_twin_follows_the_student_and_asks_for_no_gradient_of_the_weights():
    student, x = a_student()
    twin, own = frozen_twin(student), {tensor.data_ptr() for tensor in student.state_dict().values()}
    assert {tensor.data_ptr() for tensor in twin.state_dict().values()} == own
    assert student.training and not twin.training and all(weight.requires_grad for weight in student.parameters())
    before = twin(x).logits
    train(student, x)
    probe = x.clone().requires_grad_()
    after = twin(probe).logits
    assert torch.equal(after, student.eval()(x).logits) and not torch.equal(after, before)
    assert not any(weight.requires_grad for weight in twin.parameters())
    (slope,) = torch.autograd.grad(after.sum(), probe)
    assert slope.abs().sum() > 0


@pytest.mark.parametrize("arch", NETS)
def test_a_folded_twin_answers_as_the_student_of_the_moment_does(arch):
    student, x = a_student(arch)
    twin = Twin(student, x)
    assert twin.folds == FOLDS[arch]
    for _ in range(2):
        train(student, x)
        student.eval()
        pixels = x.clone().requires_grad_()
        want, found = student(pixels), twin.current()(pixels)
        for one, other in zip(found, want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.detach().abs().max()))
        slopes = [torch.autograd.grad(out.logits.square().sum(), pixels)[0] for out in (found, want)]
        torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-5 * float(slopes[1].abs().max()))
    assert not any(weight.requires_grad for weight in twin.current().parameters())


class Twice(nn.Module):
    """One convolution before two norms, one that a second layer uses, and one whose weight is made in a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.other = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.used, self.last = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.normed = nn.utils.spectral_norm(nn.Conv2d(4, 4, 1))
        self.end = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.conv(x)) + self.other(self.conv(x))
        shared = self.used(x)
        return self.end(self.normed(self.last(shared) + shared)).mean((2, 3))


class Asking(nn.Module):
    """Another way for other numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).mean((2, 3)) if x.mean() > 0 else x.mean((2, 3))


@pytest.mark.parametrize("net", [Twice, Asking, nn.Flatten])
def test_what_does_not_fold_is_left_as_it_is(net):
    student, x = a_student()
    student.backbone = nn.Sequential(net())
    twin = Twin(student, x)
    assert twin.folds == 0 and twin.current().backbone is not student.backbone
    assert torch.equal(twin.current().backbone(x), student.eval().backbone(x))


def test_a_fold_that_answers_otherwise_is_not_used(monkeypatch):
    student, x = a_student()
    monkeypatch.setattr(module.FoldedConvs, "refresh", lambda convs: [one.weight.zero_() for one in convs.folded])
    assert Twin(student, x).folds == 0
