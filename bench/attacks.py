"""Attacks side by side: ours beside the libraries people use, on the same models, epsilon, steps, batch and threads.

    python bench/attacks.py --data build/data --zoo ../shared/data/weights --out docs/benchmarks.md

Every measurement is a process of its own, so that peak memory is its own; rounds are interleaved and the fastest one
counts, so that a busy machine disturbs all alike. A library that is not installed is left out.
"""

import argparse
import datetime
import importlib.util
import json
import os
import pickle
import platform
import resource
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from darht.core.vision import torchvision

LIBRARIES = ("darht", "darht bf16", "pyautoattack", "torchattacks", "foolbox", "adv-lib", "ART")
ATTACKS = {
    "pgd-20": ("darht", "darht bf16", "torchattacks", "foolbox", "adv-lib", "ART"),
    "apgd-ce-100": ("darht", "darht bf16", "pyautoattack", "torchattacks", "adv-lib", "ART"),
    "autoattack": ("darht", "darht bf16", "pyautoattack", "torchattacks"),
}
MODELS = {"resnet4b_adv": "robust ResNet", "resnet20": "ResNet, undefended", "vit": "small timm ViT, undefended"}


class Counted(nn.Module):
    """Counts the rows that go forward, and those of them that want a gradient."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.forwards, self.backwards = net, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        self.backwards += len(x) * (torch.is_grad_enabled() and x.requires_grad)
        return self.net(x)


def load_images(data: Path, split: str, count: int) -> tuple[Tensor, Tensor]:
    with (data / "cifar-10-batches-py" / split).open("rb") as file:
        held = pickle.load(file, encoding="bytes")
    return torch.tensor(held[b"data"][:count]).view(-1, 3, 32, 32).float() / 255, torch.tensor(held[b"labels"][:count])


def load_model(name: str, zoo: Path, data: Path) -> nn.Module:
    if name == "vit":
        return load_vit(data)
    spec = importlib.util.spec_from_file_location("zoo", zoo / "zoo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(name).requires_grad_(False)


def load_vit(data: Path) -> nn.Module:
    """A timm ViT of 0.5 million parameters, trained on first use for a few epochs (about 45 % clean accuracy)."""
    import timm

    torch.manual_seed(0)
    net = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=96, depth=4, num_heads=3, num_classes=10
    )
    path = data / "bench_vit.pt"
    if not path.is_file():
        x, y = load_images(data, "data_batch_1", 10_000)
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.05)
        for _ in range(4):
            for rows in torch.randperm(len(x)).split(128):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
                optimizer.step()
        torch.save(net.state_dict(), path)
    net.load_state_dict(torch.load(path, weights_only=True))
    return net.eval().requires_grad_(False)


def robust_accuracy(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, eps: int) -> float:
    """The one judge: right when clean and right on what the library returned, which must lie in the ball."""
    assert float((x_adv - x).abs().max()) <= eps / 255 + 1e-5 and 0 <= float(x_adv.min()) <= float(x_adv.max()) <= 1
    with torch.no_grad():
        clean = torch.cat([model(rows).argmax(1) for rows in x.split(128)]) == y
        attacked = torch.cat([model(rows).argmax(1) for rows in x_adv.split(128)]) == y
    return 100 * float((clean & attacked).float().mean())


def ours(attack: str, model: nn.Module, x: Tensor, y: Tensor, eps: int, batch: int, precision: str):
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
    # its logger of pictures imports visdom, which nothing here needs
    sys.modules.setdefault("visdom", types.SimpleNamespace(Visdom=object))
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


THEIRS = {
    "pyautoattack": pyautoattack,
    "torchattacks": torchattacks,
    "foolbox": foolbox,
    "adv-lib": adv_lib,
    "ART": art,
}


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """One library, one attack, one model, in this process."""
    torch.set_num_threads(arguments.threads)
    torchvision()
    model = load_model(arguments.model, arguments.zoo, arguments.data)
    x, y = load_images(arguments.data, "test_batch", arguments.count)
    run = THEIRS.get(arguments.library)
    warm = x[: arguments.batch], y[: arguments.batch]
    with torch.enable_grad():
        for rows in warm[0].split(arguments.batch):  # compile kernels, fault pages in
            torch.autograd.grad(model(rows.requires_grad_()).sum(), rows)
    x = x.detach()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if run is None:
        precision = "bf16" if "bf16" in arguments.library else "float32"
        start = time.process_time()
        x_adv, forwards, backwards = ours(arguments.attack, model, x, y, arguments.eps, arguments.batch, precision)
    else:
        counted = Counted(model).eval()
        start = time.process_time()
        x_adv = run(arguments.attack, counted, x, y, arguments.eps / 255, arguments.batch).detach()
        forwards, backwards = counted.forwards, counted.backwards
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": seconds * 1000 / len(y), "forwards": forwards / len(y), "backwards": backwards / len(y),
        "robust": robust_accuracy(model, x, x_adv, y, arguments.eps), "memory": (peak - before) / 1024,
    }  # fmt: skip


def collect(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """All measurements, interleaved; of each the fastest round. What the log holds already is not measured again."""
    log = arguments.log
    known = [json.loads(line) for line in log.read_text().splitlines()] if log and log.is_file() else []
    rows: list[dict[str, object]] = []
    for model in arguments.models:
        for attack in arguments.attacks:
            count = arguments.few if attack == "autoattack" or model != "resnet4b_adv" else arguments.count
            best: dict[str, dict[str, float]] = {}
            for number in range(1 if attack == "autoattack" else arguments.rounds):
                for library in ATTACKS[attack]:
                    what = {"library": library, "attack": attack, "model": model, "count": count}
                    what |= {"eps": arguments.eps, "batch": arguments.batch, "threads": arguments.threads}
                    done = [one["found"] for one in known if one["what"] == what and one["round"] == number]
                    found = done[0] if done else None if arguments.from_log else measured_apart(what, arguments)
                    if found is None:
                        continue
                    if log and not done:
                        with log.open("a") as file:
                            file.write(json.dumps({"what": what, "round": number, "found": found}) + "\n")
                    if library not in best or found["seconds"] < best[library]["seconds"]:
                        best[library] = found
            rows += [{"model": model, "attack": attack, "images": count, "library": k, **v} for k, v in best.items()]
    return rows


def measured_apart(what: dict[str, object], arguments: argparse.Namespace) -> dict[str, float] | None:
    """`measure` in a fresh process; None, with a line that says why, where it fails."""
    options = [part for name, value in what.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-W", "ignore", __file__, "--one", *options]
    command += ["--data", str(arguments.data), "--zoo", str(arguments.zoo)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(what["library"], what["attack"], what["model"], "failed:", done.stderr.strip().splitlines()[-1][:200])
        return None
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    print(what["library"], what["attack"], what["model"], {k: round(v, 2) for k, v in found.items()}, flush=True)
    return found


def table(rows: list[dict[str, object]]) -> str:
    """Markdown; the factor is over the fastest other library on the same model and attack."""
    lines = [
        "| model | attack | images | library | CPU s / 1,000 | forward | backward | robust % | MiB | faster by |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rivals = [
            other["seconds"] for other in rows
            if (other["model"], other["attack"]) == (row["model"], row["attack"]) and other["library"] in THEIRS
        ]  # fmt: skip
        factor = f"{min(rivals) / row['seconds']:.2f}" if rivals and row["library"] not in THEIRS else ""
        lines.append(
            f"| {row['model']} | {row['attack']} | {row['images']} | {row['library']} | {row['seconds']:.2f} | "
            f"{row['forwards']:.1f} | {row['backwards']:.1f} | {row['robust']:.1f} | {row['memory']:.0f} | {factor} |"
        )
    return "\n".join(lines)


def page(rows: list[dict[str, object]], arguments: argparse.Namespace) -> str:
    models = "; ".join(f"`{name}` is a {what}" for name, what in MODELS.items() if name in arguments.models)
    command = f"python bench/attacks.py --count {arguments.count} --few {arguments.few} --rounds {arguments.rounds}"
    cores = f"{os.cpu_count()}-core {platform.machine()} CPU"
    return f"""# Benchmarks

