"""From a leaderboard's name and a file to a teacher, with no other option than the name."""

import pytest
import torch

from darht.cache.builder.teachers import import_teacher, load_teacher, read_card
from darht.core.errors import ModelError
from darht.core.nets import build
from darht.core.nets.checkpoint import read_checkpoint
from darht.core.nets.identify import identify
from darht.core.nets.robustbench import CLASSES, entries

CPU = torch.device("cpu")
NARROW = {"width": 1}
WANG = "robustbench:Wang2023Better_WRN-28-10"
# The forms that the leaderboard's files have: buffers of a normalisation, wrappers, two states, an unused block.
SAMPLES = [
    ("cifar10", "Wang2023Better_WRN-28-10", "buffers"),
    ("cifar100", "Wang2023Better_WRN-28-10", "wrapped"),
    ("cifar10", "Rade2021Helper_R18_ddpm", "plain"),
    ("cifar10", "Carmon2019Unlabeled", "wrapped"),
    ("cifar10", "Chen2020Efficient", "mu"),
    ("cifar10", "Engstrom2019Robustness", "plain"),
    ("cifar10", "Andriushchenko2020Understanding", "two states"),
    ("cifar100", "Rice2020Overfitting", "plain"),
    ("cifar100", "Addepalli2022Efficient_RN18", "plain"),
    ("cifar10", "Debenedetti2022Light_XCiT-S12", "plain"),
]
HIDDEN = {  # what the paper's network has and its entry does not say, because the file shows it
    "Carmon2019Unlabeled": {"sub_block1": True},
    "Chen2020Efficient": {"sub_block1": True},
    ("cifar100", "Rice2020Overfitting"): {"bn_before_fc": True},
}


def small(entry):
    return {"width": 8, "heads": 2, "depth": 1} if entry.arch.startswith("xcit") else NARROW


def dressed(state, form):
    """A state dict as the leaderboard's files hold it."""
    if form == "wrapped":
        return {"epoch": 1, "state_dict": {f"module.{key}": value for key, value in state.items()}}
    if form == "buffers":
        rows = ([0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616])
        return state | {key: torch.tensor(row).view(3, 1, 1) for key, row in zip(("mean", "std"), rows, strict=True)}
    if form == "mu":
        rows = ([0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616])
        state = {f"model.{key}": value for key, value in state.items()}
        pair = {key: torch.tensor(row).view(1, 3, 1, 1) for key, row in zip(("mu", "sigma"), rows, strict=True)}
        return state | {f"model.{key}": value for key, value in pair.items()}
    if form == "two states":
        other = {key: value + 1 for key, value in state.items()}
        return {"best": other, "last": state | {"model_preact_hl1.1.weight": state["conv1.weight"]}}
    return state


@pytest.mark.parametrize(("data", "name", "form"), SAMPLES)
def test_a_name_of_robustbench_needs_no_other_option(data, name, form, tmp_path):
    entry, notes = entries(data)[name], []
    hidden = HIDDEN.get(name) or HIDDEN.get((data, name), {})
    net = build(entry.arch, CLASSES[data], {**entry.kwargs, **small(entry), **hidden}).eval()
    file = tmp_path / entry.file
    torch.save(dressed(net.state_dict(), form), file)
    teach = {"kwargs": small(entry), "preprocessing": {}, "on_note": notes.append}
    card = import_teacher(file, tmp_path / "teacher", arch=f"robustbench:{name}", **teach)
    assert (card.arch, card.num_classes) == (entry.arch, CLASSES[data])
    assert card.training["robustbench"] == {
        "name": name, "data": data, "clean": entry.clean, "robust": entry.robust, "eps": entry.eps
    }  # fmt: skip
    assert card.kwargs == {**entry.kwargs, **small(entry), **hidden}
    x = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(row).view(3, 1, 1) for row in (entry.mean or (0,) * 3, entry.std or (1,) * 3))
    torch.testing.assert_close(load_teacher(tmp_path / "teacher", CPU)[0](x), net((x - mean) / std))
    assert f"{entry.clean:g} % clean and {entry.robust:g} %" in notes[0]
    assert not any("calls this file" in note for note in notes)


