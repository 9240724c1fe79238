"""The client's side of a server that forks a child for every order: a script with lines of JSON in and out."""

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
