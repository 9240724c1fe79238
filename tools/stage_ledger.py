"""What is noted of an experiment's stages: the command of each, the files that it read, and its seconds.

The words of a command do not change with the recipe or the spec that it reads, so the sha256 of these belongs to the
note. A stage that is asked again is cheap where its result stands, and where it would be another the command refuses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from darht.core.files import sha256_file
from darht.core.sealed import read_sealed, write_sealed
from darht.tools.stage_pool import Stage

STAGES = "stages.json"


@dataclass
class StageLedger:
    """The notes in a folder; `read_ledger` opens them.

    Attributes:
        path: of the file.
        notes: by stage: `line`, `seconds`, and `reads`, the sha256 by name of what the command read. Without `reads`
            a stage is not done: it is to run again, or an earlier version noted it.
    """

    path: Path
    notes: dict[str, dict[str, Any]]
    _reads: dict[str, dict[str, str]] = field(default_factory=dict)
    _before: dict[str, float] = field(default_factory=dict)

    def take_undone(self, plan: Sequence[Stage]) -> list[Stage]:
        """The stages of a plan that are to run, which no longer count as done, here and on disk.

        A stage is done when it ended with the same words and the same files read, what it makes is there, and so are
        all that it needs.
        """
        undone: dict[str, Stage] = {}
        for stage in plan:
            self._reads[stage.name] = {path.name: sha256_file(path) for path in stage.reads}
            if not self._is_done(stage) or not undone.keys().isdisjoint(stage.needs):
                undone[stage.name] = stage
                self._before[stage.name] = self._seconds_so_far(stage)
        forgotten = [note for name in undone if "reads" in (note := self.notes.get(name, {}))]
        for note in forgotten:
            del note["reads"]
        if forgotten:
            write_sealed(self.path, self.notes)
        return list(undone.values())

    def note(self, stage: Stage, seconds: float) -> None:
        """A stage of `take_undone` ended after so many seconds; those of what it went on from are added."""
        total = round(seconds + self._before[stage.name], 2)
        self.notes[stage.name] = {"line": stage.line, "seconds": total, "reads": self._reads[stage.name]}
        write_sealed(self.path, self.notes)

    def seconds(self, plan: Sequence[Stage]) -> dict[str, float]:
        """Seconds by stage of a plan, of those that are noted."""
        return {stage.name: self.notes[stage.name]["seconds"] for stage in plan if stage.name in self.notes}

    def _is_done(self, stage: Stage) -> bool:
        note = self.notes.get(stage.name, {})
        same = (note.get("line"), note.get("reads")) == (stage.line, self._reads[stage.name])
        return same and all(path.is_file() for path in stage.makes)

    def _seconds_so_far(self, stage: Stage) -> float:
        """Of what the same command left: it takes that up, or refuses."""
        note = self.notes.get(stage.name, {})
        stands = note.get("line") == stage.line and stage.makes and all(path.is_file() for path in stage.makes)
        return float(note["seconds"]) if stands else 0.0


def read_ledger(folder: Path) -> StageLedger:
    """The notes in a folder; none where nothing has run.

    Raises:
        CorruptError: they were changed after they were written.
    """
    path = folder / STAGES
    fix = "remove it, and every stage asks its command again"
    return StageLedger(path, read_sealed(path, fix).value if path.is_file() else {})
