"""Croissant metadata (JSON-LD, version 1.1) of a sealed cache or of its WebDataset export.

It lists every file with its size and sha256 and every array with its type and shape. From an export with one entry per
sample `mlcroissant` loads images and labels; perturbations and logits, and everything in a cache, it describes only:
it reads neither npz nor Zarr.
"""

import json
from collections.abc import Iterable
from typing import Any

from darht.cache.format.layout import ENCODED, ArrayLayout
from darht.cache.format.manifest import MANIFEST, SPEC
from darht.cache.format.tar_index import INDEX, Index
from darht.cache.read.reader import Cache
from darht.cache.read.webdataset import open_shards
from darht.core.config import parse_canonical
from darht.core.files import sha256_bytes
from darht.core.storage import Location, Storage

CROISSANT = "croissant.json"
_VERSION = "http://mlcommons.org/croissant/1.1"
_BINARY = "application/octet-stream"
_TYPES = {
    "uint8": "cr:UInt8",
    "int8": "cr:Int8",
    "int16": "cr:Int16",
    "int32": "cr:Int32",
    "int64": "cr:Int64",
    "float16": "cr:Float16",
    "float32": "cr:Float32",
    ENCODED: "sc:ImageObject",
}
Json = dict[str, Any]

_TERMS = "citeAs column containedIn equivalentProperty extract field fileProperty fileObject fileSet format includes"
_TERMS += " isArray arrayShape isLiveDataset jsonPath key md5 parentField path recordSet references regex repeated"
_TERMS += " replace samplingRate separator source subField transform"
_CONTEXT: Json = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "name": {"@container": "@language"},
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
    **{term: f"cr:{term}" for term in _TERMS.split()},
}


def export_croissant(location: Location) -> Json:
    """Write `croissant.json` beside the data that it describes, and return its contents.

    Args:
        location: a sealed cache, or its WebDataset export.

    Raises:
        CacheError: it is neither, or something is missing.
        DarhtError: the storage cannot be written.
    """
    cache = open_shards(location)
    described = describe(cache)
    cache.folder.write(CROISSANT, (json.dumps(described, indent=2) + "\n").encode())
    return described


def describe(cache: Cache) -> Json:
    """The contents of `croissant.json`, which is not written."""
    data = cache.folder.read(INDEX)
    described = _cache(cache) if data is None else _export(cache, parse_canonical(Index, data, INDEX))
    return {"@context": _CONTEXT, "@type": "sc:Dataset", **_about(cache), **described}


def _about(cache: Cache) -> Json:
    data, spec = cache.spec.data, cache.spec
    images = f"{data.source} ({data.split}, {data.rows} rows, {len(data.classes)} classes)"
    views = f"{spec.views.count} views of every image. Root hash {cache.root_hash}."
    about = f"Images of {images} and {views}"
    if spec.teachers:
        about = f"Adversarial perturbations of {images} and the raw logits of the teachers "
        about += f"{', '.join(spec.teachers)} on {views}"
    return {
        "name": f"darht-{data.source}-{data.split}",
        "description": about,
        "conformsTo": _VERSION,
        "version": f"1.0.0+{cache.root_hash[:12]}",
    }


def _cache(cache: Cache) -> Json:
    """A cache: every file, and for each array the set of its shards and a record set with one record per row."""
    files = [_stated(cache.folder, key, "application/json") for key in (SPEC, MANIFEST)]
    files += [_file(f.path, f.size, f.sha256, "application/json") for f in cache.manifest.metadata]
    files += [_file(shard.path, shard.size, shard.sha256, _BINARY) for shard in cache.manifest.shards]
    sets, records = [], []
    for name, array in cache.arrays.items():
        shards = [shard.path for shard in cache.manifest.shards if shard.array == name]
        sets.append(_file_set(f"shards/{name}", shards, _BINARY))
        value = _field(f"{name}/value", _TYPES[array.dtype], _content(f"shards/{name}"), array.shape[1:])
        records.append(_record_set(name, _meaning(cache, array), [value]))
    return {"distribution": files + sets, "recordSet": records}


def _export(cache: Cache, index: Index) -> Json:
    """An export: its tars, and in them one set of files for each kind of entry."""
    tars = [_file(tar.path, tar.size, tar.sha256, "application/x-tar") for tar in index.tars]
    files = [_stated(cache.folder, INDEX, "application/json"), *tars]
    inside = [tar.path for tar in index.tars]
    if index.layout == "blocks":
        blocks = _file_set("blocks", ["*.npz"], _BINARY, inside)
        return {"distribution": [*files, blocks], "recordSet": _npz_records(cache, "blocks")}
    kinds = {
        "png": "image/*" if cache.spec.store.images == "jpeg" else "image/png",
        "cls": "text/plain",
        "json": "application/json",
        "logits.npz": _BINARY,
    }
    kinds |= {"delta.npy": _BINARY} if cache.spec.attacks else {}
    jpeg = cache.spec.store.images == "jpeg"  # others among them are PNG
    names = {kind: [f"*.{kind}", *(["*.jpg"] if kind == "png" and jpeg else [])] for kind in kinds}
    sets = [_file_set(kind, names[kind], encoding, inside) for kind, encoding in kinds.items()]
    return {"distribution": files + sets, "recordSet": [*_samples(), *_npz_records(cache, "samples")]}


