"""`inner: warm`: a memory that stays on the same pixels under any crop and flip, and one step of FGSM-MEP by hand."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import CPU, assert_same_bits, changed, read_checkpoint, stop_after
from torch import nn

from darht.cache.format.apply_views import apply_views
from darht.cache.read.sampler import draw_choices
from darht.cache.read.stream import Feed
from darht.core.rng import RowRng
from darht.trainer.config import InnerConfig, TrainConfig, WarmConfig
from darht.trainer.student.inner import Examples
from darht.trainer.student.losses import RECIPES
from darht.trainer.student.model import StudentOutput
from darht.trainer.student.setup import feed_plan, make_student
from darht.trainer.student.step import Step
from darht.trainer.student.targets import clean_answer
from darht.trainer.student.train import Callbacks, train
from darht.trainer.student.warm import WarmMemory, warm_step

N, C, UNIT = 24, 5, 1 / 64
AT = RECIPES["at"]()


def memory_for(data):
    return WarmMemory.create(len(data.images), tuple(data.images.shape[1:]), data.offsets, CPU)


def canvas_index(i, j, offset, padding, width):
    """Where pixel (i, j) of a view lies on the padded canvas; see docs/cache-format.md on views."""
    dy, dx, flip = (int(value) for value in offset)
    return i + dy + padding, (width - 1 - j if flip else j) + dx + padding


@given(data=st.data(), padding=st.integers(0, 3), height=st.integers(1, 5), width=st.integers(1, 5))
@settings(max_examples=40)
def test_a_memory_stays_on_the_same_pixels_under_any_crop_and_flip(data, padding, height, width):
    """What one view writes another reads where both show a pixel; what a crop does not show keeps what it had."""
    offset = st.tuples(st.integers(-padding, padding), st.integers(-padding, padding), st.integers(0, 1))
    edge = torch.tensor([[padding, -padding, 0]], dtype=torch.int8)
    memory = WarmMemory.create(2, (3, height, width), edge, CPU)
    shape = (3, height + 2 * padding, width + 2 * padding)
    expected = {name: np.zeros((2, *shape)) for name in ("delta", "momentum")}
    for write in range(3):
        drawn = [data.draw(offset) for _ in range(2)]
        generator = torch.Generator().manual_seed(write)
        delta = torch.randint(-127, 128, (2, 3, height, width), generator=generator).float()
        momentum = torch.randint(-127, 128, (2, 3, height, width), generator=generator) * UNIT
        memory.write(torch.arange(2), torch.tensor(drawn, dtype=torch.int8), delta, momentum)
        for row in range(2):
            for i in range(height):
                for j in range(width):
                    y, x = canvas_index(i, j, drawn[row], padding, width)
                    expected["delta"][row, :, y, x] = delta[row, :, i, j]
                    expected["momentum"][row, :, y, x] = momentum[row, :, i, j]
    views = torch.tensor([data.draw(offset) for _ in range(2)], dtype=torch.int8)
    for name, read in zip(("delta", "momentum"), memory.read(torch.arange(2), views, (height, width)), strict=True):
        for row in range(2):
            for i in range(height):
                for j in range(width):
                    y, x = canvas_index(i, j, views[row], padding, width)
                    assert read[row, :, i, j].tolist() == expected[name][row, :, y, x].tolist()
    assert torch.equal(memory.delta.double(), torch.from_numpy(expected["delta"]))


def test_processes_take_over_each_other_s_rows_and_one_perturbation_of_those_that_both_wrote():
    """Rows 0 and 1 are one's, 1 and 2 the other's, nobody writes 3: of row 1 the second's counts, undiluted."""
    shape, upright = (2, 3, 2, 2), torch.zeros(2, 3, dtype=torch.int8)
    both = [WarmMemory.create(4, shape[1:], upright[:1], CPU) for _ in range(2)]
    for rank, memory in enumerate(both):
        memory.write(torch.tensor([rank, rank + 1]), upright, torch.full(shape, 8.0 - 15 * rank), torch.zeros(shape))
    fresh = [memory.fresh.clone() for memory in both]
    speaker = torch.stack([flags.int() * (rank + 1) for rank, flags in enumerate(fresh)]).amax(0)
    sums = sum(memory.pixels * (speaker == rank + 1)[:, None, None, None] for rank, memory in enumerate(both))
    for rank, memory in enumerate(both):
        memory.join(lambda rows: rows.copy_(sums), lambda flags, rank=rank: (speaker == rank + 1, speaker > 0))
        assert memory.delta[:, 0, 0, 0].tolist() == [8, -7, -7, 0]
        assert memory.seen.tolist() == [True, True, True, False] and not memory.fresh.any()


