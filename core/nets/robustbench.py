"""What RobustBench publishes of its L-inf entries on CIFAR-10 and CIFAR-100 whose networks are built here.

Names, architectures and preprocessing are those of its model zoo, accuracies those of its leaderboard
(github.com/RobustBench/robustbench: `model_zoo/`, `model_info/*/Linf/NAME.json`; read in November 2026). Left out are
ensembles, MeanSparse, and networks of which a single entry exists.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Triple = tuple[float, float, float]
PREFIX = "robustbench:"
CLASSES = {"cifar10": 10, "cifar100": 100}
_HEADS = {"dm-": "logits", "wrn-": "fc", "resnet": "linear", "preact": "linear", "xcit-": "head"}
_THOUSANDTHS = 0.031 * 255  # some papers attack within 0.031, which is a little less than 8 levels


@dataclass(frozen=True)
class Entry:
    """One line of the leaderboard.

    Attributes:
        name: on the leaderboard.
        data: cifar10 or cifar100.
        arch: as `build` takes it.
        clean: accuracy in per cent on all test images.
        robust: in per cent, the lowest that RobustBench knows: of AutoAttack, or of another evaluation below it.
        eps: radius of `robust` in pixel levels.
        file: name that RobustBench gives to the weights.
        mean, std: of the pixels in [0, 1]; None where the network takes them as they are.
        kwargs: of the architecture, those that no state dict tells.
        part: of the file's sets of weights, the one that is meant; "" for the whole file.
        extra: prefix of entries that belong to no layer; "" for none.
    """

    name: str
    data: str
    arch: str
    clean: float
    robust: float
    eps: float
    file: str
    mean: Triple | None = None
    std: Triple | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    part: str = ""
    extra: str = ""

    @property
    def head(self) -> str:
        """The name of the classifier layer."""
        return next(head for start, head in _HEADS.items() if self.arch.startswith(start))

    def published(self) -> dict[str, Any]:
        """What a card keeps of it, as plain data."""
        return {"name": self.name, "data": self.data, "clean": self.clean, "robust": self.robust, "eps": self.eps}


_Row = tuple[str, str, float, float]  # name, architecture, clean and robust accuracy
_ROWS: dict[str, tuple[_Row, ...]] = {}

_ROWS["cifar10"] = (
    ("Bartoldson2024Adversarial_WRN-94-16", "dm-wrn-94-16", 93.68, 73.71),
    ("Bartoldson2024Adversarial_WRN-82-8", "dm-wrn-82-8", 93.11, 71.59),
    ("Wang2023Better_WRN-70-16", "dm-wrn-70-16", 93.25, 70.69),
    ("Cui2023Decoupled_WRN-28-10", "dm-wrn-28-10", 92.16, 67.73),
    ("Wang2023Better_WRN-28-10", "dm-wrn-28-10", 92.44, 67.31),
    ("Rebuffi2021Fixing_70_16_cutmix_extra", "dm-wrn-70-16", 92.23, 66.56),
    ("Gowal2021Improving_70_16_ddpm_100m", "dm-wrn-70-16", 88.74, 66.1),
    ("Gowal2020Uncovering_70_16_extra", "dm-wrn-70-16", 91.1, 65.87),
    ("Rebuffi2021Fixing_106_16_cutmix_ddpm", "dm-wrn-106-16", 88.5, 64.58),
    ("Rebuffi2021Fixing_70_16_cutmix_ddpm", "dm-wrn-70-16", 88.54, 64.2),
    ("Xu2023Exploring_WRN-28-10", "dm-wrn-28-10", 93.69, 63.89),
    ("Gowal2021Improving_28_10_ddpm_100m", "dm-wrn-28-10", 87.5, 63.38),
    ("Pang2022Robustness_WRN70_16", "dm-wrn-70-16", 89.01, 63.35),
    ("Rade2021Helper_extra", "dm-wrn-34-10", 91.47, 62.83),
    ("Gowal2020Uncovering_28_10_extra", "dm-wrn-28-10", 89.48, 62.76),
    ("Pang2022Robustness_WRN28_10", "dm-wrn-28-10", 88.61, 61.04),
    ("Rade2021Helper_ddpm", "dm-wrn-28-10", 88.16, 60.97),
    ("Rebuffi2021Fixing_28_10_cutmix_ddpm", "dm-wrn-28-10", 87.33, 60.73),
    ("Sridhar2021Robust_34_15", "wrn-34-15", 86.53, 60.41),
    ("Sehwag2021Proxy", "wrn-34-10", 86.68, 60.27),
    ("Wu2020Adversarial_extra", "wrn-28-10", 88.25, 60.04),
    ("Sridhar2021Robust", "wrn-28-10", 89.46, 59.66),
    ("Zhang2020Geometry", "wrn-28-10", 89.36, 59.64),
    ("Carmon2019Unlabeled", "wrn-28-10", 89.69, 59.53),
    ("Gowal2021Improving_R18_ddpm_100m", "dm-preact-resnet18", 87.35, 58.5),
    ("Chen2024Data_WRN_34_20", "wrn-34-20", 86.1, 58.09),
    ("Addepalli2021Towards_WRN34", "wrn-34-10", 85.32, 58.04),
    ("Addepalli2022Efficient_WRN_34_10", "wrn-34-10", 88.71, 57.81),
    ("Chen2021LTD_WRN34_20", "wrn-34-20", 86.03, 57.71),
    ("Rade2021Helper_R18_extra", "dm-preact-resnet18", 89.02, 57.67),
    ("Jia2022LAS-AT_70_16", "wrn-70-16", 85.66, 57.61),
    ("Debenedetti2022Light_XCiT-L12", "xcit-l12-p4", 91.73, 57.58),
    ("Chen2024Data_WRN_34_10", "wrn-34-10", 86.54, 57.3),
    ("Debenedetti2022Light_XCiT-M12", "xcit-m12-p4", 91.3, 57.27),
    ("Sehwag2020Hydra", "wrn-28-10", 88.98, 57.14),
    ("Gowal2020Uncovering_70_16", "dm-wrn-70-16", 85.29, 57.14),
    ("Rade2021Helper_R18_ddpm", "dm-preact-resnet18", 86.86, 57.09),
    ("Cui2023Decoupled_WRN-34-10", "wrn-34-10", 85.31, 57.09),
    ("Chen2021LTD_WRN34_10", "wrn-34-10", 85.21, 56.94),
    ("Gowal2020Uncovering_34_20", "dm-wrn-34-20", 85.64, 56.82),
    ("Rebuffi2021Fixing_R18_ddpm", "dm-preact-resnet18", 83.53, 56.66),
    ("Wang2020Improving", "wrn-28-10", 87.5, 56.29),
    ("Jia2022LAS-AT_34_10", "wrn-34-10", 84.98, 56.26),
    ("Wu2020Adversarial", "wrn-34-10", 85.36, 56.17),
    ("Debenedetti2022Light_XCiT-S12", "xcit-s12-p4", 90.06, 56.14),
    ("Sehwag2021Proxy_R18", "resnet18", 84.59, 55.54),
    ("Hendrycks2019Using", "wrn-28-10", 87.11, 54.92),
    ("Cui2020Learnable_34_20", "wrn-34-20", 88.7, 53.57),
    ("Zhang2020Attacks", "wrn-34-10", 84.52, 53.51),
    ("Rice2020Overfitting", "wrn-34-20", 85.34, 53.42),
    ("Huang2020Self", "wrn-34-10", 83.48, 53.34),
    ("Zhang2019Theoretically", "wrn-34-10", 84.92, 53.08),
    ("Cui2020Learnable_34_10", "wrn-34-10", 88.22, 52.86),
    ("Addepalli2022Efficient_RN18", "resnet18", 85.71, 52.48),
    ("Chen2020Efficient", "wrn-34-10", 85.32, 51.12),
    ("Addepalli2021Towards_RN18", "resnet18", 80.24, 51.06),
    ("Sitawarin2020Improving", "wrn-34-10", 86.84, 50.72),
    ("Engstrom2019Robustness", "resnet50", 87.03, 49.25),
    ("Zhang2019You", "wrn-34-10", 87.2, 44.83),
    ("Andriushchenko2020Understanding", "preact_resnet18", 79.84, 43.93),
    ("Wong2020Fast", "preact_resnet18", 83.34, 43.21),
    ("Standard", "wrn-28-10", 94.78, 0.0),
)

_ROWS["cifar100"] = (
    ("Wang2023Better_WRN-70-16", "dm-wrn-70-16", 75.22, 42.66),
    ("Cui2023Decoupled_WRN-28-10", "dm-wrn-28-10", 73.85, 39.18),
    ("Wang2023Better_WRN-28-10", "dm-wrn-28-10", 72.58, 38.77),
    ("Gowal2020Uncovering_extra", "dm-wrn-70-16", 69.15, 36.88),
    ("Debenedetti2022Light_XCiT-L12", "xcit-l12-p4", 70.76, 35.08),
    ("Rebuffi2021Fixing_70_16_cutmix_ddpm", "dm-wrn-70-16", 63.56, 34.64),
    ("Debenedetti2022Light_XCiT-M12", "xcit-m12-p4", 69.21, 34.21),
    ("Pang2022Robustness_WRN70_16", "dm-wrn-70-16", 65.56, 33.05),
    ("Cui2023Decoupled_WRN-34-10_autoaug", "wrn-34-10", 65.93, 32.52),
    ("Debenedetti2022Light_XCiT-S12", "xcit-s12-p4", 67.34, 32.19),
    ("Rebuffi2021Fixing_28_10_cutmix_ddpm", "dm-wrn-28-10", 62.41, 32.06),
    ("Jia2022LAS-AT_34_20", "wrn-34-20", 67.31, 31.91),
    ("Cui2023Decoupled_WRN-34-10", "wrn-34-10", 65.76, 31.91),
    ("Addepalli2022Efficient_WRN_34_10", "wrn-34-10", 68.75, 31.85),
    ("Cui2020Learnable_34_10_LBGAT9_eps_8_255", "wrn-34-10", 62.99, 31.2),
    ("Sehwag2021Proxy", "wrn-34-10", 65.93, 31.15),
    ("Chen2024Data_WRN_34_10", "wrn-34-10", 64.32, 31.13),
    ("Pang2022Robustness_WRN28_10", "dm-wrn-28-10", 63.66, 31.08),
    ("Jia2022LAS-AT_34_10", "wrn-34-10", 64.89, 30.77),
    ("Chen2021LTD_WRN34_10", "wrn-34-10", 64.07, 30.59),
    ("Addepalli2021Towards_WRN34", "wrn-34-10", 65.73, 30.35),
    ("Cui2020Learnable_34_20_LBGAT6", "wrn-34-20", 62.55, 30.2),
    ("Gowal2020Uncovering", "dm-wrn-70-16", 60.86, 30.03),
    ("Cui2020Learnable_34_10_LBGAT6", "wrn-34-10", 60.64, 29.33),
    ("Rade2021Helper_R18_ddpm", "dm-preact-resnet18", 61.5, 28.88),
    ("Wu2020Adversarial", "wrn-34-10", 60.38, 28.86),
    ("Rebuffi2021Fixing_R18_ddpm", "dm-preact-resnet18", 56.87, 28.5),
    ("Hendrycks2019Using", "wrn-28-10", 59.23, 28.42),
    ("Addepalli2022Efficient_RN18", "resnet18", 65.45, 27.67),
    ("Cui2020Learnable_34_10_LBGAT0", "wrn-34-10", 70.25, 27.16),
    ("Addepalli2021Towards_PARN18", "preact_resnet18", 62.02, 27.14),
    ("Chen2020Efficient", "wrn-34-10", 62.15, 26.94),
    ("Sitawarin2020Improving", "wrn-34-10", 62.82, 24.57),
    ("Rice2020Overfitting", "preact_resnet18", 53.83, 18.95),
)

_DEEPMIND: dict[str, tuple[Triple, Triple]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
_ROUNDED = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
_EXACT = (
    (0.5070751592371323, 0.48654887331495095, 0.4409178433670343),
    (0.2673342858792401, 0.2564384629170883, 0.27615047132568404),
)
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_NORMALISED: dict[tuple[str, str], tuple[Triple, Triple]] = {  # beside DeepMind's networks and XCiT
    ("cifar10", "Rice2020Overfitting"): _DEEPMIND["cifar10"],
    ("cifar10", "Wong2020Fast"): _DEEPMIND["cifar10"],
    ("cifar10", "Chen2020Efficient"): _DEEPMIND["cifar10"],
    ("cifar10", "Engstrom2019Robustness"): (_DEEPMIND["cifar10"][0], (0.2023, 0.1994, 0.2010)),
    ("cifar10", "Hendrycks2019Using"): _HALF,
    ("cifar100", "Hendrycks2019Using"): _HALF,
    ("cifar100", "Chen2020Efficient"): _ROUNDED,
    ("cifar100", "Wu2020Adversarial"): _EXACT,
    ("cifar100", "Rice2020Overfitting"): _EXACT,
}
_KWARGS: dict[tuple[str, str], Mapping[str, Any]] = {
    ("cifar10", "Andriushchenko2020Understanding"): {"out_shortcut": False},
    ("cifar10", "Wong2020Fast"): {"out_shortcut": False},
}
_PARTS = {("cifar10", "Andriushchenko2020Understanding"): "last"}
_EXTRAS = {("cifar10", "Andriushchenko2020Understanding"): "model_preact_hl1."}
_AT_THOUSANDTHS = {
    ("cifar10", "Zhang2019Theoretically"),
    ("cifar10", "Huang2020Self"),
    ("cifar10", "Zhang2020Geometry"),
    ("cifar10", "Cui2020Learnable_34_10"),
    ("cifar10", "Cui2020Learnable_34_20"),
    ("cifar100", "Cui2020Learnable_34_10_LBGAT0"),
    ("cifar100", "Cui2020Learnable_34_10_LBGAT6"),
    ("cifar100", "Cui2020Learnable_34_20_LBGAT6"),
}


def entries(data: str) -> dict[str, Entry]:
    """The entries on `cifar10` or `cifar100` by their names, the most robust first."""
    return {row[0]: _entry(data, *row) for row in _ROWS[data]}


def _entry(data: str, name: str, arch: str, clean: float, robust: float) -> Entry:
    key, usual = (data, name), None
    if arch.startswith("xcit"):
        usual = _DEEPMIND[data] if data == "cifar10" else _ROUNDED
    elif arch.startswith("dm-"):
        usual = _DEEPMIND[data]
    mean, std = _NORMALISED.get(key, usual) or (None, None)
    size = arch.removeprefix("xcit-")[:1]
    xcit = f"debenedetti2022light-xcit-{size}-{data}-linf.pth.tar"
    return Entry(
        name, data, arch, clean, robust,
        eps=_THOUSANDTHS if key in _AT_THOUSANDTHS else 8.0,
        file=xcit if arch.startswith("xcit") else f"{name}.pt",
        mean=mean, std=std, kwargs=_KWARGS.get(key, {}), part=_PARTS.get(key, ""), extra=_EXTRAS.get(key, ""),
    )  # fmt: skip
