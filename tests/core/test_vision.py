"""torchvision is importable even where its compiled operators are not."""

import subprocess
import sys
import textwrap

import pytest

from darht.core.vision import torchvision

NEEDS_OPERATORS = """
    import sys
    import torch

    sys.imports = getattr(sys, "imports", 0) + 1
    from torchvision import part
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            raise RuntimeError(f"operator torchvision::{name} does not exist")
"""


def call_with_fake(folder, source, code):
    """Run `code` in a process whose torchvision is `source`; the standard output, stripped."""
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(textwrap.dedent(source))
    (package / "part.py").write_text("")
    program = f"import sys; sys.path.insert(0, {str(folder)!r})\n{textwrap.dedent(code)}"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_package_that_comes_back_works():
    package = torchvision()
    assert package is sys.modules["torchvision"]
    assert package is torchvision()
    fake = package.datasets.FakeData(size=2, image_size=(3, 8, 8), num_classes=4)
    assert len(fake) == 2
    assert fake[0][0].size == (8, 8)


def test_missing_operators_are_declared(tmp_path):
    code = """
        from darht.core.vision import torchvision
        first, second = torchvision(), torchvision()
        print(first.__name__, first is second, sys.imports)
    """
    assert call_with_fake(tmp_path, NEEDS_OPERATORS, code) == "torchvision True 2"


def test_declared_operators_outlive_the_call_and_are_declared_once(tmp_path):
    code = """
        import gc
        import torch
        from darht.core.vision import torchvision
        torchvision()
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        gc.collect()
        torchvision()
        try:
            torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
        except NotImplementedError:
            print("declared only", sys.imports)
    """
    assert call_with_fake(tmp_path, NEEDS_OPERATORS, code) == "declared only 3"


@pytest.mark.parametrize("text", ["the driver is too old", "operator torchvision::roi_align does not exist"])
def test_another_failure_is_an_import_error(tmp_path, text):
    code = """
        from darht.core.vision import torchvision
        try:
            torchvision()
        except ImportError as error:
            print(error)
    """
    printed = call_with_fake(tmp_path, f"raise RuntimeError({text!r})", code)
    assert printed == f"torchvision does not load beside this torch; install the build that belongs to it: {text}"


def test_an_absent_torchvision_is_an_import_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError):
        torchvision()
