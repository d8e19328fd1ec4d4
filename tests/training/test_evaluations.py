"""`training.evaluations`: sets on intervals of their own, and mistakes. tests/real runs tasks."""

import math
from pathlib import Path

import pytest

from fast_llm.config.document import read
from fast_llm.errors import ConfigError
from fast_llm.planning.preflight import preflight
from fast_llm.planning.report import describe_run
from fast_llm.report.facts import task_scores
from fast_llm.report.records import RunRecords
from fast_llm.training.log_lines import score_lines
from tests.training.runs import records, run, settings, write_tokens


def arguments(root: Path, *further: str) -> list[str]:
    return settings(
        root,
        "training.train_iters=5",
        "training.validation.interval=2",
        "training.validation.iterations=1",
        f"data.validation_sets.rare={root}/rare",
        f"data.validation_sets.usual={root}/rare",
        "training.evaluations.seldom={interval: 3, validation_sets: [rare], iterations: 2}",
        *further,
    )


def test_a_set_is_measured_on_the_interval_of_its_evaluation(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", documents=150)
    write_tokens(tmp_path / "rare", documents=60)
    assert run(arguments(tmp_path)) == 0
    found = records(tmp_path / "run", "validation")
    names = ("language_model_loss", "usual_loss", "rare_loss")
    measured = {step: [name in one for name in names] for step, one in found.items()}
    assert measured == {
        0: [True, True, True],
        2: [True, True, False],
        3: [False, False, True],
        4: [True, True, False],
        5: [True, True, True],
    }
    assert found[0]["rare_perplexity"] == pytest.approx(math.exp(found[0]["rare_loss"]))
    plan = describe_run(preflight(read(None, arguments(tmp_path)), 1, weights=False))
    assert "seldom: rare, at the start, every 3 steps and at the end" in plan
    assert "validation_tokens" not in plan and "and on usual" in plan


def test_the_last_step_is_measured_once_without_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tokens(tmp_path / "tokens", documents=150)
    write_tokens(tmp_path / "rare", documents=60)
    saved = ("run.experiment_dir", "training.checkpoint", "training.export")
    assert run([one for one in arguments(tmp_path) if not one.startswith(saved)]) == 0
    shown = "".join(capsys.readouterr())
    assert [shown.count(f"step {step}/5  validation loss") for step in (0, 2, 4, 5)] == [1] * 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "{interval: 3, validation_sets: [rarely], iterations: 2}",
            "training.evaluations.seldom.validation_sets.0: given rarely, not a name of"
            " data.validation_sets; did you mean rare? (it has rare, usual)",
        ),
        (
            "{interval: 3, validation_sets: [rare, rare], iterations: 2}",
            "training.evaluations.seldom.validation_sets.1: given rare, which"
            " training.evaluations.seldom measures already; name it once",
        ),
        (
            "{interval: 3}",
            "training.evaluations.seldom: give tasks or validation_sets; neither is given",
        ),
        (
            "{interval: 3, validation_sets: [rare]}",
            "training.evaluations.seldom: missing iterations: validation_sets require it, e.g. 25",
        ),
        (
            "{tasks: [mmlu]}",
            "training.evaluations.seldom: missing interval: give the number of steps, e.g. 1000, or"
            " null",
        ),
        (
            "{interval: 3, tasks: [mmlu], iterations: 2}",
            "training.evaluations.seldom: iterations belong to validation_sets; for tasks, give"
            " limit",
        ),
    ],
)
def test_mistakes(given: str, message: str, tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", documents=150)
    write_tokens(tmp_path / "rare", documents=60)
    with pytest.raises(ConfigError) as raised:
        preflight(read(None, arguments(tmp_path, f"training.evaluations.seldom={given}")), 1, False)
    assert any(problem.endswith(message) for problem in raised.value.problems), (
        raised.value.problems
    )


def test_tasks_need_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fast_llm.planning.evaluations.PACKAGES", ("no_such_package", "os"))
    write_tokens(tmp_path / "tokens", documents=150)
    given = "training.evaluations.quick={interval: 3, tasks: [mmlu]}"
    with pytest.raises(ConfigError) as raised:
        preflight(read(None, settings(tmp_path, "training.train_iters=1", given)), 1, False)
    assert [problem.partition("]}: ")[2] for problem in raised.value.problems] == [
        "training.evaluations (the extra `evaluate`) needs the package no_such_package: pip install"
        " no_such_package os"
    ]


RECORD = {
    "step": 2,
    "phase": "evaluation",
    "train_iters": 4,
    "evaluation": "quick",
    "tasks": {
        "one": {
            "acc": 0.25,
            "acc_stderr": 0.0625,
            "examples": 48,
            "contamination": {"examples": 40, "found": 4, "mostly": 1, "short": 8},
        },
        "two": {"perplexity": None, "examples": 10},
    },
    "seconds": 1.5,
}


def test_log_lines_of_scores() -> None:
    assert score_lines(RECORD) == [
        "step 2/4  quick: one  acc 0.2500 ± 0.0625  48 examples  1.5 s of all tasks",
        "step 2/4  quick: two  perplexity not finite  10 examples",
    ]


def test_the_report_reads_several_evaluations_of_a_step(tmp_path: Path) -> None:
    run_records = RunRecords(tmp_path)
    first = RECORD | {"step": 0, "tasks": {"one": {"acc": 0.5, "examples": 48}}}
    other = RECORD | {"evaluation": "slow", "tasks": {"three": {"acc": 1.0, "examples": 3}}}
    for record in (first, RECORD, other):
        run_records._add(record)
    scores = {one.task: one for one in task_scores(run_records)}
    assert set(scores) == {"one", "three"}
    assert (scores["one"].first, scores["one"].last, scores["one"].error) == (0.5, 0.25, 0.0625)
    assert scores["one"].found == "4 of 40"
    assert scores["three"].evaluation == "slow" and scores["three"].last_step == 2
