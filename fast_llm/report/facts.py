"""What a report says besides curves: losses before and after, figures, times, settings."""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from fast_llm.config.document import read as read_yaml
from fast_llm.config.section import dump
from fast_llm.config.train import TrainConfig
from fast_llm.config.validate import validate
from fast_llm.report.records import LONGEST_HEAD, Event, RunRecords
from fast_llm.terminal import short_count

RECIPE = Path(__file__).parent.parent / "demo" / "train-config.yaml"
TRAINED = "the training data"  # what language_model_loss of a validation is of
_HOW_TO_TRAIN = (  # settings below model.base_model
    *("z_loss_coefficient", "cross_entropy_impl", "cross_entropy_splits", "mlp_recompute_level"),
    *("use_flash_attention", "expert_auxiliary_loss_coefficient", "expert_z_loss_coefficient"),
    "expert_bias_update_rate",
)
SMALL = 0.005  # nats: smaller changes count as none
_PLAN = "What this run does:"


@dataclass(frozen=True)
class Change:
    """A loss of validation at the start, at its best, and at the end."""

    name: str
    first_step: int
    first: float
    best_step: int
    best: float
    last_step: int
    last: float
    bits: tuple[float, float] | None = None  # per byte, at the start and at the end

    @property
    def change(self) -> float:
        """In nats; negative: learned."""
        return self.last - self.first

    @property
    def verdict(self) -> str:
        """In a word."""
        if self.first_step == self.last_step:
            return "measured once"
        if abs(self.change) < SMALL:
            return "unchanged"
        return "learned" if self.change < 0 else "forgot"


def changes(records: RunRecords, until: float = math.inf) -> list[Change]:
    """How each loss of validation changed: of all data, each source, and each further set.

    `until`: the last step whose losses count.
    """
    columns = records.columns["validation"]
    found = []
    for field in columns.fields:
        source = field.removeprefix("sources/").removesuffix("/loss")
        if field == f"sources/{source}/loss":
            name, bits = source, f"sources/{source}/bits_per_byte"
        elif field.endswith("_loss"):
            name, bits = field.removesuffix("_loss"), field.removesuffix("loss") + "bits_per_byte"
            if field == "language_model_loss":
                name, bits = TRAINED, "bits_per_byte"
        else:
            continue
        steps, losses = columns.points(field)
        steps = steps[: bisect_right(steps, until)]
        losses = losses[: len(steps)]
        if not steps:
            continue
        best = min(range(len(losses)), key=losses.__getitem__)
        ends = columns.at(bits, steps[0]), columns.at(bits, steps[-1])
        found.append(
            Change(
                name,
                steps[0],
                losses[0],
                steps[best],
                losses[best],
                steps[-1],
                losses[-1],
                ends if all(map(math.isfinite, ends)) else None,
            )
        )
    return found


@dataclass(frozen=True)
class TaskScore:
    """A metric of a task at the first and the last evaluation."""

    evaluation: str
    task: str
    metric: str
    first_step: int
    first: float
    last_step: int
    last: float
    error: float  # the standard error at the end; NaN if there is none
    found: str  # how many examples the training data holds: "4 of 30"; "" if unknown


def task_scores(records: RunRecords) -> list[TaskScore]:
    """The scores of `training.evaluations` on tasks."""
    columns = records.columns.get("evaluation")
    found: list[TaskScore] = []
    for field in columns.fields if columns is not None else ():
        evaluation, _, rest = field.partition("/")
        task, _, metric = rest.partition("/")
        if metric == "examples" or metric.startswith("contamination/"):
            continue
        if metric.endswith("_stderr"):
            continue
        assert columns is not None
        steps, values = columns.points(field)
        if not steps:
            continue
        held = [
            columns.points(f"{evaluation}/{task}/contamination/{name}")[1][-1:]
            for name in ("found", "examples")
        ]
        errors = columns.points(f"{field}_stderr")[1]
        found.append(
            TaskScore(
                evaluation,
                task,
                metric,
                steps[0],
                values[0],
                steps[-1],
                values[-1],
                errors[-1] if errors else math.nan,
                _held(held[0][0], held[1][0]) if all(held) else "",
            )
        )
    return found


def _held(found: float, examples: float) -> str:
    return f"{found:,.0f} of {examples:,.0f}" if examples else "too short to be found"


def summary(found: Sequence[Change]) -> str:
    """What was learned and forgotten, in words: "learned code (-1.20) and forgot prose (+0.10)"."""
    parts = []
    for verdict, before in (("learned", "learned"), ("forgot", "forgot")):
        named = [f"{one.name} ({one.change:+.3f})" for one in found if one.verdict == verdict]
        if named:
            parts.append(f"{before} {', '.join(named)}")
    if same := [one.name for one in found if one.verdict == "unchanged"]:
        parts.append(f"left {', '.join(same)} unchanged")
    return (" and ".join(parts) or "was measured once") + ", in nats per token."


def figures(records: RunRecords) -> list[tuple[str, str]]:
    """The numbers at the top: what was done, and how fast."""
    training = records.columns["training"]
    found = [(f"{records.step:,} of {records.train_iters:,}", "steps")]
    _, tokens = training.points("consumed_tokens")
    if tokens:
        found.append((short_count(tokens[-1]), "tokens"))
    _, losses = training.points("language_model_loss")
    if losses:
        found.append((f"{losses[-1]:.4f}", "training loss"))
    _, rates = training.points("tokens_per_sec_per_gpu")
    if rates:
        found.append((short_count(median(rates)), "tokens/s per process, median"))
    _, shares = training.points("mfu")
    if shares:
        found.append((f"{median(shares):.1%}", "MFU, median"))
    memory = [*training.points("max_reserved")[1], *training.points("resident")[1]]
    if memory:
        found.append((f"{max(memory) * 2**20 / 1e9:.1f} GB", "memory of the first process, peak"))
    if (slow := slowest(records)) is not None:
        found.append((slow, "was slower than the others, most often"))
    if records.starts > 1:
        found.append((str(records.starts), "starts"))
    return found


