"""What was made here is remembered, with its options; what was not is refused, with the callable named."""

import threading

import pytest

from darht.core import trust
from darht.core.errors import ModelError

CALL = ("python:nets:make", 3, {"width": 2})


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(trust, "_made", set())
    return tmp_path / "darht" / "trusted"


def refused(arch, num_classes, kwargs):
    with pytest.raises(ModelError) as caught:
        trust.check_trusted(arch, num_classes, kwargs, "DIR/teacher.json")
    return str(caught.value)


def test_a_call_is_remembered_with_its_options(data_folder, monkeypatch):
    assert refused(*CALL).startswith("DIR/teacher.json asks to call nets:make, which is code")
    assert "--trust-code" in refused(*CALL)
    trust.remember(*CALL)
    monkeypatch.setattr(trust, "_made", set())  # another process
    trust.check_trusted(*CALL, "a card")
    assert [path.suffix for path in data_folder.iterdir()] == [".json"]
    refused("python:nets:make", 3, {"width": 3})
    refused("python:nets:make", 4, {"width": 2})
    next(data_folder.iterdir()).unlink()
    refused(*CALL)


def test_only_code_needs_trust(data_folder):
    trust.remember("resnet18", 3, {})
    trust.check_trusted("resnet18", 3, {}, "a card")
    assert not data_folder.exists()


def test_what_the_user_trusts_is_called(data_folder):
    with trust.trusting():
        trust.check_trusted(*CALL, "a card")
        with trust.trusting(False):
            trust.check_trusted(*CALL, "a card")
        assert trust.is_trusting()
    with trust.trusting(False):
        refused(*CALL)
    assert not data_folder.exists()


def test_trust_stays_in_its_thread(data_folder):
    found = []
    with trust.trusting():
        thread = threading.Thread(target=lambda: found.append(trust.is_trusting()))
        thread.start()
        thread.join()
    assert found == [False]


def test_a_folder_that_cannot_be_written_stops_nobody(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    trust.remember(*CALL)
    trust.check_trusted(*CALL, "a card of this process")


def test_without_the_variable_it_lies_in_the_home(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert trust.trusted_folder() == tmp_path / ".local" / "share" / "darht" / "trusted"
