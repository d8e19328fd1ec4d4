"""A job from start to end: mistakes, processes that are late or lost, one run in a folder."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml

from fast_llm import cli
from fast_llm.config.compat import REFUSED, RENAMED
from fast_llm.config.document import read
from fast_llm.config.train import TrainConfig
from fast_llm.config.validate import validate
from fast_llm.errors import ConfigError, UserError
from fast_llm.parallel.mesh import Mesh
from fast_llm.planning.preflight import preflight
from fast_llm.planning.report import describe_run
from fast_llm.training.job import train
from fast_llm.training.run import lock
from tests.faults.jobs import Job
from tests.helpers import needs_compiler, slow, spawn
from tests.training.runs import losses, records, run, settings, write_tokens


def problems(arguments: list[str], processes: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        preflight(read(None, arguments), processes, weights=False)
    return str(caught.value)


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    write_tokens(tmp_path / "tokens", 400)
    return tmp_path


def test_the_plan_in_numbers(tokens: Path) -> None:
    arguments = settings(
        tokens,
        "training.train_iters=10",
        "training.checkpoint.interval=5",
        "training.export.interval=5",
    )
    text = describe_run(preflight(read(None, arguments), 2, weights=False))
    assert "8 sequences of 24 tokens = 2 a micro-batch × 2 micro-batches × 2 processes" in text
    assert "10 steps of 192 tokens = 1,920 tokens" in text
    assert re.search(
        r"Data {10}training tokens  epochs  source\n {14} +\d[\d,]*   0\.\d+  \S+/tokens\n", text
    )
    assert re.search(
        r"Saving {8} +every +size  kept\n {14}checkpoints  5 steps +\d+ kB  \d+\n", text
    )
    assert re.search(r"\n {14}exports +5 steps +\d+ kB  all\n", text) and "free at" in text
    assert re.search(
        r"Split         for +documents +tokens\n {14}training +320 +[\d,]+\n"
        r" {14}validation +40 +[\d,]+\n {14}test +40 ",
        text,
    )


def test_all_mistakes_of_data_and_settings_at_once(tokens: Path) -> None:
    text = problems(
        settings(
            tokens,
            "model.base_model.vocab_size=100",
            "batch.batch_size=3",
            "training.validation.interval=1",
            "optimizer.learning_rate.decay_style=linear",
            "optimizer.learning_rate.minimum=1",
        ),
        processes=3,
    )
    assert (
        "batch_size 3 / micro_batch_size 2 = 2 micro-batches for 3 processes: 1 would have nothing"
        " to do" in text
    )
    assert "training.validation.iterations" in text
    assert "optimizer.learning_rate.decay_iterations" in text
    assert "optimizer.learning_rate.minimum: given 1" in text


def test_a_validation_that_is_too_large(tokens: Path) -> None:
    text = problems(
        settings(tokens, "training.validation.interval=1", "training.validation.iterations=1000")
    )
    assert (
        "1000 batches × 8 sequences = 8,000 sequences" in text
        and "lower training.validation.iterations to" in text
    )


def test_tokens_that_the_model_does_not_have(
    tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        UserError,
        match=r"tokens: document \d+ holds token 1\d\d at position \d+.*vocab_size is 100",
    ):
        run(settings(tokens, "model.base_model.vocab_size=100", "training.train_iters=50"))


def test_mistakes_that_training_meets_have_their_setting(
    tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = settings(tokens, "model.base_model.vocab_size=100", "training.train_iters=50")
    assert cli.main(["train", *arguments]) == 2
    assert (
        f"fast-llm train: override data.path={tokens}/tokens: data.path: {tokens}/tokens"
        in capsys.readouterr().err
    )


def test_a_missing_package(tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fast_llm.planning.preflight.importlib.util.find_spec", lambda name: None)
    text = problems(settings(tokens, "training.wandb.project_name=x", "training.tensorboard=yes"))
    assert "pip install wandb" in text and "pip install tensorboard" in text


def test_a_folder_that_cannot_be_written(tokens: Path) -> None:
    (tokens / "file").write_text("")
    assert "is a file" in problems(
        settings(tokens, f"run.experiment_dir={tokens}/file/run", "training.train_iters=1")
    )


def test_the_plan_shows_the_learning_rate_at_each_border(tokens: Path) -> None:
    schedule = [
        f"optimizer.learning_rate.{one}"
        for one in (
            *("decay_style=wsd", "cooldown=4", "cooldown_style=1-sqrt", "decay_iterations=10"),
            *("warmup_iterations=2", "minimum=1e-3"),
        )
    ]
    arguments = settings(tokens, "training.train_iters=9", *schedule)
    spec = preflight(read(None, arguments), 1, weights=False)
    assert (
        "\nSchedule      step  learning rate  then\n"
        "              1             0.005  linear warmup\n"
        "              2              0.01  constant\n"
        "              6              0.01  1-sqrt cooldown\n"
        "              9          0.002206  end of training\n"  # 0.001 + 0.009 · (1 - √(3/4))
    ) in describe_run(spec)
    assert (
        "override optimizer.learning_rate.decay_iterations=10: optimizer.learning_rate"
        ".decay_iterations: the schedule ends at step 10, but training.train_iters is 9: training"
        " ends with the rate 0.002206" in spec.warnings
    )


def test_a_schedule_may_change_on_resume(tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It needs no consent, is logged, and continues by the number of the update."""
    rate = "optimizer.learning_rate"
    shared = settings(tokens, "training.checkpoint.interval=2")
    assert run([*shared, "training.train_iters=2"]) == 0
    capsys.readouterr()
    cooldown = ["decay_style=wsd", "decay_iterations=6", "cooldown=4"]
    assert run([*shared, "training.train_iters=6", *(f"{rate}.{one}" for one in cooldown)]) == 0
    output = capsys.readouterr().out
    assert f'{rate}.decay_style: "constant" → "wsd"' in output
    assert f"{rate}.cooldown: null → 4" in output
    rates = [record["learning_rate"] for record in records(tokens / "run").values()]
    assert rates == pytest.approx([1e-2, 1e-2, 7.5e-3, 5e-3, 2.5e-3, 0])