def slowest(records: RunRecords) -> str | None:
    """The rank that training.slow_process_factor named most often, and in how many records."""
    training = records.columns["training"]
    _, ranks = training.points("slowest_rank")
    if not ranks:
        return None
    rank, count = Counter(map(int, ranks)).most_common(1)[0]
    return f"rank {rank}, in {count} of {len(training.points('step_time_ms')[1])} records"


def times(records: RunRecords) -> list[tuple[str, float]]:
    """Where the time went, in seconds: (what, seconds), between the first and the last record."""
    training, validation = records.columns["training"], records.columns["validation"]
    steps, milliseconds = training.points("step_time_ms")
    if not steps or records.began is None or records.ended is None:
        return []
    counts = [b - a for a, b in zip([steps[0], *steps], steps, strict=False)]
    spent = sum(c * ms for c, ms in zip(counts, milliseconds, strict=True)) / 1e3
    waits = training.points("data_wait_ms")[1]
    waited = sum(c * ms for c, ms in zip(counts, waits, strict=False)) / 1e3
    evaluated = sum(s for s in validation.points("seconds")[1])
    total = (records.ended - records.began).total_seconds()
    found = [
        ("training steps", max(0.0, spent - waited)),
        ("waiting for data, inside steps", waited),
        ("validation", evaluated),
    ]
    other = total - spent - evaluated
    if other > 0.01 * total:
        found.append(("saving, starts, and steps that were undone", other))
    return [(what, seconds) for what, seconds in found if seconds > 0.001 * total]


def plan(folder: Path) -> str:
    """What the newest start of a run printed as its plan; "" without a log."""
    logs = [p for p in folder.glob("runs/*/logs/logs_rank_*0.txt") if p.parts[-3].isdigit()]
    for path in sorted(logs, key=lambda p: int(p.parts[-3]), reverse=True):
        with path.open(encoding="utf-8", errors="replace") as file:
            head = file.read(LONGEST_HEAD)
        _, found, rest = head.partition(_PLAN + "\n")
        if found:
            lines = rest.splitlines()
            end = next((n for n, line in enumerate(lines) if line[:2].isdigit()), len(lines))
            return "\n".join(lines[:end])
    return ""


def settings(folder: Path) -> dict[str, Any]:
    """The settings of a run, by dotted name, as config.yaml has them."""
    path = folder / "config.yaml"
    return _flat(yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.exists() else {}


def borders(records: RunRecords, ours: Mapping[str, Any]) -> list[Event]:
    """Where a run branched off another, and the last step of each stage of its data."""
    found = []
    parent, step = ours.get("run.branch_from.run"), ours.get("run.branch_from.step")
    if parent is not None and isinstance(step, int):
        found.append(Event(step, "branch", f"branch of {parent}"))
    stages = ours.get("data.stages") or []
    for number, stage in enumerate(stages[:-1], 1):
        until, tokens = stage.get("until"), stage.get("until_tokens")
        if tokens is not None:
            # Padding counts here, unlike in `consumed_tokens`.
            until = _step_of_tokens(records, ours, tokens)
        if until is not None and until <= records.step:
            found.append(Event(until, "stage", f"end of stage {number} of the data"))
    return found


def _step_of_tokens(records: RunRecords, ours: Mapping[str, Any], tokens: int) -> int | None:
    """The first logged step at which the run has consumed so many tokens, padding included."""
    training = records.columns["training"]
    steps, samples = training.points("consumed_samples")
    base, before, consumed = ours.get("batch.sequence_length") or math.inf, 0.0, 0.0
    for step, count in zip(steps, samples, strict=True):
        # Recorded where stages have several lengths.
        length = training.at("sequence_length", step)
        consumed += (count - before) * (length if math.isfinite(length) else base)
        before = count
        if consumed >= tokens:
            return step
    return None


def other_settings(ours: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The settings that differ from the recipe of Llama-3.1-8B: name, here, there.

    Those of the architecture are left out: the plan has them.
    """
    recipe = _flat(yaml.safe_load(dump(validate(TrainConfig, read_yaml(RECIPE)))))
    return [
        (name, _shown(value), _shown(recipe.get(name)))
        for name, value in ours.items()
        if not _is_architecture(name) and value != recipe.get(name)
    ]


def differences(every: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The settings that differ between runs: name, and the value of each run."""
    names = sorted({name for ours in every for name in ours})
    rows = [[name, *(_shown(ours.get(name)) for ours in every)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def parent(folder: Path, ours: Mapping[str, Any]) -> tuple[Path, int] | None:
    """The folder of the run that a run branched off, if it is there, and after which step."""
    given, step = ours.get("run.branch_from.run"), ours.get("run.branch_from.step")
    if not isinstance(given, str) or not isinstance(step, int):
        return None
    places = [Path(given).expanduser(), folder.absolute().parent / Path(given).name]
    return next(((p, step) for p in places if (p / "metrics.jsonl").is_file()), None)


def _is_architecture(name: str) -> bool:
    """Whether a setting says what the model is, not how it is trained."""
    above, _, last = name.rpartition(".")
    return above.startswith("model.base_model") and last not in _HOW_TO_TRAIN


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        inside = isinstance(value, dict) and value
        found |= _flat(value, f"{prefix}{name}.") if inside else {prefix + str(name): value}
    return found


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return (
        yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()
    )
