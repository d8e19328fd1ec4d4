"""The job of `prepare`: its check, the disk, and every mistake in its settings."""

import errno
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fast_llm import cli
from fast_llm.data import prepare as module
from fast_llm.data.prepare import prepare
from fast_llm.data.tokenfile import TokenFileWriter
from fast_llm.errors import DataError
from tests.data import synthetic
from tests.data.preparing import TEXTS, configure, everything, jsonl, start, tokens


def test_hint_at_more_workers(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text(synthetic.text(0, 1000))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    hint = (
        "tokenize_workers is 1, and this machine has 16 cores: tokenize_workers=16 is up to 16"
        " times as fast."
    )
    with caplog.at_level(logging.INFO):
        prepare(configure(tmp_path / "1", tmp_path / "a.txt", model))
        assert hint not in caplog.text
        monkeypatch.setattr(module, "_LARGE_CORPUS", 1000)
        prepare(configure(tmp_path / "2", tmp_path / "a.txt", model, tokenize_workers=2))
        assert hint not in caplog.text
        prepare(configure(tmp_path / "3", tmp_path / "a.txt", model))
    assert hint in caplog.text


def test_check(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.jsonl").write_bytes(jsonl(TEXTS))
    (source / "b.jsonl").write_text('{"body": "x"}\n\n')
    (source / "c.jsonl").write_text('{"text": null}\n' * 3 + '{"text": "x"}\n')
    (source / "README.md").write_text("about")

    def command(*further: str) -> int:
        given = [
            f"output_path={tmp_path}/out",
            f"dataset.path={source}",
            f"tokenizer.path={model}",
            *further,
        ]
        return cli.main(["prepare", "gpt_memmap", "--validate", *given])

    assert command() == 0
    out = capsys.readouterr().out
    assert out.startswith(f"output_path: {tmp_path}/out\n")
    size = sum(len(text.encode()) for text in TEXTS) / 1e6
    found = re.search(r"^documents   35 in .*/source, about ([\d.]+) MB of text$", out, re.M)
    assert found and float(found[1]) == pytest.approx(size, rel=0.15)
    found = re.search(
        r"^tokens      about ([\d,.]+(?:e\+\d+)?) with BOS and EOS: .* GB free$", out, re.M
    )
    exact = sum(map(len, tokens(model, TEXTS)))
    assert found and float(found[1].replace(",", "")) == pytest.approx(exact, rel=0.3)
    assert "left out    1 file: README.md (no table)\n" in out
    assert (
        f"sample      {source}/a.jsonl:1: {TEXTS[0][:60] + '…'!r}, {len(TEXTS[0].encode())} bytes\n"
        in out
    )
    assert f"no text     {source}/c.jsonl: its first documents are not text\n" in out
    assert "a.jsonl: its first" not in out
    assert re.search(
        r"^time        at most about \w+ to tokenize with tokenize_workers=1$", out, re.M
    )
    assert f"left out    1 rows of {source}/b.jsonl, which has no column text; it has body\n" in out
    assert f"tokenizer   {model}/tokenizer.json: 320 tokens, stored as uint16\n" in out
    assert (
        f"a document  begins with BOS 0 {synthetic.BOS} and ends with EOS 1 {synthetic.EOS}\n"
        in out
    )
    assert f"written to  {tmp_path}/out/ and {tmp_path}/out.json\n" in out
    assert not (tmp_path / "out").exists()
    assert command("tokenizer.bos=no", "distributed.world_size=2", "distributed.rank=1") == 0
    out = capsys.readouterr().out
    assert (
        "a document  begins with no BOS and ends" in out
        and "shared by 2 ranks, of which this is 1" in out
    )
    for setting, message in (
        ("dataset.field=content", "dataset.field: "),
        ("dataset.path=none.jsonl", "no such file"),
        ("tokenizer.path=./none", "./none: no such file or folder"),
    ):
        assert command(setting) == 2
        assert message in capsys.readouterr().err
    assert command("dataset.path=org/name") == 0
    assert (
        "org/name on the Hugging Face Hub, which a check does not download"
        in capsys.readouterr().out
    )


def test_a_line_that_is_no_json_is_said_once(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        jsonl(["a"] * 1200) + b'{"text": oops}\n' + jsonl(["a"] * 1200)
    )
    for count in (1, 2):
        process = start(
            tmp_path, tmp_path / "out", tmp_path / "a.jsonl", model, f"tokenize_workers={count}"
        )
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 2
        assert stderr.count("not JSON") == 1 and "Traceback" not in stderr
        assert f"{tmp_path}/a.jsonl:1201: not JSON: Expecting value, at character 10" in stderr


def test_help_loads_nothing() -> None:
    code = (
        "import sys, fast_llm.cli\ntry: fast_llm.cli.main(['prepare', '--help'])\nexcept"
        " SystemExit: pass\nprint(*sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"datasets", "torch", "tokenizers", "numpy", "pydantic"} & set(result.stdout.split())


@pytest.mark.parametrize(
    ("files", "changes", "message"),
    [
        (
            {},
            {"dataset__path": "DIR/none.jsonl"},
            r"dataset.path: .*none.jsonl: no such file or folder",
        ),
        ({}, {"dataset__path": "none.jsonl"}, r"dataset.path: none.jsonl: no such file or folder"),
        ({}, {}, r"dataset.path: .*: no files there"),
        (
            {"a.txt": "x"},
            {"dataset__data_files": "*.py"},
            r"with dataset.data_files \*.py: no files there",
        ),
        (
            {"a.txt": "x"},
            {"dataset__path": "DIR/a.txt", "dataset__data_files": "*"},
            r"dataset.data_files: .* names files already",
        ),
        (
            {"a.txt": "x"},
            {"dataset__config_name": "en"},
            r"dataset.config_name: given en, but .* is a local path, not on the Hub",
        ),
        (
            {"a.txt": "x"},
            {"dataset__split": "test"},
            r"dataset.split: given test, but files of text are all `train`",
        ),
        ({"a.csv": "x"}, {}, r"a.csv: csv is not read; convert it to jsonl or parquet"),
        (
            {"a.jsonl": "{}", "b.parquet": ""},
            {},
            r"files of several kinds: a.jsonl \(json\), b.parquet \(parquet\); choose",
        ),
        (
            {"a.jsonl": "{}", "b.py": ""},
            {"dataset__data_files": "*"},
            r"files of several kinds: b.py \(file\), a.jsonl \(json\)",
        ),
        ({"a.jsonl": ""}, {}, r"all files are empty"),
        (
            {"a.jsonl": '{"body": "x", "id": 1}'},
            {},
            r"dataset.field: .* has no column text; it has body, id",
        ),
        ({"a.jsonl": '{"text": [1]}'}, {}, r"has no document to write: 1 not text"),
        (
            {"a.jsonl": '{"text": "x"}\n{"text": oops}'},
            {},
            r"/a.jsonl:2: not JSON: Expecting value, at character 10 of the line; fix the line or"
            r" delete it",
        ),
        (
            {"a.parquet": "nonsense"},
            {},
            r"/a.parquet: damaged, or not a parquet file: .*magic bytes",
        ),
        ({"a.jsonl": '{"text": null}'}, {}, r"has no document to write: 1 not text"),
    ],
)
def test_mistakes(
    tmp_path: Path, model: Path, files: dict[str, str], changes: dict[str, Any], message: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, text in files.items():
        (source / name).write_text(text)
    changes = {name: value.replace("DIR", str(source)) for name, value in changes.items()}
    with pytest.raises(DataError, match=message):
        prepare(
            configure(tmp_path / "out", changes.pop("dataset__path", str(source)), model, **changes)
        )
    assert not (tmp_path / "out.json").exists()


def test_room_on_the_disk(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text(synthetic.text(0, 20_000))
    needed = 0
    usage = shutil.disk_usage(tmp_path)
    for free, fits in ((10_000, False), (10_000_000, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        if fits:
            metadata = prepare(configure(tmp_path / "data", tmp_path / "a.txt", model))
            needed = (tmp_path / "data" / "shard_0_0.bin").stat().st_size
        else:
            with pytest.raises(
                DataError,
                match=r"the token files will need about \d\S* GB more, but 1e-05 GB are free; make",
            ):
                prepare(configure(tmp_path / "data", tmp_path / "a.txt", model))
    # The estimate is good: a tenth less than what it took is refused, a tenth more is enough.
    for free, fits in ((int(0.9 * needed), False), (int(1.1 * needed), True)):
        shutil.rmtree(tmp_path / "data")
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        if fits:
            prepare(configure(tmp_path / "data", tmp_path / "a.txt", model))
        else:
            with pytest.raises(
                DataError, match=r"make room, or set dataset.disable_disk_space_check: yes"
            ):
                prepare(configure(tmp_path / "data", tmp_path / "a.txt", model))
            prepare(
                configure(
                    tmp_path / "data",
                    tmp_path / "a.txt",
                    model,
                    dataset__disable_disk_space_check=True,
                )
            )
            metadata.unlink()


def test_disk_that_fills_up(
    tmp_path: Path, large: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(configure(tmp_path / "whole" / "data", large, model))
    append = TokenFileWriter.append_many

    def full(self: TokenFileWriter, *arguments: Any) -> None:
        if self.prefix.name == "shard_0_3":
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, *arguments)

    monkeypatch.setattr(TokenFileWriter, "append_many", full)
    config = configure(tmp_path / "other" / "data", large, model)
    with pytest.raises(
        DataError,
        match=r"data: the disk is full; free some space and run the same command again to resume",
    ):
        prepare(config)
    assert not list((tmp_path / "other" / "data").glob("*.partial"))
    monkeypatch.undo()
    prepare(config)
    assert everything(tmp_path / "other") == everything(tmp_path / "whole")


def test_output_that_cannot_be_written(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"output_path: .*a.txt: cannot be written to: File exists"):
        prepare(configure(tmp_path / "a.txt", tmp_path / "a.txt", model))
    with pytest.raises(DataError, match=r"output_path: .*: cannot be written to: Not a directory"):
        prepare(configure(tmp_path / "a.txt" / "data", tmp_path / "a.txt", model))
