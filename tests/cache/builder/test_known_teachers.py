"""Finding the teachers of a cache again: where they lay, where they lie now, and whether they are the same."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from darht.cache.builder.known_teachers import load_known_teacher, teacher_folders
from darht.cache.builder.teachers import load_teacher, read_card, write_card
from darht.cache.read.reader import open_cache
from darht.core.errors import ConfigError, ModelError

CPU = torch.device("cpu")


def test_given_folders_come_before_known_ones(tiny_cache, tiny_teachers, tmp_path):
    cache = open_cache(tiny_cache)
    assert teacher_folders(cache.spec, cache.origin(), {}) == tiny_teachers
    found = teacher_folders(cache.spec, cache.origin(), {"vit": tmp_path})
    assert list(found.items()) == [("cnn", tiny_teachers["cnn"]), ("vit", tmp_path)]
    assert teacher_folders(cache.spec, {}, {"vit": Path("x")}) == {"vit": Path("x")}
    with pytest.raises(ConfigError, match=r"^the cache has no teacher 'a', 'b'; it has cnn, vit$"):
        teacher_folders(cache.spec, {}, {"a": tmp_path, "vit": tmp_path, "b": tmp_path})


def test_the_same_teacher_is_loaded_and_another_refused(tiny_cache, tiny_teachers, tmp_path):
    spec, x = open_cache(tiny_cache).spec, torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    loaded = load_known_teacher("cnn", tiny_teachers["cnn"], spec, CPU)
    assert torch.equal(loaded(x), load_teacher(tiny_teachers["cnn"], CPU)[0](x))
    with pytest.raises(ModelError, match=r"is not teacher 'cnn' of the cache: .*; give --teacher cnn=FOLDER$"):
        load_known_teacher("cnn", tiny_teachers["vit"], spec, CPU)


def test_the_same_weights_with_other_preprocessing_are_another_teacher(tiny_cache, tiny_teachers, tmp_path):

    shutil.copytree(tiny_teachers["cnn"], tmp_path / "cnn")
    card = read_card(tmp_path / "cnn")
    write_card(
        tmp_path / "cnn", dataclasses.replace(card, preprocessing=dataclasses.replace(card.preprocessing, resize=8))
    )
    with pytest.raises(ModelError, match=r"of the cache: preprocessing\.resize"):
        load_known_teacher("cnn", tmp_path / "cnn", open_cache(tiny_cache).spec, CPU)
