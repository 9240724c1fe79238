"""Files that describe more than memory holds, and messages about long values."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darht.core.bounded import MAX_BYTES, MAX_DEPTH, MAX_NODES, cut, place, read_json, read_yaml, short_json, show
from darht.core.errors import ConfigError

# A bomb must not take the tests with it: it is read in a process with 4 GiB and an end.
READER = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
from pathlib import Path
from darht.cache.format.spec import CacheSpec
from darht.core.config import load_mapping, override, parse, parse_canonical
from darht.core.errors import ConfigError
how, path = sys.argv[1], Path(sys.argv[2])
try:
    if how == "yaml":
        parse(CacheSpec, load_mapping(path), path.name)
    elif how == "set":
        parse(CacheSpec, override({}, (path.read_text(),)), "options")
    else:
        parse_canonical(CacheSpec, path.read_bytes(), path.name)
except ConfigError as error:
    print(error)
"""


def refusal(how: str, path: Path, text: str) -> str:
    path.write_text(text)
    words = [sys.executable, "-c", READER, how, path]
    done = subprocess.run(words, capture_output=True, check=False, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
    (line,) = done.stdout.splitlines()
    assert len(line) < 5000
    return line


def doubled(levels: int) -> str:
    """Lists each of which holds nine times the one before."""
    lines = ["x0: &x0 [a]"] + [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join([*lines, f"data: *x{levels - 1}", "teachers: 3", ""])


MERGED = "a0: &a0 {k: 1}\n" + "\n".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12))
CHAIN = "a0: &a0 [1]\n" + "\n".join(f"a{i}: &a{i} {'[' * 30}*a{i - 1}{']' * 30}" for i in range(1, 40))
DEEP = 100_000


@pytest.mark.parametrize(
    ("how", "text", "expected"),
    [
        ("yaml", doubled(7), "a file may hold 100,000 values, aliases written out"),
        ("yaml", doubled(30), "a file may hold 100,000 values, aliases written out"),
        ("yaml", MERGED, "a file may hold 100,000 values, aliases written out"),
        ("yaml", CHAIN, "values may be nested 50 levels deep, aliases written out"),
        ("yaml", "data: " + "[" * DEEP + "]" * DEEP, "values may be nested 50 levels deep"),
        ("yaml", '{"data": ' * DEEP + "1" + "}" * DEEP, "values may be nested 50 levels deep"),
        ("yaml", "data: " + "- " * DEEP, "values may be nested 50 levels deep|is not valid YAML"),
        ("yaml", "data: &a [*a]", "line 1: an anchor holds an alias of itself"),
        ("yaml", "data: " + "9" * 500_000, "a number may have 1000 characters; this one has 500000"),
        ("yaml", "data: " + "1:1" * 200_000, "a number may have 1000 characters|must be a mapping"),
        ("yaml", "data: " + "x" * (1 << 20), "is larger than the 1,048,576 bytes"),
        ("yaml", "data: " + "x" * 1_000_000, "data must be a mapping; got 'xxx"),
        ("yaml", "k" * 100_000 + ": 1", "got|unknown key|is not valid YAML"),
        ("yaml", "data: [" + "a, " * 200_000 + "]", "a file may hold 100,000 values"),
        ("yaml", "teachers: [" + "a, " * 90_000 + "]", "teachers must be a mapping; got \\['a', "),
        ("yaml", "teachers: {" + ", ".join(f"t{i}: 1" for i in range(40_000)) + "}", "and 39986 more problems"),
        ("yaml", '"a\\nb": 1', "unknown key 'a\\\\nb'"),
        ("yaml", "data: 2024-99-99", "is not valid YAML: month must be in 1..12"),
        ("set", "data=" + doubled(7).replace("\n", ", ").join("{}"), "100,000 values|is not valid YAML"),
        ("set", "data=" + "[" * DEEP, "the value is not valid YAML: values may be nested 50 levels deep"),
        ("set", ".".join("a" * 300) + "=1", "descends 299 levels; an assignment may descend 49"),
        ("set", "data=" + "x" * 900_000, "data must be a mapping; got 'xxx"),
        ("json", "[" * DEEP, "is nested more than 50 levels deep"),
        ("json", '{"a":' * 400 + "1" + "}" * 400, "is nested more than 50 levels deep"),
        ("json", "[" * 51 + "]" * 51, "is nested more than 50 levels deep"),
        ("json", "9" * 10_000, "is not JSON: Exceeds the limit"),
        ("json", '{"data": "' + "x" * 3_000_000 + '"}', "data must be a mapping; got 'xxx"),
    ],
    ids=lambda value: None if len(value) > 40 else value,
)
def test_a_bomb_is_one_line(tmp_path: Path, how, text, expected):
    assert re.search(expected, refusal(how, tmp_path / "spec.yaml", text))


def test_aliases_and_merge_keys_keep_working():
    text = "a: &a {x: 1, y: [2]}\nb: {<<: *a, x: 3}\nc: *a\n"
    assert read_yaml(text, "f") == {"a": {"x": 1, "y": [2]}, "b": {"x": 3, "y": [2]}, "c": {"x": 1, "y": [2]}}


@pytest.mark.parametrize("path", sorted(Path("recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_is_far_from_the_bounds(path: Path):
    assert isinstance(read_yaml(path.read_bytes(), path.name), dict)


def test_the_bounds_are_where_they_say():
    assert read_yaml("[" * MAX_DEPTH + "]" * MAX_DEPTH, "f") is not None
    with pytest.raises(ConfigError, match="values may be nested 50 levels"):
        read_yaml("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "f")
    assert read_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, "f") is not None
    shared = "a: &a [" + "1," * 998 + "]\nb: [" + "*a," * 99 + "]"  # 5 + 100 * 998 + 99 values
    assert len(read_yaml(shared, "f")["b"]) == 99
    with pytest.raises(ConfigError, match=f"may hold {MAX_NODES:,} values"):
        read_yaml(shared[:-1] + "*a,*a]", "f")
    with pytest.raises(ConfigError, match=f"larger than the {MAX_BYTES:,} bytes"):
        read_yaml(" " * (MAX_BYTES + 1), "f")


def test_json_has_no_bound_of_size():
    assert len(read_json(json.dumps(list(range(300_000))), "f")) == 300_000


@given(
    st.recursive(
        st.integers() | st.text() | st.floats(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_what_is_shown_is_short_and_one_line(value):
    assert len(show(value)) <= 160 and "\n" not in show(value)
    assert len(short_json(value)) <= 60
    assert len(place(value)) <= 160 and "\n" not in place(value)


def test_short_values_are_shown_as_they_are():
    assert (show("a"), show([1, "x"]), show({"a": None}), place("a.b"), cut("abcdef", 5)) == (
        "'a'", "[1, 'x']", "{'a': None}", "a.b", "ab...",
    )  # fmt: skip
