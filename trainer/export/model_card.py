"""The model card: `README.md` beside a student's weights, in the layout of the Hugging Face hub."""

import json
import re
from pathlib import Path
from typing import Any

import safetensors
import torch

from darht.cache.builder.known_teachers import teacher_folders
from darht.cache.builder.teachers import read_card
from darht.cache.read.reader import Cache
from darht.core.errors import DarhtError, ModelError
from darht.core.files import write_atomic
from darht.core.markdown import code, escape
from darht.core.sealed import read_sealed
from darht.trainer.evaluation.score import NORMS, SCHEMA_VERSION
from darht.trainer.state.checkpoint import BEST, RUN, WEIGHTS, StudentCard, load_student, read_student_card

README = "README.md"
TRANSFER_ONLY = (
    "transfer robustness: trained on other networks' adversarial examples only, never on its own; "
    "white-box robustness is not claimed"
)

_FORMS = {
    "hub": "pixels in [0, 1] go in, raw logits come out, normalisation is inside",
    "plain": "map and head are folded into the last layer, and pixels go in {seen}",
    "onnx": "map and head are folded into the last layer; `pixels` `[N, 3, H, W]` in [0, 1] go in, `logits` come out",
}
_SNIPPETS = {
    "hub": """import torch
from pathlib import Path
from darht.trainer.state.checkpoint import load_student

student, card = load_student(Path("FOLDER"), torch.device("cpu"))
classifier = student.fold()  # pixels [B, 3, H, W] in [0, 1] to logits [B, C]""",
    "plain": """import torch
from safetensors.torch import load_file
from darht.core.nets import build  # or any script's network with the same parameter names

net = build({arch!r}, {C}, {kwargs}).eval()
net.load_state_dict(load_file("plain.safetensors"))
mean, std = (torch.tensor(v).view(3, 1, 1) for v in ({mean}, {std})){resize}
logits = net((pixels - mean) / std)  # pixels [B, 3, H, W] in [0, 1]""",
    "onnx": """import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
logits = session.run(["logits"], {{"pixels": pixels}})[0]  # float32 [N, 3, H, W] in [0, 1]""",
}
_RESIZE = """
pixels = torch.nn.functional.interpolate(pixels, size=({side}, {side}), mode="bilinear", align_corners=False)"""


def teacher_notes(cache: Cache) -> dict[str, Any]:
    """Role, architecture and, where the teachers' folders are still there, the accuracies measured on them, by name."""
    folders = teacher_folders(cache.spec, cache.origin(), {})
    notes = {}
    for name, spec in cache.spec.teachers.items():
        note: dict[str, Any] = {"role": spec.role, "arch": spec.arch, "weights_sha256": spec.weights_sha256}
        try:
            card = read_card(folders[name])
        except (KeyError, OSError, DarhtError):
            card = None
        if card is not None and card.weights_sha256 == spec.weights_sha256:
            note |= {"algorithm": card.training.get("algorithm"), "accuracy": card.accuracy}
        notes[name] = note
    return notes


def write_model_card(run: Path, which: str, folder: Path | None = None, form: str = "hub") -> None:
    """Write the card of the student in `run/which` beside its weights, or into `folder`, for weights of that form.

    It holds what the run's files say at this moment: an evaluation counts only when it is of this very epoch.

    Raises:
        ModelError: there is no student.
        CorruptError: `run.json` or `eval.json` was changed.
    """
    card = read_student_card(run / which)
    notes = _json(run / RUN, "restore it") or {}
    report = _json(run / ("eval.json" if which == BEST else f"eval-{which}.json"), "remove it and run darht-eval") or {}
    of = tuple(report.get(key) for key in ("schema_version", "epoch", "cache_root_hash"))
    if of != (SCHEMA_VERSION, card.epoch, card.cache_root_hash):
        report = {}
    if form == "hub":
        parameters = count_parameters(run / which / WEIGHTS)
    else:  # map and head are one layer there
        student, _ = load_student(run / which, torch.device("cpu"))
        parameters = sum(p.numel() for p in student.fold().parameters())
    text = model_card(card, notes.get("teachers", {}), report or None, parameters=parameters, form=form)
    write_atomic((folder or run / which) / README, text.encode())


def _json(path: Path, fix: str) -> dict[str, Any] | None:
    return read_sealed(path, fix).value if path.is_file() else None


