"""Several processes that train one student, and what else a batch can be cut into."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from built import sealed_cache
from rank_server import RankServer
from runs import assert_same_bits, read_checkpoint

from darht.cache.read.reader import Cache, open_cache
from darht.core.errors import ConfigError, UnreachableError
from darht.trainer.config import (
    AverageConfig,
    ComputeConfig,
    InnerConfig,
    OptimConfig,
    StudentConfig,
    TrainConfig,
    WarmConfig,
)
from darht.trainer.state.checkpoint import LAST, PAUSED, load_student
from darht.trainer.student.distributed import Ranks, Wish, joined
from darht.trainer.student.model import Student, StudentOutput
from darht.trainer.student.train import Callbacks, train
from darht.trainer.student.validate import check_parts

CPU = torch.device("cpu")
VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
CONFIG = TrainConfig(
    recipe="at",
    student=StudentConfig(arch="timm:vit_tiny_patch16_224", kwargs=VIT, feature_map=False),
    inner=InnerConfig(kind="warm", eps=32, steps=2, warm=WarmConfig(check_rows=0)),
    optim=OptimConfig(epochs=2, batch_size=16, lr=0.05, schedule="constant"),
)


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankServer]:
    with RankServer() as running:
        yield running


STEPS = 5  # of an epoch


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_student(out / LAST, CPU)[0].state_dict()


def state(out: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(out)


@pytest.fixture(scope="module")
def alone(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    train(CONFIG, open_cache(tiny_cache), out, device=CPU)
    return out


@pytest.fixture(scope="module")
def two(ranks: RankServer, tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two") / "run"
    assert ranks.together(tiny_cache, out, CONFIG) == [0, 0]
    return out


def test_two_processes_train_the_student_of_one(alone: Path, two: Path):
    for name, expected in weights(alone).items():
        torch.testing.assert_close(weights(two)[name], expected, atol=2e-4, rtol=1e-3)
    ours, theirs = state(two), state(alone)
    assert torch.equal(ours["memory"]["seen"], theirs["memory"]["seen"])
    same = (ours["memory"]["pixels"] == theirs["memory"]["pixels"])[..., :3].float().mean()
    assert same > 0.98  # a gradient within rounding of zero may have either sign


def test_two_processes_train_the_student_of_one_from_several_sources(ranks: RankServer, blend: Path, tmp_path: Path):
    config = dataclasses.replace(
        CONFIG, inner=InnerConfig(eps=32, steps=2), optim=OptimConfig(epochs=1, batch_size=16, lr=0.05)
    )
    train(config, open_cache(blend), tmp_path / "alone", device=CPU)
    assert ranks.together(blend, tmp_path / "two", config) == [0, 0]
    for name, expected in weights(tmp_path / "alone").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], expected, atol=2e-4, rtol=1e-3)


def test_a_row_that_both_processes_drew_keeps_one_perturbation(ranks: RankServer, blend_config: Path, tmp_path: Path):
    """Rows of a source with a large share of each batch come round again within an epoch, in either process."""
    spec = yaml.safe_load(blend_config.read_text())
    spec["data"][1]["share"], spec["attacks"] = 0.75, {}
    inner = InnerConfig(kind="warm", eps=32, warm=WarmConfig(start="noise", check_rows=0))
    config = dataclasses.replace(CONFIG, inner=inner, optim=OptimConfig(epochs=1, batch_size=16, lr=0.05))
    assert ranks.together(sealed_cache(spec, tmp_path), tmp_path / "two", config) == [0, 0]
    assert state(tmp_path / "two")["memory"]["pixels"][..., :3].int().abs().max() == 32


def test_when_one_is_asked_to_stop_both_do_and_go_on_to_the_same_bits(
    ranks: RankServer, tiny_cache: Path, two: Path, tmp_path: Path
):
    """They stop two steps later: with the first the other knows."""
    out = tmp_path / "run"
    assert ranks.together(tiny_cache, out, CONFIG, f"1:{STEPS + 1}") == [130, 130]
    pauses = [torch.load(out / name, weights_only=True) for name in (PAUSED, "paused-1.pt")]
    assert [(kept["progress"]["epoch"], kept["pause"]["steps"]) for kept in pauses] == [(1, 3), (1, 3)]
    left = tmp_path / "alone"
    shutil.copytree(out, left)
    notes: list[str] = []
    train(CONFIG, open_cache(tiny_cache), left, device=CPU, resume=True, callbacks=Callbacks(on_note=notes.append))
    assert notes[-1] == "the pause was kept by 2 processes, these are 1: on from epoch 1's end"
    assert ranks.together(tiny_cache, out, CONFIG) == [0, 0]
    assert_same_bits(out, two)
    assert not list(out.glob("paused*")) and not list(left.glob("paused*"))


def test_when_an_epoch_ends_before_all_know_they_stop_there(
    ranks: RankServer, tiny_cache: Path, two: Path, tmp_path: Path
):
    out = tmp_path / "run"
    assert ranks.together(tiny_cache, out, CONFIG, f"1:{STEPS - 1}") == [130, 130]
    assert state(out)["progress"]["epoch"] == 1 and not list(out.glob("paused*"))
    assert ranks.together(tiny_cache, out, CONFIG) == [0, 0]
    assert_same_bits(out, two)


def test_alone_a_wish_counts_at_once_and_together_a_step_later():
    assert Ranks().stop(True, None) and not Ranks().stop(False, None)
    several = Ranks(0, 2)
    assert Ranks().wish(True) is None and Ranks().averaged(torch.nn.Linear(1, 1)) is None
    asked = [Wish(torch.tensor(count), SimpleNamespace(wait=lambda: True)) for count in (0.0, 1.0)]
    assert not several.stop(True, None) and not several.stop(True, asked[0])
    assert several.stop(False, asked[1])


def test_this_process_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined(CPU) as ranks:
        at = torch.arange(7)
        assert ranks == Ranks(0, 1) and ranks.first and torch.equal(ranks.part(at), at)
        assert ranks.agree({"a": 1}) == {"a": 1}


def test_the_parts_of_a_batch_are_the_batch():
    at = torch.arange(11)
    parts = [Ranks(rank, 4).part(at) for rank in range(4)]
    assert torch.equal(torch.cat(parts), at) and {len(part) for part in parts} <= {2, 3}


@pytest.mark.parametrize("parts", [2, 7, 64])
def test_a_batch_cut_into_parts_gives_the_same_step(tiny_cache: Path, alone: Path, tmp_path: Path, parts: int):
    config = dataclasses.replace(CONFIG, compute=ComputeConfig(accumulate=parts))
    train(config, open_cache(tiny_cache), tmp_path / "run", device=CPU)
    for name, expected in weights(alone).items():
        torch.testing.assert_close(weights(tmp_path / "run")[name], expected, atol=2e-4, rtol=1e-3)


RESNET = StudentConfig(arch="resnet18", kwargs={"width": 4, "blocks": [1, 1, 1, 1]}, feature_map=False)


@pytest.mark.parametrize("on", [True, False])
def test_bf16_and_channels_last_are_of_the_passes_and_weights_are_float32(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on: bool
):
    seen, forward = set(), Student.forward

    def spy(student: Student, x: torch.Tensor) -> StudentOutput:
        out = forward(student, x)
        inner = next(p for p in student.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1)
        if student.training:
            seen.add((out.logits.dtype, inner.is_contiguous(memory_format=torch.channels_last)))
        return out

    monkeypatch.setattr(Student, "forward", spy)
    compute = ComputeConfig(precision="bf16", channels_last=True) if on else ComputeConfig()
    train(dataclasses.replace(CONFIG, student=RESNET, compute=compute), open_cache(tiny_cache), tmp_path, device=CPU)
    assert seen == {(torch.bfloat16 if on else torch.float32, on)}
    assert all(value.dtype != torch.bfloat16 for value in weights(tmp_path).values())


def test_a_compiled_student_is_the_same_student_and_counts_the_same(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its second forward pass of a step counts as well, and the inner loop leaves its batch norms alone."""
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda net, **how: compiled.append(net) or net)
    for name, on in (("plain", False), ("compiled", True)):
        pgd = InnerConfig(kind="pgd", eps=32, steps=2)
        config = dataclasses.replace(
            CONFIG, recipe="rslad", student=RESNET, inner=pgd, compute=ComputeConfig(compile=on)
        )
        train(config, open_cache(tiny_cache), tmp_path / name, device=CPU)
    assert len(compiled) == 2, "the student and its twin for the inner loop"
    rows = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("plain", "compiled")]
    for one, other in zip(*rows, strict=True):
        mine, theirs = ({k: v for k, v in json.loads(line).items() if "second" not in k} for line in (one, other))
        assert mine == theirs and mine["train_clean"] is not None
    assert all(torch.equal(weights(tmp_path / "plain")[k], v) for k, v in weights(tmp_path / "compiled").items())


