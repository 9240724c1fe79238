"""The dataset card of a cache: `README.md` as the Hugging Face hub shows it, YAML in front and Markdown behind."""

from darht.cache.format.mixture import describe_sources
from darht.cache.read.reader import Cache
from darht.core.markdown import code, escape

README = "README.md"
_SIZES = (("n<1K", 10**3), ("1K<n<10K", 10**4), ("10K<n<100K", 10**5), ("100K<n<1M", 10**6), ("1M<n<10M", 10**7))


def dataset_card(cache: Cache, address: str) -> str:
    """The card.

    Args:
        cache: sealed, or an export.
        address: under which others read it.
    """
    data = cache.spec.data
    size = next((name for name, most in _SIZES if data.rows < most), "10M<n<100M")
    front = ["---", "viewer: false", "task_categories:", "- image-classification", "size_categories:", f"- {size}"]
    front += ["tags:", *(f"- {tag}" for tag in ("darht", "adversarial-robustness", "knowledge-distillation"))]
    text = [
        *(*front, "---", ""),
        f"# {escape(data.source)} with teachers' answers, for darht",
        "",
        f"{data.rows:,} images of {escape(data.source)} ({escape(data.split)}), {len(data.classes)} classes, in "
        f"{cache.spec.views.count} views each, with adversarial perturbations and the raw logits of the teachers. "
        "`croissant.json` describes every file and array.",
        "",
        *_sources(cache),
        f"Root hash {code(cache.root_hash)}.",
        "",
        "```",
        "pip install 'darht[hub]'",
        f"darht-train --shards {code(address).strip('`')} --out run",
        "```",
        "",
        *(*_teachers(cache), ""),
        *_attacks(cache),
        "The images are those of the data set named above; its licence holds for them.",
    ]
    return "\n".join(text) + "\n"


def _sources(cache: Cache) -> list[str]:
    lines = [f"- {escape(text)}" for text in describe_sources(cache.spec.data.sources)]
    return ["The images are of several sources:", "", *lines, ""] if lines else []


def _teachers(cache: Cache) -> list[str]:
    rows = [
        f"| {escape(name)} | {escape(teacher.arch)} | {escape(teacher.role)} | {code(teacher.weights_sha256[:12])} |"
        for name, teacher in cache.spec.teachers.items()
    ]
    return ["## Teachers", "", "| teacher | network | role | weights |", "|---|---|---|---|", *rows]


def _attacks(cache: Cache) -> list[str]:
    if not cache.spec.attacks:
        return []
    rows = [
        f"| {escape(name)} | {escape(attack.kind)} | {escape(attack.teacher)} | {attack.views} "
        f"| {attack.parameters.get('eps', 0):g}/255 |"
        for name, attack in cache.spec.attacks.items()
    ]
    head = ["## Attacks", "", "| attack | kind | made on | views | radius |", "|---|---|---|---|---|"]
    return [*head, *rows, ""]