def count_parameters(weights: Path) -> int:
    """Weights in a safetensors file, without the statistics of batch norms.

    Raises:
        ModelError: the file is missing or damaged.
    """
    try:
        with safetensors.safe_open(weights, framework="pt") as file:
            names = [name for name in file.keys() if not name.endswith(("running_mean", "running_var", "_tracked"))]  # noqa: SIM118
            return sum(_size(file.get_slice(name).get_shape()) for name in names)
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelError(f"{weights} is not a whole safetensors file: {error}") from error


def _size(shape: list[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def model_card(
    card: StudentCard, teachers: dict[str, Any], report: dict[str, Any] | None, *, parameters: int, form: str = "hub"
) -> str:
    """The card's Markdown.

    Args:
        card: the student's own.
        teachers: notes by name, as `teacher_notes` gives them.
        report: `eval.json` of this student, or None.
        parameters: of the network whose weights lie beside the card.
        form: `hub`, `plain` or `onnx`: which weights lie beside the card.
    """
    sections = [
        _front_matter(card),
        _what(card, parameters, form),
        "## Accuracy\n\n" + (_evaluated(report) if report else _held_out(card)),
        _training(card),
        _teachers(teachers),
        _use(card, form),
        _limits(card, report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def inner_label(card: StudentCard) -> str:
    """Where adversarial examples came from, in words; `cached` is called what it buys."""
    if card.clean_only:
        return "none: clean images only"
    inner = card.recipe["inner"]
    if inner["kind"] == "cached":
        return f"`cached`, {TRANSFER_ONLY}"
    steps = f", {inner['steps']} steps on the student" if inner["kind"] in ("pgd", "fat") else ", on the student"
    return f"{code(inner['kind'])}{steps}"


def _front_matter(card: StudentCard) -> str:
    tags = ["image-classification", "adversarial-robustness", "knowledge-distillation", card.arch.replace(":", "-")]
    lines = ["library_name: darht", "pipeline_tag: image-classification", "tags:", *(f"- {_yaml(tag)}" for tag in tags)]
    return "\n".join(["---", *lines, "---"])


def _yaml(tag: str) -> str:
    """A text as YAML: as it is where it is a plain word, and as JSON, which is YAML, where it may be more."""
    return tag if re.fullmatch(r"[A-Za-z][\w.-]*", tag) else json.dumps(tag)


def _what(card: StudentCard, parameters: int, form: str) -> str:
    shape = "x".join(map(str, card.image_size)) + " pixels, " if card.image_size else ""
    rows = (
        f", with a feature map of {len(card.teachers)} rows ({', '.join(map(escape, card.teachers))})"
        if card.teachers
        else ""
    )
    dropout = ""
    if card.mc_dropout:
        dropout = f" It was trained with Monte-Carlo dropout of {card.mc_dropout:g}"
        dropout += (
            f"; answers are means over {card.mc_samples} random passes."
            if form == "hub"
            else ", which is off here; the accuracies below are the student's with dropout on."
        )
    side = card.preprocessing.resize
    seen = "*normalised*" if side is None else f"*resized to {side}x{side} and normalised*"
    return (
        f"# {escape(card.arch)}, distilled with darht\n\n"
        f"A {escape(card.arch)} image classifier{rows if form == 'hub' else ''}: {shape}{card.num_classes} classes. "
        f"It has {parameters:,} parameters; {_FORMS[form].format(seen=seen)}.{dropout}"
    )


def _evaluated(report: dict[str, Any]) -> str:
    """The worst case first, then what it is made of; the checks' own attacks are left to `eval.md`."""
    data, worst = report["data"], report["robust_accuracy"]
    low, high = worst["interval95"]
    attack = worst["attack"]
    masking = report["masking"].get("verdict", "all checks passed")  # earlier reports have no word for it
    if not report["masking"]["passed"]:
        masking = "**checks failed: do not believe these numbers**"
    lines = [
        f"Measured by darht-eval, tier {code(report['tier'])}, on {data['rows']:,} images of the "
        f"{escape(data['split'])} split of {escape(data['source'])}. The epoch was chosen on rows of the cache, not on "
        "these images.",
        "",
        f"Robust accuracy **{worst['accuracy']:.1f} %** [{low:.1f}, {high:.1f}] at {NORMS[attack['norm']]} "
        f"{attack['eps']:g}/255: the worst case per image over all {len(attack['over']) - 1} attacks. "
        f"Gradient masking: {masking}.",
        "",
        *(f"**Warning:** {escape(text)}\n" for text in report["warnings"]),
        "| measured | accuracy % | 95 % interval | right of | on | attack |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(_score_row(score) for score in report["scores"] if score["family"] != "check")])


def _score_row(score: dict[str, Any]) -> str:
    low, high = score["interval95"]
    cells = [escape(score["name"]), f"{score['accuracy']:.1f}", f"{low:.1f} - {high:.1f}"]
    cells += [f"{score['correct']} of {score['count']}", escape(score["on"]), escape(score["in_words"])]
    return f"| {' | '.join(cells)} |"


def _held_out(card: StudentCard) -> str:
    if not card.selection:
        return "Not measured: no training rows were held out, and darht-eval has not run on this student."
    inner = card.recipe["inner"]
    names = {"holdout_clean": "clean", "holdout_pgd": f"PGD at {inner['eps']:g}/255"}
    figures = ", ".join(f"{names.get(key, escape(key))} {value:.1f} %" for key, value in card.selection.items())
    return (
        f"On rows held out of the *training* split, which also chose the epoch: {figures}. These are not test "
        "accuracies; `darht-eval RUN` measures those."
    )


def _training(card: StudentCard) -> str:
    optim = card.recipe.get("optim", {})
    rows = {
        "recipe": code(card.recipe["recipe"]),
        "adversarial examples": inner_label(card),
        **({} if card.clean_only else {"radius": f"L-inf, {card.recipe['inner']['eps']:g}/255"}),
        "epoch": f"{card.epoch} of {escape(optim.get('epochs', '?'))}",
        "batch size, rate": f"{escape(optim.get('batch_size', '?'))}, {escape(optim.get('lr', '?'))}",
        "seed": escape(card.recipe.get("seed", "?")),
        "cache root hash": code(card.cache_root_hash),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"## Training\n\n| | |\n|---|---|\n{table}\n\nEvery setting stands in `config.json` under `recipe`."


def _teachers(teachers: dict[str, Any]) -> str:
    if not teachers:
        return ""
    head = "## Teachers in the cache\n\n| teacher | network | role | trained by | accuracy % |\n|---|---|---|---|---|"
    rows = [
        f"| {escape(name)} | {escape(note['arch'])} | {escape(note['role'])} "
        f"| {escape(note.get('algorithm') or 'not known')} "
        f"| {_accuracies(note.get('accuracy') or {})} |"
        for name, note in teachers.items()
    ]
    return "\n".join([head, *rows])


def _accuracies(measured: dict[str, Any]) -> str:
    parts = [
        f"{escape(split)}: clean {found['clean']:.1f}, PGD-20 at {found['eps']:g}/255 {found['pgd-20']:.1f}"
        for split, found in measured.items()
    ]
    return "; ".join(parts) or "not known"


def _use(card: StudentCard, form: str) -> str:
    mean, std = list(card.preprocessing.mean), list(card.preprocessing.std)
    side = card.preprocessing.resize
    seen = {"mean": mean, "std": std, "resize": "" if side is None else _RESIZE.format(side=side)}
    code = _SNIPPETS[form].format(arch=card.arch, C=card.num_classes, kwargs=card.kwargs, **seen)
    return (
        "## Intended use\n\n"
        "Research on adversarial robustness and distillation, on images like those it was trained on.\n\n"
        f"```python\n{code}\n```"
    )


def _limits(card: StudentCard, report: dict[str, Any] | None) -> str:
    inner, clean = card.recipe["inner"], card.clean_only
    radius = f"It was trained against L-inf perturbations of at most {inner['eps']:g}/255; nothing is claimed beyond."
    limits = [
        "It was trained on clean images only; no robustness is claimed." if clean else radius,
        "Robust accuracy is an upper bound: a stronger attack may find more.",
        "It is not a safety component, and gives no guarantee for any single image.",
    ]
    if inner["kind"] == "cached" and not clean:
        limits.insert(0, f"This is {TRANSFER_ONLY}: an attacker who has the weights is likely to succeed.")
    if report is None:
        limits.append("It has not been evaluated on test images.")
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)