def test_a_view_reads_what_the_same_view_of_the_image_s_perturbation_shows(data):
    """The memory and the data path agree on what a view is."""
    rows, memory = torch.arange(N), memory_for(data)
    delta = torch.randint(-9, 10, (N, 3, 4, 4), generator=torch.Generator().manual_seed(0)).float()
    memory.write(rows, torch.zeros(N, 3, dtype=torch.int8), delta, torch.zeros_like(delta))
    for offset in data.offsets:
        views = offset.expand(N, 3)
        assert torch.equal(memory.read(rows, views, (4, 4))[0], apply_views(delta, views))


def test_rows_do_not_touch_each_other(data):
    memory, rows = memory_for(data), torch.tensor([3, 7])
    memory.write(rows, torch.zeros(2, 3, dtype=torch.int8), torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4))
    touched = (memory.delta != 0).flatten(1).any(1) | (memory.momentum != 0).flatten(1).any(1)
    assert touched.nonzero().flatten().tolist() == [3, 7]


def test_large_momenta_saturate(data):
    memory, rows = memory_for(data), torch.arange(1)
    upright = torch.zeros(1, 3, dtype=torch.int8)
    for value, kept in ((5.0, 127 * UNIT), (-5.0, -127 * UNIT), (0.3, round(0.3 / UNIT) * UNIT)):
        memory.write(rows, upright, torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), value))
        assert memory.read(rows, upright, (4, 4))[1].unique().tolist() == [pytest.approx(kept)]


