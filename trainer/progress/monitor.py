"""What people see while a student trains: a progress bar, a line for each epoch, curves, and TensorBoard's events."""

from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, TaskID, TextColumn

from darht.core.bars import Bar
from darht.core.cli import stderr_console, time_columns
from darht.trainer.progress.curves import write_curves
from darht.trainer.progress.metrics import Metrics, Reading
from darht.trainer.state.interrupt import STOPPING, InterruptHandler
from darht.trainer.student.train import Callbacks

EVENTS = "tensorboard"
_REFRESH = 0.5  # seconds between two looks at the metrics
_BESIDE = 46  # characters beside the figures: the epoch, the smallest bar, two times
_CURVES_SHARE = 0.05  # of the time at most goes into the picture: short epochs share one


class Monitor:
    """Hooks for `train`, to be used as a context that shows the bar; `on_step` and `on_epoch` are told by `train`.

    From the first step on, the first Ctrl-C waits for the end of the step (or of the epoch, when that is being scored),
    where nothing is half done, and the hook raises KeyboardInterrupt then; another Ctrl-C does not wait.

    Args:
        out: the run's folder; gets `curves.png` and, where TensorBoard is installed, `tensorboard/`.
        epochs: of the whole run.
        shown: False for a process beside the one that speaks and draws.

    Attributes:
        finished: epochs that are done, on the disk or not; None before the first step, when a resumed run's are not
            known here.
    """

    def __init__(self, out: Path, epochs: int, *, shown: bool = True) -> None:
        self.out, self.epochs, self.shown = out, epochs, shown
        self.finished: int | None = None
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[note]}"))
        passed, left = time_columns()
        console = stderr_console(quiet=not shown)
        # Transient: the line of the last epoch says what a bar that stays would say again, from an earlier look.
        self._bar = Bar(*columns, passed, TextColumn("left"), left, console=console, expand=True, transient=True)
        self._task: TaskID | None = None
        self._looked, self._images, self._speed = monotonic(), 0, 0.0
        self._drawn, self._cost, self._fresh = monotonic(), 0.0, True
        self._events: Any = None
        self._interrupt = InterruptHandler(lambda: self.on_note(STOPPING))

    def __enter__(self) -> "Monitor":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._interrupt.release()
        self._bar.stop()
        if self._events is not None:
            self._events.close()
        if self.shown and not self._fresh:
            self._draw()

    @property
    def callbacks(self) -> Callbacks:
        """What to give to `train`."""
        return Callbacks(on_step=self.on_step, on_epoch=self.on_epoch, on_note=self.on_note)

    def on_step(self, step: int, total: int, images: int, metrics: Metrics) -> None:
        """Move the bar; the figures beside it are looked up twice a second."""
        if self._task is None:
            self._task = self._bar.add_task("", total=total, completed=step - 1, note="")
            self._interrupt.arm()
        self.finished = (step - 1) * self.epochs // total
        self._images += images
        now = monotonic()
        if now - self._looked >= _REFRESH:
            speed = self._images / (now - self._looked)
            self._speed = 0.7 * self._speed + 0.3 * speed if self._speed else speed
            self._looked, self._images = now, 0
            reading = metrics.glance()
            if reading is not None:
                note = describe(reading, self._speed, self._bar.console.width - _BESIDE)
                self._bar.update(self._task, note=note)
        epoch = f"epoch {self.finished + 1}/{self.epochs}"
        self._bar.update(self._task, completed=step, description=epoch)
        self._interrupt.check()

    def on_epoch(self, row: dict[str, Any]) -> None:
        """Print the epoch's line, note its scalars, and draw the curves when that is worth its time."""
        self.finished, self._fresh = row["epoch"], False
        self._bar.console.print(epoch_line(row, self.epochs), highlight=False, soft_wrap=True)
        if self.shown:
            self._note(row)
        if self.shown and monotonic() - self._drawn >= self._cost / _CURVES_SHARE:
            self._draw()
        self._looked, self._images = monotonic(), 0
        self._interrupt.check()

    def on_note(self, text: str) -> None:
        """Print what a person should know above the bar."""
        self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _draw(self) -> None:
        start = monotonic()
        write_curves(self.out)
        self._drawn, self._fresh = monotonic(), True
        self._cost = self._drawn - start

    def _note(self, row: dict[str, Any]) -> None:
        if self._events is None:
            self._events = event_writer(self.out / EVENTS, row["epoch"])
        if self._events is not None:
            for name, value in row.items():
                if name != "epoch" and isinstance(value, int | float):
                    self._events.add_scalar(_tag(name), value, row["epoch"])
            self._events.flush()


def event_writer(folder: Path, first: int) -> Any:
    """TensorBoard's writer, or None where it is not installed.

    Events of epochs from `first` on, which a run left that was stopped before it kept them, are marked as void.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(log_dir=str(folder), purge_step=first)


def _tag(name: str) -> str:
    group = "accuracy" if name.startswith(("train_", "holdout_")) else "training"
    return f"{group}/{name}"


def describe(reading: Reading, speed: float, room: int = 1000) -> str:
    """The figures beside the bar, as many as `room` characters hold: the first are the last to go."""
    parts = [f"loss {reading.loss:.3f}"]
    parts += [f"clean {reading.clean:.1f} %"] if reading.clean is not None else []
    parts += [f"adv. {reading.adversarial:.1f} %"] if reading.adversarial is not None else []
    parts += [f"{speed:.0f} images/s"]
    while len(parts) > 1 and len(", ".join(parts)) > room:
        parts.pop()
    return ", ".join(parts)


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """One finished epoch in a line."""
    names = {"train_clean": "training: clean", "train_adversarial": "training: adversarial"}
    names |= {"holdout_clean": "held out: clean", "holdout_pgd": "held out: PGD"}
    parts = [f"epoch {row['epoch']}/{epochs}", f"loss {row['loss']:.4f}"]
    said: set[str] = set()
    for key, words in names.items():
        if row.get(key) is not None:
            where, _, what = words.partition(": ")
            parts.append(f"{what if where in said else words} {row[key]:.1f} %")
            said.add(where)
    return ", ".join(parts)
