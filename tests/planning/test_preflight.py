"""Warnings before the first step, and the words of the plan."""

import re
import shutil
from pathlib import Path

import pytest

from fast_llm import cli
from fast_llm.config.document import read
from fast_llm.planning.preflight import preflight
from fast_llm.planning.report import describe_run
from tests.training.runs import run, settings, write_tokens


@pytest.fixture
def tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_tokens(tmp_path / "tokens", 400)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def warnings(folder: Path, *further: str) -> list[str]:
    return preflight(read(None, settings(folder, *further)), 1, weights=False).warnings


SAVES = ["training.checkpoint.interval=5", "training.export.interval=5"]


@pytest.mark.parametrize(
    ("further", "expected"),
    [
        (
            [],
            "Nothing that is trained will be saved: set training.checkpoint.interval (training"
            " state, also after the last step) or training.export.interval (a Hugging Face model,"
            " also after the last step)",
        ),
        (
            ["run.experiment_dir=null"],
            "Nothing will be saved: set run.experiment_dir, and training.checkpoint.interval"
            " (training state, also after the last step) or training.export.interval (a Hugging"
            " Face model, also after the last step)",
        ),
        (
            ["training.export.interval=5"],
            "No checkpoints: a run that crashes starts over. Set training.checkpoint.interval to"
            " save its state",
        ),
        (["training.checkpoint.interval=5"], None),
        (SAVES, None),
    ],
)
def test_what_will_not_be_saved(
    tokens: Path, capsys: pytest.CaptureFixture[str], further: list[str], expected: str | None
) -> None:
    arguments = settings(tokens, "training.train_iters=1", *further)
    assert cli.main(["train", "--validate", *arguments]) == 0
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Warning")]
    assert run(arguments) == 0
    said = capsys.readouterr().out
    if expected is None:
        assert found == [] and "will be saved" not in said and "starts over" not in said
        return
    assert len(found) == 1 and found[0] == f"Warning       {expected}."
    assert said.count(f"{expected}.") == 1 and said.index(expected) < said.index("step 1/1  loss ")


def test_no_warning_if_nothing_is_trained(tokens: Path) -> None:
    measure = ["training.validation.interval=1", "training.validation.iterations=1"]
    assert warnings(tokens, "training.train_iters=0", *measure) == []


def test_averages_that_never_appear(tokens: Path) -> None:
    """An average that begins too late, and averages without exports."""
    late = ["training.train_iters=60", "training.averages.tail={start: 55, interval: 10}"]
    assert warnings(tokens, *late, *SAVES) == [
        "override training.averages.tail={start: 55, interval: 10}: training.averages.tail.start:"
        " given 55: the first update would be after step 65 (start + interval), but"
        " training.train_iters is 60, so this average stays empty"
    ]
    just = ["training.train_iters=60", "training.averages.tail={start: 50, interval: 10}"]
    assert warnings(tokens, *just, *SAVES) == []
    assert warnings(tokens, *just, SAVES[0]) == [
        "override training.averages.tail={start: 50, interval: 10}: training.averages: only"
        " checkpoints will hold the averages, because training.export.interval is null; set it to"
        " get models of them"
    ]


def plan(folder: Path, *further: str) -> str:
    spec = preflight(read(None, settings(folder, *further)), 1, weights=False)
    return describe_run(spec)


def test_the_words_of_the_plan(tokens: Path) -> None:
    shutil.copy(tokens / "tokens.bin", tokens / "docs.bin")
    shutil.copy(tokens / "tokens.idx", tokens / "docs.idx")
    found = plan(
        tokens,
        "training.train_iters=60",
        "training.checkpoint={interval: 10, keep: 2, keep_every: 2}",
        "training.export={interval: 1, keep: 3}",
        "training.averages.ema={decay: 0.9, interval: 1}",
        "training.validation={interval: 1, iterations: 1}",
        f"data.validation_sets.docs={tokens}/docs",
    )
    lines = [line.strip() for line in found.splitlines()]
    at = next(i for i, line in enumerate(lines) if line.startswith("Saving"))
    assert re.split("  +", lines[at + 1])[::3] == [
        "checkpoints",
        "every 20 steps, and the 2 newest of the others",
    ]
    assert re.split("  +", lines[at + 2])[::3] == ["exports", "3"]
    assert re.split("  +", lines[at + 2])[1] == "1 step"
    assert lines[at + 3].startswith("checkpoints are written in the background, from")
    assert lines[at + 4].startswith(
        "Averages      ema: EMA with decay 0.9 of the weights every step;"
    )
    assert "of 24 tokens = 2 a micro-batch × 4 micro-batches × 1 process\n" in found
    assert "at the start, every step and at the end, on the same 192 of " in found
    assert " tokens, and on docs\n" in found
    one = plan(tokens, "training.train_iters=1", "batch.batch_size=2")
    assert (
        "Batch         2 sequences of 24 tokens = 2 a micro-batch × 1 micro-batch × 1 process\n"
        in one
    )
    assert "Training      1 step of 48 tokens = 48 tokens, " in one


