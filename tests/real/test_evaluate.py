"""`fast-llm evaluate` and `training.evaluations` with the real lm-eval: its own numbers."""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from fast_llm import cli
from fast_llm.config.document import read
from fast_llm.data.tokenfile import TokenFileWriter
from fast_llm.errors import ConfigError
from fast_llm.evaluation.tasks import PACKAGES
from fast_llm.planning.preflight import preflight
from fast_llm.training.scoring import Scorer
from tests.evaluation.tiny import write_model, write_tasks
from tests.helpers import spawn
from tests.training.runs import run, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(find_spec(name) is None for name in PACKAGES), reason="needs lm_eval: make test-real"
    ),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
    write_model(folder / "model")
    write_model(folder / "other", seed=1)
    write_tasks(folder / "tasks")
    return folder


def expected(model: Path, place: Path, tasks: list[str], **more: Any) -> dict[str, Any]:
    """What lm-eval's own command computes."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        "hf",
        {"pretrained": str(model), "dtype": "float32", "max_length": more.pop("max_length", None)},
        tasks=tasks,
        device="cpu",
        bootstrap_iters=1000,
        task_manager=TaskManager(include_path=str(place / "tasks"), include_defaults=False),
        **more,
    )
    assert found is not None
    results: dict[str, Any] = found["results"]
    return results


def check(scores: list[dict[str, Any]], results: dict[str, Any]) -> None:
    """Equal to the last digits of fp32 sums of some hundred terms."""
    assert scores
    for score in scores:
        values = results[score["task"]]
        assert score["value"] == pytest.approx(values[f"{score['metric']},none"], rel=1e-5)
        error = values[f"{score['metric']}_stderr,none"]
        if score["standard_error"] is None:
            assert error == "N/A"
        else:
            assert score["standard_error"] == pytest.approx(error, rel=1e-4)


def test_the_scores_of_several_models(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [str(place / "model"), str(place / "other")]
    words = ["--tasks", "tiny", "tiny_generate", "--include-path", str(place / "tasks")]
    words += ["--num-fewshot", "1", "--output", str(place / "scores.json")]
    assert cli.main(["evaluate", *models, *words]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("task ") and "tiny_choice" in shown and " ± " in shown
    result = json.loads((place / "scores.json").read_text())
    assert [one["model"] for one in result["models"]] == models
    for one in result["models"]:
        assert {score["task"] for score in one["scores"]} == {
            *("tiny_choice", "tiny_last", "tiny_text", "tiny_generate")
        }
        tasks = ["tiny", "tiny_generate"]
        check(one["scores"], expected(one["model"], place, tasks, num_fewshot=1))


def test_a_limit_and_a_length(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tasks", "tiny", "--include-path", str(place / "tasks"), "--json"]
    words += ["--limit", "7", "--max-length", "24"]
    assert cli.main(["evaluate", str(place / "model"), *words]) == 0
    scores = json.loads(capsys.readouterr().out)["models"][0]["scores"]
    assert {score["examples"] for score in scores} == {6, 7}
    check(scores, expected(place / "model", place, ["tiny"], limit=7, max_length=24))


def test_texts_in_the_data(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer.from_file(str(place / "model/tokenizer.json"))
    questions = [json.loads(x) for x in (place / "tasks/questions.jsonl").read_text().splitlines()]
    writer = TokenFileWriter(place / "tokens", np.dtype("uint16"))
    for question in questions[:4]:
        text = "Before it. " + question["question"] + " And after."
        writer.append(np.array(tokenizer.encode(text).ids))
    writer.close()
    words = ["--tasks", "tiny_choice", "tiny_text", "--include-path", str(place / "tasks")]
    words += ["--json", "--data", str(place / "tokens")]
    assert cli.main(["evaluate", str(place / "model"), *words]) == 0
    found = json.loads(capsys.readouterr().out)["contamination"][str(place / "tokens")]
    assert found["tiny_choice"]["found"] == 4 and found["tiny_choice"]["examples"] == 30
    assert found["tiny_text"]["found"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--tasks", "tiny_choise"],
            "--tasks: tiny_choise: no task of lm-eval has this name, nor in {tasks}; did you mean"
            " tiny_choice?; `lm-eval ls tasks` lists all\n",
        ),
        (["--tasks", "choise.yaml"], "--tasks: choise.yaml: no such file\n"),
        (
            ["--tasks", "tiny", "--output", "{tasks}/none/scores.json"],
            "--output: {tasks}/none/scores.json: cannot be a file; its folder must exist\n",
        ),
    ],
)
def test_mistakes(
    words: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = str(place / "tasks")
    words = [word.format(tasks=tasks) for word in words]
    command = ["evaluate", str(place / "model"), *words, "--include-path", tasks]
    assert cli.main(command) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert message.format(tasks=tasks).strip() in shown


def test_a_folder_that_is_not_there(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tasks", "tiny", "--include-path", str(place / "none")]
    assert cli.main(["evaluate", str(place / "model"), *words]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert f"--include-path: {place / 'none'}: no such folder; it must hold" in shown


# During training.


def settings(place: Path, name: str, *further: str) -> list[str]:
    """A run of three steps with evaluations on every second one, and at both ends."""
    evaluation = f"{{interval: 2, tasks: [tiny], include_path: {place}/tasks}}"
    return [
        f"pretrained.path={place}/model",
        f"data.path={place}/training",
        "data.split=[8,1,1]",
        "batch.batch_size=4",
        "batch.micro_batch_size=2",
        "batch.sequence_length=32",
        "training.train_iters=3",
        "training.logs.interval=1",
        "training.export.interval=3",
        "training.checkpoint.interval=1",
        "training.checkpoint.keep=null",
        "optimizer.learning_rate.base=1e-2",
        f"training.evaluations.quick={evaluation}",
        f"run.experiment_dir={place}/{name}",
        *further,
    ]


@pytest.fixture(scope="module")
def training(place: Path) -> Path:
    """The folder, with training data that holds four of the tasks' questions."""
    tokenizer = Tokenizer.from_file(str(place / "model/tokenizer.json"))
    questions = [json.loads(x) for x in (place / "tasks/questions.jsonl").read_text().splitlines()]
    writer = TokenFileWriter(place / "training", np.dtype("uint16"))
    for number in range(60):
        text = questions[number % 4]["question"] if number < 4 else f"some text {number} " * 20
        writer.append(np.array(tokenizer.encode(text).ids))
    writer.close()
    return place


