"""Attacks without the model's gradient: queries for scores, queries for classes, and transfer from other models."""

from collections.abc import Mapping

import numpy as np

from darht.attacks import APGD, MIM, Square
from darht.attacks.objectives import Model
from darht.attacks.rays import RayS
from darht.cache.sources.load import Source
from darht.trainer.evaluation.attacks.substitute import Substitution, label_by_asking, train_substitute
from darht.trainer.evaluation.attacks.suite import from_other, logit_ratio, white_box
from darht.trainer.evaluation.measure import Measurement
from darht.trainer.evaluation.score import EVERYONE


def run_queries(m: Measurement, rows: np.ndarray, *, square: int = 5000, rays: int = 10_000) -> None:
    """Square and RayS alone, on images that white-box attacks may have fooled already: what a stranger can do.

    Args:
        m: the evaluation.
        rows: positions of images that are right when clean.
        square: queries of Square for each image; the paper's 5,000.
        rays: queries of RayS for each image; the paper's 10,000.
    """
    on = f"the first {len(rows)} images that are right when clean"
    ball = m.setup.threat
    scores = Square(eps=ball.eps, norm=ball.norm, queries=square)
    m.ask(white_box(m, "square", scores, family="black-box"), rows, on=on)
    if ball.norm == "linf":
        m.ask(white_box(m, "rays", RayS(eps=ball.eps, queries=rays), family="black-box"), rows, on=on)
    else:
        m.left_out["rays"] = "it searches sign directions, which only L-inf has"


def run_surrogates(m: Measurement, surrogates: Mapping[str, Model]) -> None:
    """Examples made on independently trained models, on every image that is right when clean."""
    for name, model in surrogates.items():
        attack = APGD(eps=m.setup.threat.eps, norm=m.setup.threat.norm, steps=100, objective=logit_ratio(m))
        step = from_other(f"surrogate:{name}", attack, model, name, "black-box", engine=m.setup.transfer_engine)
        m.ask(step, m.correct, on=EVERYONE)
    if not surrogates:
        m.left_out["surrogate"] = "no independently trained model was given: --surrogate MODEL names one"


def run_substitutes(m: Measurement, train: Source | str, config: Substitution, rows: np.ndarray) -> None:
    """The adaptive black-box attack of Mahmood et al. 2020 (arXiv 2006.10876), for each share of the training data.

    Args:
        m: the evaluation.
        train: the training split, or why it is not there.
        config: shares, rounds and schedule.
        rows: positions of test images that are right when clean.
    """
    if isinstance(train, str):
        m.left_out["substitute"] = f"it asks about training images: {train}"
        return
    attack = MIM(eps=m.setup.threat.eps, norm=m.setup.threat.norm, step=max(1.0, m.setup.threat.eps // 8), steps=10)
    on = f"the first {len(rows)} images that are right when clean"
    for share in config.shares:
        model = _substitute(m, train, config, share)
        held = f"a substitute from {config.images(share, len(train.images)):,} images and the model's answers"
        step = from_other(f"substitute:{100 * share:g}% of data", attack, model, held, "black-box",
                          engine=m.setup.transfer_engine)  # fmt: skip
        step.about["substitute"] = config.record(share, len(train.images))
        m.ask(step, rows, on=on)


def _substitute(m: Measurement, train: Source, config: Substitution, share: float) -> Model:
    """A substitute trained on answers of the evaluated model, from the ledger where it was trained before."""
    facts = {**config.record(share, len(train.images)), "seed": m.setup.seed, "train": train.sha256}
    names = sorted(config.network(len(train.classes)).state_dict())
    done = 0

    def on_epoch() -> None:
        nonlocal done
        done += 1
        m.setup.on_batch(f"train substitute:{100 * share:g}%", done, config.rounds * config.epochs, int(m.alive.sum()))

    def make() -> dict[str, np.ndarray]:
        net = train_substitute(config, train, share, lambda x: label_by_asking(m.setup.ask, x), seed=m.setup.seed,
                               device=m.setup.device, on_epoch=on_epoch)  # fmt: skip
        return {name: value.cpu().numpy() for name, value in net.state_dict().items()}

    state = m.setup.ledger.get(f"weights of substitute {100 * share:g}%", facts, make)
    assert sorted(state) == names
    return config.load(state, len(train.classes), m.setup.device)