def kept_and_mean(config: TrainConfig, cache: Path, out: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """What a run keeps, and its own weights after each epoch."""
    own: list[dict] = []

    def note(row: dict) -> None:
        own.append({name: value.clone() for name, value in state(out)["student"].items()})

    train(config, open_cache(cache), out, device=CPU, callbacks=Callbacks(on_epoch=note))
    return weights(out), own


def test_swa_keeps_the_mean_over_epochs(tiny_cache: Path, tmp_path: Path):
    optim = dataclasses.replace(CONFIG.optim, epochs=4)
    config = dataclasses.replace(CONFIG, optim=optim, average=AverageConfig(kind="swa", start=0.5))
    kept, own = kept_and_mean(config, tiny_cache, tmp_path / "run")
    for name, value in kept.items():
        expected = torch.stack([epoch[name] for epoch in own[1:]]).mean(0)  # the second epoch ends at one half
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)


def test_ema_follows_the_weights(tiny_cache: Path, tmp_path: Path):
    config = dataclasses.replace(CONFIG, average=AverageConfig(kind="ema", decay=0.5))
    kept, own = kept_and_mean(config, tiny_cache, tmp_path / "run")
    assert any(not torch.equal(kept[name], own[-1][name]) for name in kept)
    near = dataclasses.replace(CONFIG, average=AverageConfig(kind="ema", decay=1e-6))
    kept, own = kept_and_mean(near, tiny_cache, tmp_path / "near")
    for name, value in kept.items():
        torch.testing.assert_close(value, own[-1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_a_mean_survives_an_interruption(tiny_cache: Path, tmp_path: Path, kind: str):
    config = dataclasses.replace(CONFIG, average=AverageConfig(kind=kind, decay=0.9, start=0.0))
    train(config, open_cache(tiny_cache), tmp_path / "whole", device=CPU)

    def stop(row: dict) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, open_cache(tiny_cache), tmp_path / "cut", device=CPU, callbacks=Callbacks(on_epoch=stop))
    train(config, open_cache(tiny_cache), tmp_path / "cut", device=CPU, resume=True)
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "cut")[name], value)