## Attacks

`{command}`, {datetime.date.today().isoformat()}, {cores}, {arguments.threads} thread, torch
{torch.__version__.split("+")[0]}. CIFAR-10 test images, L-inf {arguments.eps}/255, batch {arguments.batch}, step
epsilon / 4 for PGD. {models}.

CPU seconds are the fastest of {arguments.rounds} interleaved rounds (AutoAttack: one). Forward and backward are passes
per image. Robust accuracy is recomputed by one function: right when clean and right on the returned pixels. Memory is
the growth of the process's peak. `darht bf16` crafts in bfloat16 and confirms each hit in float32. torchattacks'
AutoAttack runs 10 steps; here its parts are given the paper's numbers. The last column compares with the fastest of
the other libraries.

{table(rows)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, default=Path("build/data"), help="holds cifar-10-batches-py")
    parser.add_argument("--zoo", type=Path, default=Path("../shared/data/weights"), help="holds zoo.py")
    parser.add_argument("--out", type=Path, help="write the page here")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS), choices=list(ATTACKS))
    parser.add_argument("--count", type=int, default=1000, help="images for the robust ResNet")
    parser.add_argument("--few", type=int, default=128, help="images for AutoAttack and for the slower models")
    parser.add_argument("--eps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--log", type=Path, help="measurements are appended here, and not repeated")
    parser.add_argument("--from-log", action="store_true", help="measure nothing: the page of what the log holds")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--library", help=argparse.SUPPRESS)
    parser.add_argument("--attack", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        warnings.simplefilter("ignore")
        print(json.dumps(measure(arguments)))
        return
    if "vit" in arguments.models:
        torchvision()
        load_vit(arguments.data)
    rows = collect(arguments)
    text = page(rows, arguments)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
