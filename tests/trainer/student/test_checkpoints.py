"""What is kept between epochs: when, by whom, and that what a kill costs is computed again to the same bits."""

import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import CPU, STATEFUL, Stopped, assert_same_bits, changed, leaves, log, read_checkpoint, stop_after

import darht.trainer.student.train as trainer
from darht.core.errors import CacheError, DarhtError
from darht.trainer.config import WarmConfig
from darht.trainer.state.checkpoint import BEST, CHECKPOINT, LAST, PAUSED, read_student_card
from darht.trainer.student import checkpoints
from darht.trainer.student.checkpoints import Checkpoints, copied
from darht.trainer.student.train import Callbacks, train

CONFIG = changed(
    recipe="at",
    inner={"kind": "warm", "warm": WarmConfig(check_rows=16)},
    optim={"epochs": 5, "batch_size": 20},
)


@pytest.fixture
def minutes(monkeypatch):
    """A clock by which an epoch takes 25 seconds, and the epochs whose end was written, in order."""
    clock, written, write = [0.0], [], Checkpoints._write
    monkeypatch.setattr(checkpoints, "EVERY", 60.0)
    monkeypatch.setattr(checkpoints, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def noted(kept, copy, card, best):
        written.append((card.epoch, threading.current_thread() is threading.main_thread()))
        write(kept, copy, card, best)

    def tick(row):
        clock[0] += 25

    monkeypatch.setattr(Checkpoints, "_write", noted)
    return SimpleNamespace(written=written, callbacks=Callbacks(on_epoch=tick))


@pytest.fixture(scope="module")
def whole(mixed_cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    train(CONFIG, mixed_cache, out, device=CPU)
    return out


def test_files_are_written_by_a_thread_after_a_minute_and_at_the_end(minutes, mixed_cache, whole, tmp_path):
    seen = []

    def look(row):
        seen.append((len(log(tmp_path)), (tmp_path / CHECKPOINT).is_file()))
        minutes.callbacks.on_epoch(row)

    train(CONFIG, mixed_cache, tmp_path, device=CPU, callbacks=Callbacks(on_epoch=look))
    assert minutes.written == [(4, False), (5, False)]
    assert seen == [(1, False), (2, False), (3, False), (4, True), (5, True)]  # the log is there at once
    assert_same_bits(tmp_path, whole)


def test_a_kill_costs_what_came_after_the_checkpoint(minutes, mixed_cache, whole, tmp_path, monkeypatch):
    """In the second step of the fifth epoch, and in the third epoch, before anything was written."""
    for out, step, epochs in ((tmp_path / "fifth", 10, [4]), (tmp_path / "third", 5, [])):
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(Checkpoints, "settle", lambda kept: None)
            callbacks = Callbacks(on_epoch=minutes.callbacks.on_epoch, on_step=stop_after(step))
            train(CONFIG, mixed_cache, out, device=CPU, callbacks=callbacks)
        assert [epoch for epoch, _ in minutes.written] == epochs
        train(CONFIG, mixed_cache, out, device=CPU, resume=True)
        assert_same_bits(out, whole)
        minutes.written.clear()


def test_a_pause_leaves_the_best_student_and_what_a_collapse_goes_back_to(minutes, mixed_cache, whole, tmp_path):
    def pause(step, *_):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(CONFIG, mixed_cache, tmp_path, device=CPU, callbacks=Callbacks(on_step=pause))
    assert (tmp_path / PAUSED).is_file() and read_checkpoint(tmp_path)["progress"]["epoch"] == 2
    scores = [row["holdout_pgd"] for row in log(tmp_path)]
    assert read_student_card(tmp_path / BEST).epoch == max(range(2), key=lambda at: (scores[at], at)) + 1
    train(CONFIG, mixed_cache, tmp_path, device=CPU, resume=True)
    assert_same_bits(tmp_path, whole)


def test_a_stop_at_an_epoch_s_end_writes_it(minutes, mixed_cache, whole, tmp_path):
    def stop(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(CONFIG, mixed_cache, tmp_path, device=CPU, callbacks=Callbacks(on_epoch=stop))
    assert [epoch for epoch, _ in minutes.written] == [2] and read_student_card(tmp_path / LAST).epoch == 2
    train(CONFIG, mixed_cache, tmp_path, device=CPU, resume=True)
    assert_same_bits(tmp_path, whole)


class Interrupting(dict):
    """Plain values of a network, of which a copy is interrupted after the first."""

    def items(self):
        yield from list(super().items())[:1]
        raise KeyboardInterrupt


@pytest.mark.parametrize("part", ["contents", "best"])
def test_an_interrupt_while_an_epoch_is_copied_writes_no_mixture(tmp_path, monkeypatch, part):
    """Of the second epoch some tensors have reached the copy of the first, or its best student is not copied."""
    written, best = [], []
    monkeypatch.setattr(checkpoints, "EVERY", 1e6)
    monkeypatch.setattr(Checkpoints, "_write", lambda kept, copy, card, best: written.append(card.epoch))
    monkeypatch.setattr(Checkpoints, "_save_best", lambda kept, card, weights: best.append((card.epoch, weights)))

    def ended(epoch, kind):
        kinds = {"contents": dict, "best": dict, part: kind}
        weights = {"first": torch.full((2,), float(epoch)), "second": torch.full((2,), float(epoch))}
        result = SimpleNamespace(state_dict=lambda: kinds["best"](weights))
        progress = SimpleNamespace(epoch=epoch, history=[{"epoch": epoch}])
        return SimpleNamespace(
            contents=lambda: {"student": kinds["contents"](weights)}, result=result, progress=progress
        )

    with pytest.raises(KeyboardInterrupt), Checkpoints(tmp_path, writes=True, goes_back=True) as kept:
        kept.add(ended(1, dict), SimpleNamespace(epoch=1), best=True, now=False)
        kept.add(ended(2, Interrupting), SimpleNamespace(epoch=2), best=True, now=False)
    assert written == [] and [epoch for epoch, _ in best] == [1]  # what was owed and is whole
    assert all(weight.tolist() == [1, 1] for weight in best[0][1].values())


@pytest.mark.parametrize("resumed", [False, True])
def test_a_collapse_goes_back_to_the_epoch_before_it_whatever_is_on_the_disk(
    minutes, mixed_cache, tmp_path, monkeypatch, resumed
):
    share, epochs = [0.0], []

    def score(student, source, *rest):
        return 90.0, 10.0 if epochs[-1] == 2 and not share[0] and source.name == "training" else 60.0

    def note(examples, *rest, epoch, pgd_share, **options):
        epochs.append(epoch)
        share[0] = pgd_share
        if resumed and len(epochs) == 6:
            raise KeyboardInterrupt
        return draw(examples, *rest, epoch=epoch, pgd_share=pgd_share, **options)

    draw = trainer.Examples.draw
    for out, every in ((tmp_path / "minute", 60.0), (tmp_path / "always", 0.0)):
        share[0] = 0.0
        epochs.clear()
        with monkeypatch.context() as patch:
            patch.setattr(trainer.Examples, "draw", note)
            patch.setattr(trainer, "score", score)
            patch.setattr(checkpoints, "EVERY", every)
            if resumed:
                with pytest.raises(KeyboardInterrupt):
                    train(CONFIG, mixed_cache, out, device=CPU)
            assert train(CONFIG, mixed_cache, out, device=CPU, resume=resumed).collapses == 1
    assert_same_bits(tmp_path / "minute", tmp_path / "always")


def test_what_could_not_be_written_is_told(minutes, mixed_cache, tmp_path, monkeypatch):
    def full(path, state):
        raise DarhtError(f"cannot write {path.name}: No space left on device")

    monkeypatch.setattr(checkpoints, "save_tensors", full)
    with pytest.raises(DarhtError, match=r"cannot write memory-4.pt: No space"):
        train(CONFIG, mixed_cache, tmp_path, device=CPU, callbacks=minutes.callbacks)


def test_checkpoints_of_earlier_versions_are_read(mixed_cache, whole, tmp_path):
    """Their memory lay inside, perturbation and momentum apart and the channels before the pixels."""
    with pytest.raises(KeyboardInterrupt):
        train(CONFIG, mixed_cache, tmp_path, device=CPU, callbacks=Callbacks(on_epoch=interrupt))
    kept = read_checkpoint(tmp_path)
    pixels = kept["memory"].pop("pixels").permute(0, 3, 1, 2)
    kept["memory"] |= {"delta": pixels[:, :3].contiguous(), "momentum": pixels[:, 3:].contiguous()}
    torch.save(kept, tmp_path / CHECKPOINT)
    train(CONFIG, mixed_cache, tmp_path, device=CPU, resume=True)
    assert_same_bits(tmp_path, whole)


def interrupt(row):
    raise KeyboardInterrupt


def test_a_memory_that_is_not_there_or_is_damaged_is_an_error(mixed_cache, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(CONFIG, mixed_cache, tmp_path, device=CPU, callbacks=Callbacks(on_epoch=interrupt))
    path = tmp_path / "memory-1.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheError, match=r"memory-1.pt"):
        train(CONFIG, mixed_cache, tmp_path, device=CPU, resume=True)
    path.unlink()
    with pytest.raises(CacheError, match=r"needs 'memory-1.pt' beside it"):
        train(CONFIG, mixed_cache, tmp_path, device=CPU, resume=True)
    kept = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    torch.save(kept | {"memory": "../memory-1.pt"}, tmp_path / CHECKPOINT)
    with pytest.raises(CacheError, match="beside it"):
        train(CONFIG, mixed_cache, tmp_path, device=CPU, resume=True)


def test_as_much_state_as_a_run_can_have_goes_through_the_copy(mixed_cache, tmp_path, minutes):
    for out, every in ((tmp_path / "minute", minutes.callbacks), (tmp_path / "always", Callbacks())):
        train(changed(STATEFUL, optim={"epochs": 2}), mixed_cache, out, device=CPU, callbacks=every)
    assert_same_bits(tmp_path / "minute", tmp_path / "always")


PLAIN = st.none() | st.integers() | st.text(max_size=3)
TENSORS = st.lists(st.integers(-5, 5), max_size=4).map(torch.tensor)
NESTED = st.recursive(
    PLAIN | TENSORS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=8,
)


@given(NESTED, NESTED)
def test_a_copy_is_equal_and_nobody_else_s(value, before):
    into = copied(before)
    for one in (copied(value), copied(value, into), copied(value, copied(value))):
        found, wanted = leaves(one), leaves(value)
        assert found.keys() == wanted.keys()
        for path, item in wanted.items():
            if isinstance(item, torch.Tensor):
                assert torch.equal(found[path], item) and found[path] is not item
                assert not len(item) or found[path].data_ptr() != item.data_ptr()
            else:
                assert found[path] == item
