"""The student's twin: the same weights and statistics, of which only the pixels' gradient is asked."""

import torch

from darht.core.preprocessing import Preprocessing
from darht.trainer.student.model import Student
from darht.trainer.student.twin import frozen_twin


def test_a_twin_follows_the_student_and_asks_for_no_gradient_of_the_weights():
    norm = Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = {"width": 2, "blocks": [1, 1, 1, 1]}
        student, x = Student("resnet18", net, teachers=2, num_classes=3, preprocessing=norm), torch.rand(4, 3, 8, 8)
    twin, own = frozen_twin(student), {tensor.data_ptr() for tensor in student.state_dict().values()}
    assert {tensor.data_ptr() for tensor in twin.state_dict().values()} == own
    assert student.training and not twin.training and all(weight.requires_grad for weight in student.parameters())
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    before = twin(x).logits
    student(x).logits.square().sum().backward()  # and batch norm's statistics
    optimizer.step()
    probe = x.clone().requires_grad_()
    after = twin(probe).logits
    assert torch.equal(after, student.eval()(x).logits) and not torch.equal(after, before)
    assert not any(weight.requires_grad for weight in twin.parameters())
    (slope,) = torch.autograd.grad(after.sum(), probe)
    assert slope.abs().sum() > 0
