"""Builds stop before they begin where a teacher makes no sense, and only then."""

import dataclasses

import pytest
import torch

from darht.cache.builder.api import build_cache
from darht.cache.builder.build import plan_build
from darht.cache.builder.sense import check_teachers
from darht.cache.builder.teachers import read_card, write_card
from darht.cache.format.manifest import SPEC
from darht.core.errors import ConfigError, ModelError

CPU = torch.device("cpu")


def shrink(config):
    config["data"]["limit"], config["views"]["count"] = 60, 2
    del config["attacks"]["pgd-vit"]


def test_the_command_stops_before_anything_is_written(invoke, variant, tmp_path):
    out = tmp_path / "out"
    told = invoke("build", variant(shrink), "--out", out, "--device", "cpu")
    assert told.exit_code == 2 and not out.exists()
    assert [line.split(":")[0] for line in told.stdout.splitlines()] == ["cnn", "vit"]
    assert "of 60 images" in told.stdout and "under PGD-2 at 32/255" in told.stdout
    assert told.stderr.startswith("error: teacher 'cnn': clean accuracy is ") and told.stderr.count("\n") == 1
    assert "guessing among 10 classes" in told.stderr and "--allow cnn --allow vit" in told.stderr
    one = invoke("build", variant(shrink), "--out", out, "--device", "cpu", "--allow", "cnn")
    assert one.exit_code == 2 and "teacher 'vit'" in one.stderr and "teacher 'cnn'" not in one.stderr
    none = invoke("build", variant(shrink), "--out", out, "--device", "cpu", "--allow", "resnet")
    assert none.stderr == "error: --allow names a teacher; there is no 'resnet', only cnn, vit\n"


def test_a_build_that_goes_on_asks_nobody(variant, tmp_path):
    """And an allowed teacher's cache is the one that it always was."""
    config, lines = variant(shrink), []
    with pytest.raises(ModelError, match="guessing among 10 classes"):
        build_cache(config, tmp_path / "out", device="cpu")
    first = build_cache(config, tmp_path / "out", device="cpu", allow=("cnn", "vit"))
    assert build_cache(config, tmp_path / "out", device="cpu").root_hash == first.root_hash
    plan = plan_build(config, device=CPU)
    check_teachers(plan, tmp_path / "out", device=CPU, on_line=lines.append)
    check_teachers(plan, tmp_path / "out", extending=True, device=CPU, on_line=lines.append)
    assert lines == []
    (tmp_path / "out" / SPEC).unlink()  # a folder that is not empty: who claims it says so
    check_teachers(plan, tmp_path / "out", device=CPU)


def test_class_names_of_a_teacher_are_those_of_the_data(variant, tiny_teachers, tmp_path):
    folder = tmp_path / "named"
    folder.mkdir()
    for path in tiny_teachers["cnn"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = variant(lambda c: (shrink(c), c["teachers"]["cnn"].update(path=str(folder))))
    named = dataclasses.replace(read_card(folder), classes=tuple("0123456789"))
    write_card(folder, named)
    assert plan_build(config, device=CPU).spec == plan_build(variant(shrink, "other.yaml"), device=CPU).spec
    write_card(folder, dataclasses.replace(named, classes=tuple("0132456789")))
    with pytest.raises(ConfigError, match=r"the data name the same classes in another order: class 2 is '3' in the fi"):
        plan_build(config, device=CPU)
