"""The model as it was before anybody asked it anything: every question goes to a copy that has seen nothing.

The copy is a process forked from one that was forked when the model was loaded, so that not only what the object holds
is new, but also globals, closures and class attributes. Where there is no fork, or it fails, the copy is a deep copy.
"""

import copy
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from darht.attacks.objectives import input_gradient, margin

PATIENCE = 120.0  # seconds for one answer
_Question = tuple[np.ndarray, np.ndarray | None]


class Fresh:
    """A model that forgets every question; start it before the model is asked, and close it.

    Args:
        model: pixels to logits, never asked.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = copy.deepcopy(model).cpu()
        self._connection: Connection | None = None
        if hasattr(os, "fork"):
            self._start()

    def __enter__(self) -> "Fresh":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def logits(self, x: Tensor) -> Tensor:
        """Logits `[B, C]` of pixels `[B, 3, H, W]`, from one copy, on the CPU."""
        return self._ask(x, None)

    def gradient(self, x: Tensor, y: Tensor) -> Tensor:
        """The gradient of the margin with respect to the pixels, from one copy; zero where none reaches them."""
        return self._ask(x, y)

    def close(self) -> None:
        """End the processes."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
            self._process.join(5)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._model, there, here), daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the children run on one thread
            self._process.start()
        there.close()
        self._connection = here

    def _ask(self, x: Tensor, y: Tensor | None) -> Tensor:
        question = x.cpu().numpy(), None if y is None else y.cpu().numpy()
        answer = self._from_process(question)
        if answer is None:
            self.close()
            answer = _answer(copy.deepcopy(self._model), question)
        return torch.from_numpy(answer)

    def _from_process(self, question: _Question) -> np.ndarray | None:
        if self._connection is None:
            return None
        try:
            self._connection.send(question)
            answer: np.ndarray | None = self._connection.recv() if self._connection.poll(PATIENCE) else None
        except (EOFError, OSError):
            return None
        return answer


def _serve(model: nn.Module, connection: Any, others: Any) -> None:
    """Fork a child for every question, until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the asking process decides when to end
    others.close()
    torch.set_num_threads(1)
    while True:
        try:
            question = connection.recv()
        except (EOFError, OSError):
            return
        child = os.fork()
        if child:
            if os.waitpid(child, 0)[1]:
                connection.send(None)
            continue
        try:
            connection.send(_answer(model, question))
            os._exit(0)
        except BaseException:  # whatever foreign code raises, the asking process tries a copy
            os._exit(1)


def _answer(model: nn.Module, question: _Question) -> np.ndarray:
    pixels = torch.from_numpy(question[0])
    if question[1] is None:
        with torch.no_grad():
            return np.asarray(model(pixels).float().numpy())
    y = torch.from_numpy(question[1])
    return _slope(lambda z: margin(model(z), y), pixels).numpy()


def _slope(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    try:
        return input_gradient(loss, x)
    except RuntimeError:
        return torch.zeros_like(x)