def test_weights_that_a_loss_leaves_out_stay_as_alone(ranks: RankServer, tiny_cache: Path, tmp_path: Path):
    """The second half of the run never reaches the head, whose momentum and decay rest then; a batch in two parts."""
    config = dataclasses.replace(
        CONFIG,
        recipe="darht",
        student=dataclasses.replace(CONFIG.student, feature_map=True),
        inner=InnerConfig(kind="cached", eps=32),
        loss={"phases": (0.0, 0.5), "awp": 0.01, "weights": "row"},
        compute=ComputeConfig(accumulate=2),
    )
    train(config, open_cache(tiny_cache), tmp_path / "alone", device=CPU)
    assert ranks.together(tiny_cache, tmp_path / "two", config) == [0, 0]
    for name, expected in weights(tmp_path / "alone").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], expected, atol=2e-4, rtol=1e-3)


def test_every_process_draws_dropout_for_itself():
    assert Ranks().own == Ranks(0, 4).own == () and {Ranks(rank, 4).own for rank in (1, 2, 3)} == {(1,), (2,), (3,)}


MTARD = dataclasses.replace(CONFIG, recipe="mtard", optim=dataclasses.replace(CONFIG.optim, epochs=3, batch_size=15))


def test_what_a_recipe_learns_is_the_same_everywhere_after_an_epoch(
    ranks: RankServer, mixed_cache: Cache, tmp_path: Path
):
    """Stopped at the end of an epoch of 3 steps, two processes go on from one checkpoint to the same bits."""
    vanilla_cache = Path(str(mixed_cache.folder))
    assert ranks.together(vanilla_cache, tmp_path / "whole", MTARD) == [0, 0]
    assert ranks.together(vanilla_cache, tmp_path / "cut", MTARD, "1:2") == [130, 130]
    assert state(tmp_path / "cut")["progress"]["epoch"] == 1 and not list((tmp_path / "cut").glob("paused*"))
    assert ranks.together(vanilla_cache, tmp_path / "cut", MTARD) == [0, 0]
    assert_same_bits(tmp_path / "cut", tmp_path / "whole")


