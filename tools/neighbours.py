"""What lies near an image: among the perturbations, the images and each teacher's logits."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from darht.cache.read.reader import Cache
from darht.core.class_names import name_of_class
from darht.core.errors import ConfigError, DataError
from darht.core.images import check_pixel_count
from darht.tools.index import Indexes
from darht.tools.live import ask, craft
from darht.tools.nearest import Nearest
from darht.tools.predictions import Ints
from darht.tools.project import project
from darht.tools.vectors import Floats, Space, cache_spaces, image_vectors, logit_vectors, space_blocks, take, unit

_CANDIDATES = 20  # looked up for each neighbour wanted and ranked again by their exact cosines


@dataclass(frozen=True)
class Neighbour:
    """One hit: its row, the cosine to the query, its label, and what the space's teachers say about it, by name.

    Row and label of an image from outside are -1.
    """

    row: int
    cosine: float
    label: int
    said: dict[str, int]


@dataclass(frozen=True)
class Hits:
    """What was found in one space.

    Attributes:
        space: its name.
        query: the query itself, as a hit of cosine 1.
        hits: the nearest rows, nearest first, without the query.
    """

    space: str
    query: Neighbour
    hits: tuple[Neighbour, ...]


@dataclass(frozen=True, kw_only=True)
class Outside:
    """An image that is not in the cache.

    Attributes:
        name: of its file.
        image: uint8 `[3, H, W]`.
        vectors: `[1, D]` by space.
        said: by space, what its teachers say, by name.
        deltas: by attack, the perturbation found for it, int8 `[1, 3, H, W]`.
    """

    name: str
    image: NDArray[np.uint8]
    vectors: dict[str, Floats]
    said: dict[str, dict[str, int]]
    deltas: dict[str, NDArray[np.int8]] = field(default_factory=dict)


def read_image(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """An image file as uint8 `[3, H, W]`.

    Raises:
        DataError: no image, or of another size than the cache's.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            check_pixel_count(*image.size, where=str(path))
            pixels = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{path} does not read as an image: {error}; give a PNG or JPEG file, or a row") from error
    if pixels.shape != tuple(shape):
        raise DataError(
            f"{path} has {pixels.shape[2]}x{pixels.shape[1]} pixels, the images of the cache have {shape[2]}x{shape[1]}"
            ": resize or cut it first"
        )
    return np.ascontiguousarray(pixels)


def outside_image(cache: Cache, path: Path, teachers: dict[str, nn.Module]) -> Outside:
    """Ask the teachers about an image from outside and attack it as the cache's attacks would.

    Its true class is not known, so an attack starts from what its own teacher says.

    Args:
        cache: a sealed cache.
        path: of the image.
        teachers: those that could be loaded; spaces that need another one are left out.
    """
    image = read_image(path, cache.spec.view_shape)
    logits = {name: ask(model, image[None]) for name, model in teachers.items()}
    says = {name: int(values.argmax()) for name, values in logits.items()}
    vectors, said = {"image": image_vectors(image[None])}, {"image": says}
    deltas = {}
    for name, attack in cache.spec.attacks.items():
        if attack.teacher in teachers:
            model = teachers[attack.teacher]
            deltas[name] = craft(cache, name, model, image, says[attack.teacher])
            vectors[f"delta/{name}"] = unit(deltas[name])
            moved = np.rint(np.clip(image + attack.scale * deltas[name], 0, 255)).astype(np.uint8)
            said[f"delta/{name}"] = {attack.teacher: int(ask(model, moved).argmax())}
    for name, values in logits.items():
        vectors[f"logits/{name}"], said[f"logits/{name}"] = logit_vectors(values), {name: says[name]}
    return Outside(name=path.name, image=image, vectors=vectors, said=said, deltas=deltas)


def find_neighbours(cache: Cache, query: int | Outside, k: int = 5, indexes: Indexes | None = None) -> list[Hits]:
    """The k nearest rows in every space, by cosine.

    Args:
        cache: a sealed cache.
        query: a row, or an image from outside.
        k: how many.
        indexes: of this cache: candidates come from there and are ranked by exact cosines. Without them every vector
            is compared.

    Raises:
        ConfigError: the row is not in the cache, or k is larger than the other rows.
    """
    inside = isinstance(query, int)
    if isinstance(query, int) and not 0 <= query < cache.rows:
        raise ConfigError(f"the row must lie in 0..{cache.rows - 1}; got {query}")
    most = cache.rows - 1 if inside else cache.rows
    if not 1 <= k <= most:
        raise ConfigError(f"--k must lie in 1..{most}, the {'other ' if inside else ''}rows of the cache; got {k}")
    labels = cache.read("label")
    spaces = cache_spaces(cache)
    names = list(spaces) if isinstance(query, int) else [name for name in spaces if name in query.vectors]
    return [_look(cache, spaces[name], query, k, labels=labels, indexes=indexes) for name in names]


