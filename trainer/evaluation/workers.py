"""Processes that share an evaluation: each runs the same program, and makes what no other is making.

The results meet in the ledger. Every process has as many threads as one alone would have, so that rounding is the same,
and a share of the attacks' lanes, which change no bits.
"""

import logging
import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.context import SpawnProcess

import torch
from torch import nn

from darht.cache.builder.pool_processes import how_it_ended
from darht.core.errors import ConfigError, DarhtError, ModelError
from darht.core.parent import deaf_to_ctrl_c, end_with_spawner
from darht.core.tensors import first_sentence
from darht.core.trust import is_trusting, trusting

_PATIENCE = 5.0  # seconds that an ended process gets before it is killed
Assist = Callable[[str | nn.Module, torch.device], None]


@contextmanager
def helpers(
    assist: Assist, text: str | nn.Module, device: torch.device, workers: int
) -> Iterator[Callable[[], list[str]]]:
    """Start `workers - 1` processes that call `assist` with the model and a device of theirs, until the block ends.

    Yields:
        Says which of them were lost since the last call; the others do what they leave.

    Raises:
        ConfigError: less than one worker.
        ModelError: the module cannot be sent to another process.
    """
    if workers < 1:
        raise ConfigError(f"an evaluation needs at least one worker; got {workers}")
    started: list[SpawnProcess] = []
    told: set[int] = set()

    def lost() -> list[str]:
        ended = {number: one for number, one in enumerate(started, 1) if one.exitcode and number not in told}
        told.update(ended)
        return [f"worker {number} {how_it_ended(one.exitcode)}: the others go on" for number, one in ended.items()]

    model = text if isinstance(text, str) else _packed(text)
    context = multiprocessing.get_context("spawn")
    try:
        for number in range(1, workers):
            arguments = (assist, model, _device(device, number), torch.get_num_threads(), is_trusting())
            process = context.Process(target=_help, args=arguments, name=f"darht-eval-{number}", daemon=True)
            with deaf_to_ctrl_c():
                process.start()
            started.append(process)
        yield lost
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.join(_PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()


def _packed(model: nn.Module) -> bytes:
    try:
        return pickle.dumps(model)
    except Exception as error:  # pickle runs foreign code: whatever it raises means "cannot be sent"
        raise ModelError(
            f"{type(model).__qualname__} cannot be sent to workers ({first_sentence(error)}): evaluate it with "
            "workers=1, or give python:module:callable that makes it"
        ) from error


def _device(device: torch.device, number: int) -> torch.device:
    """Workers go round the GPUs, unless one was named."""
    if str(device) != "cuda":
        return device
    return torch.device("cuda", number % torch.cuda.device_count())


def _help(assist: Assist, model: str | bytes, device: torch.device, threads: int, trust_code: bool) -> None:
    """The life of a worker. What a user did wrong is said by the first process, which meets it too."""
    end_with_spawner()
    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    with suppress(DarhtError), trusting(trust_code):
        assist(model if isinstance(model, str) else pickle.loads(model), device)  # from this process's own parent