def test_of_a_paper_s_own_file_the_averaged_weights_are_taken_because_the_leaderboard_measures_them(tmp_path):
    raw, averaged = (build("dm-wrn-28-10", 10, NARROW).eval() for _ in range(2))
    both = {"model_state_dict": averaged.state_dict(), "unaveraged_model_state_dict": raw.state_dict()}
    torch.save(both, tmp_path / "weights-best.pt")
    notes, x = [], torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(row).view(3, 1, 1) for row in ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)))
    for which, net in ((None, averaged), ("ema", averaged), ("raw", raw)):
        teach = {"kwargs": NARROW, "preprocessing": {}, "which": which, "on_note": notes.append}
        import_teacher(tmp_path / "weights-best.pt", tmp_path / str(which), arch=WANG, **teach)
        model, _ = load_teacher(tmp_path / str(which), CPU)
        torch.testing.assert_close(model(x), net((x - mean) / std))
    said = "the averaged weights are taken; unaveraged_model_state_dict holds raw ones: --weights raw takes them"
    assert notes.count(said) == 1


def saved(tmp_path, arch, classes, **kwargs):
    path = tmp_path / "w.pt"
    torch.save(build(arch, classes, {**NARROW, **kwargs}).state_dict(), path)
    return path


def test_a_file_of_another_name_is_taken_and_told(tmp_path):
    path, notes = saved(tmp_path, "dm-wrn-28-10", 100), []
    teach = {"kwargs": NARROW, "preprocessing": {}, "on_note": notes.append}
    import_teacher(path, tmp_path / "t", arch="robustbench:Wang2023Better_WRN-28-10", **teach)
    assert "RobustBench calls this file Wang2023Better_WRN-28-10.pt; this one is w.pt" in notes
    assert read_card(tmp_path / "t").preprocessing.mean == (0.5071, 0.4865, 0.4409)


@pytest.mark.parametrize(
    ("arch", "classes", "message"),
    [
        ("robustbench:Wang2023Beter_WRN-28-10", 10, "nearest are Wang2023Better_WRN-28-10"),
        ("robustbench:%", 10, "names are, such as Bartoldson"),
        ("robustbench:", 10, "is no L-inf entry"),
        ("robustbench:Carmon2019Unlabeled", 100, r"has 100 classes; .* has 10 \(cifar10\)"),
        ("robustbench:Wang2023Better_WRN-28-10", 7, r"has .*; .* has 10 \(cifar10\) and 100 \(cifar100\)"),
        ("robustbench:Wang2023Better_WRN-28-10", 10, "does not fit the architecture"),
    ],
)
def test_refused(arch, classes, message, tmp_path):
    path = saved(tmp_path, "wrn-28-10" if "Carmon" in arch else "dm-wrn-22-10", classes)
    with pytest.raises(ModelError, match=message) as caught:
        import_teacher(path, tmp_path / "t", arch=arch, kwargs=NARROW, preprocessing={})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "t").exists()


def test_without_its_file_an_entry_says_where_robustbench_keeps_it():
    with pytest.raises(ModelError, match=r"models/cifar10/Linf/Carmon2019Unlabeled\.pt"):
        identify("robustbench:Carmon2019Unlabeled", {}, None, None)
    with pytest.raises(ModelError, match="give their file"):
        identify("wrn-28-10", {}, None, None)
    assert identify("python:a:b", {"c": 1}, None, None).kwargs == {"c": 1}


@pytest.mark.parametrize("sub_block1", [False, True])
def test_the_unused_block_of_a_wide_resnet_is_told_apart_by_itself(sub_block1, tmp_path):
    path = saved(tmp_path, "wrn-10-1", 3, **({"sub_block1": True} if sub_block1 else {}))
    network = identify("wrn-10-1", NARROW, read_checkpoint(path), None)
    assert network.kwargs == NARROW | ({"sub_block1": True} if sub_block1 else {})
    assert len(network.notes) == sub_block1
    card = import_teacher(path, tmp_path / "t", arch="wrn-10-1", kwargs=NARROW, preprocessing={})
    assert card.num_classes == 3


def test_what_was_said_stands_before_what_the_file_shows(tmp_path):
    path = saved(tmp_path, "wrn-10-1", 3, sub_block1=True)
    with pytest.raises(ModelError, match=r"does not fit the architecture: .*sub_block1"):
        import_teacher(path, tmp_path / "t", arch="wrn-10-1", kwargs={**NARROW, "sub_block1": False}, preprocessing={})


def test_the_batch_norm_before_the_classifier_is_told_apart_by_itself(tmp_path):
    path = saved(tmp_path, "preact_resnet18", 3, bn_before_fc=True, blocks=[1, 1, 1, 1])
    said = {**NARROW, "blocks": [1, 1, 1, 1]}
    assert identify("preact_resnet18", said, read_checkpoint(path), None).kwargs == {**said, "bn_before_fc": True}