def evaluations(folder: Path) -> dict[int, dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {one["step"]: one["tasks"] for one in lines if one["phase"] == "evaluation"}


def check_tasks(tasks: dict[str, Any], results: dict[str, Any]) -> None:
    for name in ("tiny_choice", "tiny_last", "tiny_text"):
        for metric, value in results[name].items():
            key, _, filtered = metric.partition(",")
            if filtered == "none" and isinstance(value, float):
                assert tasks[name][key] == pytest.approx(value, rel=2e-4), (name, key)


def test_training_logs_what_lm_eval_finds_of_the_export(training: Path) -> None:
    """On the weights in memory: those of lm-eval's own model on the export, and on the base."""
    assert run(settings(training, "run")) == 0
    found = evaluations(training / "run")
    assert list(found) == [0, 2, 3]
    export = training / "run/export/llama/3"
    check_tasks(found[0], expected(training / "model", training, ["tiny"], max_length=32))
    check_tasks(found[3], expected(export, training, ["tiny"], max_length=32))
    assert found[0]["tiny_text"] != found[3]["tiny_text"]
    overlap = found[3]["tiny_choice"]["contamination"]
    assert overlap["found"] == 4 and overlap["examples"] == 30
    page = (training / "run/report.html").read_text()
    assert "tiny_choice" in page and "4 of 30" in page


def test_evaluations_change_nothing_and_resume(training: Path) -> None:
    """Interrupted in an evaluation, the run does it once, and ends on the same bits."""
    assert run(settings(training, "straight")) == 0
    assert run(settings(training, "without", "training.evaluations={}")) == 0
    same = weights(training / "straight/checkpoint/3")
    assert weights(training / "without/checkpoint/3") == same

    compute, calls = Scorer._compute, []

    def interrupting(scorer: Scorer, rows: Any) -> Any:
        calls.append(1)
        if scorer.train_step.optimizer.updates == 2:
            scorer.stop = lambda: True
        return compute(scorer, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "_compute", interrupting)
        run(settings(training, "broken"))
    assert list(evaluations(training / "broken")) == [0] and calls
    assert run(settings(training, "broken")) == 0
    lines = (training / "broken/metrics.jsonl").read_text().splitlines()
    steps = [one["step"] for one in map(json.loads, lines) if one["phase"] == "evaluation"]
    assert steps == [0, 2, 3]
    assert weights(training / "broken/checkpoint/3") == same
    ours, theirs = evaluations(training / "broken"), evaluations(training / "straight")
    for step in (0, 2, 3):
        for task in ("tiny_choice", "tiny_last", "tiny_text"):
            without = [
                {k: v for k, v in one[step][task].items() if k != "contamination"}
                for one in (ours, theirs)
            ]
            assert without[0] == without[1]


@pytest.mark.parametrize(
    "layout",
    [["model.multi_stage.zero_stage=3"], ["model.distributed.pipeline_parallel=2"]],
)
def test_two_processes(training: Path, layout: list[str]) -> None:
    name = layout[0].rpartition(".")[2]
    assert spawn(2, run, settings(training, name, *layout)) == [0, 0]
    found = evaluations(training / name)
    check_tasks(found[0], expected(training / "model", training, ["tiny"], max_length=32))


def test_a_failure_of_a_task_does_not_end_training(
    training: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = training / "long"
    write_tasks(long)
    text = (long / "tiny_last.yaml").read_text()
    changed = text.replace("{{question.split(' ')[-1]}}", "{{question}}{{question}}")
    (long / "tiny_last.yaml").write_text(changed)
    quick = f"{{interval: 2, tasks: [tiny_last], include_path: {long}, contamination: no}}"
    assert run(settings(training, "failing", f"training.evaluations.quick={quick}")) == 0
    shown = "".join(capsys.readouterr())
    assert "Evaluation quick at step 0 failed, and training continues: ValueError: a" in shown
    assert not evaluations(training / "failing")


def test_mistakes_are_found_before_the_start(training: Path) -> None:
    tasks = training / "tasks"
    for given, message in (
        (
            "tasks: [tiny_generate]",
            "training.evaluations.quick.tasks: tiny_generate generate text, which is not done"
            " during training; leave them out, and run them on an export: fast-llm evaluate EXPORT"
            " --tasks tiny_generate",
        ),
        (
            "tasks: [tiny_tekst]",
            "training.evaluations.quick.tasks: tiny_tekst: no task of lm-eval has this name, nor"
            f" in {tasks}; did you mean tiny_text?; `lm-eval ls tasks` lists all",
        ),
    ):
        quick = f"training.evaluations.quick={{interval: 2, {given}, include_path: {tasks}}}"
        with pytest.raises(ConfigError) as raised:
            preflight(read(None, settings(training, "wrong", quick)), 1, weights=False)
        assert [p for p in raised.value.problems if p.endswith(message)], raised.value.problems
