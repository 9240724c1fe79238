"""Progress bars on a terminal; in a file a plain line every half minute."""

from time import monotonic
from typing import Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn, TaskID

_EVERY = 30.0  # seconds between two lines in a file


class Bar(Progress):
    """Rich's bars; where the console is no terminal, a line is printed now and then, and no bar but one that stays.

    Args:
        columns: of the bar.
        console: where it is drawn.
        transient: whether it goes away at the end.
        options: of rich's own.
    """

    def __init__(self, *columns: ProgressColumn, console: Console, transient: bool = False, **options: Any) -> None:
        hidden = transient and not console.is_terminal
        super().__init__(*columns, console=console, transient=transient, disable=hidden, **options)
        self._said = monotonic()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Change a task, as rich does."""
        super().update(task_id, **changes)
        self._say(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Move a task on, as rich does."""
        super().advance(task_id, advance)
        self._say(task_id)

    def _say(self, task_id: TaskID) -> None:
        if not self.console.is_terminal and monotonic() - self._said >= _EVERY:
            self._said = monotonic()
            task = self._tasks[task_id]
            parts = [f"{task.description or 'done'}: {task.completed:g}"]
            parts[0] += "" if task.total is None else f" of {task.total:g}"
            parts += [str(task.fields["note"])] if task.fields.get("note") else []
            parts += [f"{task.speed:.3g} a second"] if task.speed else []
            parts += [f"{_clock(task.elapsed)} so far"] if task.elapsed else []
            parts += [f"{_clock(task.time_remaining)} left"] if task.time_remaining else []
            self.console.print(", ".join(parts), highlight=False, markup=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
