"""Each library's way to run an attack: ours and those that people use, with the same epsilon, steps and batch.

`RUN[library](attack, model, x, y, eps, batch)` returns the adversarial pixels and how many rows went forward and
backward. `eps` is in pixel levels.
"""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

ATTACKS = {
    "pgd-20": ("darht", "darht bf16", "torchattacks", "foolbox", "adv-lib", "ART"),
    "apgd-ce-100": ("darht", "darht bf16", "pyautoattack", "torchattacks", "adv-lib", "ART"),
    "autoattack": ("darht", "darht bf16", "pyautoattack", "torchattacks"),
}
MODULES = {
    "darht": ("darht.attacks",),
    "darht bf16": ("darht.attacks",),
    "pyautoattack": ("pyautoattack",),
    "torchattacks": ("torchattacks",),
    "foolbox": ("foolbox",),
    "adv-lib": ("adv_lib.attacks",),
    "ART": ("art.attacks.evasion", "art.estimators.classification"),
}
OURS = ("darht", "darht bf16")
Found = tuple[Tensor, float, float]


def is_installed(library: str) -> bool:
    return importlib.util.find_spec(MODULES[library][0].split(".")[0]) is not None


def load(library: str) -> None:
    """Import it, so that no measurement pays for that."""
    if library == "adv-lib":  # its logger of pictures imports visdom, which nothing here needs
        sys.modules.setdefault("visdom", types.SimpleNamespace(Visdom=object))
    for name in MODULES[library]:
        importlib.import_module(name)


class Counted(nn.Module):
    """Counts the rows that go forward, and those of them that want a gradient."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.forwards, self.backwards = net, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        self.backwards += len(x) * (torch.is_grad_enabled() and x.requires_grad)
        return self.net(x)


def ours(precision: str, attack: str, model: nn.Module, x: Tensor, y: Tensor, eps: int, batch: int) -> Found:
    from darht.attacks import APGD, PGD, AutoAttack, Engine
    from darht.core.rng import RowRng

    engine, generator = Engine(slots=batch, precision=precision), RowRng.create(0, "bench", rows=torch.arange(len(y)))
    if attack == "autoattack":
        found = AutoAttack(eps=eps, engine=engine).run(model, x, y, generator=generator)
    else:
        chosen = PGD(eps=eps, step=max(1, eps // 4), steps=20) if attack == "pgd-20" else APGD(eps=eps, steps=100)
        found = engine.run(chosen, model, x, y, generator=generator)
    return found.x_adv, float(found.forwards.sum()), float(found.backwards.sum())


def pyautoattack(attack: str, model: nn.Module, x: Tensor, y: Tensor, eps: float, batch: int) -> Tensor:
    from pyautoattack import AutoAttack

    if attack == "autoattack":
        suite = AutoAttack(model, eps=eps, seed=0)
    else:
        suite = AutoAttack(model, eps=eps, seed=0, version="custom", attacks=["apgd-ce"])
        suite.apgd.n_restarts = 1
    return suite.run_standard_evaluation(x, y, batch_size=batch)[0]


def torchattacks(attack: str, model: nn.Module, x: Tensor, y: Tensor, eps: float, batch: int) -> Tensor:
    import torchattacks as ta

    step = max(1, round(eps * 255) // 4) / 255
    made = {
        "pgd-20": lambda: ta.PGD(model, eps=eps, alpha=step, steps=20),
        "apgd-ce-100": lambda: ta.APGD(model, eps=eps, steps=100, loss="ce", seed=0),
        # ta.AutoAttack runs 10 steps: this is what it runs, with the numbers of the paper
        "autoattack": lambda: ta.MultiAttack([
            ta.APGD(model, eps=eps, steps=100, loss="ce", seed=0),
            ta.APGDT(model, eps=eps, steps=100, n_classes=10, seed=0),
            ta.FAB(model, eps=eps, steps=100, n_classes=10, multi_targeted=True, seed=0),
            ta.Square(model, eps=eps, n_queries=5000, seed=0),
        ]),
    }[attack]()  # fmt: skip
    return torch.cat([made(rows, labels) for rows, labels in zip(x.split(batch), y.split(batch), strict=True)])


def foolbox(attack: str, model: nn.Module, x: Tensor, y: Tensor, eps: float, batch: int) -> Tensor:
    import foolbox as fb

    wrapped = fb.PyTorchModel(model, bounds=(0, 1), device="cpu")
    made = fb.attacks.LinfPGD(abs_stepsize=max(1, round(eps * 255) // 4) / 255, steps=20, random_start=True)
    pairs = zip(x.split(batch), y.split(batch), strict=True)
    return torch.cat([made(wrapped, rows, labels, epsilons=eps)[1] for rows, labels in pairs])


def adv_lib(attack: str, model: nn.Module, x: Tensor, y: Tensor, eps: float, batch: int) -> Tensor:
    from adv_lib.attacks import apgd, pgd_linf

    step = max(1, round(eps * 255) // 4) / 255
    pairs = zip(x.split(batch), y.split(batch), strict=True)
    if attack == "pgd-20":
        made = [pgd_linf(model, rows, t, eps, steps=20, absolute_step_size=step, restarts=1) for rows, t in pairs]
    else:
        made = [apgd(model, rows, t, eps, norm=float("inf"), n_iter=100, loss_function="ce") for rows, t in pairs]
    return torch.cat(made)


def art(attack: str, model: nn.Module, x: Tensor, y: Tensor, eps: float, batch: int) -> Tensor:
    from art.attacks.evasion import AutoProjectedGradientDescent, ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    wrapped = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), (3, 32, 32), 10, clip_values=(0.0, 1.0), device_type="cpu"
    )
    step = max(1, round(eps * 255) // 4) / 255
    common = {"eps": eps, "eps_step": step, "batch_size": batch, "verbose": False}
    if attack == "pgd-20":
        made = ProjectedGradientDescentPyTorch(wrapped, max_iter=20, num_random_init=1, **common)
    else:
        common["eps_step"] = 2 * eps
        made = AutoProjectedGradientDescent(
            wrapped, max_iter=100, nb_random_init=1, loss_type="cross_entropy", **common
        )
    return torch.from_numpy(made.generate(x.numpy(), y.numpy()))


def counted(
    run: Callable[..., Tensor], attack: str, model: nn.Module, x: Tensor, y: Tensor, eps: int, batch: int
) -> Found:
    """Another library's run; it takes epsilon as a fraction of 1."""
    watched = Counted(model).eval()
    return run(attack, watched, x, y, eps / 255, batch).detach(), watched.forwards, watched.backwards


RUN: dict[str, Callable[..., Found]] = {
    "darht": partial(ours, "float32"),
    "darht bf16": partial(ours, "bf16"),
    "pyautoattack": partial(counted, pyautoattack),
    "torchattacks": partial(counted, torchattacks),
    "foolbox": partial(counted, foolbox),
    "adv-lib": partial(counted, adv_lib),
    "ART": partial(counted, art),
}
