"""What a report reads from metrics.jsonl: undone steps, events, thinned curves, changes, times."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fast_llm.report import facts
from fast_llm.report.records import Columns, Event, RunRecords, thin


def write(folder: Path, *records: dict[str, Any], mode: str = "w") -> RunRecords:
    folder.mkdir(exist_ok=True)
    with (folder / "metrics.jsonl").open(mode) as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    found = RunRecords(folder)
    found.update()
    return found


def trained(step: int, run: int = 0, **values: Any) -> dict[str, Any]:
    shared = {"run": run, "step": step, "phase": "training", "train_iters": 100, "spikes": 0}
    return shared | {"skipped_iters": 0, "language_model_loss": 1.0 + step / 100} | values


def validated(step: int, run: int = 0, **losses: Any) -> dict[str, Any]:
    return {"run": run, "step": step, "phase": "validation", "seconds": 2.0, **losses}


def test_the_newest_record_of_a_step_counts(tmp_path: Path) -> None:
    found = write(
        tmp_path / "run",
        trained(10),
        trained(20),
        trained(30),
        validated(30, language_model_loss=3.0),
        trained(20, run=1, language_model_loss=9.0),  # resumed from step 10
    )
    assert found.columns["training"].points("language_model_loss") == ([10, 20], [1.1, 9.0])
    assert found.columns["validation"].points("language_model_loss") == ([30], [3.0])
    assert found.events == [Event(20, "restart", "start 2")] and found.starts == 2
    assert found.step == 30 and not found.complete


def test_a_rewind_undoes_steps(tmp_path: Path) -> None:
    rewind = {"run": 0, "step": 10, "phase": "rewind", "after": 10, "spike": 30, "sequences": 8}
    found = write(
        tmp_path / "run",
        trained(10),
        trained(20),
        validated(20, language_model_loss=2.0),
        trained(30, spikes=1, skipped_iters=1),
        rewind,
        trained(20, language_model_loss=5.0),
    )
    assert found.columns["training"].points("language_model_loss") == ([10, 20], [1.1, 5.0])
    assert not found.columns["validation"].steps
    assert [(event.step, event.kind) for event in found.events] == [(30, "spike"), (30, "rewind")]


def test_what_is_appended_is_read_once(tmp_path: Path) -> None:
    found = write(tmp_path / "run", trained(10))
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write(json.dumps(trained(20))[:30])
    found.update()
    assert list(found.columns["training"].steps) == [10]
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write(json.dumps(trained(20))[30:] + "\nnot json\n[1]\n")
    found.update()
    found.update()
    assert list(found.columns["training"].steps) == [10, 20]


def test_fields_that_come_and_go() -> None:
    columns = Columns()
    columns.add(1, {"a": 1.0})
    columns.add(2, {"b": 2.0})
    columns.add(3, {"a": 3.0, "b": 4.0})
    assert columns.points("a") == ([1, 3], [1.0, 3.0])
    assert columns.points("b") == ([2, 3], [2.0, 4.0])
    assert math.isnan(columns.at("a", 2)) and columns.at("a", 9) == 3.0
    columns.undo(1)
    columns.add(5, {"b": 7.0})
    assert columns.points("a") == ([1], [1.0]) and columns.points("b") == ([5], [7.0])
    assert columns.points("none") == ([], [])


def test_fields_of_sources(tmp_path: Path) -> None:
    found = write(tmp_path / "run", trained(1, sources={"code": {"loss": 2.0, "epochs": None}}))
    assert found.columns["training"].points("sources/code/loss") == ([1], [2.0])


@pytest.mark.parametrize("count", [1, 50, 101, 12_345])
def test_thinned_curves_keep_their_extremes(count: int) -> None:
    steps = list(range(10, 10 + 3 * count, 3))
    values = [math.sin(step) for step in steps]
    values[count // 3], values[count // 2] = 40.0, -40.0
    few, kept = thin(steps, values, 100)
    assert len(few) <= 102 and few == sorted(set(few))
    assert all(values[steps.index(step)] == value for step, value in zip(few, kept, strict=True))
    assert (few[0], few[-1]) == (steps[0], steps[-1])
    assert (max(kept), min(kept)) == (max(values), min(values))
    if count <= 100:
        assert (few, kept) == (steps, values)


def test_what_was_learned_and_forgotten(tmp_path: Path) -> None:
    found = write(
        tmp_path / "run",
        validated(0, language_model_loss=3.0, prose_loss=2.0, same_loss=1.0, bits_per_byte=1.5),
        validated(50, language_model_loss=2.0, prose_loss=2.2, same_loss=1.0, bits_per_byte=1.0),
        validated(99, language_model_loss=2.5, prose_loss=2.3, same_loss=1.004, bits_per_byte=1.2),
    )
    changes = facts.changes(found)
    trained_on, prose, same = changes
    assert (trained_on.name, trained_on.verdict) == ("the training data", "learned")
    assert (trained_on.first, trained_on.best, trained_on.best_step) == (3.0, 2.0, 50)
    assert (trained_on.last, trained_on.bits) == (2.5, (1.5, 1.2))
    assert (prose.name, prose.verdict, prose.bits) == ("prose", "forgot", None)
    assert prose.change == pytest.approx(0.3) and same.verdict == "unchanged"
    assert facts.summary(changes) == (
        "learned the training data (-0.500) and forgot prose (+0.300) and left same unchanged, in"
        " nats per token."
    )
    once = facts.changes(write(tmp_path / "once", validated(0, a_loss=1.0)))
    assert facts.summary(once) == "was measured once, in nats per token."


def test_where_the_time_went(tmp_path: Path) -> None:
    def at(step: int, minute: int) -> dict[str, Any]:
        done = f"2026-01-01T10:{minute:02}:00+00:00"
        return trained(
            step, step_time_ms=3000.0, data_wait_ms=300.0, completion_time=done, remaining_time=0
        )

    found = write(
        tmp_path / "run", at(10, 0), at(20, 1), validated(20, language_model_loss=1.0), at(30, 2)
    )
    spent = dict(facts.times(found))
    assert spent["training steps"] == pytest.approx(2 * 10 * 2.7)
    assert spent["waiting for data, inside steps"] == pytest.approx(2 * 10 * 0.3)
    assert spent["validation"] == 2.0
    assert spent["saving, starts, and steps that were undone"] == pytest.approx(120 - 60 - 2)


def test_the_process_that_was_slow(tmp_path: Path) -> None:
    """The rank that was named most often; nothing where none was."""
    time: dict[str, Any] = {"step_time_ms": 100.0}
    none = write(tmp_path / "none", trained(1, **time), trained(2, **time))
    assert facts.slowest(none) is None
    assert "slower" not in str(facts.figures(none))
    some = write(
        tmp_path / "some",
        trained(1, **time, slowest_rank=3, slowest_times=1.5),
        trained(2, **time),
        trained(3, **time, slowest_rank=1, slowest_times=1.3),
        trained(4, **time, slowest_rank=3, slowest_times=1.4),
    )
    found = "rank 3, in 2 of 4 records", "was slower than the others, most often"
    assert found in facts.figures(some)


def test_borders_of_stages_and_branches(tmp_path: Path) -> None:
    found = write(tmp_path / "run", *(trained(s, consumed_samples=2 * s) for s in range(5, 31, 5)))
    settings = {
        "batch.sequence_length": 5,
        "data.stages": [{"until": 8}, {"until_tokens": 120}, {"until": 90}, {}],
        "run.branch_from.run": "parent",
        "run.branch_from.step": 4,
    }
    assert [(e.step, e.kind, e.text) for e in facts.borders(found, settings)] == [
        (4, "branch", "branch of parent"),
        (8, "stage", "end of stage 1 of the data"),
        (15, "stage", "end of stage 2 of the data"),  # the record with which it is over
    ]
    assert facts.borders(found, {"data.stages": [], "run.branch_from": None}) == []


def test_a_restart_is_where_the_run_resumed(tmp_path: Path) -> None:
    logs = tmp_path / "run/runs/1/logs"
    logs.mkdir(parents=True)
    (logs / "logs_rank_00.txt").write_text("Resuming from run/checkpoint/60, after step 60.\n")
    found = write(tmp_path / "run", trained(70), trained(100, run=1), trained(90, run=2))
    assert [(e.step, e.text) for e in found.events] == [(60, "start 2"), (90, "start 3")]


def test_a_branch_begins_with_the_validation_of_its_parent(tmp_path: Path) -> None:
    write(
        tmp_path / "parent",
        validated(0, language_model_loss=5.0),
        validated(20, language_model_loss=3.0, old_loss=1.0),
        validated(40, language_model_loss=2.0),
    )
    branch = {"run.branch_from.run": "elsewhere/parent", "run.branch_from.step": 25}
    found = facts.parent(tmp_path / "branch", branch)  # next to the branch, if moved together
    assert found == (tmp_path / "parent", 25)
    parent = RunRecords(found[0])
    parent.update()
    records = RunRecords(tmp_path / "branch")
    records.inherit(parent, 25)
    write(tmp_path / "branch", validated(30, language_model_loss=2.5))
    records.update()
    (change, old) = facts.changes(records)
    assert (change.first_step, change.first, change.last) == (20, 3.0, 2.5)
    assert old.verdict == "measured once"
    assert facts.parent(tmp_path / "branch", {"run.branch_from.run": "gone"}) is None


def test_settings_that_differ() -> None:
    one = {"model.base_model.z_loss_coefficient": 0.1, "model.base_model.vocab_size": 7, "a": None}
    names = [name for name, _, _ in facts.other_settings(one)]
    assert "model.base_model.z_loss_coefficient" in names
    assert "model.base_model.vocab_size" not in names
    assert facts.differences([one, one | {"a": 2}]) == [["a", "null", "2"]]
