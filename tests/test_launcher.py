"""The complete output of torchrun and fast-llm, from real launchers and processes."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fast_llm import launcher
from tests.helpers import install, slow
from tests.training.runs import losses, settings, write_tokens

ROOT = Path(__file__).parent.parent
TIME = r"\d\d-\d\d \d\d:\d\d:\d\d "  # in front of each line of the log


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment, with pyproject.toml's entry points even if not installed here."""
    folder = tmp_path_factory.mktemp("installed")
    install(folder)
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
    }
    return kept | {"PYTHONPATH": f"{folder}:{ROOT}"}


def torchrun(processes: int, *further: str) -> list[str]:
    """The command; `-m fast_llm.cli` replaces `--no-python fast-llm`, which needs the PATH."""
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(processes),
        *further,
    ]
    return [*launch, "-m", "fast_llm.cli", "train", "gpt"]


def output(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Exit code, and standard output and error together."""
    done = subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout


def test_a_mistake_is_one_message_and_is_not_tried_again(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    command = [*torchrun(2, "--max-restarts", "3"), *settings(tmp_path, "training.train_iters=x")]
    assert output(command, environment) == (
        2,
        'fast-llm train: override training.train_iters=x: training.train_iters: given "x", must be'
        " an integer of 0 or more\n",
    )


@slow
def test_a_mistake_on_one_of_two_nodes(tmp_path: Path, environment: dict[str, str]) -> None:
    """One message, on the node without the data; both launchers end at once, without a retry."""
    write_tokens(tmp_path / "tokens", 400)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    meet = [
        "--nnodes",
        "2",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        address,
        "--local-addr",
        "127.0.0.1",
    ]
    nodes = []
    for data in ("tokens", "nowhere"):
        command = [
            *torchrun(1, *meet, "--max-restarts", "3"),
            *settings(tmp_path, "training.train_iters=9"),
        ]
        command.append(f"data.path={tmp_path}/{data}")
        nodes.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [2, 2], said
    (line,) = "".join(said).splitlines()
    # The node that joins first has rank 0, whose own mistake is printed without a rank.
    place = (
        rf"(rank 1 on {socket.gethostname()}: )?override data.path={tmp_path}/nowhere: data.path: "
    )
    assert re.match(rf"fast-llm train: {place}{tmp_path}/nowhere.idx: no such file", line), line


@slow
def test_ctrl_c_in_the_launchers_terminal(tmp_path: Path, environment: dict[str, str]) -> None:
    write_tokens(tmp_path / "tokens", 400)
    command = [
        *torchrun(2),
        *settings(tmp_path, "training.train_iters=1_000_000", "run.log_timestamps=no"),
    ]
    said = tmp_path / "said"
    with (
        said.open("wb") as file,
        subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, start_new_session=True
        ) as job,
    ):
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not metrics.exists() or not losses(tmp_path / "run"):
            assert job.poll() is None, said.read_text()
            time.sleep(0.05)
        os.killpg(job.pid, signal.SIGINT)  # as a terminal does
        assert job.wait(60) == 128 + signal.SIGINT
    text = said.read_text()
    line = (
        "Ctrl-C: the current step is finished and saved, then the run ends. torchrun waits 30 s"
        " for this. A second one, 2 s"
    )
    assert text.count(line) == 1, text
    last = re.search(
        r"\nStopped by a signal after step (\d+); the same command continues.\n$", text
    )
    assert last is not None and (tmp_path / "run" / "checkpoint" / last[1]).is_dir(), text
    assert not re.search("Traceback|Signal|W1|closing", text), text


def test_a_command_that_is_not_there(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--no-python", "./fast-llm", "train"]
    assert output(command, environment) == (
        2,
        "torchrun: ./fast-llm: no such command: activate the environment that fast-llm is"
        " installed in, or give its path\n",
    )


@slow
def test_a_crash_is_tried_again(tmp_path: Path, environment: dict[str, str]) -> None:
    """Restarted processes ignore the contents of torchrun's store."""
    write_tokens(tmp_path / "tokens", 400)
    command = [*torchrun(2, "--standalone", "--max-restarts", "1")]
    command += settings(
        tmp_path,
        "training.train_iters=40",
        "training.checkpoint.interval=5",
        "run.log_timestamps=no",
    )
    said = tmp_path / "said"
    with (
        said.open("wb") as file,
        subprocess.Popen(command, env=environment, stdout=file, stderr=file) as job,
    ):
        while not list(tmp_path.glob("run/checkpoint/[0-9]*")):
            assert job.poll() is None, said.read_text()
            time.sleep(0.02)
        ranks = {
            process.environ()["RANK"]: process for process in psutil.Process(job.pid).children()
        }
        ranks["1"].kill()
        assert job.wait(90) == 0, said.read_text()
    text = said.read_text()
    assert text.count("another process of this run has ended without a message") == 1, text
    assert text.count("Resuming from ") == 1 and text.endswith(
        "\nTraining is complete: 40 steps.\n"
    ), text


def test_a_process_that_is_killed_is_named(tmp_path: Path, environment: dict[str, str]) -> None:
    write_tokens(tmp_path / "tokens", 400)
    command = [
        *torchrun(2),
        *settings(tmp_path, "training.train_iters=1_000_000"),
    ]
    said = tmp_path / "said"
    with (
        said.open("wb") as file,
        subprocess.Popen(command, env=environment, stdout=file, stderr=file) as job,
    ):
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not metrics.exists() or not losses(tmp_path / "run"):
            assert job.poll() is None, said.read_text()
            time.sleep(0.05)
        ranks = {
            process.environ()["RANK"]: process for process in psutil.Process(job.pid).children()
        }
        # With the agent's store, processes of the next attempt would find the old addresses.
        assert ranks["1"].environ()["TORCHELASTIC_USE_AGENT_STORE"] == "False"
        ranks["1"].kill()
        assert job.wait(60) == 1
    log, _, rest = said.read_text().partition("fast-llm train: ")
    # The log, and the messages of the remaining process and of torchrun.
    assert all(re.match(rf"{TIME}|\w[\w ]{{13}}\S| {{14}}", line) for line in log.splitlines()), log
    assert rest.splitlines() == [
        f"rank 0 on {socket.gethostname()}: another process of this run has ended without a"
        " message; see the log of its host or of the launcher. No checkpoint is complete: the same"
        " command starts this run from its beginning.",
        f"torchrun: rank 1 on {socket.gethostname()} was killed by SIGKILL (process"
        f" {ranks['1'].pid})",
    ]


@slow
def test_a_run_prints_its_own_log_and_nothing_else(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    write_tokens(tmp_path / "tokens", 400)
    further = [
        "training.checkpoint.interval=1",
        "training.export.interval=2",
        "training.validation.interval=2",
    ]
    further += [
        "training.validation.iterations=1",
        "model.distributed.tensor_parallel=2",
        "batch.micro_batch_size=1",
    ]
    code, text = output(
        [*torchrun(4), *settings(tmp_path, "training.train_iters=2", *further)], environment
    )
    assert code == 0
    ours = rf"{TIME}|[A-Z][a-z]+ {{2,}}\S| {{14}}"  # the log, and the lines of the plan
    assert [line for line in text.splitlines() if not re.match(ours, line)] == []
    assert text.splitlines()[-1].endswith(" Training is complete: 2 steps.")


def test_other_launches_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sys.excepthook
    for words in (["torchrun", "train.py"], ["/usr/bin/fast-llm", "train", "gpt"]):
        monkeypatch.setattr(sys, "argv", words)
        backend = launcher.register()
        assert sys.excepthook is before
    with pytest.raises(ValueError, match="not a rendezvous backend"):
        backend(None)


def test_unknown_errors_keep_their_report() -> None:
    seen: list[object] = []
    report = launcher._ExceptHook(lambda *given: seen.append(given))
    error = RuntimeError("another torch")
    report(RuntimeError, error, None)
    assert seen == [(RuntimeError, error, None)]
    stopped = type("SignalException", (Exception,), {"sigval": signal.SIGTERM})()
    with pytest.raises(SystemExit) as left:
        report(type(stopped), stopped, None)
    assert left.value.code == 143
