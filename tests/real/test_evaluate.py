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
from fast_llm.data.tokenfile import TokenFileWriter
from fast_llm.evaluation.tasks import PACKAGES
from tests.evaluation.tiny import write_model, write_tasks

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