class Softmax(nn.Module):
    """A linear student in float64, whose gradient is known in closed form."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.weight = nn.Parameter(torch.randn(C, 48, dtype=torch.float64, generator=generator))

    def forward(self, x):
        logits = x.flatten(1) @ self.weight.T
        return StudentOutput(logits, logits.new_zeros(len(x), 0, C))


def clean_step(data, rows, views, dtype=torch.float64):
    x = apply_views(data.images[rows], data.offsets[views]).to(dtype) / 255
    targets = data.clean[rows, views].to(dtype)
    supervises = data.robust.expand(len(rows), -1)
    return Step(x, x, data.labels[rows], clean_answer(targets), targets, targets, supervises, data.robust, 0.0)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5])
def test_steps_are_those_of_fgsm_mep(data, momentum):
    """Five steps in changing views, against the published update written out pixel by pixel.

    eta is where a row starts, g the sign of the gradient at x + eta, m = momentum * m + g. The student is trained on
    x + clip(eta + step g), and the next eta is clip(eta + step sign(m)), both inside the pixel range.
    """
    inner = InnerConfig(kind="warm", eps=16, step=12, warm=WarmConfig(momentum=momentum))
    student, memory, rows = Softmax(), memory_for(data), torch.tensor([5, 0, 11])
    weight = student.weight.detach().numpy()
    etas, momenta = ({int(row): np.zeros((3, 6, 6)) for row in rows} for _ in range(2))
    for number in range(5):
        views = torch.tensor([[0, 7, 17], [3, 3, 1], [16, 2, 9], [0, 0, 0], [12, 5, 4]][number])
        step = clean_step(data, rows, views)
        found = warm_step(student, step, memory, rows, data.offsets[views], recipe=AT, inner=inner)
        for b, row in enumerate(rows.tolist()):
            clean = np.rint(step.clean[b].numpy() * 255)
            where = [[canvas_index(i, j, data.offsets[views[b]], 1, 4) for j in range(4)] for i in range(4)]
            eta, m = (np.array([[[kept[row][c][where[i][j]] for j in range(4)] for i in range(4)] for c in range(3)])
                      for kept in (etas, momenta))  # fmt: skip
            eta = np.clip(clean + eta, 0, 255) - clean
            logits = weight @ (clean + eta).reshape(-1) / 255
            p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            p[int(step.y[b])] -= 1
            sign = np.sign(weight.T @ p).reshape(3, 4, 4)
            m = momentum * m + sign
            x, following = (
                np.clip(clean + np.clip(eta + 12 * direction, -16, 16), 0, 255) for direction in (sign, np.sign(m))
            )
            np.testing.assert_array_equal(found.x[b].numpy(), x / 255)
            np.testing.assert_allclose(found.start[b].detach().numpy(), logits, rtol=1e-10)
            for i in range(4):
                for j in range(4):
                    etas[row][:, where[i][j][0], where[i][j][1]] = (following - clean)[:, i, j]
                    stored = np.clip(np.rint(m[:, i, j] / UNIT), -127, 127) * UNIT  # one byte a value
                    momenta[row][:, where[i][j][0], where[i][j][1]] = stored
            np.testing.assert_array_equal(memory.delta[row].numpy(), etas[row])
            np.testing.assert_array_equal(memory.momentum[row].numpy() * UNIT, momenta[row])
    assert any((momenta[5] % 1 != 0).flatten()) is (momentum > 0)


@given(
    eps=st.integers(1, 127),
    length=st.integers(1, 255),
    momentum=st.floats(0, 0.5),
    start=st.sampled_from(["cached", "zero", "noise"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_steps_stay_in_the_ball_in_the_pixel_range_and_on_the_grid(student, data, eps, length, momentum, start, seed):
    inner = InnerConfig(kind="warm", eps=eps, step=length, warm=WarmConfig(momentum=momentum, start=start))
    config, memory, rows = TrainConfig(recipe="at", inner=inner, seed=seed), memory_for(data), torch.arange(8)
    examples = Examples(config, AT, memory)
    for epoch in range(3):
        step = examples.draw(student, data, rows, epoch=epoch, number=epoch, done=0.0, pgd_share=0.0)
        levels, clean = (step.x * 255).round(), (step.clean * 255).round()
        assert torch.equal(levels / 255, step.x)
        assert (levels - clean).abs().max() <= eps
        assert levels.min() >= 0 and levels.max() <= 255
        assert not step.x.requires_grad
        assert memory.delta.abs().max() <= eps
    assert memory.seen.tolist() == [True] * 8 + [False] * (N - 8)


@pytest.mark.parametrize("start", ["cached", "zero", "noise"])
def test_where_a_row_starts(data, start):
    """A stored perturbation of a choice of attack that the seed makes, nothing, or noise; cut to the ball, and once."""
    inner = InnerConfig(kind="warm", eps=8, warm=WarmConfig(start=start))
    threat, seen, rows = inner.pgd().threat, [], torch.arange(N)
    for seed in range(3):
        memory = memory_for(data)
        memory.begin(data, rows[: N // 2], threat, inner, seed)
        memory.begin(data, rows, threat, inner, seed)  # the first half has started already
        inside = memory.delta[:, :, 1:-1, 1:-1]
        outside = memory.delta.clone()
        outside[:, :, 1:-1, 1:-1] = 0
        assert not outside.any() and not memory.momentum.any() and memory.seen.all()
        if start == "zero":
            expected = torch.zeros_like(inside)
        elif start == "noise":
            expected = threat.random_start((N, 3, 4, 4), RowRng.create(seed, "warm", rows=rows))
            assert expected.abs().max() == 8
        else:
            choice = draw_choices(rows, 2, seed, 0, "warm")
            assert set(choice.tolist()) == {0, 1}
            expected = torch.stack([data.deltas[choice[row]][row, 0] for row in rows]).clamp(-8, 8)
        assert torch.equal(inside, expected.to(torch.int8))
        seen.append(inside.clone())
    assert torch.equal(seen[0], seen[1]) is (start == "zero")


def test_a_row_that_has_started_goes_on_from_where_it_was(data):
    inner = InnerConfig(kind="warm", eps=8)
    memory, rows = memory_for(data), torch.arange(4)
    memory.begin(data, rows, inner.pgd().threat, inner, 0)
    memory.write(rows, torch.zeros(4, 3, dtype=torch.int8), torch.full((4, 3, 4, 4), 3.0), torch.zeros(4, 3, 4, 4))
    memory.begin(data, rows, inner.pgd().threat, inner, 0)
    assert memory.delta[:4, :, 1:-1, 1:-1].unique().tolist() == [3]


def test_when_all_rows_have_started_no_step_asks_again(data):
    """A step that asks which rows are new waits for the GPU; held-out rows never start."""
    inner, memory, rows = InnerConfig(kind="warm", eps=8), memory_for(data), torch.arange(N)
    memory.look(rows[:4])
    assert not memory.complete
    memory.begin(data, rows[:4], inner.pgd().threat, inner, 0)
    memory.look(rows)
    assert not memory.complete
    memory.look(rows[:4])
    assert memory.complete
    memory.seen = None
    memory.begin(data, rows[:4], inner.pgd().threat, inner, 0)


def test_perturbations_stored_in_fractions_of_a_level_are_rounded(data):
    finer = dataclasses.replace(data, scales=(0.5, 0.5))
    inner, memory, rows = InnerConfig(kind="warm", eps=127), memory_for(data), torch.arange(N)
    memory.begin(finer, rows, inner.pgd().threat, inner, 0)
    choice = draw_choices(rows, 2, 0, 0, "warm")
    stored = torch.stack([data.deltas[choice[row]][row, 0] for row in rows]).float() / 2
    assert (memory.delta[:, :, 1:-1, 1:-1] - stored).abs().max() == 0.5


def test_a_row_s_step_does_not_depend_on_its_batch(student, data):
    config = TrainConfig(recipe="at", inner=InnerConfig(kind="warm", eps=16))
    rows, mixed = torch.tensor([3, 17, 8, 21]), torch.tensor([8, 5, 3, 1, 21, 17])
    student.eval()  # in train mode batch norm couples the rows
    found = []
    for batch, place in ((rows, [0, 1, 2, 3]), (mixed, [2, 5, 0, 4])):
        memory = memory_for(data)
        for epoch in range(3):
            step = Examples(config, AT, memory).draw(
                student, data, batch, epoch=epoch, number=epoch, done=0.0, pgd_share=0.0
            )
        found.append((step.x[place], memory.delta[rows], memory.momentum[rows]))
    student.train()
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_the_student_is_taken_in_its_mode_and_its_start_keeps_a_gradient(student, data):
    config = TrainConfig(recipe="at", inner=InnerConfig(kind="warm", eps=16))
    before = int(student.body[1].num_batches_tracked)
    step = Examples(config, AT, memory_for(data)).draw(
        student, data, torch.arange(N), epoch=0, number=0, done=0.0, pgd_share=0.0
    )
    assert int(student.body[1].num_batches_tracked) == before + 1
    assert step.start.requires_grad and step.start.shape == (N, C)
    assert all(p.grad is None for p in student.parameters())


@pytest.mark.parametrize("clean_by", ["batch", "row"])
@pytest.mark.parametrize("consistency", [0.0, 10.0])
def test_the_consistency_term_ties_both_ends_of_the_step(mixed_cache, tmp_path, consistency, clean_by):
    """The loss in the log of a single step is the recipe's plus the weighted squared distance of the logits."""
    inner = InnerConfig(kind="warm", eps=32, warm=WarmConfig(consistency=consistency, check_rows=0))
    loss = {"clean_share": 0.3 if clean_by == "row" else 0.0, "clean_by": clean_by}
    config = changed(recipe="at", inner=vars(inner), optim={"epochs": 1, "batch_size": 45}, loss=loss)
    row = train(config, mixed_cache, tmp_path, device=CPU).history[0]
    with Feed(mixed_cache, feed_plan(config, mixed_cache, CPU, 1.0), seed=config.seed, epochs=1) as feed:
        student = make_student(config, feed, mixed_cache.spec.data.classes).train()
        ((data, at),) = feed.batches(0)
        offsets = torch.from_numpy(mixed_cache.read("views/offset"))
        memory = WarmMemory.create(mixed_cache.rows, (3, 8, 8), offsets, CPU)
        step = Examples(config, config.objective(), memory).draw(
            student, data, at, epoch=0, number=0, done=0.0, pgd_share=0.0
        )
    logits = student(step.x).logits
    adversarial = logits[(step.x != step.clean).flatten(1).any(1)]
    assert (len(adversarial) < len(logits)) is (clean_by == "row")
    expected = F.cross_entropy(logits, step.y) + consistency * (adversarial - step.start).square().mean()
    assert row["loss"] == pytest.approx(expected.item(), abs=2e-5)


