"""The lines of the log for a training step and an evaluation.

A training line fits a terminal of 100 columns behind the time: step, loss, gradient norm, learning
rate, tokens/s of all processes, memory of this process, time left. What is unusual follows it:
skipped updates, losses that are not finite, spikes, waiting for data, a slow process; then the
losses of up to six sources. Everything else is in metrics.jsonl.
"""

import math
from collections.abc import Mapping
from typing import Any

from fast_llm.terminal import short_count, short_duration

_MANY_SOURCES = 7  # from which on their losses are in metrics.jsonl only
_MUCH_WAITING = 0.1  # of a step's time, from which on waiting for data is shown


def training_line(values: Mapping[str, Any], processes: int) -> str:
    """The line of a training record of metrics.jsonl."""
    memory = values.get("max_reserved", values.get("resident", 0.0)) * 2**20
    parts = [
        _position(values),
        f"loss {_loss(values['language_model_loss'])}",
        f"grad {_digits(values['grad_norm'])}",
        f"lr {_power(values['learning_rate'])}",
        f"{short_count(values['tokens_per_sec_per_gpu'] * processes)} tok/s",
        f"{memory / 1e9:.{0 if memory >= 1e10 else 1}f}GB",
        f"{short_duration(values['remaining_time'])} left",
    ]
    if values["skipped_iters"]:
        parts.append(f"{values['skipped_iters']} skipped")
    if values["nan_iters"]:
        parts.append(f"{values['nan_iters']} not finite")
    if values["spikes"]:
        parts.append(f"{values['spikes']} spike{'s' * (values['spikes'] > 1)}")
    waiting = values["data_wait_ms"] / values["step_time_ms"]
    if waiting > _MUCH_WAITING:
        parts.append(f"{waiting:.0%} waiting for data")
    if "slowest_rank" in values:
        parts.append(f"rank {values['slowest_rank']} is {values['slowest_times']:.3g} × as slow")
    if sources := _sources(values):
        parts.append(f"({sources})")
    return "  ".join(parts)


def evaluation_lines(values: Mapping[str, Any], losses: Mapping[str, float | None]) -> list[str]:
    """A line for each loss of a validation or test record; the first has tokens and time."""
    lines: list[str] = []
    for name, loss in losses.items():
        of_set = "" if name == "language_model_loss" else f" of {name.removesuffix('_loss')}"
        parts = [_position(values)]
        if loss is None:
            parts.append(f"{values['phase']}{of_set}: no target tokens")
        else:
            parts.append(f"{values['phase']}{of_set} loss {_loss(loss)}")
            parts.append(f"perplexity {_digits(math.exp(min(loss, 700)))}")
            prefix = "" if name == "language_model_loss" else name.removesuffix("loss")
            bits = values.get(f"{prefix}bits_per_byte")
            if bits is not None:
                parts.append(f"{_digits(bits)} bits/byte")
        if not lines:
            sets = " of all sets" * (len(losses) > 1)
            parts.append(f"{values['tokens']:,} tokens{sets} in {values['seconds']:.1f} s")
        lines.append("  ".join(parts))
        if len(lines) == 1 and (sources := _sources(values)):
            lines.append(f"{_position(values)}  {values['phase']} by source: {sources}")
    return lines


def score_lines(values: Mapping[str, Any]) -> list[str]:
    """A line for each task of a record of an evaluation; the first has the time."""
    lines: list[str] = []
    for task, fields in values["tasks"].items():
        parts = [_position(values), f"{values['evaluation']}: {task}"]
        for name, value in fields.items():
            if name in ("examples", "contamination") or name.endswith("_stderr"):
                continue
            error = fields.get(f"{name}_stderr")
            shown = "not finite" if value is None else _loss(value)
            parts.append(f"{name} {shown}" + (f" ± {_loss(error)}" if error else ""))
        parts.append(f"{fields['examples']:,} examples")
        if not lines:
            every = " of all tasks" * (len(values["tasks"]) > 1)
            parts.append(f"{values['seconds']:.1f} s{every}")
        lines.append("  ".join(parts))
    return lines


def _sources(values: Mapping[str, Any]) -> str:
    """The loss of each source of a record, or "" if it has too many of them or none."""
    found = values.get("sources", {})
    if len(found) >= _MANY_SOURCES:
        return ""
    return ", ".join(
        f"{name} {'-' if fields['loss'] is None else _loss(fields['loss'])}"
        for name, fields in found.items()
    )


def _position(values: Mapping[str, Any]) -> str:
    total = values["train_iters"]
    return f"step {values['step']:{len(str(total))}}/{total}"


def _loss(loss: float) -> str:
    return f"{loss:.{4 if abs(loss) < 10 else 3 if abs(loss) < 100 else 1}f}"


def _digits(number: float) -> str:
    """Five characters where they are enough."""
    if not abs(number) < 1000:
        return f"{number:.3g}"
    return f"{number:.{3 if abs(number) < 10 else 2 if abs(number) < 100 else 1}f}"


def _power(number: float) -> str:
    """Two digits and the power of ten, without a leading zero: 3.0e-5."""
    mantissa, _, power = f"{number:.1e}".partition("e")
    return f"{mantissa}e{int(power)}" if number else "0"
