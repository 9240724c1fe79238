"""Stages side by side: what waits for what, and what a failed one leaves."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from forking import tell_threads

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


def test_a_stage_has_all_cores_where_it_may_and_nothing_runs_beside_it(tmp_path: Path) -> None:
    stages = [
        Stage("a", (), any_threads=True),
        Stage("b", (), any_threads=True),
        Stage("alone", (), ("a", "b"), any_threads=True),
        Stage("fixed", (), ("alone",)),
    ]
    run_side_by_side(
        stages, tell_threads, jobs=2, logs=tmp_path, on_start=lambda stage: None, on_end=lambda stage: None
    )
    cores = len(os.sched_getaffinity(0))
    share = max(1, cores // 2)
    told = {stage.name: int((tmp_path / f"{stage.name}.log").read_text()) for stage in stages}
    assert told == {"a": share, "b": share, "alone": cores, "fixed": share}


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_experiment_stops_its_stages_as_their_commands_stop(number: int, tmp_path: Path) -> None:
    net = {"arch": "resnet18", "kwargs": {"width": 2, "blocks": [1, 1, 1, 1]}}
    teacher = {**net, "algorithm": "standard", "set": {"optim.epochs": 5000, "optim.batch_size": 32}, "allow": True}
    recipe = {
        "data": {"source": "digits", "limit": 64, "test_limit": 40},
        "teachers": {"a": teacher, "b": teacher}, "cache": {}, "students": {"s": {"recipe": "kd"}},
    }  # fmt: skip
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(recipe))
    words = [
        sys.executable,
        "-c",
        "from darht.tools.experiment_cli import experiment; experiment()",
        "long.yaml",
        "--out",
        "out",
    ]
    program = subprocess.Popen([*words, "--jobs", "2"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    logs = [tmp_path / "out/logs" / f"teacher-{name}.log" for name in "ab"]
    deadline = time.monotonic() + 60
    try:
        while not all(log.is_file() and "epoch 3/" in log.read_text() for log in logs):
            assert time.monotonic() < deadline and program.poll() is None
            time.sleep(0.1)
        program.send_signal(number)
        told = program.communicate(timeout=60)[1]
    finally:
        program.kill()
    assert program.returncode == 128 + number, told
    assert told.splitlines()[-1].startswith("go on with: ") and told.endswith("long.yaml --out out --jobs 2\n")
    for log in logs:
        lines = log.read_text().splitlines()
        assert any("epochs are kept" in line for line in lines) and lines[-1].startswith("go on with: ")