def test_a_memory_that_forgets_starts_as_it_did_at_first(data):
    inner, rows = InnerConfig(kind="warm", eps=16, warm=WarmConfig(start="noise")), torch.arange(N)
    memory = memory_for(data)
    memory.begin(data, rows, inner.pgd().threat, inner, 0)
    first = {name: value.clone() for name, value in memory.state().items()}
    memory.write(rows, data.offsets[:1].expand(N, 3), torch.ones(N, 3, 4, 4), torch.ones(N, 3, 4, 4))
    memory.look(rows)
    assert memory.complete
    memory.forget()
    memory.look(rows)
    assert not memory.complete
    memory.begin(data, rows, inner.pgd().threat, inner, 0)
    assert all(torch.equal(value, first[name]) for name, value in memory.state().items())


def test_rows_are_forgotten_every_so_many_epochs(mixed_cache, tmp_path, monkeypatch):
    epochs, forget = [], WarmMemory.forget
    monkeypatch.setattr(WarmMemory, "forget", lambda memory: (epochs.append(bool(memory.seen.any())), forget(memory)))
    inner = {"kind": "warm", "warm": WarmConfig(check_rows=0, reset=2)}
    train(changed(recipe="at", inner=inner, optim={"epochs": 5}), mixed_cache, tmp_path, device=CPU)
    assert epochs == [True, True]  # before the third and the fifth


