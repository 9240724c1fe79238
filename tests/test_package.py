"""What importing costs, and what the package offers."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "zarr", "timm", "torchvision", "sklearn", "faiss", "matplotlib")


def heavy_after(code: str) -> list[str]:
    """Which heavy packages a fresh interpreter has loaded after running `code`."""
    report = f"import sys, json; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_darht_is_light():
    assert heavy_after("import darht; darht.__version__") == []


@pytest.mark.parametrize("arguments", [["--help"], ["build", "--help"], ["info", "--help"], ["seal", "--help"]])
def test_the_help_of_the_cache_is_light(arguments):
    code = f"""
from darht.cache.cli import cache
try:
    cache({arguments!r})
except SystemExit as end:
    assert end.code == 0, end.code
"""
    assert heavy_after(code) == []


PUBLIC = [
    "Cache", "CacheConfig", "CacheDataset", "Classifier", "DarhtError", "EvalConfig", "EvalReport", "Reach",
    "TeachConfig", "TrainConfig", "__version__", "attacks", "build_cache", "default_copy", "evaluate", "load_student",
    "load_teacher", "open_cache", "train", "train_teacher", "trusting",
]  # fmt: skip


def test_the_public_names():
    import darht

    assert darht.__all__ == PUBLIC == sorted(PUBLIC)
    assert isinstance(darht.__version__, str)
    assert set(PUBLIC) <= set(dir(darht))
    for name in PUBLIC:
        found = getattr(darht, name)
        assert name == "__version__" or found.__doc__, name
    with pytest.raises(AttributeError, match="module 'darht' has no attribute 'nothing'"):
        _ = darht.nothing


def test_every_public_name_is_in_its_page_and_no_other():
    page = (REPOSITORY / "docs" / "python.md").read_text()
    rows = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert sorted(row.split("(")[0] for row in rows) == PUBLIC


READS = """
import sys
from pathlib import Path
import darht
cache = darht.open_cache(Path(sys.argv[1]))
logits = cache.read("logits/cnn/clean")
assert type(logits).__module__ == "numpy" and logits.shape == (100, 9, 10)
"""
COMMANDS = [["info"], ["status"], ["verify"], ["gc"], ["diff"], ["export"]]


def run(code: str, *arguments: object) -> list[str]:
    report = f"import json; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    command = [sys.executable, "-c", f"import sys\n{code}\n{report}", *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_reading_a_cache_needs_numpy_and_neither_torch_nor_zarr(tiny_cache: Path):
    assert run(READS, tiny_cache) == []


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_that_look_at_a_cache_import_no_torch_and_no_attack(
    command: list[str], tiny_cache: Path, tmp_path: Path
):
    caches = [tiny_cache] * (2 if command == ["diff"] else 1)
    if command[0] == "export":
        caches += ["--format", "webdataset", "--out", tmp_path / "tars"]
    code = """
from darht.cache.cli import cache
try:
    cache(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
assert not any(name.startswith("darht.attacks") for name in sys.modules)
"""
    assert "torch" not in run(code, *command, *caches)


def test_a_checkout_without_symbolic_links_says_so_in_one_line(tmp_path: Path):
    package = tmp_path / "darht"
    package.mkdir()
    (package / "__init__.py").write_text((REPOSITORY / "src" / "darht" / "__init__.py").read_text())
    (package / "core").write_text("../../core")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", "import darht"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: the checkout of darht has no symbolic links")


def test_an_install_puts_no_folder_of_the_root_on_the_path(tmp_path: Path):
    names = ("cache", "core", "trainer", "tools", "attacks")
    code = f"import importlib.util as u; print([name for name in {names} if u.find_spec(name)])"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (
            "darht.attacks",
            {
                "APGD",
                "APGDT",
                "ATTACKS",
                "Attack",
                "AttackWarning",
                "AutoAttack",
                "AutoSAGA",
                "CW",
                "CWLinf",
                "Engine",
                "Evaluation",
                "FABT",
                "FGSM",
                "MIM",
                "Outcome",
                "PGD",
                "RowRng",
                "SAGA",
                "SET_ATTACKS",
                "Square",
                "Threat",
                "parse_eps",
            },
        ),
        ("darht.core.nets", {"Backbone", "Preprocess", "backbone", "build", "check_pixels", "fold_head", "head_name"}),
    ],
)
def test_the_public_names_of_the_layers(module, names):
    loaded = importlib.import_module(module)
    assert set(loaded.__all__) == names
    assert all(hasattr(loaded, name) for name in names)