def test_the_average_that_a_recipe_asks_is_the_same_everywhere_after_an_epoch(
    ranks: RankServer, tiny_cache: Path, tmp_path: Path
):
    """Its batch norms as well: two processes go on from one checkpoint to the same bits."""
    inner, optim = InnerConfig(eps=32, steps=1), dataclasses.replace(CONFIG.optim, epochs=2)
    config = dataclasses.replace(CONFIG, recipe="adr", student=RESNET, inner=inner, optim=optim)
    assert ranks.together(tiny_cache, tmp_path / "whole", config) == [0, 0]
    assert ranks.together(tiny_cache, tmp_path / "cut", config, f"1:{STEPS - 1}") == [130, 130]
    assert state(tmp_path / "cut")["progress"]["epoch"] == 1 and not list((tmp_path / "cut").glob("paused*"))
    assert ranks.together(tiny_cache, tmp_path / "cut", config) == [0, 0]
    assert_same_bits(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize(
    ("optim", "compute", "world", "message"),
    [
        ({"batch_size": 1}, {}, 2, "batches of 1 rows do not reach for 2 processes: raise optim.batch_size"),
        ({"batch_size": 1}, {}, 1, "batches of 1 in 1 parts leave 1: raise optim.batch_size"),
        ({"batch_size": 16}, {"accumulate": 6}, 2, "batches of 16 in 12 parts leave 1"),
        ({"batch_size": 200}, {"accumulate": 60}, 1, "batches of 89 in 60 parts leave 1"),
    ],
)
def test_batches_that_are_cut_too_small(optim: dict, compute: dict, world: int, message: str):
    config = dataclasses.replace(
        CONFIG, optim=dataclasses.replace(CONFIG.optim, **optim), compute=ComputeConfig(**compute)
    )
    normed = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    with pytest.raises(ConfigError, match=message):
        check_parts(normed, config, 89, Ranks(0, world))
    if world == 1:
        check_parts(torch.nn.Linear(1, 1), config, 89, Ranks(0, world))
    check_parts(normed, CONFIG, 89, Ranks(0, 2))


@pytest.mark.parametrize(
    ("text", "kind", "told"),
    [
        ("[gloo/transport/tcp/pair.cc:544] Connection closed by peer", UnreachableError, "another process of this"),
        ("the tensor has another dtype", RuntimeError, "another dtype"),
    ],
)
def test_a_process_that_is_gone_is_told_in_a_line(text, kind, told):
    with pytest.raises(kind, match=told), joined(CPU):
        raise RuntimeError(text)
