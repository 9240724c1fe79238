"""The rules of CONTRIBUTING.md that no linter knows: sizes of functions and files, and counts of parameters."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

FOLDERS = ("core", "attacks", "cache", "trainer", "tools", "bench", "examples")
MOST_LINES = {"trainer/student/train.py": 60}  # of a function: the training loop is read in one piece
FUNCTION, PARAMETERS, FILE = 50, 8, 350


def problems(path: Path) -> Iterator[str]:
    """What breaks a rule in one file, a line each. A command's options are its parameters: cli.py may have more."""
    text = path.read_text()
    if (lines := text.count("\n")) > FILE:
        yield f"{path}: {lines} lines; at most {FILE}: move a part of it to a file of its own"
    most = MOST_LINES.get(str(path), FUNCTION)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.body[_first(node)].lineno + 1
            if length > most:
                yield f"{path}:{node.lineno}: {node.name} has {length} lines; at most {most}"
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(argument.arg not in ("self", "cls") for argument in given)
            if count > PARAMETERS and path.name != "cli.py":
                yield f"{path}:{node.lineno}: {node.name} has {count} parameters; at most {PARAMETERS}"


def _first(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The first statement that is not the docstring."""
    return int(ast.get_docstring(node) is not None and len(node.body) > 1)


if __name__ == "__main__":
    paths = subprocess.run(["git", "ls-files", "*.py"], capture_output=True, text=True, check=True).stdout.split()
    found = [line for name in paths if name.startswith(FOLDERS) for line in problems(Path(name))]
    print("\n".join(found) or f"{len(paths)} files keep the rules of the house")
    sys.exit(bool(found))