def test_sequences_longer_than_the_model_was_made_for(
    tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    most = "model.base_model.max_position_embeddings"
    arguments = settings(tokens, "training.train_iters=1", *SAVES, f"{most}=20")
    assert cli.main(["train", "--validate", *arguments]) == 0
    assert capsys.readouterr().out.endswith(
        "Warning       override batch.sequence_length=24: batch.sequence_length: given 24, above"
        f" {most}, 20: positions from 20"
        " on are new to the model, and other programs may refuse them. Lower it, or raise the"
        " other.\n"
    )
    assert warnings(tokens, "training.train_iters=1", *SAVES, f"{most}=24") == []
    (tokens / "model").mkdir()
    (tokens / "model" / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 40, "intermediate_size": 52, "vocab_size": 128,'
        ' "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,'
        ' "max_position_embeddings": 16, "head_dim": 10}'
    )
    shape = [
        "pretrained.path=model",
        "pretrained.model_weights=no",
        "batch.sequence_length=24",
        "run.experiment_dir=r",
    ]
    data = [f"data.path={tokens}/tokens", "data.split=[1]", "training.train_iters=1"]
    (said,) = preflight(read(None, [*shape, *data, *SAVES]), 1, weights=False).warnings
    assert "given 24, above max_position_embeddings of model/config.json, 16:" in said


def disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, free)
    )


def test_a_disk_that_will_be_full(
    tokens: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parameters = 27_400
    state, export = 12 * parameters, 4 * parameters
    more = [
        "training.train_iters=20",
        "training.checkpoint.interval=2",
        "training.checkpoint.keep=3",
        SAVES[1],
    ]
    needed = 4 * state + 4 * export
    disk(monkeypatch, needed)
    assert warnings(tokens, *more) == []
    disk(monkeypatch, needed - 1)
    (said,) = warnings(tokens, *more)
    assert said == (
        f"override run.experiment_dir={tokens}/run: run.experiment_dir: the disk will be full"
        " before this run ends: it keeps 4 more checkpoints of 329 kB and 4 more exports of 110 kB,"
        " 1.75 MB at most, and 1.75 MB are free. Lower training.checkpoint.keep or set"
        " training.export.keep, raise the intervals, or make room"
    )
    assert cli.main(["train", "--validate", *settings(tokens, *more)]) == 0
    assert "this run takes 1.75 MB at most" in capsys.readouterr().out
    # Existing checkpoints are not counted again, and deleted ones make room.
    disk(monkeypatch, 10**12)
    assert run(settings(tokens, *more, "training.train_iters=10")) == 0
    disk(monkeypatch, state + 2 * export)
    assert warnings(tokens, *more) == []
    disk(monkeypatch, state + 2 * export - 1)
    (said,) = warnings(tokens, *more)
    assert "it keeps 1 more checkpoints of 329 kB and 2 more exports of 110 kB" in said
    disk(monkeypatch, state + export - 1)
    assert cli.main(["train", "--validate", *settings(tokens, *more)]) == 2
    assert "a checkpoint and an export need 438 kB, but" in capsys.readouterr().err
    # A complete run needs no space.
    disk(monkeypatch, 10)
    assert warnings(tokens, *more, "training.train_iters=10") == []


def test_a_run_of_a_quadrillion_steps_is_checked_at_once(tokens: Path) -> None:
    (said,) = warnings(
        tokens,
        "training.train_iters=1_000_000_000_000_000",
        *SAVES,
        "training.checkpoint.keep_every=7",
    )
    assert (
        "the disk will be full before this run ends: it keeps 28571428571434 more checkpoints"
        in said
    )