def _look(
    cache: Cache, space: Space, query: int | Outside, k: int, *, labels: np.ndarray, indexes: Indexes | None
) -> Hits:
    if isinstance(query, int):
        row, vector = query, take(cache, space, np.array([query]))
        first = _hit(cache, space, row, 1.0, labels)
    else:
        row, vector = -1, query.vectors[space.name]
        first = Neighbour(-1, 1.0, -1, query.said[space.name])
    rows, cosines = _nearest(cache, space, vector, row=row, k=k, indexes=indexes)
    hits = [_hit(cache, space, int(i), float(c), labels) for i, c in zip(rows, cosines, strict=True)]
    return Hits(space.name, first, tuple(hits))


def _nearest(
    cache: Cache, space: Space, vector: Floats, *, row: int, k: int, indexes: Indexes | None
) -> tuple[Ints, Floats]:
    near = Nearest(vector, k, exclude=np.array([row]))
    candidates = None if indexes is None else _candidates(indexes, space, vector, k)
    if candidates is not None:
        for candidate, values in zip(candidates.tolist(), take(cache, space, candidates), strict=True):
            near.see(candidate, values[None])
    if candidates is None or (near.rows < 0).any():  # an approximate index may hold fewer than it was asked for
        near = Nearest(vector, k, exclude=np.array([row]))
        for block in space_blocks(cache, space):
            near.see(block.start, space.read(block))
    return near.rows[0], near.cosines[0]


def _candidates(indexes: Indexes, space: Space, vector: Floats, k: int) -> Ints | None:
    if space.name not in indexes.card.indexes:
        return None
    index = indexes.load(space.name)
    _, rows = index.search(project(vector, indexes.axes(space.name)), min(_CANDIDATES * k, index.ntotal))
    found: Ints = np.unique(rows[rows >= 0])
    return found


def _hit(cache: Cache, space: Space, row: int, cosine: float, labels: np.ndarray) -> Neighbour:
    what = space.subject if space.kind == "delta" else "clean"
    at = slice(row, row + 1)
    said = {t: int(cache.logits(t, what, rows=at)[0].argmax()) for t in space.teachers}
    return Neighbour(row, cosine, int(labels[row]), said)


def spoken(said: dict[str, int], classes: tuple[str, ...]) -> str:
    """What teachers say, in words: one class where they agree."""
    different = {classes[c] for c in said.values()}
    if len(different) <= 1:
        return "".join(different)
    return ", ".join(f"{name}: {classes[c]}" for name, c in said.items())


def draw(cache: Cache, found: Iterable[Hits], path: Path, outside: Outside | None = None) -> None:
    """Write a sheet (PNG): a line for each space, the query first, then its neighbours.

    Perturbations are drawn around grey, full contrast at epsilon; in other spaces the clean image is drawn.
    """
    from darht.tools.pictures import figure, save

    found, classes = list(found), cache.spec.data.classes
    columns = 1 + len(found[0].hits)
    fig = figure(0.4 + 1.45 * columns, 0.6 + 1.85 * len(found))
    grid = fig.subplots(len(found), columns, squeeze=False)
    for axes_row, hits in zip(grid, found, strict=True):
        for axes, hit in zip(axes_row, (hits.query, *hits.hits), strict=True):
            is_query = hit is hits.query
            axes.imshow(picture_of(cache, hits.space, hit.row, outside), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            title = "query" if is_query else f"cos {hit.cosine:.2f}"
            axes.set_title(title, fontsize=8, fontweight="bold" if is_query else "normal")
            name = f"row {hit.row}: {name_of_class(classes, hit.label)}" if hit.row >= 0 else "from outside"
            words = spoken(hit.said, classes).replace(", ", "\n")
            axes.set_xlabel(f"{name}\n{'says ' if words else ''}{words}", fontsize=6.5)
        axes_row[0].set_ylabel(hits.space, fontsize=7)
    name = f"row {found[0].query.row}" if outside is None else outside.name
    fig.suptitle(f"Nearest rows to {name} in each space", fontsize=10)
    save(fig, path)


def picture_of(cache: Cache, space: str, row: int, outside: Outside | None = None) -> NDArray[np.float32]:
    """Pixels `[H, W, 3]` in [0, 1] of a row, or of the image from outside when the row is -1."""
    layout, at = cache.arrays.get(space), slice(row, row + 1)
    if layout is None or layout.kind != "delta" or layout.attack is None:
        image = outside.image if outside is not None and row < 0 else cache.clean(at)[0]
        return (image.transpose(1, 2, 0) / 255).astype(np.float32)
    stored = outside.deltas[layout.attack][0] if outside is not None and row < 0 else cache.read(space, at)[0, 0]
    return amplified(cache, layout.attack, stored)


def amplified(cache: Cache, attack: str, delta: NDArray[np.int8]) -> NDArray[np.float32]:
    """A stored perturbation `[3, H, W]` as pixels `[H, W, 3]` around grey: epsilon is full contrast.

    Under another norm than L-inf the largest change is full contrast.
    """
    spec = cache.spec.attacks[attack]
    levels = delta.astype(np.float32) * spec.scale
    span = spec.parameters["eps"] if spec.parameters["norm"] == "linf" else max(1.0, float(np.abs(levels).max()))
    return np.clip(0.5 + levels / (2 * span), 0, 1).transpose(1, 2, 0).astype(np.float32)
