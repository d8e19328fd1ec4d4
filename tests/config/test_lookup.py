"""`fast-llm settings` for a section, a setting, a part of a name, and an unknown name."""

import io

import pytest

from fast_llm import cli
from fast_llm.config.compat import PREPARE_REFUSED, REFUSED, RENAMED
from fast_llm.config.lookup import describe
from fast_llm.config.mistakes import iter_paths, iter_settings
from fast_llm.config.prepare import ConvertConfig, PrepareConfig
from fast_llm.config.reference import meaning
from fast_llm.config.train import TrainConfig, TrainingConfig
from fast_llm.errors import ConfigError

KINDS = (TrainConfig, PrepareConfig, ConvertConfig)


def text(path: str, columns: int = 100) -> str:
    return describe(path, columns, io.StringIO())


def test_a_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["settings", "training.num_workers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "training.num_workers"
    assert lines[1].split() == ["default", "2"]
    assert lines[2].split()[0] == "allowed" and "integer" in lines[2]
    assert lines[3].split()[0] == "meaning" and "Fast-LLM 0.2" in "".join(lines)
    shown = " ".join(" ".join(lines).split())
    assert " ".join(meaning(TrainingConfig, "num_workers").split()).replace("`", "") in shown


def test_the_end_of_a_name_is_enough() -> None:
    assert text("learning_rate.base") == text("optimizer.learning_rate.base")
    found = text("keep_every")
    assert "training.checkpoint.keep_every\n" in found and "training.export.keep_every\n" in found


@pytest.mark.parametrize("columns", [80, 100])
def test_every_section_and_setting_fits(columns: int) -> None:
    for kind in KINDS:
        for path in kind.model_fields:
            found = text(path, columns)
            lines = [line for line in found.splitlines() if " " in line.strip()]
            assert max(map(len, lines), default=0) <= columns
            for inner in iter_paths(kind):
                if inner.startswith(f"{path}."):
                    assert f"\n{inner}\n" in found, inner


def test_without_a_path_there_is_a_line_for_each_setting() -> None:
    lines = [line.split() for line in text("").splitlines() if line.startswith("  ")]
    expected = [path for kind in KINDS for path, _ in iter_settings(kind)]
    assert [line[0] for line in lines] == expected and all(len(line) > 1 for line in lines)
    assert text("prepare") in text("")


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("optimizer.lr", "no such setting; did you mean optimizer.learning_rate.base?"),
        ("trainin.checkpoint", "no such setting; did you mean training.checkpoint?"),
        ("z_loss", "no such setting; did you mean model.base_model.z_loss_coefficient?"),
        ("model.base_model.z_loss", "no such setting; did you mean"
            " model.base_model.z_loss_coefficient?"),
        ("zzzz", "no such setting; `fast-llm settings` lists all"),
        (next(iter(RENAMED)), "an older name; see `fast-llm settings"
            f" {next(iter(RENAMED.values()))}`"),
        (next(iter(REFUSED)), f"not supported: {next(iter(REFUSED.values()))}"),
        (next(iter(PREPARE_REFUSED)), f"not supported: {next(iter(PREPARE_REFUSED.values()))}"),
    ],
)  # fmt: skip
def test_a_wrong_name(path: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        text(path)
    assert caught.value.problems == [f"{path}: {problem}"]


def test_there_is_no_name_that_is_refused_and_offered() -> None:
    offered = {path for kind in KINDS for path in iter_paths(kind)}
    assert not offered & RENAMED.keys()
