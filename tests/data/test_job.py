"""One rank's part of a preparation: ranks, integer types, BOS and EOS, and the lock."""

import errno
import fcntl
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fast_llm.data import job, tokenizer
from fast_llm.data.prepare import prepare
from fast_llm.errors import DataError
from tests.data import synthetic
from tests.data.preparing import configure, content, read, tokens


def test_a_failed_preparation_leaves_no_folder(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": oops}\n')
    (tmp_path / "b.jsonl").write_text('{"text": null}\n')
    before = sorted(tmp_path.iterdir())
    for name in ("a.jsonl", "b.jsonl", "none.jsonl"):
        with pytest.raises(DataError):
            prepare(configure(tmp_path / "new" / "deep" / "out", tmp_path / name, model))
        assert sorted(tmp_path.iterdir()) == before
    # What was there stays.
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError):
        prepare(configure(tmp_path / "out", tmp_path / "a.jsonl", model))
    assert (tmp_path / "out").is_dir()


def test_bos_and_eos(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    synthetic.gpt2(tmp_path / "gpt2")

    def written(which: Path, **changes: Any) -> list[list[int]]:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return read(prepare(configure(tmp_path / "out", tmp_path / "a.txt", which, **changes)))

    assert written(model) == tokens(model, ["text"])
    assert written(model, tokenizer__bos=False) == tokens(model, ["text"], front=())
    assert written(model, tokenizer__eos=False) == tokens(model, ["text"], back=())
    gpt2 = tmp_path / "gpt2"
    assert written(gpt2) == tokens(gpt2, ["text"], (), (0,))
    assert written(gpt2, tokenizer__bos=True) == tokens(gpt2, ["text"], (0,), (0,))
    (gpt2 / "tokenizer_config.json").write_text("{}")
    assert written(gpt2, tokenizer__eos=False) == tokens(gpt2, ["text"], (), ())
    with pytest.raises(DataError, match=r"tokenizer.bos: given yes, but .*gpt2 names no BOS token"):
        written(gpt2, tokenizer__bos=True, tokenizer__eos=False)
    for eos in ("auto", True):
        with pytest.raises(
            DataError,
            match=r"tokenizer.eos: .*gpt2 names no EOS token, without which documents run tog",
        ):
            written(gpt2, tokenizer__eos=eos)


@pytest.mark.parametrize(
    ("vocabulary", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "int32")]
)
def test_smallest_integer(vocabulary: int, dtype: str, tmp_path: Path, model: Path) -> None:
    loaded = tokenizer.load(str(model))
    config = configure(tmp_path, "x", model)
    assert job._dtype(
        config, tokenizer.Loaded(**{**vars(loaded), "vocab_size": vocabulary})
    ) == np.dtype(dtype)


def test_chosen_integer(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    metadata = prepare(
        configure(tmp_path / "out", tmp_path / "a.txt", model, dataset__data_type="int64")
    )
    assert content(metadata)["datasets"][0]["dtype"] == "int64"
    assert read(metadata) == tokens(model, ["text"])
    message = (
        r"dataset.data_type: given uint8, which holds numbers up to 255, but .* is 319; uint16"
        r" holds it"
    )
    with pytest.raises(DataError, match=message):
        prepare(
            configure(tmp_path / "other", tmp_path / "a.txt", model, dataset__data_type="uint8")
        )


def test_rank_of_the_environment(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(tmp_path, "x", model)
    assert job._rank_and_world(config) == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert job._rank_and_world(config) == (3, 4)
    assert job._rank_and_world(configure(tmp_path, "x", model, distributed__rank=1)) == (1, 4)
    with pytest.raises(
        DataError, match=r"distributed.rank: given 3, must be below distributed.world_size 2"
    ):
        job._rank_and_world(configure(tmp_path, "x", model, distributed__world_size=2))
    monkeypatch.delenv("RANK")
    with pytest.raises(
        DataError, match=r"distributed.rank: missing, with distributed.world_size 4; give each node"
    ):
        job._rank_and_world(config)
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(
        DataError,
        match=r"distributed.world_size: WORLD_SIZE in the environment is 'many', must be a number",
    ):
        job._rank_and_world(config)


def test_two_at_once(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("text")
    config = configure(tmp_path / "data", tmp_path / "a.txt", model)
    (tmp_path / "data").mkdir()
    with (tmp_path / "data" / ".lock_0").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(
            DataError,
            match=r"data: another process is preparing rank 0 in this folder; wait for it",
        ):
            prepare(config)

    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert read(prepare(config)) == tokens(model, ["text"])
    assert (
        "cannot be locked (No locks available); never run two preparations at once" in caplog.text
    )
