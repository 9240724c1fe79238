"""What is inside a cache, as text for people."""

from dataclasses import dataclass
from pathlib import Path

from darht.cache.admin.cost import array_seconds, cost_facts, cost_of, run_cost
from darht.cache.format.layout import ArrayLayout
from darht.cache.format.mixture import describe_sources
from darht.cache.format.spec import ViewSpec
from darht.cache.read.reader import Cache


@dataclass(frozen=True)
class Summary:
    """A cache in words.

    Attributes:
        facts: pairs of name and value.
        arrays: per array: name, type, shape, megabytes, bytes per row, share of the raw size, seconds of work.
    """

    facts: tuple[tuple[str, str], ...]
    arrays: tuple[tuple[str, ...], ...]


def summarise(cache: Cache, run: Path | None = None) -> Summary:
    """Describe a sealed cache, and when it pays; with the figures of a `run` where one is given.

    Raises:
        CacheError: `run` is not a run of this cache.
    """
    spec = cache.spec
    total = sum(shard.size for shard in cache.manifest.shards)
    held = len(cache.manifest.holdout)
    left_out = f"; {spec.data.skipped} files that cannot be decoded were left out" if spec.data.skipped else ""
    of = "several sources" if spec.data.sources else f"{spec.data.source} {spec.data.split}"
    facts = [
        ("data", f"{of}, {spec.data.rows} rows, {held} of them held out{left_out}"),
        *_sources(cache),
        ("classes", f"{len(spec.data.classes)}: {', '.join(spec.data.classes[:10])}"),
        ("views", _views(spec.views)),
    ]
    for name, teacher in spec.teachers.items():
        facts.append((f"teacher {name}", f"{teacher.arch}, {teacher.role}, weights {teacher.weights_sha256[:12]}"))
    for name, attack in spec.attacks.items():
        settings = ", ".join(f"{key} {value}" for key, value in attack.parameters.items())
        facts.append((f"attack {name}", f"{attack.kind} on {attack.teacher}, {attack.views} views, {settings}"))
    facts.append(("size", f"{total / 1e6:.2f} MB, {total / spec.data.rows:.0f} bytes a row"))
    facts += cost_facts(cost_of(cache), None if run is None else run_cost(run, cache))
    facts.append(("root hash", cache.root_hash))
    return Summary(tuple(facts), tuple(_array_row(cache, array) for array in cache.arrays.values()))


def _sources(cache: Cache) -> list[tuple[str, str]]:
    """A line for each of several sources; of where it lies the last part alone, where this machine knows it."""
    if not cache.spec.data.sources:
        return []
    origin = cache.origin()
    roots = {"0": origin.get("data_root")} | origin.get("data_roots", {})
    texts = describe_sources(cache.spec.data.sources)
    lie = [f", from {Path(root).name}" if (root := roots.get(str(k))) else "" for k in range(len(texts))]
    return [(f"source {k}", text + lie[k]) for k, text in enumerate(texts)]


def _views(views: ViewSpec) -> str:
    about = f"padding {views.padding}"
    if views.resized:
        (least, most), (narrow, wide) = views.scale, views.ratio
        about = f"{views.size} pixels, {least:g} to {most:g} of the area, ratios {narrow:g} to {wide:g}"
    return f"{views.count} ({views.kind}, {about}, mirrored: {views.flip})"


def _array_row(cache: Cache, array: ArrayLayout) -> tuple[str, ...]:
    size = cache.size(array.name)
    raw = size if array.encoded else array.shape[0] * array.row_bytes
    shape = " x ".join(map(str, array.shape))
    return (
        array.name,
        cache.spec.store.images if array.encoded else array.dtype,
        shape,
        f"{size / 1e6:.2f}",
        f"{size / array.shape[0]:.1f}",
        f"{100 * size / raw:.0f} %",
        f"{array_seconds(cache, array.name):.1f}",
    )
