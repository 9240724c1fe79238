"""Teachers that come with darht, named in place of a folder."""

from pathlib import Path

import pytest
import torch
from built import sealed_cache

from darht.cache.builder.teachers import load_teacher, read_card
from darht.cache.read.reader import open_cache
from darht.core import zoo
from darht.core.errors import ConfigError, ModelError
from darht.core.zoo import absolute, teacher_at, teacher_path


@pytest.fixture
def stocked(tiny_teachers, monkeypatch):
    """A zoo of the two teachers of the tests."""
    monkeypatch.setattr(zoo, "zoo", lambda: {f"digits-{name}": folder for name, folder in tiny_teachers.items()})
    return tiny_teachers


def test_a_name_stands_for_the_folder(stocked, tmp_path):
    assert teacher_path(Path("zoo:digits-cnn")) == stocked["cnn"]
    assert teacher_path(tmp_path) == tmp_path
    assert teacher_at("zoo:digits-cnn", tmp_path) == Path("zoo:digits-cnn")
    assert teacher_at("cnn", tmp_path) == tmp_path / "cnn"
    assert absolute(Path("zoo:digits-cnn")) == "zoo:digits-cnn", "an absolute path would be another machine's"


def test_the_card_and_the_weights_are_the_folders(stocked):
    card = read_card(Path("zoo:digits-cnn"))
    model, again = load_teacher(Path("zoo:digits-cnn"), torch.device("cpu"))
    ours, _ = load_teacher(stocked["cnn"], torch.device("cpu"))
    x = torch.rand(4, 1, 8, 8)
    assert card == again == read_card(stocked["cnn"])
    assert torch.equal(model(x), ours(x))


def test_a_cache_remembers_its_teachers_by_their_names(stocked, tmp_path):
    """As a path, a name would lead nowhere from the cache's folder, and its teachers could not be asked again."""
    config = {
        "data": {"source": "digits", "limit": 100, "holdout": 0.1},
        "teachers": {"cnn": {"path": "zoo:digits-cnn"}},
        "views": {"kind": "identity"},
    }
    cache = open_cache(sealed_cache(config, tmp_path))
    origin = cache.origin()
    assert origin["teachers"] == {"cnn": "zoo:digits-cnn"}
    assert load_teacher(Path(origin["teachers"]["cnn"]), torch.device("cpu"))[1] == read_card(stocked["cnn"])


def test_a_wrong_name_gets_the_nearest(stocked):
    with pytest.raises(ConfigError, match=r"no teacher 'digits-cn' comes with darht; did you mean zoo:digits-cnn\?"):
        teacher_path(Path("zoo:digits-cn"))
    with pytest.raises(ConfigError, match="it has digits-"):
        teacher_path(Path("zoo:xyz"))


def test_a_zoo_of_none_says_so(monkeypatch):
    monkeypatch.setattr(zoo, "zoo", dict)
    with pytest.raises(ConfigError, match="it has none"):
        load_teacher(Path("zoo:cifar10-vit"), torch.device("cpu"))


def test_every_teacher_that_comes_along_has_measured_accuracies_and_loads():
    """A card without figures, or weights that are not the card's, must not be given out."""
    assert sum(path.stat().st_size for folder in zoo.zoo().values() for path in folder.iterdir()) < 6_000_000
    for name in zoo.zoo():
        try:
            _, card = load_teacher(Path(zoo.PREFIX + name), torch.device("cpu"))
        except ModelError as error:
            pytest.skip(f"{name}: {error}")
        assert card.accuracy and card.training, name