@pytest.mark.parametrize("recipe", ["mtard", "adaad"])
def test_a_stopped_run_goes_on_with_its_memory_and_what_the_recipe_had_learned(mixed_cache, tmp_path, recipe):
    more = {"loss": {"igdm": 2.0}, "targets": "first-order"} if recipe == "adaad" else {"loss": {"awp": 0.01}}
    inner = {"kind": "warm", "warm": WarmConfig(check_rows=8, reset=2)}
    config = changed(recipe=recipe, inner=inner, optim={"batch_size": 16}, **more)
    train(config, mixed_cache, tmp_path / "whole", device=CPU)
    with pytest.raises(Exception, match="stopped"):
        train(config, mixed_cache, tmp_path / "cut", device=CPU, callbacks=Callbacks(on_step=stop_after(5)))
    train(config, mixed_cache, tmp_path / "cut", device=CPU, resume=True)
    assert_same_bits(tmp_path / "cut", tmp_path / "whole")
    kept = read_checkpoint(tmp_path / "cut")
    trained = torch.ones(mixed_cache.rows, dtype=torch.bool)
    trained[list(mixed_cache.manifest.holdout)] = False
    assert kept["memory"]["pixels"].dtype == torch.int8
    assert kept["memory"]["pixels"].shape == (60, 12, 12, 6)  # the farthest crop is two pixels off
    assert not kept["memory"]["seen"][~trained].any()
    assert set(kept["learned"]) == ({"clean", "adversarial", "weight"} if recipe == "mtard" else set())
