"""What measures a GPU: in miniature on a CPU, gone on with, with a failure kept, and without a GPU."""

import json
import sys
from pathlib import Path

import torch
from scripts import load_script

GPU = load_script(Path("bench/gpu.py"))


def call(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["bench/gpu.py", *map(str, words)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return GPU.main()


def test_everything_in_miniature(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(GPU, "MODES", {"warm": GPU.MODES["warm"]})
    assert call(monkeypatch, "--smoke", "--work", tmp_path) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())["measured"]
    assert list(found) == ["warm eager", "epoch", "unit fp32", "unit tf32", "unit bf16"]
    assert all("error" not in one for one in found.values())
    assert found["warm eager"]["images_per_second"] > 0 and found["warm eager"]["launches"] is None
    assert found["unit tf32"]["same"] == 1.0 > found["unit bf16"]["same"]  # a CPU has no TensorFloat-32
    page = (tmp_path / "gpu.md").read_text()
    assert (
        GPU.SAYS_NOTHING in page and "| 17,000 |" in page and "An epoch of `warm`" in page and page.count("| - |") > 3
    )
    assert not list(tmp_path.glob("tmp*"))
    capsys.readouterr()
    assert call(monkeypatch, "--smoke", "--work", tmp_path) == 0
    assert capsys.readouterr().out.count("# measured before: ") == len(found)


def test_a_failure_is_kept_as_a_line_and_tried_again(tmp_path, capsys):
    file, facts, ran = tmp_path / "gpu.json", {"device": "a card"}, []

    def good():
        ran.append("good")
        return {"images_per_second": 100.0, "launches": 1.0, "waits": 0.0, "peak_gib": 0.5}

    def bad():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried ...")

    todo = {"warm eager": good, "warm compiled": bad}
    done = GPU.measure(todo, facts, file)
    assert done["warm compiled"] == {"error": "CUDA out of memory."}
    page = GPU.page(done, facts, "python bench/gpu.py")
    assert "| warm eager | 100 | 17,000 | 1 % | 1 | 0.0 | 0.50 |" in page
    assert "- warm compiled failed: CUDA out of memory." in page
    done = GPU.measure(todo | {"warm compiled": good}, facts, file)
    assert "error" not in done["warm compiled"] and ran == ["good", "good"]
    GPU.measure(todo, facts | {"torch": "another"}, file)
    assert ran == ["good"] * 3  # figures of another card or version are not taken over
    capsys.readouterr()


def test_a_stop_keeps_what_is_measured(monkeypatch, tmp_path, capsys):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr(GPU, "measurements", lambda *_: {"warm eager": dict, "warm compiled": stop})
    assert call(monkeypatch, "--smoke", "--work", tmp_path) == GPU.STOPPED
    assert "the same command goes on" in capsys.readouterr().err
    assert list(json.loads((tmp_path / "gpu.json").read_text())["measured"]) == ["warm eager"]
    (tmp_path / "gpu.json").write_bytes((tmp_path / "gpu.json").read_bytes().replace(b"warm", b"harm"))
    assert call(monkeypatch, "--smoke", "--work", tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "all is measured anew" in error


def test_without_a_gpu_it_counts(monkeypatch, capsys):
    monkeypatch.setattr(GPU, "counts", lambda: "| counted |")
    assert call(monkeypatch) == 0
    out = capsys.readouterr().out
    assert out.startswith("torch sees no GPU") and "| counted |" in out
