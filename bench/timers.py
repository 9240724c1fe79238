"""Where the time of a program goes, without a profiler's own."""

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any


class Timers:
    """Seconds inside some functions, outermost only, while `counting`."""

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()
        self.counting, self.inside = True, False

    @contextlib.contextmanager
    def on(self, owner: Any, name: str, label: str) -> Iterator[None]:
        original = getattr(owner, name)

        @functools.wraps(original)
        def timed(*words: Any, **options: Any) -> Any:
            if self.inside or not self.counting:
                return original(*words, **options)
            start, self.inside = time.perf_counter(), True
            try:
                return original(*words, **options)
            finally:
                self.inside = False
                self.spent[label] += time.perf_counter() - start

        setattr(owner, name, timed)
        try:
            yield
        finally:
            setattr(owner, name, original)
