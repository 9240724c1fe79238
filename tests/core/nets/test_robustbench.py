"""The table of RobustBench's entries: complete, ordered, and buildable line by line."""

import pytest
import torch

from darht.core.nets import build
from darht.core.nets.robustbench import CLASSES, entries

TINY = {"xcit": {"width": 8, "heads": 2, "depth": 1}}
EVERY = [entry for data in CLASSES for entry in entries(data).values()]


@pytest.mark.parametrize("data", CLASSES)
def test_at_least_thirty_entries_the_most_robust_first(data):
    found = list(entries(data).values())
    assert len(found) >= 30
    robustly = [entry for entry in found if entry.name != "Standard"]
    assert all(20 < entry.clean < 100 and 10 < entry.robust < entry.clean for entry in robustly)
    robust = [round(entry.robust) for entry in found]
    assert sorted(robust, reverse=True)[:10] == robust[:10]


@pytest.mark.parametrize("arch", sorted({entry.arch for entry in EVERY}))
def test_every_architecture_of_the_table_has_the_head_it_names(arch):
    entry = next(entry for entry in EVERY if entry.arch == arch)
    with torch.device("meta"):
        model = build(arch, 10, {**entry.kwargs, **TINY.get(arch[:4], {"width": 2})})
    assert model.get_submodule(entry.head).out_features == 10


@pytest.mark.parametrize(
    ("data", "name", "arch", "clean", "robust"),
    [
        ("cifar10", "Bartoldson2024Adversarial_WRN-94-16", "dm-wrn-94-16", 93.68, 73.71),
        ("cifar10", "Wang2023Better_WRN-28-10", "dm-wrn-28-10", 92.44, 67.31),
        ("cifar10", "Carmon2019Unlabeled", "wrn-28-10", 89.69, 59.53),
        ("cifar10", "Engstrom2019Robustness", "resnet50", 87.03, 49.25),
        ("cifar100", "Wang2023Better_WRN-28-10", "dm-wrn-28-10", 72.58, 38.77),
        ("cifar100", "Rice2020Overfitting", "preact_resnet18", 53.83, 18.95),
    ],
)
def test_published_facts(data, name, arch, clean, robust):
    entry = entries(data)[name]
    assert (entry.arch, entry.clean, entry.robust) == (arch, clean, robust)


def test_preprocessing_is_the_papers():
    ten, hundred = entries("cifar10"), entries("cifar100")
    assert ten["Gowal2020Uncovering_70_16"].std == (0.2471, 0.2435, 0.2616)
    assert hundred["Gowal2020Uncovering"].mean == (0.5071, 0.4865, 0.4409)
    assert ten["Carmon2019Unlabeled"].mean is None
    assert ten["Hendrycks2019Using"].mean == ten["Hendrycks2019Using"].std == (0.5, 0.5, 0.5)
    assert ten["Engstrom2019Robustness"].std == (0.2023, 0.1994, 0.2010)
    assert ten["Zhang2019Theoretically"].eps == pytest.approx(7.905)
    assert {entry.eps for entry in EVERY} == {8.0, 0.031 * 255}


def test_files_have_the_names_that_robustbench_gives():
    assert entries("cifar10")["Carmon2019Unlabeled"].file == "Carmon2019Unlabeled.pt"
    assert (
        entries("cifar100")["Debenedetti2022Light_XCiT-M12"].file == "debenedetti2022light-xcit-m-cifar100-linf.pth.tar"
    )
