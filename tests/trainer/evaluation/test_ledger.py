"""Results are kept under what they depend on, whole or not at all."""

import fcntl

import numpy as np
import pytest

from darht.trainer.evaluation.ledger import Entry, Ledger


def made(value):
    return lambda: {"value": np.array([value])}


def test_the_second_time_it_is_read(tmp_path):
    ledger = Ledger(tmp_path / "parts", {"model": "m"})
    assert ledger.get("pgd", {"eps": 8}, made(1))["value"].tolist() == [1]
    assert ledger.get("pgd", {"eps": 8}, made(2))["value"].tolist() == [1]


@pytest.mark.parametrize("change", [{"name": "fgsm"}, {"facts": {"eps": 4}}, {"identity": {"model": "n"}}])
def test_whatever_differs_is_made_anew(tmp_path, change):
    Ledger(tmp_path, {"model": "m"}).get("pgd", {"eps": 8}, made(1))
    other = Ledger(tmp_path, change.get("identity", {"model": "m"}))
    assert other.get(change.get("name", "pgd"), change.get("facts", {"eps": 8}), made(2))["value"].tolist() == [2]


def test_a_file_that_says_it_is_encrypted_is_made_again(tmp_path):
    ledger = Ledger(tmp_path, {})
    ledger.get("pgd", {}, made(1))
    (path,) = tmp_path.glob("*.npz")
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] ^= 1
    path.write_bytes(data)
    assert ledger.get("pgd", {}, made(2))["value"].tolist() == [2]


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 cut", None])
def test_a_file_that_is_not_whole_is_made_again(tmp_path, damage):
    ledger = Ledger(tmp_path, {})
    ledger.get("a name: with/odd (signs)", {}, made(1))
    (path,) = tmp_path.glob("*.npz")
    assert "/" not in path.name and ":" not in path.name
    path.write_bytes(path.read_bytes()[:-30] if damage is None else damage)
    assert ledger.get("a name: with/odd (signs)", {}, made(2))["value"].tolist() == [2]


def test_without_a_folder_nothing_is_kept():
    ledger = Ledger(None, {})
    assert ledger.get("pgd", {}, made(1))["value"].tolist() == [1]
    assert ledger.get("pgd", {}, made(2))["value"].tolist() == [2]


def test_what_another_process_makes_is_waited_for_and_made_when_it_is_lost(tmp_path):
    """The other process is a lock that is let go without a file, as after a kill."""
    ledger = Ledger(tmp_path, {}, shared=True)
    entries = [Entry(name, {}, made(name)) for name in ("first", "second")]
    told, other = [], ledger._path("first", {}).with_suffix(".lock").open("ab")
    fcntl.flock(other, fcntl.LOCK_EX)

    def on_done(count):
        told.append((count, sorted(path.name.split("-")[0] for path in tmp_path.glob("*.npz"))))
        other.close()

    ledger.share_out(entries, on_done)
    assert told == [(1, ["second"]), (2, ["first", "second"])]
    assert ledger.get("first", {}, made("nobody"))["value"].tolist() == ["first"]
    assert list(tmp_path.glob("*.lock")) == []


def test_alone_nothing_is_shared_out(tmp_path):
    Ledger(tmp_path, {}).share_out([Entry("first", {}, made(1))], lambda count: pytest.fail("told"))
    assert list(tmp_path.iterdir()) == []
