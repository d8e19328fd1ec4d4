"""What metrics.jsonl of a run says, step by step, without the steps that were undone.

A run that was killed repeats the steps after its newest checkpoint; a rewind undoes steps. The
newest record of a step counts. `RunRecords.update` reads only what was appended since it was last
called, so a run of any length can be followed.
"""

import json
import math
import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

LONGEST_HEAD = 2**18  # characters at the start of a log, in which the plan and the start are
_RESUMED = re.compile(r"Resuming from .*, after step (\d+)\.")
PHASES = ("training", "validation", "test", "evaluation")
# Of these a page has no use; they are left out, as reading 100,000 records takes seconds.
# fmt: off
_NOT_SHOWN = (
    *("run", "iteration", "train_iters", "percent_done", "step", "batch_size", "perplexity"),
    *("remaining_time", "allocated", "reserved", "global_max_reserved", "step_time_average_ms"),
    *("model_tflops", "hardware_tflops", "nan_iters", "target_tokens"),
)
# fmt: on


@dataclass(frozen=True)
class Event:
    """Something that happened at a step."""

    step: int
    kind: str  # restart, rewind, spike or skipped
    text: str


class Columns:
    """Records of one phase by step, ascending: an array for each field, NaN where it is missing."""

    def __init__(self) -> None:
        self.steps = array("q")
        self.fields: dict[str, array[float]] = {}

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add a record. Those of this step and of later ones were undone."""
        self.undo(step - 1)
        count = len(self.steps)
        self.steps.append(step)
        for name, value in values.items():
            column = self.fields.get(name)
            if column is None:
                column = self.fields[name] = array("d")
            if len(column) < count:
                column.extend([math.nan] * (count - len(column)))
            column.append(value)

    def join(self, step: int, values: Mapping[str, float]) -> None:
        """Add a record to that of this step, if there is one: another evaluation's."""
        self.undo(step)
        if not self.steps or self.steps[-1] != step:
            self.add(step, values)
            return
        count = len(self.steps)
        for name, value in values.items():
            column = self.fields.setdefault(name, array("d"))
            column.extend([math.nan] * (count - len(column)))
            column[-1] = value

    def undo(self, after: int) -> None:
        """Drop the records after a step."""
        count = bisect_right(self.steps, after)
        if count < len(self.steps):
            del self.steps[count:]
            for column in self.fields.values():
                del column[count:]

    def points(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a field, where it has one."""
        values = self.fields.get(name, array("d"))
        found = [(s, v) for s, v in zip(self.steps, values, strict=False) if math.isfinite(v)]
        return [step for step, _ in found], [value for _, value in found]

    def at(self, name: str, step: int) -> float:
        """A field's value at the last record up to a step; NaN without one."""
        values = self.fields.get(name, array("d"))
        place = bisect_right(self.steps, step) - 1
        return values[place] if 0 <= place < len(values) else math.nan


class RunRecords:
    """The records of a run. `columns`: by phase. `events`: in the order in which they happened."""

    def __init__(self, folder: Path, phases: Sequence[str] = PHASES):
        """`folder`: the experiment's; `phases`: whose records are kept."""
        self.folder = folder
        self.columns = {phase: Columns() for phase in phases}
        self.events: list[Event] = []
        self.samples: dict[int, dict[str, str]] = {}  # step → prompt → text
        self.train_iters = 0
        self.starts = 0
        self.began: datetime | None = None  # the times of the first and the last training record
        self.ended: datetime | None = None
        self._start = -1  # the number of the start that the last record is of
        self._read = 0  # bytes

    @property
    def step(self) -> int:
        """The last step that has a record."""
        return max((c.steps[-1] for c in self.columns.values() if c.steps), default=0)

    @property
    def complete(self) -> bool:
        """Whether the last step was trained, or, in a run without steps, a loss was measured."""
        steps = self.columns["training" if self.train_iters else "validation"].steps
        return bool(steps) and steps[-1] >= self.train_iters

    def update(self) -> None:
        """Read what was appended. Raises OSError."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # it is still being written
                self._read += len(line)
                try:
                    record = json.loads(line)
                except ValueError:  # a line that a crash cut short
                    continue
                if isinstance(record, dict) and isinstance(record.get("step"), int):
                    self._add(record)

    def _add(self, record: dict[str, Any]) -> None:
        step, phase = record["step"], record.get("phase")
        start = record.get("run", 0)
        if start != self._start:
            if self._start >= 0:
                begins = self._resumed_after(start)
                place = step if begins is None else begins
                if begins is not None:
                    self.undo(begins)
                self.events.append(Event(place, "restart", f"start {start + 1}"))
            self._start, self.starts = start, self.starts + 1
        if phase == "rewind":
            spike = record.get("spike", step)
            self.events.append(Event(spike, "rewind", f"spike; rewound to step {step}"))
            self.undo(step)
            return
        if phase == "samples" and len(self.columns) == len(PHASES):
            self._add_samples(step, record.get("samples"))
        if phase not in self.columns:
            return
        self.train_iters = record.get("train_iters", self.train_iters)
        if phase == "evaluation":
            self.columns[phase].join(step, _task_numbers(record))
            return
        self.columns[phase].add(step, _numbers(record))
        if phase != "training":
            return
        for name, kind in (("spikes", "spike"), ("skipped_iters", "skipped")):
            if record.get(name):
                self.events.append(Event(step, kind, f"{record[name]} {_WORDS[kind]}"))
                break  # a spike's update is skipped, too
        self._time(record)

    def _add_samples(self, step: int, samples: Any) -> None:
        kept = {s: texts for s, texts in self.samples.items() if s < step}
        pairs = [each for each in samples or () if isinstance(each, dict)]
        self.samples = kept | {step: {str(p.get("prompt")): str(p.get("text")) for p in pairs}}

    def undo(self, after: int) -> None:
        """Drop the records after a step."""
        for columns in self.columns.values():
            columns.undo(after)
        self.samples = {step: texts for step, texts in self.samples.items() if step <= after}

    def _resumed_after(self, start: int) -> int | None:
        """The step after which a start of the run resumed, as its log says."""
        for path in sorted(self.folder.glob(f"runs/{start}/logs/logs_rank_*0.txt")):
            with path.open(encoding="utf-8", errors="replace") as file:
                found = _RESUMED.search(file.read(LONGEST_HEAD))
            if found:
                return int(found[1])
        return None

    def inherit(self, parent: "RunRecords", step: int) -> None:
        """Take the last validation of the run that this one branched off after a step."""
        theirs = parent.columns["validation"]
        place = bisect_right(theirs.steps, step) - 1
        if place >= 0:
            values = {name: theirs.at(name, step) for name in theirs.fields}
            self.columns["validation"].add(theirs.steps[place], values)

    def _time(self, record: Mapping[str, Any]) -> None:
        try:
            done = datetime.fromisoformat(record["completion_time"])
            now = done - timedelta(seconds=record["remaining_time"])
        except (KeyError, TypeError, ValueError, OverflowError):
            return
        self.began, self.ended = self.began or now, now


_WORDS = {"spike": "spikes since the last record", "skipped": "updates skipped"}


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record that a page shows; those of a mapping inside it as name/inner."""
    found: dict[str, float] = {}
    inside = [("", record)]
    for prefix, values in inside:  # which grows
        for name, value in values.items():
            kind = type(value)
            if kind is dict:
                inside.append((f"{prefix}{name}/", value))
            elif (kind is float or kind is int) and name not in _NOT_SHOWN:
                found[prefix + name] = value
    return found


def _task_numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The scores of an evaluation's record, as evaluation/task/metric."""
    found: dict[str, float] = {}
    for task, fields in (record.get("tasks") or {}).items():
        held = {f"contamination/{k}": v for k, v in (fields.get("contamination") or {}).items()}
        for name, value in {**fields, **held}.items():
            if isinstance(value, int | float):
                found[f"{record.get('evaluation')}/{task}/{name}"] = float(value)
    return found


def thin(steps: list[int], values: list[float], most: int) -> tuple[list[int], list[float]]:
    """At most about `most` points of a curve, with its extremes: the smallest and the largest value
    of each of most / 2 equal stretches of steps, in their order.
    """
    if len(steps) <= most:
        return steps, values
    kept = {0, len(steps) - 1}
    first, span = steps[0], steps[-1] - steps[0] + 1
    stretches = max(1, most // 2)
    begin = 0
    for number in range(1, stretches + 1):
        end = bisect_left(steps, first + span * number // stretches)
        if end > begin:
            inside = range(begin, end)
            kept |= {min(inside, key=values.__getitem__), max(inside, key=values.__getitem__)}
        begin = end
    places = sorted(kept)
    return [steps[place] for place in places], [values[place] for place in places]
