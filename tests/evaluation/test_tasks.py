"""Messages about the optional packages."""

import importlib.util

import pytest

from fast_llm import cli


def test_without_the_packages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *more: None if name == "lm_eval" else find(name, *more),
    )
    monkeypatch.setattr("fast_llm.evaluation.tasks.PACKAGES", ("lm_eval", "transformers"))
    from fast_llm.evaluation import tasks

    assert tasks.missing_packages(("lm_eval", "transformers")) == ["lm_eval"]
    assert cli.main(["evaluate", "MODEL", "--tasks", "mmlu"]) == 2
    assert capsys.readouterr().err.strip() == (
        "fast-llm evaluate: `fast-llm evaluate` (the extra `evaluate`) needs the package lm_eval:"
        " pip install lm_eval transformers"
    )
