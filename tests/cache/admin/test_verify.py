"""Verification and repair: whatever byte is damaged is found, never trained on in silence, and built again the same."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from damage import DAMAGES, flip
from reseal import reseal

from darht.cache.admin.status import read_status
from darht.cache.admin.verify import delta_faults, verify
from darht.cache.builder.build import build, plan_build
from darht.cache.builder.seal import seal
from darht.cache.export.webdataset import export_webdataset
from darht.cache.format.commit import State
from darht.cache.format.layout import block_rows
from darht.cache.format.spec import AttackSpec
from darht.cache.read.loader import load_training_set
from darht.cache.read.reader import open_cache
from darht.cache.read.training_set import TrainingSet
from darht.cache.read.webdataset import ExportedCache, open_shards
from darht.core.errors import CacheError, CorruptError
from darht.trainer.cli import train

CPU = torch.device("cpu")
FILES = [
    "spec.json",
    "manifest.json",
    "commits/label/00001.json",
    "commits/delta/pgd-vit/00003.json",
    "data.zarr/zarr.json",
    "data.zarr/label/zarr.json",
    "data.zarr/logits/vit/clean/zarr.json",
    "data.zarr/source_index/c/2",
    "data.zarr/label/c/0",
    "data.zarr/image/c/1/0/0/0",
    "data.zarr/views/offset/c/0/0",
    "data.zarr/delta/pgd-cnn/c/3/0/0/0/0",
    "data.zarr/logits/cnn/clean/c/0/0/0",
    "data.zarr/logits/vit/pgd-cnn/c/2/0/0",
]


def numbers(data: TrainingSet) -> list[bytes]:
    """Every number that a student could be trained on."""
    parts = (data.images, data.labels, data.offsets, data.clean, *data.deltas, *data.adversarial)
    return [part.numpy().tobytes() for part in parts] + [data.training.tobytes(), data.holdout.tobytes()]


@pytest.mark.parametrize("file", FILES)
def test_every_damage_is_noticed_and_never_trained_on(file: str, tiny_cache: Path, tmp_path: Path) -> None:
    whole = load_training_set(open_cache(tiny_cache), device=CPU, adversarial=True, budget_gib=1)
    for name, damage in DAMAGES.items():
        copy = Path(shutil.copytree(tiny_cache, tmp_path / name))
        damage(copy / file)
        try:
            noticed = bool(verify(copy))
        except CacheError:
            noticed = True
        assert noticed, f"{name} of {file} was not noticed"
        try:
            read = load_training_set(open_cache(copy), device=CPU, adversarial=True, budget_gib=1)
        except CacheError:
            continue
        # Commit records and source indices are not read when training: there is nothing to be misled by.
        assert file.startswith("commits/") or "source_index" in file, f"{name} of {file} was trained on"
        assert numbers(read) == numbers(whole)


@pytest.mark.parametrize("layout", ["samples", "blocks"])
def test_every_damage_of_an_export_is_noticed_and_never_trained_on(
    layout: str, tiny_cache: Path, tmp_path: Path
) -> None:
    export_webdataset(open_cache(tiny_cache), tmp_path / "whole", layout)  # type: ignore[arg-type]
    assert verify(tmp_path / "whole") == []
    for file in ("index.json", "shard-00003.tar"):
        for name, damage in DAMAGES.items():
            copy = Path(shutil.copytree(tmp_path / "whole", tmp_path / f"{file}-{name}"))
            damage(copy / file)
            try:
                noticed = bool(verify(copy))
            except CacheError:
                noticed = True
            assert noticed, f"{name} of {file} was not noticed"
            with pytest.raises(CacheError):
                load_training_set(open_shards(copy), device=CPU, adversarial=True, budget_gib=1)


@pytest.mark.parametrize("layout", ["samples", "blocks"])
def test_every_tar_of_an_export_is_looked_at_and_none_is_held_whole(
    layout: str, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tars, read_into, seen = tmp_path / "tars", ExportedCache.read_into, list[int]()
    export_webdataset(open_cache(tiny_cache), tars, layout)  # type: ignore[arg-type]

    def watched(self: ExportedCache, out: dict[str, np.ndarray], rows: slice) -> None:
        seen.append(max(map(len, out.values())))
        read_into(self, out, rows)

    monkeypatch.setattr(ExportedCache, "read_into", watched)
    units: list[tuple[str, int]] = []
    assert verify(tars, lambda name, number: units.append((name, number))) == []
    assert units == [(f"shard-{number:05d}.tar", number) for number in range(4)]
    assert max(seen) <= block_rows(open_cache(tiny_cache).spec.store) < open_cache(tiny_cache).rows
    (tars / "shard-00000.tar").unlink()
    flip(0.5)(tars / "shard-00001.tar")
    (tars / "shard-00003.tar").write_bytes(b"cut")
    says = verify(tars)
    expected = ("shard-00000.tar is missing", "shard-00001.tar does not have the sha256", "shard-00003.tar has 3 bytes")
    assert len(says) == 3 and all(part in line for part, line in zip(expected, says, strict=True))


@pytest.mark.parametrize("layout", ["samples", "blocks"])
def test_the_numbers_of_an_export_are_held_against_the_rules(layout: str, copied: Path, tmp_path: Path) -> None:
    reseal(copied, "label", put(3, -1))
    reseal(copied, "delta/pgd-cnn", put((0, 0, 0, 0, 0), 33))
    reseal(copied, "delta/pgd-vit", put((0, 1, 0, 0, 0), -32), shard=1)
    reseal(copied, "views/offset", put((1, 0), 5))
    export_webdataset(open_cache(copied), tmp_path / "tars", layout)  # type: ignore[arg-type]
    says = verify(tmp_path / "tars")
    for part in (
        "index.json, rows 0..",
        "shard-00000.tar, label, rows 0..31: labels lie in -1..9, classes in 0..9",
        "shard-00000.tar, delta/pgd-cnn, rows 0..31: in view 0 1 rows leave the ball: up to 33.0000 levels",
        "shard-00001.tar, delta/pgd-vit, rows 32..63: in view 1 1 rows leave the pixel range",
    ):
        assert any(part in line for line in says), (part, says)


@pytest.mark.parametrize("file", ["manifest.json", "data.zarr/logits/vit/clean/c/1/0/0", "data.zarr/image/zarr.json"])
@pytest.mark.parametrize("name", ["in the middle", "deleted", "swapped"])
def test_the_command_that_trains_refuses_in_one_line(file: str, name: str, copied: Path, tmp_path: Path) -> None:
    DAMAGES[name](copied / file)
    result = CliRunner().invoke(train, ["--shards", str(copied), "--out", str(tmp_path / "run"), "--device", "cpu"])
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit)
    said = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "darht-cache" in said[0], result.output
    assert not (tmp_path / "run" / "student").exists()


def test_the_message_names_path_rows_and_the_command_that_repairs(copied: Path) -> None:
    flip(0.5)(copied / "data.zarr/logits/vit/clean/c/1/0/0")
    with pytest.raises(CorruptError) as caught:
        load_training_set(open_cache(copied), device=CPU, adversarial=False, budget_gib=1)
    for part in ("data.zarr/logits/vit/clean/c/1/0/0", "rows 32..63", "darht-cache build"):
        assert part in str(caught.value)


def test_logits_that_are_not_finite_are_not_trained_on_although_every_hash_fits(copied: Path) -> None:
    reseal(copied, "logits/cnn/clean", put((2, 1, 0), np.nan))
    with pytest.raises(CorruptError, match="not finite"):
        load_training_set(open_cache(copied), device=CPU, adversarial=False, budget_gib=1)


@pytest.mark.parametrize("file", [file for file in FILES if file != "spec.json"])
def test_build_repairs_exactly_what_is_broken_and_the_root_hash_is_the_same(
    file: str, tiny_cache: Path, tiny_cache_config: Path, tmp_path: Path
) -> None:
    expected = open_cache(tiny_cache).root_hash
    plan = plan_build(tiny_cache_config, device=CPU)
    for name in ("in the middle", "deleted"):
        copy = Path(shutil.copytree(tiny_cache, tmp_path / name))
        DAMAGES[name](copy / file)
        report = build(plan, copy, device=CPU, on_unit=lambda array, shard, seconds: None)
        a_unit = file.startswith("commits/") or "/c/" in file
        assert report.computed == (1 if a_unit else 0)
        assert seal(copy).root_hash == expected
        assert verify(copy) == []


def put(index: tuple[int, ...] | int, value: float) -> Callable[[np.ndarray], None]:
    def change(values: np.ndarray) -> None:
        values[index] = value

    return change


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("source_index", put(3, 4), "the source indices are not the row numbers"),
        ("label", put(3, 10), "labels lie in 0..10, classes in 0..9"),
        ("views/offset", put((0, 1), 1), "view 0 is not the identity"),
        ("logits/vit/clean", put((2, 1, 0), np.nan), "logits that are not finite"),
        (
            "delta/pgd-cnn",
            put((0, 0, 0, 0, 0), 33),
            "in view 0 1 rows leave the ball: up to 33.0000 levels",
        ),
        ("delta/pgd-vit", put((0, 1, 0, 0, 0), -32), "in view 1 1 rows leave the pixel range [0, 255]"),
    ],
)
def test_numbers_that_break_the_rules_are_found_although_every_hash_fits(
    name: str, change: Callable[[np.ndarray], None], said: str, copied: Path
) -> None:
    reseal(copied, name, change)
    problems = verify(copied)
    assert any(said in problem for problem in problems), problems
    assert all("rows 0.." in problem or "view" in problem for problem in problems)


def test_a_whole_cache_has_no_problems_and_every_unit_is_looked_at(tiny_cache: Path) -> None:
    seen: list[tuple[str, int]] = []
    assert verify(tiny_cache, lambda name, shard: seen.append((name, shard))) == []
    assert len(seen) == len(set(seen)) == 45


def test_the_status_counts_units(copied: Path) -> None:
    assert read_status(copied).state is State.DONE
    (copied / "commits/image/00001.json").unlink()
    (copied / "data.zarr/logits/vit/clean/c/3/0/0").write_bytes(b"short")
    status = read_status(copied)
    assert status.state is State.CORRUPT and status.shards == (1, 3)
    by_name = {array.name: array for array in status.arrays}
    assert by_name["image"].missing == (1,) and by_name["image"].done == 3
    assert by_name["logits/vit/clean"].corrupt == (3,)
    left = by_name["image"].seconds_left
    assert left == pytest.approx(by_name["image"].seconds / 3)


def test_the_exit_codes(copied: Path, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    assert invoke("status", copied).exit_code == 0
    assert invoke("verify", copied).exit_code == 0
    (copied / "manifest.json").rename(tmp_path / "manifest.json")
    assert invoke("status", copied).exit_code == 3
    assert invoke("verify", copied).exit_code == 3
    (tmp_path / "manifest.json").rename(copied / "manifest.json")
    flip(0.5)(copied / "data.zarr/label/c/0")
    found = invoke("verify", copied)
    assert found.exit_code == 4 and "corrupt: " in found.output and "label/c/0" in found.output
    (copied / "data.zarr/label/c/0").unlink()
    assert invoke("status", copied).exit_code == 4
    as_json = json.loads(invoke("status", copied, "--json").output)
    assert as_json["state"] == "corrupt" and as_json["shards"] == [0]
    assert invoke("status", tmp_path / "nothing").exit_code == 2


def test_a_damaged_record_is_told_with_its_path(copied: Path) -> None:
    (copied / "commits/label/00002.json").write_text("{")
    assert len(verify(copied)) == 1 and "00002.json is not a commit record" in verify(copied)[0]
    with pytest.raises(CorruptError, match=r"00002\.json"):
        seal(copied)


def test_perturbations_outside_of_the_ball_or_the_pixel_range_are_told_with_the_worst():
    images = np.full((2, 3, 4, 4), 250, dtype=np.uint8)
    delta = np.zeros((2, 3, 4, 4))
    delta[1, 0, 0, 0] = 9
    small, large = (AttackSpec("pgd", "t", 1, {"eps": eps, "norm": "linf"}) for eps in (8.0, 9.0))
    ball, pixels = delta_faults(delta, images, small)
    assert ball == "1 rows leave the ball: up to 9.0000 levels, epsilon 8"
    assert list(delta_faults(delta, images, large)) == [pixels] == ["1 rows leave the pixel range [0, 255]"]
    wide = AttackSpec("pgd", "t", 1, {"eps": 9.0, "norm": "l2"})
    assert next(delta_faults(delta - 250, images, wide)).startswith("2 rows leave the ball")