def test_what_may_change_on_resume_and_what_may_not(
    tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def arguments(*further: str) -> list[str]:
        return settings(
            tokens, "training.train_iters=2", "training.checkpoint.interval=2", *further
        )

    assert run(arguments()) == 0
    text = problems(
        arguments(
            "batch.batch_size=4",
            "model.distributed.seed=7",
            "model.base_model.transformer.num_layers=1",
        )
    )
    assert "batch.batch_size: given 4" in text and "run.accept_changes=[batch.batch_size]" in text
    assert "model.distributed.seed: given 7" in text
    assert "a model cannot change its shape" in text
    assert "training.train_iters: given 1" in problems(arguments("training.train_iters=1"))
    capsys.readouterr()
    consent = "run.accept_changes=[batch.batch_size]"
    assert (
        run(
            arguments(
                "batch.batch_size=4",
                consent,
                "training.train_iters=4",
                "optimizer.learning_rate.base=1e-3",
            )
        )
        == 0
    )
    output = capsys.readouterr().out
    assert (
        "batch.batch_size: 8 → 4" in output
        and "optimizer.learning_rate.base: 0.01 → 0.001" in output
    )
    # Two steps of eight sequences and two of four: each sequence is read once.
    assert records(tokens / "run")[4]["consumed_samples"] == 24


def test_the_resolved_configuration_is_valid_input(tokens: Path) -> None:
    assert run(settings(tokens, "training.train_iters=1")) == 0
    again = validate(TrainConfig, read(tokens / "run" / "config.yaml"), REFUSED, RENAMED)
    chosen = ("optimizer.moments_dtype=fp32", "model.multi_stage.compile_all=no")
    decided = settings(tokens, "training.train_iters=1", *chosen)
    first = validate(TrainConfig, read(None, decided), REFUSED, RENAMED)
    assert again.model_dump() == first.model_dump()
    assert yaml.safe_load((tokens / "run" / "config.yaml").read_text())["batch"]["batch_size"] == 8


def dies_while_they_meet(rank: int) -> None:
    def die(**_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 1:
        dist.new_group = die  # type: ignore[assignment]


def test_who_is_lost_while_they_meet_is_not_waited_for(tokens: Path) -> None:
    """The groups that they create later wait for `training.timeout`, here a week."""
    arguments = settings(tokens, "training.train_iters=50", "model.distributed.timeout=1")
    with Job(tokens, arguments, 2, dies_while_they_meet, helped=False) as job:
        assert job.wait() == 128 + signal.SIGKILL
        assert " tok/s " not in job.said()


def be_late(folder: Path) -> bool:
    """Whether the others were still waiting, or began to wait, when the last process came."""
    mesh = Mesh(0.5, 60)
    if mesh.rank == 1:
        while not (folder / "waits").exists():
            time.sleep(0.01)
        time.sleep(2)  # four times the timeout, whenever the start began
        (folder / "comes").touch()
    else:
        (folder / "waits").touch()
    mesh.barrier()
    return (folder / "comes").exists()


def test_patience_lasts(tmp_path: Path) -> None:
    assert spawn(2, be_late, tmp_path) == [True, True]


def speaks_late(rank: int) -> None:
    report = ConfigError.report

    def late(error: ConfigError) -> str:
        time.sleep(0.5 * (rank == 0))
        return report(error)

    ConfigError.report = late  # type: ignore[method-assign, assignment]


def test_the_first_process_tells_why_although_others_have_ended(tokens: Path) -> None:
    """torchrun ends the other processes when it sees that one has ended."""
    arguments = settings(tokens, "model.base_model.vocab_size=100", "training.train_iters=50")
    with Job(tokens, arguments, 2, speaks_late) as job:
        assert job.wait() == 2
        assert re.search(r"fast-llm train: .* holds token 1\d\d", job.said()), job.said()


def test_a_damaged_checkpoint_is_named_once(tokens: Path) -> None:
    arguments = settings(tokens, "training.train_iters=2", "training.checkpoint.interval=1")
    with Job(tokens, arguments, 1) as job:
        assert job.wait() == 0
    largest = max(
        (tokens / "run" / "checkpoint" / "2").iterdir(), key=lambda path: path.stat().st_size
    )
    data = bytearray(largest.read_bytes())
    data[-1] ^= 1
    largest.write_bytes(data)
    with Job(tokens, arguments, 2) as job:
        assert job.wait() == 0
        named = [line for line in job.said().splitlines() if "Skipped: " in line]
    assert len(named) == 1 and re.match(
        r"\d\d-\d\d \d\d:\d\d:\d\d Skipped: .*checkpoint/2", named[0]
    ), named
    time_of_day, _, message = named[0][6:].partition(" ")
    logged = (tokens / "run" / "runs" / "1" / "logs" / "logs_rank_0.txt").read_text().splitlines()
    assert any(
        re.fullmatch(rf"20\d\d-\d\d-\d\d {time_of_day},\d+ \[Rank 0\] {re.escape(message)}", line)
        for line in logged
    ), logged


def test_a_callback_is_started_with_what_was_saved(tokens: Path) -> None:
    script = f"bash -c 'echo $FAST_LLM_SAVED $WHO >> {tokens}/calls'"
    arguments = settings(
        tokens,
        "training.train_iters=2",
        "training.checkpoint.interval=1",
        f'training.checkpoint.callback.script="{script}"',
    )
    assert run([*arguments, "training.checkpoint.callback.environment.WHO=me"]) == 0
    for _ in range(100):
        if (tokens / "calls").exists() and len((tokens / "calls").read_text().splitlines()) == 2:
            break
        __import__("time").sleep(0.05)
    assert (tokens / "calls").read_text().splitlines() == [
        f"{tokens}/run/checkpoint/{step} me" for step in (1, 2)
    ]


def test_a_second_run_in_the_same_folder(tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = settings(tokens, "training.train_iters=1", "training.checkpoint.interval=1")
    holder = lock(tokens / "run")
    for world in (1, 2):
        with pytest.raises(
            AssertionError, match=f"another run writes to .*: process {os.getpid()} on .* since 20"
        ):
            spawn(world, run, arguments)
    assert list((tokens / "run").iterdir()) == [tokens / "run" / ".lock"]
    holder.close()
    assert spawn(2, run, arguments) == [0, 0]


def test_a_plan_that_another_run_overtook(tokens: Path) -> None:
    arguments = settings(tokens, "training.train_iters=2", "training.checkpoint.interval=1")
    spec = preflight(read(None, arguments), 1, weights=False)
    assert spawn(1, run, arguments) == [0]
    with pytest.raises(
        ConfigError, match=r"another run saved to .* just now; start the same command again"
    ):
        train(spec)


def test_no_experiment_dir_writes_nothing(tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tokens)
    before = sorted(tokens.rglob("*"))
    assert run(settings(tokens, "training.train_iters=1", "run.experiment_dir=null")) == 0
    assert sorted(tokens.rglob("*")) == before


def test_the_callbacks_environment_holds_no_secrets(tokens: Path) -> None:
    text = problems(settings(tokens, "training.checkpoint.callback.environment.HF_TOKEN=x"))
    assert "HF_TOKEN" in text and "secret" in text


def run_compiled(arguments: list[str]) -> tuple[int, bool]:
    from torch._dynamo.utils import counters

    return run(arguments), counters["stats"]["unique_graphs"] > 0


@slow
@needs_compiler
def test_compiled_blocks_train_alike(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", 400)
    small = [
        "batch.micro_batch_size=1",
        "batch.cross_document_attention=yes",
        "model.base_model.transformer.num_layers=1",
    ]
    common = settings(tmp_path, "training.train_iters=3", *small)
    assert spawn(1, run, [*common, f"run.experiment_dir={tmp_path}/plain"]) == [0]
    compiled = [
        *common,
        "model.multi_stage.compile_all=yes",
        f"run.experiment_dir={tmp_path}/compiled",
    ]
    cut = ["model.distributed.tensor_parallel=2", "model.distributed.sequence_tensor_parallel=yes"]
    assert spawn(2, run_compiled, [*compiled, *cut]) == [(0, True)] * 2
    # fp32 sums in another order, and Adam's first steps, which follow a gradient's sign.
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
