"""A run as a teacher: the folded student, under a card as a teacher's."""

import pytest
import torch
from reseal import rewrite
from runs import CPU, write_student

from darht.cache.builder.build import build, plan_build
from darht.cache.builder.seal import seal
from darht.cache.builder.students import student_folder
from darht.cache.builder.teachers import load_teacher, read_card
from darht.core.errors import ModelError
from darht.trainer.state.checkpoint import load_student


@pytest.mark.parametrize("teachers", [0, 2])
def test_a_student_s_folder_and_a_run_are_read_as_the_folded_student(tmp_path, teachers):
    run = tmp_path / "run"
    write_student(run / "student", teachers)
    write_student(run, teachers)  # what lies beside run.json is not what a run means
    (run / "config.json").write_text("{}")
    (run / "run.json").write_text("{}")
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    want = load_student(run / "student", CPU)[0].fold().eval()(x)
    for folder in (run, run / "student"):
        assert student_folder(folder) == run / "student"
        network, card = load_teacher(folder, CPU)
        assert torch.equal(network(x), want)
        assert not network.training and not any(value.requires_grad for value in network.parameters())
        assert card.preprocessing.mean == (0.3, 0.4, 0.5) and card.training["algorithm"] == "at"
        assert read_card(folder) == card


def test_a_cache_is_built_from_a_run(tmp_path):
    write_student(tmp_path / "run/student", 2)
    (tmp_path / "run/run.json").write_text("{}")
    (tmp_path / "c.yaml").write_text(
        "data: {source: digits, limit: 60, holdout: 0}\n"
        "teachers: {own: {path: run}}\nviews: {padding: 0, flip: false}\n"
    )
    build(plan_build(tmp_path / "c.yaml", device=CPU), tmp_path / "cache", device=CPU, on_unit=lambda *_: None)
    assert len(seal(tmp_path / "cache").root_hash) == 64


def test_what_is_no_student_is_refused(tmp_path):
    assert student_folder(tmp_path) is None
    with pytest.raises(ModelError, match="is not a teacher folder"):
        load_teacher(tmp_path, CPU)
    folder = write_student(tmp_path / "s", 0)
    rewrite(folder / "config.json", kwargs={"width": 4, "blocks": [1, 1, 1, 1]})
    with pytest.raises(ModelError, match="does not fit resnet18"):
        load_teacher(folder, CPU)
    (folder / "model.safetensors").write_bytes(b"other")
    with pytest.raises(ModelError, match=r"model\.safetensors has sha256"):
        load_teacher(folder, CPU)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="is not a student's card"):
        load_teacher(folder, CPU)
