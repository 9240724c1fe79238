"""Parsing, canonical JSON, fingerprints and diffs."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darht.cache.builder.config import CacheConfig, DataConfig, ViewConfig
from darht.cache.format.manifest import Manifest
from darht.cache.format.spec import AttackSpec, CacheSpec, StoreSpec
from darht.core.config import canonical_json, fingerprint, load_mapping, override, parse, spec_diff, to_plain
from darht.core.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    size: int
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"size must be at least 1; got {self.size}")


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = Inner(1)
    kind: Literal["fast", "slow"] = "fast"
    flag: bool = False
    limit: int | None = None
    widths: tuple[int, ...] = ()
    parts: dict[str, Inner] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


def message(data: Any, cls: type = Outer) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(cls, data, "file.yaml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_everything_a_file_can_say():
    data = {
        "name": "a",
        "inner": {"size": 3, "share": 1},
        "kind": "slow",
        "flag": True,
        "limit": 7,
        "widths": [1, 2],
        "parts": {"left": {"size": 4}},
        "extra": {"anything": [1, None]},
    }
    assert parse(Outer, data, "file.yaml") == Outer(
        "a", Inner(3, 1.0), "slow", True, 7, (1, 2), {"left": Inner(4)}, {"anything": [1, None]}
    )
    assert isinstance(parse(Outer, data, "file.yaml").inner.share, float)


def test_an_unknown_key_comes_with_the_nearest_one():
    assert message({"name": "a", "widht": [1]}) == "file.yaml: unknown key 'widht'; did you mean 'widths'?"
    assert message({"name": "a", "inner": {"size": 1, "shaer": 0.1}}) == (
        "file.yaml.inner: unknown key 'shaer'; did you mean 'share'?"
    )


def test_an_unknown_key_that_is_near_to_none_comes_with_all():
    assert message({"size": 1, "zzz": 2}, Inner) == "file.yaml: unknown key 'zzz'; known keys are size, share"


def test_all_problems_come_in_one_message():
    text = message({"widht": [1], "flag": 1, "limit": "x", "parts": {"left": {"size": 0}, "right": {}}})
    assert text == (
        "file.yaml: unknown key 'widht'; did you mean 'widths'?; "
        "file.yaml: key 'name' is required; "
        "file.yaml.flag must be true or false; got 1; "
        "file.yaml.limit must be a whole number; got 'x'; "
        "file.yaml.parts.left: size must be at least 1; got 0; "
        "file.yaml.parts.right: key 'size' is required"
    )


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"name": 3}, "file.yaml.name must be text; got 3"),
        ({"name": "a", "kind": "quick"}, "file.yaml.kind must be one of fast, slow; got 'quick'"),
        ({"name": "a", "limit": 1.5}, "file.yaml.limit must be a whole number; got 1.5"),
        ({"name": "a", "limit": True}, "file.yaml.limit must be a whole number; got True"),
        ({"name": "a", "widths": 3}, "file.yaml.widths must be a list; got 3"),
        ({"name": "a", "widths": [1, "x"]}, "file.yaml.widths[1] must be a whole number; got 'x'"),
        ({"name": "a", "parts": [1]}, "file.yaml.parts must be a mapping; got [1]"),
        ({"name": "a", "inner": 3}, "file.yaml.inner must be a mapping; got 3"),
        ({"name": "a", "inner": {"size": 1, "share": True}}, "file.yaml.inner.share must be a finite number; got True"),
        ({"name": "a", "inner": {"size": 1, "share": None}}, "file.yaml.inner.share must be a finite number; got None"),
        ([1], "file.yaml must be a mapping; got [1]"),
    ],
)
def test_wrong_types(data, expected):
    assert message(data) == expected


@pytest.mark.parametrize(("text", "value"), [("5e-4", 5e-4), ("1E3", 1000.0), (" 2 ", 2.0), (3, 3.0)])
def test_numbers_that_yaml_reads_as_text(text, value):
    assert parse(Inner, {"size": 1, "share": text}, "x").share == value


@pytest.mark.parametrize("value", [math.nan, math.inf, "nan", "-inf", "1e999", 10**400, "five"])
def test_a_number_is_finite(value):
    assert "share must be a finite number" in message({"size": 1, "share": value}, Inner)


def test_none_is_a_value_of_an_optional_key_only():
    assert parse(Outer, {"name": "a", "limit": None}, "x").limit is None
    assert message({"name": None}) == "file.yaml.name must be text; got None"


def test_yaml_files(tmp_path: Path):
    path = tmp_path / "a.yaml"
    path.write_text("a: 1\nb: [2, 3]\n")
    assert load_mapping(path) == {"a": 1, "b": [2, 3]}
    path.write_text('{"a": 1}')
    assert load_mapping(path) == {"a": 1}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a: [1\n", "is not valid YAML"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        (b"- 1\n", "must hold a mapping of keys to values; it holds list"),
        (b"", "must hold a mapping of keys to values; it holds NoneType"),
        (b"!!python/object/apply:os.system [echo]", "is not valid YAML"),
    ],
)
def test_files_that_are_no_mapping(tmp_path: Path, content, expected):
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=expected) as caught:
        load_mapping(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_missing(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"cannot read .*no\.yaml: No such file"):
        load_mapping(tmp_path / "no.yaml")


GOLDEN = {"b": [1, 2.0, None, True], "a": {"z": "ü", "y": 1e-05}, "c": Path("x/y")}
GOLDEN_JSON = '{"a":{"y":1e-05,"z":"\\u00fc"},"b":[1,2.0,null,true],"c":"x/y"}\n'


def test_canonical_json_is_pinned():
    assert canonical_json(GOLDEN) == GOLDEN_JSON
    assert canonical_json(Outer("a", widths=(1,), parts={"q": Inner(2)})) == (
        '{"extra":{},"flag":false,"inner":{"share":0.5,"size":1},"kind":"fast","limit":null,"name":"a",'
        '"parts":{"q":{"share":0.5,"size":2}},"widths":[1]}\n'
    )


def test_the_fingerprint_is_pinned():
    assert fingerprint(GOLDEN) == "905ad39e14df6e4f49759f6f60515d876f501d6a949d23cc18d27e61b9065a38"


def test_canonical_json_has_no_nan():
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"a": math.nan})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def turned(value: Any) -> Any:
    """The same value with every mapping in the opposite order."""
    if isinstance(value, dict):
        return {key: turned(item) for key, item in reversed(value.items())}
    return [turned(item) for item in value] if isinstance(value, list) else value


@given(JSON)
def test_canonical_json_does_not_depend_on_the_order_of_keys(value):
    text = canonical_json(value)
    assert canonical_json(turned(value)) == text
    assert canonical_json(json.loads(text)) == text
    assert text.isascii() and text.count("\n") == 1


@given(JSON, JSON)
def test_a_diff_is_empty_only_for_equal_values(old, new):
    assert spec_diff(old, old) == []
    assert (spec_diff(old, new) == []) == (old == new)


def test_a_diff_names_every_field():
    old = {"a": {"x": 1, "y": 2, "gone": 3}, "b": [1], "same": 0}
    new = {"a": {"x": 1, "y": 5}, "b": [1, 2], "same": 0, "new": {"k": 1}}
    assert spec_diff(old, new) == [
        "a.y: 2 -> 5",
        "a.gone: 3 -> (absent)",
        "b: [1] -> [1, 2]",
        'new: (absent) -> {"k": 1}',
    ]


def test_a_diff_cuts_long_values():
    (line,) = spec_diff({"a": "x" * 100}, {"a": 1})
    assert line == 'a: "' + "x" * 56 + "... -> 1"


def test_override_changes_one_of_two_keys_that_share_a_mapping():
    shared = {"epochs": 3, "lr": 0.1}
    data = {"a": {"optim": shared}, "b": {"optim": shared}}
    assert override(data, ("a.optim.epochs=9",)) == {"a": {"optim": {"epochs": 9, "lr": 0.1}}, "b": {"optim": shared}}
    assert shared == {"epochs": 3, "lr": 0.1}


def test_override():
    data = {"a": {"b": 1}, "c": 2}
    assert override(data, ("a.b=3", "c=[1, x]", "d.e=true", "f=a=b", "g=")) == {
        "a": {"b": 3},
        "c": [1, "x"],
        "d": {"e": True},
        "f": "a=b",
        "g": None,
    }
    assert data == {"a": {"b": 1}, "c": 2}


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("a", "an assignment reads key=value; got 'a'"),
        ("c.d=1", "'c.d=1': 'c' is not a mapping"),
        ("a=[1", "'a=[1': the value is not valid YAML"),
    ],
)
def test_override_refuses(assignment, expected):
    with pytest.raises(ConfigError) as caught:
        override({"c": 2}, (assignment,))
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)


TEXT, COUNT = st.text(max_size=4), st.integers(1, 1000)
CONFIGS = st.builds(
    CacheConfig,
    data=st.builds(
        DataConfig,
        source=TEXT,
        limit=st.none() | COUNT,
        image_size=st.none() | COUNT,
        holdout=st.floats(0, 1, exclude_max=True),
    ),
    teachers=st.dictionaries(TEXT, st.nothing(), max_size=0),
    attacks=st.dictionaries(TEXT, st.dictionaries(TEXT, COUNT, max_size=2), max_size=2),
    views=st.builds(ViewConfig, padding=st.integers(0, 127), count=st.none() | COUNT),
    store=st.builds(lambda chunk, times: StoreSpec(chunk * times, chunk), COUNT, COUNT),
    seed=st.integers(0),
)


@given(CONFIGS)
def test_a_config_survives_its_plain_form(config):
    assert parse(CacheConfig, to_plain(config), "x") == config
    assert parse(CacheConfig, json.loads(canonical_json(config)), "x") == config


@given(st.builds(AttackSpec, parameters=st.dictionaries(TEXT, st.floats(-1e9, 1e9), max_size=3)))
def test_an_attack_survives_its_plain_form(spec):
    assert parse(AttackSpec, json.loads(canonical_json(spec)), "x") == spec


@given(st.builds(Manifest, format_version=st.just(1)))
def test_a_manifest_survives_its_plain_form(manifest):
    assert parse(Manifest, json.loads(canonical_json(manifest)), "x") == manifest


def test_a_spec_survives_its_plain_form(tiny_cache: Path):
    spec = parse(CacheSpec, json.loads((tiny_cache / "spec.json").read_bytes()), "spec.json")
    assert canonical_json(spec) == (tiny_cache / "spec.json").read_text()
    assert parse(CacheSpec, to_plain(spec), "x") == spec
    assert dataclasses.replace(spec, seed=spec.seed + 1) != spec
