"""Processes that are forked for a test: a server that does it for every order, and what a stage of a test calls."""

import json
import os
import subprocess
import sys
from typing import Any, Self


class ForkServer:
    """A script that runs until the block ends, on one thread: nothing waits for another process's threads."""

    def __init__(self, script: str, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, script, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def ask(self, order: dict[str, Any]) -> Any:
        """The answer to one order."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the server ended; its stderr says why"
        return json.loads(answer)


def tell_threads(words: tuple[str, ...]) -> None:
    """What a stage can call, in a process that does not know the tests: prints the threads that torch has there."""
    import torch

    sys.stdout.write(f"{torch.get_num_threads()}\n")
