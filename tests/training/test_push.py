"""`training.export.push_to_hub`: uploads by the real client to a local server, failures, resume."""

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fast_llm.config.document import read
from fast_llm.errors import ConfigError
from fast_llm.planning.preflight import preflight
from fast_llm.planning.report import describe_run, describe_warnings
from fast_llm.training import push
from fast_llm.training.trainer import Trainer
from tests.helpers import slow, spawn
from tests.training.runs import run, settings, tell, until, write_tokens
from tests.training.uploads import TOKEN, Hub, serve

REPO = "me/model"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        for name in ("_PAUSE", "_LONGEST_PAUSE", "_LAST_PAUSE", "_LOOK_SECONDS"):
            monkeypatch.setattr(push, name, 0.1)
        write_tokens(tmp_path / "tokens")
        yield served


def arguments(folder: Path, *further: str) -> list[str]:
    return settings(
        folder,
        "training.train_iters=4",
        "training.checkpoint.interval=2",
        "training.export.interval=2",
        "training.averages.ema={decay: 0.5, interval: 1}",
        f"training.export.push_to_hub.repo={REPO}",
        *further,
    )


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def pushed(folder: Path) -> list[int]:
    return [one["step"] for one in json.loads((folder / "run/pushed.json").read_text())["pushed"]]


def test_the_last_export_is_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    assert run(arguments(tmp_path)) == 0
    assert hub.repos[REPO] == files(tmp_path / "run/export/llama/4")
    assert hub.private[REPO] and hub.commits[-1] == (REPO, "Step 4")
    assert pushed(tmp_path)[-1] == 4
    attempts = hub.attempts
    assert run(arguments(tmp_path)) == 0  # complete, and pushed
    assert hub.attempts == attempts


def test_weights_of_before_are_deleted_and_other_files_stay(hub: Hub, tmp_path: Path) -> None:
    """A model of one file replaces one of several; the average is pushed on request."""
    hub.repos[REPO] = {"model-00001-of-00002.safetensors": b"x", "figure.png": b"y"}
    hub.private[REPO] = True
    assert run(arguments(tmp_path, "training.export.push_to_hub.average=ema")) == 0
    own = files(tmp_path / "run/export/llama-ema/4")
    assert hub.repos[REPO] == own | {"figure.png": b"y"}


def test_failures_are_retried_and_end_no_run(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refused = 2
    assert run(arguments(tmp_path, "training.export.interval=4")) == 0
    out = capsys.readouterr().out
    assert f"training.export.push_to_hub: {REPO}: " in out and "no right to write here" in out
    assert "the next attempt to push" in out and pushed(tmp_path) == [4]
    assert hub.repos[REPO] == files(tmp_path / "run/export/llama/4")
    # When training has ended, there is an end to it; the same command tries again.
    shutil.rmtree(tmp_path / "run")
    hub.refused = 1000
    assert run(arguments(tmp_path, "training.export.interval=4")) == 0
    assert f"is not on the Hub; the same command tries again, or `hf upload {REPO}" in (
        capsys.readouterr().out
    )
    hub.refused = 0
    assert not (tmp_path / "run/pushed.json").exists()
    assert run(arguments(tmp_path, "training.export.interval=4")) == 0
    assert pushed(tmp_path) == [4]


@slow
def test_a_wrong_token_shows_at_the_start(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert run(arguments(tmp_path, "training.export.interval=4")) == 0
    out = capsys.readouterr().out
    assert f"push_to_hub: {REPO}: " in out and "401" in out
    assert not hub.commits and (tmp_path / "run/export/llama/4/model.safetensors").exists()


@slow
def test_nothing_is_pushed_to_a_public_repository_unasked(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repos[REPO], hub.private[REPO] = {}, False
    assert run(arguments(tmp_path)) == 0
    assert "me/model is public, but training.export.push_to_hub.private" in capsys.readouterr().out
    assert not hub.commits
    assert run(arguments(tmp_path, "training.export.push_to_hub.private=no")) == 0
    assert hub.commits


@slow
def test_a_stopped_run_does_not_wait_and_the_next_start_pushes(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A signal during the upload at the end."""
    hub.open.clear()
    should_stop = Trainer.should_stop

    def stopping(self: Trainer) -> bool:
        if self.lifecycle == "end" and hub.attempts:
            tell(self, signal.SIGTERM)
        return should_stop(self)

    monkeypatch.setattr(Trainer, "should_stop", stopping)
    assert run(arguments(tmp_path, "training.export.interval=4")) == 128 + signal.SIGTERM
    left = "was not pushed yet; the next start of this run pushes it."
    assert f"{tmp_path}/run/export/llama/4 {left}" in capsys.readouterr().out
    hub.open.set()
    monkeypatch.setattr(Trainer, "should_stop", should_stop)
    hub.commits.clear()
    assert run(arguments(tmp_path, "training.export.interval=4")) == 0
    assert pushed(tmp_path) == [4]


@slow
def test_an_export_that_is_uploaded_is_not_deleted(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `keep: 1` and a slow Hub, the export of step 2 stays until it is there."""
    hub.open.clear()
    export = Trainer.run_due
    seen = []

    def slowly(self: Trainer, step: int, shutdown: bool) -> None:
        export(self, step, shutdown)
        if step == 2:
            until(lambda: hub.attempts == 1)
        if step == 4:
            self.checkpoints.saver.wait()
            seen.extend(sorted(path.name for path in (tmp_path / "run/export/llama").iterdir()))
            hub.open.set()

    monkeypatch.setattr(Trainer, "run_due", slowly)
    assert run(arguments(tmp_path, "training.export.keep=1")) == 0
    assert seen == ["2", "4"] and pushed(tmp_path) == [2, 4]


@slow
def test_only_the_first_process_pushes(hub: Hub, tmp_path: Path) -> None:
    words = arguments(tmp_path, "training.export.interval=4", "model.multi_stage.zero_stage=3")
    assert spawn(2, run, words) == [0, 0]
    assert hub.attempts == 1 and hub.repos[REPO] == files(tmp_path / "run/export/llama/4")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["training.export.push_to_hub.repo=model"], "given model, must be the name of a repo"),
        (["training.export.push_to_hub.repo=a/b/c"], "given a/b/c, must be the name of a repo"),
        (["training.export.push_to_hub.repo=a/b.git"], "given a/b.git, must be the name"),
        (["training.export.interval=null"], "training.export.push_to_hub.repo requires it"),
        (
            ["training.export.push_to_hub.average=tail"],
            "given tail, must be an average of training.averages: ema",
        ),
    ],
)
def test_mistakes(tmp_path: Path, words: list[str], message: str) -> None:
    write_tokens(tmp_path / "tokens")
    with pytest.raises(ConfigError, match=message):
        preflight(read(None, arguments(tmp_path, *words)), 1, weights=True)


def test_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tokens(tmp_path / "tokens")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    spec = preflight(read(None, arguments(tmp_path)), 1, weights=True)
    assert "exports are pushed to the private me/model on the Hub" in describe_run(spec)
    assert "push_to_hub" not in describe_warnings(spec)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    spec = preflight(read(None, arguments(tmp_path)), 1, weights=True)
    assert "there is no token here" in " ".join(describe_warnings(spec).split())
