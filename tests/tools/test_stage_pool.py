"""Stages side by side: what waits for what, and what a failed one leaves."""

from pathlib import Path

import pytest

from darht.tools.experiment_cli import call
from darht.tools.stage_pool import Stage, StageError, run_side_by_side


def test_a_stage_begins_when_what_it_needs_is_done(tmp_path: Path) -> None:
    told: list[str] = []
    stages = [
        Stage("a", ("1",)),
        Stage("b", ("2",)),
        Stage("c d", ("3",), ("a", "b", "done before")),
        Stage("e", ("4",)),
    ]
    run_side_by_side(
        stages,
        print,
        jobs=2,
        logs=tmp_path / "logs",
        on_start=lambda stage: told.append(f"+{stage.name}"),
        on_end=lambda stage: told.append(f"-{stage.name}"),
    )
    assert sorted(told) == sorted(f"{sign}{stage.name}" for sign in "+-" for stage in stages)
    assert max(told.index("-a"), told.index("-b")) < told.index("+c d")
    open_at_once = [sum(1 if word[0] == "+" else -1 for word in told[:k]) for k in range(len(told) + 1)]
    assert max(open_at_once) == 2
    assert (tmp_path / "logs" / "c-d.log").read_text() == "('3',)\n"


def test_a_stage_that_fails_is_named_with_its_reason_and_nothing_begins_after_it(tmp_path: Path) -> None:
    begun: list[str] = []
    stages = [Stage("info", ("darht-cache", "info", str(tmp_path / "none"))), Stage("later", (), ("info",))]
    with pytest.raises(StageError, match=r"stage 'info' ended with exit code 2: .*none.*info\.log\)"):
        run_side_by_side(
            stages,
            call,
            jobs=2,
            logs=tmp_path / "logs",
            on_start=lambda stage: begun.append(stage.name),
            on_end=lambda stage: pytest.fail(stage.name),
        )
    assert begun == ["info"]