def _samples() -> list[Json]:
    """What `mlcroissant` loads: the key of a sample, which is the source index, with its image, or with its label."""
    key = {"regex": r"^(\d+)\."}
    found = (("images", "image", "png", "sc:ImageObject"), ("labels", "label", "cls", "sc:Integer"))
    return [
        _record_set(
            name,
            f"The {what} of every sample by its key, the source index.",
            [
                _field(f"{name}/key", "sc:Integer", _file_name(entry, key)),
                _field(f"{name}/{what}", data_type, _content(entry)),
            ],
        )
        for name, what, entry, data_type in found
    ]


def _npz_records(cache: Cache, layout: str) -> list[Json]:
    """Arrays inside npz and npy entries: type, shape and meaning of each."""
    records = []
    for name, array in cache.arrays.items():
        if array.kind == "views" or (layout == "samples" and not (array.said or array.kind == "delta")):
            continue
        source = "blocks" if layout == "blocks" else "delta.npy" if array.kind == "delta" else "logits.npz"
        value = _field(f"{name}/value", _TYPES[array.dtype], _content(source), array.shape[1:])
        records.append(_record_set(name, _meaning(cache, array), [value]))
    return records


_MEANINGS = {
    "boxes": "What each view shows of the image: top, left, height, width and whether it is mirrored.",
    "views": "Each view: dy, dx and whether it is mirrored.",
    "label": "The class, or -1 where a row has no label.",
    "image": "Pixels [3, H, W].",
    "source_index": "Number of the row in its split.",
    "jacobian": "Jacobian [classes, 3, H, W] of teacher {teacher} on the image, in its rows' scales.",
    "jacobian-scale": "Scale [classes] of each row of the Jacobian of teacher {teacher}.",
    "jacobian-class": "Class [classes] of each row of the Jacobian of teacher {teacher}.",
}


_ANSWERS = {
    "logits": "Raw logits [views, classes]",
    "logits-top": "The largest raw logits, falling, and the log of the others' summed exponentials [views, k + 1]",
    "logits-class": "The classes [views, k] of the largest logits",
    "logits-int8": "Raw logits [views, classes], in the steps of each answer from its middle,",
    "logits-scale": "Step and middle [views, 2] of the logits",
}


def _meaning(cache: Cache, array: ArrayLayout) -> str:
    """One sentence about an array's values, for people."""
    if array.kind == "delta":
        scale, eps, norm = (array.attributes[key] for key in ("scale", "eps", "norm"))
        attack = cache.spec.attacks[str(array.attack)].kind
        return (
            f"Perturbations [views, 3, H, W] of attack {array.attack} ({attack} on teacher {array.teacher}, "
            f"{norm} radius {eps:g}), in units of {scale:g} pixel levels."
        )
    if array.is_answer:
        where = "every view of the image"
        if len(cache.spec.bands) > 1:
            where = f"views {array.first_view} to {array.first_view + array.shape[1] - 1} of the image"
        if array.attack is not None:
            where = f"the views plus the perturbations of {array.attack}"
        return f"{_ANSWERS[array.kind]} of teacher {array.teacher} on {where}."
    if array.encoded:
        return "The image, as the bytes of a JPEG or PNG file."
    return _MEANINGS[array.kind].format(teacher=array.teacher)


def _stated(folder: Storage, key: str, encoding: str) -> Json:
    data = folder.read(key) or b""
    return _file(key, len(data), sha256_bytes(data), encoding)


def _file(path: str, size: int, sha256: str, encoding: str) -> Json:
    return {
        "@type": "cr:FileObject",
        "@id": path,
        "name": path,
        "contentUrl": path,
        "contentSize": f"{size} B",
        "encodingFormat": encoding,
        "sha256": sha256,
    }


def _file_set(name: str, includes: list[str], encoding: str, inside: Iterable[str] = ()) -> Json:
    within = {"containedIn": [{"@id": path} for path in inside]} if inside else {}
    return {
        "@type": "cr:FileSet",
        "@id": name,
        "name": name,
        **within,
        "encodingFormat": encoding,
        "includes": includes,
    }


def _record_set(name: str, description: str, fields: list[Json]) -> Json:
    return {"@type": "cr:RecordSet", "@id": name, "name": name, "description": description, "field": fields}


def _field(name: str, data_type: str, source: Json, shape: tuple[int, ...] = ()) -> Json:
    array = {"isArray": True, "arrayShape": ",".join(map(str, shape))} if shape else {}
    return {"@type": "cr:Field", "@id": name, "name": name, "dataType": data_type, **array, "source": source}


def _content(file_set: str) -> Json:
    return {"fileSet": {"@id": file_set}, "extract": {"fileProperty": "content"}}


def _file_name(file_set: str, transform: Json) -> Json:
    return {"fileSet": {"@id": file_set}, "extract": {"fileProperty": "filename"}, "transform": transform}
