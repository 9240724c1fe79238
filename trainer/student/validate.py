"""What is refused, or told, before a run's first step."""

from collections.abc import Iterator

from torch.nn.modules.batchnorm import _BatchNorm

from darht.cache.read.reader import Cache
from darht.core.errors import ConfigError
from darht.trainer.config import TrainConfig
from darht.trainer.student.distributed import Ranks
from darht.trainer.student.model import Student

_HEAD_EPOCHS = 30  # the released schedule has 118


def check_recipe(config: TrainConfig, cache: Cache) -> None:
    """Raise ConfigError where the recipe asks for what the cache does not hold."""
    if not cache.spec.teachers and config.objective().teachers_needed != "none":
        raise ConfigError(
            f"recipe {config.recipe} learns from teachers, and {cache.folder} has none: use recipe at or trades, or "
            "add teachers with darht-cache extend"
        )
    if not cache.spec.teachers and cache.spec.data.labelled < cache.rows:
        raise ConfigError(
            f"{cache.folder} has rows without labels and no teacher who says what they are: add teachers with "
            "darht-cache extend"
        )
    problems = [*_missing_parts(config, cache), *_missing_teachers(config, cache)]
    if problems:
        raise ConfigError("; ".join(problems))


def _missing_parts(config: TrainConfig, cache: Cache) -> Iterator[str]:
    attacks, inner = cache.spec.attacks, config.inner
    without = f"{cache.folder} has no attacks"
    if inner.kind == "cached" and not attacks:
        yield f"inner: cached needs stored perturbations, {without}; use inner.kind: pgd"
    if inner.kind == "warm" and inner.warm.start == "cached" and not attacks:
        yield f"inner.warm.start: cached needs stored perturbations, {without}; use start: noise"
    if config.targets == "nearest" and not attacks:
        yield f"targets: nearest needs stored answers, {without}; use targets: clean"
    lacking = [name for name in cache.spec.teachers if name not in cache.spec.jacobians]
    if config.targets == "first-order" and lacking:
        yield (
            f"targets: first-order needs the Jacobian of every teacher, {cache.folder} lacks {', '.join(lacking)}; "
            "list them under 'jacobians' and run darht-cache extend, or use targets: clean"
        )
    setting = config.objective().compares_points()
    if setting and config.teachers == "cached" and config.targets != "first-order":
        yield (
            f"loss.{setting} compares what teachers say at x' and at its mirror image, which quoted answers do not "
            f"tell apart; use targets: first-order or teachers: live, or {setting}: 0"
        )
    if config.teachers == "cached" and (exact := config.objective().needs_all_logits()) and cache.spec.store.top_k:
        kept = f"{cache.spec.store.top_k} of {len(cache.classes)}"
        yield (
            f"loss.{exact} compares raw logits of all classes, {cache.folder} holds {kept} (store.logits: top-k); use "
            "kd: kl, or build with store.logits: float16"
        )
    yield from _moving_parts(config, cache)
    if inner.kind == "cached" and attacks:
        yield from _stored_radius(inner.eps, cache)


def _stored_radius(eps: float, cache: Cache) -> Iterator[str]:
    """What is selected by, and what the card claims, is L-inf at `inner.eps`: as far as stored examples reach."""
    radii = {attack.eps for attack in cache.spec.attacks.values() if attack.norm == "linf"}
    if not radii:
        yield (
            f"inner: cached trains within an L-inf radius, and the attacks of {cache.folder} are all L2: use "
            "inner.kind: pgd, or add an L-inf attack with darht-cache extend"
        )
    elif max(radii) != eps:
        yield (
            f"inner.eps must be the largest radius of the cache's L-inf attacks, {max(radii):g}; got {eps:g}: set "
            f"inner.eps: {max(radii):g}"
        )


def _moving_parts(config: TrainConfig, cache: Cache) -> Iterator[str]:
    """What moves a perturbation from one view to another, which resized crops do not allow."""
    if not cache.spec.views.resized:
        return
    why = f"and the views of {cache.folder} are resized crops, each with perturbations of its own"
    if config.targets in ("nearest", "first-order") and config.teachers == "cached":
        yield f"targets: {config.targets} moves perturbations between views, {why}; use targets: clean"
    if config.inner.kind == "warm" and config.inner.warm.start != "label":
        yield f"inner: warm remembers a row's perturbation over its views, {why}; use warm.start: label, n-fgsm or pgd"


def _missing_teachers(config: TrainConfig, cache: Cache) -> Iterator[str]:
    roles, recipe = {teacher.role for teacher in cache.spec.teachers.values()}, config.objective()
    only_clean = recipe.clean_mix()[0] == 1
    if recipe.teachers_needed != "none" and not only_clean and "robust" not in roles:
        yield (
            f"recipe {config.recipe} needs a robust teacher on adversarial images; those of {cache.folder} are all "
            "vanilla"
        )
    if recipe.teachers_needed == "both" and "vanilla" not in roles:
        yield (
            f"recipe {config.recipe} needs a teacher whose role is vanilla on clean images; those of {cache.folder} "
            "are all robust"
        )


def short_phases(config: TrainConfig) -> str | None:
    """A sentence for a run whose recipe leaves the head after a few epochs."""
    share, epochs = config.objective().head_trained_until(), config.optim.epochs
    if share >= 0.5 or share * epochs >= _HEAD_EPOCHS:
        return None
    return (
        f"the head is trained in the first {share * epochs:.1f} of {epochs} epochs only; short runs do better with "
        "loss.phases: [0.1, 0.8]"
    )


def check_parts(student: Student, config: TrainConfig, rows: int, ranks: Ranks) -> None:
    """Raise ConfigError where a batch of `rows` to train on is cut too small for the processes or for batch norm."""
    batch, parts = min(config.optim.batch_size, rows), ranks.world * config.compute.accumulate
    if batch < ranks.world:
        raise ConfigError(f"batches of {batch} rows do not reach for {ranks.world} processes: raise optim.batch_size")
    normed = any(isinstance(module, _BatchNorm) for module in student.modules())
    if normed and max(1, batch // parts) < 2:
        raise ConfigError(
            f"batch norm takes statistics over at least 2 rows; batches of {batch} in {parts} parts leave 1: raise "
            "optim.batch_size, or lower compute.accumulate"
        )
