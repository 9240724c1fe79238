"""Sources made of image files: a folder for each class, and Tiny ImageNet.

Pixels are taken as Pillow decodes them to 8-bit RGB: grey is replicated, transparency is dropped, EXIF rotation is not
applied (as torchvision's ImageFolder does it).
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from darht.cache.sources.rows import Rows, one_line, read_lines, rows_to_take, shown
from darht.core.errors import DataError

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_MODES_OF_8_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
_BLOCK = 256  # images a thread decodes in one go: far fewer futures than files
_THREADS = 4  # Pillow decodes without the interpreter lock; more threads wait for the disk
_TINY_FOLDER = "tiny-imagenet-200"
_TINY_REMEDY = f"unpack the official archive {_TINY_FOLDER}.zip there"


def read_imagefolder(root: Path, split: str, limit: int | None, image_size: int | None) -> Rows:
    """Read `root/SPLIT/CLASS/IMAGE`: uint8 `[N, 3, H, W]`, sorted by class name and then by file name.

    SPLIT is `train`, or for the test split `test`, or `val` where there is no `test`. The class folders of `train` give
    the labels of both splits. Files with other suffixes than png, jpg, jpeg, webp and bmp, hidden files and deeper
    folders are not read. With `image_size` the shorter side is resized (bicubic) and the centre square is cut out.

    Raises:
        DataError: a folder is missing or empty, the splits differ in classes, an image cannot be decoded or differs in
            size from the first.
    """
    train, folder = _split_folder(root, "train"), _split_folder(root, split)
    classes = _class_folders(train)
    differing = sorted(set(classes) ^ set(_class_folders(folder)))
    if differing:
        raise DataError(f"{folder} and {train} must have the same class folders; only one has: {shown(differing)}")
    files = [_image_files(folder / name) for name in classes]
    empty = [str(folder / name) for name, found in zip(classes, files, strict=True) if not found]
    if empty:
        raise DataError(
            f"every class folder must hold images ({', '.join(_SUFFIXES)}); none in {shown(empty)}; "
            "add images, or remove the folder from both splits"
        )
    paths = [path for found in files for path in found]
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(found) for found in files])
    take = rows_to_take(limit, len(paths), str(folder))
    return Rows(decode_images(paths[:take], image_size), labels[:take], classes)


def _split_folder(root: Path, split: str) -> Path:
    names = ("train",) if split == "train" else ("test", "val")
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise DataError(
        f"imagefolder needs the folder {' or '.join(str(root / name) for name in names)}, which is not there; "
        "put images in CLASS folders there"
    )


def _class_folders(folder: Path) -> tuple[str, ...]:
    names = tuple(sorted(path.name for path in _visible(folder) if path.is_dir()))
    if not names:
        raise DataError(f"{folder} must hold one folder for each class; it holds none")
    return names


def _visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def _image_files(folder: Path) -> list[Path]:
    found = [path for path in _visible(folder) if path.suffix.lower() in _SUFFIXES and path.is_file()]
    return sorted(found, key=lambda path: path.name)


def read_tiny_imagenet(root: Path, split: str, limit: int | None) -> Rows:
    """Read Tiny ImageNet-200: uint8 `[N, 3, 64, 64]`, labels numbered by the lines of `wnids.txt`.

    Train rows are sorted by label and then by file name. The test split is the official validation set, in the order of
    `val_annotations.txt` (the official test images have no labels). Class names are the first names in `words.txt`, or
    the WordNet identifiers where it has none. `root` is the official folder or the one around it.

    Raises:
        DataError: a file is missing, cannot be decoded or is not 64x64; files and lists disagree.
    """
    folder = root / _TINY_FOLDER if (root / _TINY_FOLDER).is_dir() else root
    if not (folder / "wnids.txt").is_file():
        raise DataError(f"tiny-imagenet needs the file {folder / 'wnids.txt'}, which is not there; {_TINY_REMEDY}")
    wnids = [line.strip() for line in read_lines(folder / "wnids.txt", _TINY_REMEDY)]
    if len(set(wnids)) != len(wnids):
        raise DataError(
            f"{folder / 'wnids.txt'} must name each class once; {len(wnids) - len(set(wnids))} are repeated"
        )
    entries = _tiny_train(folder, wnids) if split == "train" else _tiny_val(folder, wnids)
    take = rows_to_take(limit, len(entries), str(folder))
    paths, labels = [path for path, _ in entries[:take]], [label for _, label in entries[:take]]
    images = decode_images(paths, None)
    if images.shape[2:] != (64, 64):
        raise DataError(f"{paths[0]} must be 64x64 pixels; it is {_size_text(images)}; {_TINY_REMEDY}")
    return Rows(images, np.array(labels, dtype=np.int64), _tiny_names(folder, wnids))


def _tiny_train(folder: Path, wnids: Sequence[str]) -> list[tuple[Path, int]]:
    train = folder / "train"
    present = {path.name for path in _visible(train) if path.is_dir()} if train.is_dir() else set()
    differing = sorted(present ^ set(wnids))
    if differing:
        raise DataError(
            f"{train} must hold one folder for each line of wnids.txt; {len(present)} folders and {len(wnids)} lines "
            f"differ in {shown(differing)}; {_TINY_REMEDY}"
        )
    missing = [wnid for wnid in wnids if not (train / wnid / "images").is_dir()]
    if missing:
        raise DataError(f"{train} must hold CLASS/images for every class; none for {shown(missing)}; {_TINY_REMEDY}")
    return [(path, label) for label, wnid in enumerate(wnids) for path in _image_files(train / wnid / "images")]


def _tiny_val(folder: Path, wnids: Sequence[str]) -> list[tuple[Path, int]]:
    table, images = folder / "val" / "val_annotations.txt", folder / "val" / "images"
    lines = [line.split("\t") for line in read_lines(table, _TINY_REMEDY)]
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    wrong = [number for number, cells in enumerate(lines, 1) if len(cells) < 2 or cells[1].strip() not in label_of]
    if wrong:
        raise DataError(f"{table}: lines {shown(wrong)} must give a file and a class of wnids.txt; {_TINY_REMEDY}")
    listed = [cells[0].strip() for cells in lines]
    present = [path.name for path in _image_files(images)] if images.is_dir() else []
    differing = sorted(set(listed) ^ set(present))
    if differing or len(set(listed)) != len(listed):
        raise DataError(
            f"{table} must list every file of {images} once; {len(listed)} lines and {len(present)} files differ"
            f" in {shown(differing) or 'repeated lines'}; {_TINY_REMEDY}"
        )
    return [(images / name, label_of[cells[1].strip()]) for name, cells in zip(listed, lines, strict=True)]


def _tiny_names(folder: Path, wnids: Sequence[str]) -> tuple[str, ...]:
    path = folder / "words.txt"
    lines = read_lines(path, _TINY_REMEDY) if path.is_file() else []
    words = {wnid: names.split(",")[0].strip() for wnid, _, names in (line.partition("\t") for line in lines)}
    return tuple(words.get(wnid) or wnid for wnid in wnids)


def decode_images(paths: Sequence[Path], image_size: int | None) -> NDArray[np.uint8]:
    """Decode files of one size into uint8 `[N, 3, H, W]`, in the order given; at least one path.

    Args:
        paths: the files.
        image_size: side in pixels of a square to resize and cut each image to; None takes them as they are.

    Raises:
        DataError: naming the first file that cannot be decoded, or whose size differs from that of the first file.
    """
    first = _decode(paths[0], image_size)
    images = np.empty((len(paths), 3, *first.shape[:2]), dtype=np.uint8)

    def fill(start: int) -> None:
        for row in range(start, min(start + _BLOCK, len(paths))):
            pixels = _decode(paths[row], image_size)
            if pixels.shape != first.shape:
                raise DataError(_size_message(paths[0], first, paths[row], pixels))
            images[row] = pixels.transpose(2, 0, 1)

    with ThreadPoolExecutor(_THREADS) as threads:
        list(threads.map(fill, range(0, len(paths), _BLOCK)))  # map raises the error of the earliest block
    return images


def _size_text(images: NDArray[np.uint8]) -> str:
    return f"{images.shape[3]}x{images.shape[2]}"


def _size_message(first: Path, expected: NDArray[np.uint8], path: Path, found: NDArray[np.uint8]) -> str:
    (height, width), (other_height, other_width) = expected.shape[:2], found.shape[:2]
    return (
        f"all images must have one size; {path} is {other_width}x{other_height} pixels, {first} is {width}x{height}; "
        f"an imagefolder is brought to one size with image_size, for example `image_size: {min(width, height)}`"
    )


def _decode(path: Path, image_size: int | None) -> NDArray[np.uint8]:
    """One image, uint8 `[H, W, 3]`."""
    try:
        with Image.open(path) as image:
            mode = image.mode
            if mode in _MODES_OF_8_BITS:
                rgb = image.convert("RGBA").convert("RGB") if mode in ("P", "PA") else image.convert("RGB")
                return np.asarray(rgb if image_size is None else _square(rgb, image_size))
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files; all mean the same to a user
        raise DataError(f"cannot decode {path}: {one_line(error)}; replace or remove the file") from error
    raise DataError(f"{path} must have 8 bits a channel; its Pillow mode is {mode}; save it as 8-bit RGB or grey")


def _square(image: Image.Image, side: int) -> Image.Image:
    """Resize the shorter side to `side` and cut the centre, rounding as torchvision's Resize and CenterCrop do."""
    width, height = image.size
    short = min(width, height)
    width, height = int(side * width / short), int(side * height / short)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return resized.crop((left, top, left + side, top + side))
