"""When a stage counts as done, and what its seconds are."""

import json
from pathlib import Path

import pytest

from darht.core.errors import CorruptError
from darht.core.sealed import write_sealed
from darht.tools.stage_ledger import STAGES, StageLedger, read_ledger
from darht.tools.stage_pool import Stage


@pytest.fixture
def plan(tmp_path: Path) -> list[Stage]:
    spec, made = tmp_path / "cache.yaml", tmp_path / "cache" / "manifest.json"
    spec.write_text("views: 8")
    return [
        Stage("teacher", ("teach",), makes=(tmp_path / "teacher.json",)),
        Stage("cache", ("build", str(spec)), ("teacher",), reads=(spec,), makes=(made,)),
        Stage("info", ("info",), ("cache",)),
        Stage("other", ("other",)),
    ]


def end(ledger: StageLedger, stages: list[Stage], seconds: float = 2.0) -> None:
    for stage in stages:
        for path in stage.makes:
            path.parent.mkdir(exist_ok=True)
            path.touch()
        ledger.note(stage, seconds)


def undone(folder: Path, plan: list[Stage]) -> list[str]:
    return [stage.name for stage in read_ledger(folder).take_undone(plan)]


@pytest.fixture
def done(tmp_path: Path, plan: list[Stage]) -> Path:
    """A folder where every stage is done."""
    ledger = read_ledger(tmp_path)
    assert ledger.take_undone(plan) == plan
    end(ledger, plan)
    assert undone(tmp_path, plan) == []
    return tmp_path


def test_a_stage_whose_file_changed_runs_again_with_all_that_need_it(done: Path, plan: list[Stage]) -> None:
    (done / "cache.yaml").write_text("views: 16")
    ledger = read_ledger(done)
    stages = ledger.take_undone(plan)
    assert [stage.name for stage in stages] == ["cache", "info"]
    end(ledger, stages[:1])  # stopped here
    assert undone(done, plan) == ["info"]
    (done / "cache.yaml").write_text("views: 8")
    assert undone(done, plan) == ["cache", "info"]


def test_a_stage_whose_result_is_gone_runs_again_with_all_that_need_it(done: Path, plan: list[Stage]) -> None:
    (done / "teacher.json").unlink()
    assert undone(done, plan) == ["teacher", "cache", "info"]


def test_what_an_earlier_version_noted_is_asked_again(done: Path, plan: list[Stage]) -> None:
    notes = {stage.name: {"line": stage.line, "seconds": 30.0} for stage in plan}
    write_sealed(done / STAGES, notes)
    ledger = read_ledger(done)
    assert ledger.take_undone(plan) == plan and ledger.seconds(plan) == dict.fromkeys(notes, 30.0)
    (done / STAGES).write_text(json.dumps(notes))
    assert undone(done, plan) == list(notes)


def test_seconds_are_of_the_plan_and_of_all_calls_that_a_result_took(done: Path, plan: list[Stage]) -> None:
    write_sealed(done / STAGES, {stage.name: {"line": stage.line, "seconds": 30.0} for stage in plan})
    ledger = read_ledger(done)
    (done / "cache" / "manifest.json").unlink()
    end(ledger, ledger.take_undone(plan))
    assert ledger.seconds(plan) == {"teacher": 32.0, "cache": 2.0, "info": 2.0, "other": 2.0}
    assert ledger.seconds(plan[:1]) == {"teacher": 32.0}


def test_notes_that_were_changed_are_refused(done: Path) -> None:
    noted = bytearray((done / STAGES).read_bytes())
    noted[40] ^= 1
    (done / STAGES).write_bytes(noted)
    with pytest.raises(CorruptError, match="remove it, and every stage asks its command again"):
        read_ledger(done)
