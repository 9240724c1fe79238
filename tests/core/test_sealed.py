"""Every single bit and every cut of a file that carries its sha256 is noticed, and what carries none is read."""

import io
import json
import logging

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from darht.core.errors import CacheError, CorruptError
from darht.core.files import sha256_bytes
from darht.core.sealed import (
    check_folder,
    check_named,
    check_zip,
    read_sealed,
    seal_json,
    seal_zip,
    unseal_json,
    write_sealed,
)
from darht.core.tensors import load_tensors, save_tensors

VALUE = {"name": "ä", "number": 0.1, "inner": {"list": [1, 2]}, "sha": "0" * 64}


def zipped() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, values=np.arange(7))
    return buffer.getvalue()


def test_json_comes_back():
    sealed = unseal_json(seal_json(VALUE, {"w.bin": "aa"}), "card", "fix")
    assert sealed == (VALUE, {"w.bin": "aa"}, True)


def test_every_bit_and_cut_of_json_is_noticed():
    data = seal_json(VALUE, {"w.bin": "0" * 64})
    changed = [bytes([*data[:i], data[i] ^ 1 << bit, *data[i + 1 :]]) for i in range(len(data)) for bit in range(8)]
    for damaged in [*changed, *(data[:length] for length in range(len(data)))]:
        with pytest.raises(CorruptError, match="the fix") as caught:
            unseal_json(damaged, "card.json", "the fix")
        assert "card.json" in str(caught.value)


@pytest.mark.parametrize("text", ["7", "[" * 500 + "]" * 500, '{"sha256": 3}', '{"sha256": "", "files": {"../x": ""}}'])
def test_what_nobody_wrote_is_one_line(text):
    with pytest.raises(CorruptError, match="fix") as caught:
        unseal_json(text.encode(), "card.json", "fix")
    assert "\n" not in str(caught.value)


def test_every_bit_and_cut_of_a_zip_is_noticed():
    data = seal_zip(zipped())
    with np.load(io.BytesIO(data)) as held:
        assert held["values"].tolist() == list(range(7))
    assert check_zip(io.BytesIO(data), "x.npz", "fix")
    changed = [bytes([*data[:i], data[i] ^ 1 << bit, *data[i + 1 :]]) for i in range(len(data)) for bit in range(8)]
    for damaged in [*changed, *(data[:length] for length in range(len(data)))]:
        with pytest.raises(CorruptError, match=r"x\.npz is damaged .+: fix"):
            check_zip(io.BytesIO(damaged), "x.npz", "fix")


def test_a_zip_without_a_sha256_is_told_from_one_that_lost_it():
    assert not check_zip(io.BytesIO(zipped()), "x.npz", "fix")


@given(st.lists(st.binary(max_size=60), max_size=8))
def test_pieces_of_any_size_give_the_same_zip(pieces):
    from darht.core.sealed import ZipSealer

    whole, buffer = zipped(), io.BytesIO()
    sealer = ZipSealer(buffer)
    for piece in [*pieces, whole[:10], whole[10:]]:
        assert sealer.write(piece) == len(piece)
    sealer.close()
    assert buffer.getvalue() == seal_zip(b"".join(pieces) + whole)


@pytest.mark.parametrize("lazily", [False, True])
def test_tensors_are_read_by_torch_and_checked(tmp_path, lazily):
    path = tmp_path / "state.pt"
    save_tensors(path, {"a": torch.arange(100)})
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.arange(100))
    assert torch.equal(load_tensors(path, lazily=lazily)["a"], torch.arange(100))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(CacheError, match=r"state\.pt is damaged \(it has another sha256 .+ remove it"):
        load_tensors(path, lazily=lazily)


def test_named_files_are_compared(tmp_path):
    card = tmp_path / "card.json"
    (tmp_path / "w.bin").write_bytes(b"abc")
    write_sealed(card, VALUE, {"w.bin": sha256_bytes(b"abc")})
    sealed = read_sealed(card, "fix")
    check_named(card, sealed, "w.bin", "fix")
    for damage in (lambda path: path.write_bytes(b"abd"), lambda path: path.unlink()):
        damage(tmp_path / "w.bin")
        with pytest.raises(CorruptError, match=r"w\.bin .+: fix"):
            check_named(card, sealed, "w.bin", "fix")
    with pytest.raises(CorruptError, match=r"does not name other\.bin"):
        check_named(card, sealed, "other.bin", "fix")


def test_a_file_without_sha256_is_read_and_said_once(tmp_path, caplog):
    for name in ("one.json", "two.json"):
        (tmp_path / name).write_text(json.dumps({"a": 1}))
        with caplog.at_level(logging.WARNING):
            assert read_sealed(tmp_path / name, "fix") == ({"a": 1}, {}, False)
    assert caplog.text.count("carry no sha256") == 1


def test_a_folder_is_read_whole(tmp_path):
    (tmp_path / "w.npy").write_bytes(b"abc")
    write_sealed(tmp_path / "card.json", VALUE, {"w.npy": sha256_bytes(b"abc")})
    save_tensors(tmp_path / "inner" / "state.pt", {"a": torch.zeros(3)})
    (tmp_path / "old.json").write_text("{}")
    found = check_folder(tmp_path)
    assert [path.name for path in found.whole] == ["card.json", "w.npy", "state.pt"]
    assert ([path.name for path in found.unhashed], found.damaged) == (["old.json"], [])
    for name in ("w.npy", "inner/state.pt"):
        (tmp_path / name).write_bytes(b"abcd")
    assert len(check_folder(tmp_path).damaged) == 2
