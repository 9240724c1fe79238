"""`student.init`: training starts from the weights of a trained network of the same architecture."""

import dataclasses

import pytest
import torch
from runs import CONFIG, CPU, changed

from darht.cache.builder.teachers import load_teacher
from darht.cache.read.reader import open_cache
from darht.cache.read.stream import Feed
from darht.core.errors import ModelError
from darht.trainer.student.setup import feed_plan, make_student
from darht.trainer.student.train import train


def start(config, cache):
    with Feed(cache, feed_plan(config, cache, CPU, 1.0), seed=config.seed, epochs=1) as feed:
        return make_student(config, feed, cache.spec.data.classes)


def test_a_student_without_a_map_starts_as_the_network_and_one_with_a_map_as_its_features(tiny_cache, tiny_teachers):
    cache, folder = open_cache(tiny_cache), tiny_teachers["cnn"]
    network, x = load_teacher(folder, CPU)[0], torch.rand(4, 3, 8, 8)
    settings = dataclasses.replace(CONFIG.student, init=str(folder), feature_map=False)
    student = start(changed(recipe="at", student=settings), cache).eval()
    torch.testing.assert_close(student(x).logits, network(x))
    mapped = start(changed(student=dataclasses.replace(settings, feature_map=True)), cache)
    own = network.net.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in mapped.backbone.state_dict().items())
    assert mapped.preprocessing == load_teacher(folder, CPU)[1].preprocessing


def test_a_run_starts_from_another_run(tiny_cache, tmp_path):
    cache, one_epoch = open_cache(tiny_cache), {"epochs": 1}
    plain = dataclasses.replace(CONFIG.student, feature_map=False)
    first = changed(recipe="at", student=plain, optim=one_epoch)
    train(first, cache, tmp_path / "first", device=CPU)
    later = changed(first, student=dataclasses.replace(plain, init=str(tmp_path / "first")))
    train(later, cache, tmp_path / "later", device=CPU)
    for name in ("student/config.json", "student/README.md"):  # what others get tells no folders
        assert str(tmp_path) not in (tmp_path / "later" / name).read_text()
    begun = start(later, cache).state_dict()
    kept = load_teacher(tmp_path / "first", CPU)[0].net.state_dict()
    assert torch.equal(begun["backbone.conv1.weight"], kept["conv1.weight"])


def test_another_architecture_is_refused(tiny_cache, tiny_teachers):
    with pytest.raises(ModelError, match="the student is"):
        start(
            changed(student=dataclasses.replace(CONFIG.student, init=str(tiny_teachers["vit"]))), open_cache(tiny_cache)
        )
