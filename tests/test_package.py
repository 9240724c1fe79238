"""What importing costs, and what the package offers."""

import importlib
import json
import subprocess
import sys

import pytest

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


def test_the_public_names():
    import darht

    assert darht.__all__ == ["__version__"]
    assert isinstance(darht.__version__, str)


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
