"""Training accuracy and loss of the batches seen, counted without another forward pass."""

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from darht.trainer.progress.metrics import LateCopy, Metrics, Reading
from darht.trainer.student.model import StudentOutput

CPU = torch.device("cpu")


class Batch(NamedTuple):
    x: Tensor
    clean: Tensor
    y: Tensor


class Echo(nn.Module):
    """Answers with the first three pixels of each image."""

    passes = 0

    def forward(self, x):
        self.passes += 1
        return StudentOutput(x.flatten(1)[:, :3], x.new_zeros(len(x), 0, 3))


def images(*answers):
    """One image for each answer that `Echo` shall give."""
    x = torch.zeros(len(answers), 3, 2, 2)
    x.view(len(answers), -1)[torch.arange(len(answers)), torch.tensor(answers)] = 1.0
    return x


def test_rows_count_by_whether_they_were_moved():
    metrics, student = Metrics(CPU), Echo()
    clean = images(0, 1, 2, 0)
    moved = images(0, 1, 1, 2)  # the last two rows are adversarial, and the first of these two is right
    batch = Batch(moved, clean, torch.tensor([0, 0, 1, 0]))
    metrics.count(student(batch.x), batch)
    metrics.add(torch.tensor(1.5))
    assert metrics.reading() == Reading(1.5, 50.0, 50.0)
    metrics.count(student(clean), batch._replace(x=clean))  # right on the first and the last
    metrics.add(torch.tensor(0.5))
    assert metrics.reading() == Reading(1.0, 50.0, 50.0)
    assert metrics.counts.tolist() == [2, 2.0, 6, 3, 2, 1]
    assert metrics.row() == {"loss": 1.0, "train_clean": 50.0, "train_adversarial": 50.0}
    assert student.passes == 2


def test_a_clean_batch_is_counted_once():
    metrics, student, x = Metrics(CPU), Echo(), images(0, 1)
    metrics.count(student(x), Batch(x, x, torch.tensor([0, 0])))
    metrics.add(torch.tensor(1.0))
    assert metrics.reading() == Reading(1.0, 50.0, None)
    assert metrics.row()["train_adversarial"] is None


def test_a_copy_of_the_clean_images_counts_as_clean():
    metrics, student, x = Metrics(CPU), Echo(), images(0, 1)
    metrics.count(student(x), Batch(x, x.clone(), torch.tensor([0, 0])))
    assert metrics.counts.tolist() == [0, 0, 2, 1, 0, 0]


def test_gradients_pass_and_logits_may_need_them():
    metrics, x = Metrics(CPU), images(0).requires_grad_()
    student = Echo()
    out = student(x)
    metrics.count(out, Batch(x, x, torch.tensor([0])))
    loss = out.logits.sum()
    loss.backward()
    metrics.add(loss)
    assert x.grad is not None
    assert not metrics.counts.requires_grad


def test_a_glance_says_nothing_before_the_first_step():
    metrics = Metrics(CPU)
    assert metrics.glance() is None
    metrics.add(torch.tensor(2.0))
    assert metrics.glance() == Reading(2.0, None, None)


def test_a_copy_of_a_gpu_s_tensor_is_read_once_it_has_arrived(monkeypatch):
    """The branch of a GPU: a copy is on its way until its event has happened."""
    arrived, late = [False], LateCopy()
    event = SimpleNamespace(record=lambda: None, query=lambda: arrived[0])
    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch, "empty", lambda shape, *, dtype, pin_memory: empty(shape, dtype=dtype))
    seen = []
    for number in range(4):
        arrived[0] = number == 2
        copy = late.of(torch.tensor(float(number)))
        seen.append(None if copy is None else copy.item())
    assert seen == [None, None, 0.0, None]  # the first was sent, and arrived with the third
