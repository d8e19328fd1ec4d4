"""Unusable documents are skipped, counted and named; unusual text is kept."""

import errno
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fast_llm.data import documents, files, shards, tokenizer
from fast_llm.data.encode import Encoder
from fast_llm.data.prepare import prepare
from fast_llm.errors import DataError
from tests.data import synthetic
from tests.data.preparing import configure, content, jsonl, read, tokens

pytestmark = pytest.mark.usefixtures("datasets_cache")


def test_odd_rows(tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"text": "one\\u0000two"}',
        b'{"text": ""}',
        b'{"text": null}',
        b'{"text": "\xff"}',
        b'{"text": "last"}',
    ]
    path.write_bytes(b"\n".join(lines))
    with caplog.at_level(logging.INFO):
        metadata = prepare(configure(tmp_path / "out", path, model))
    assert read(metadata) == tokens(model, ["one\0two", "last"])
    described = content(metadata)
    assert described["skipped"] == {"empty": 1, "not_text": 1, "not_utf8": 1}
    assert described["skipped_documents"] == 3
    assert described["skipped_examples"] == [
        [f"{path}:2", "empty"],
        [f"{path}:3", "not_text"],
        [f"{path}:4", "not_utf8"],
    ]
    assert f"Skipped {path}:4: not UTF-8" in caplog.text
    assert "skipped 1 empty, 1 not text, 1 not UTF-8" in caplog.text


def test_rows_of_files_without_the_column_are_not_named_one_by_one(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """There are ten names, which are for what the reader does not know yet."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.jsonl").write_text('{"content": "a"}\n' * 20)
    (source / "b.json").write_text(json.dumps([{"content": "a"}] * 20))
    columns = tmp_path / "columns"
    columns.mkdir()
    pq.write_table(pa.table({"content": ["a"] * 20}), columns / "a.parquet")
    pq.write_table(pa.table({"text": ["d", None]}), columns / "d.parquet")
    (source / "d.jsonl").write_text('{"text": "d"}\n{"text": null}\n')
    for folder, number in ((source, 41), (columns, 21)):
        metadata = prepare(configure(tmp_path / f"out{number}", folder, model))
        assert content(metadata)["skipped"] == {"not_text": number}
    named = [message for message in caplog.messages if message.startswith("Skipped ")]
    assert named == [
        f"Skipped {source}/d.jsonl:2: not text",
        f"Skipped {columns}/d.parquet, row 1: not text",
    ]
    for path in (source / "a.jsonl", source / "b.json", columns / "a.parquet"):
        left_out = f"{path} has no column text; it has content: its 20 rows are left out."
        assert left_out in caplog.messages


def test_column_of_several_types(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"text": "a"}\n{"text": 3}\n{"text": ["b"]}\n{"text": "d"}\n'
    )
    metadata = prepare(configure(tmp_path / "out", tmp_path / "a.jsonl", model))
    assert read(metadata) == tokens(model, ["a", "d"])
    assert content(metadata)["skipped"] == {"not_text": 2}


def test_odd_files(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(12):
        (source / f"{number:02}.bin").write_bytes(b"\x80")
    (source / "a.txt").write_text("a")
    (source / "large.txt").write_text("b" * 50)
    (source / "z.txt").write_text("gone when it is read")
    config = configure(tmp_path / "out", source, model, dataset__max_document_bytes=49)
    found = documents.open_documents(files.find(config.dataset), 1)
    assert len(found) == 15
    (source / "z.txt").unlink()
    monkeypatch.setattr(documents, "open_documents", lambda *_: found)
    metadata = prepare(config)
    assert read(metadata) == tokens(model, ["a"])
    assert content(metadata)["skipped"] == {"not_utf8": 12, "unreadable": 1, "too_large": 1}
    assert len(content(metadata)["skipped_examples"]) == 10
    # Ten are named, the others only counted.
    assert caplog.text.count("Skipped") == 10
    assert f"{source}/09.bin: not UTF-8; further ones are only counted" in caplog.text


def test_disk_that_fails(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")

    def stat(path: str) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    config = configure(tmp_path / "out", tmp_path / "a.txt", model)
    found = documents.open_documents(files.find(config.dataset), 1)
    monkeypatch.setattr(documents, "open_documents", lambda *_: found)
    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(
        DataError, match=r"a.txt: cannot be read: Input/output error; run the same command again"
    ):
        found.reader.file(str(tmp_path / "a.txt"))


def test_spelled_special_tokens_end_nothing(tmp_path: Path, model: Path) -> None:
    text = f"stop = '{synthetic.EOS}'  # after {synthetic.BOS}"
    (tmp_path / "a.py").write_text(text)
    (document,) = read(prepare(configure(tmp_path / "out", tmp_path / "a.py", model)))
    assert document[0] == 0 and document[-1] == 1
    assert not {0, 1} & set(document[1:-1])
    assert (
        tokenizer.load(str(model)).tokenizer.decode(document[1:-1], skip_special_tokens=False)
        == text
    )


def test_tokenizer_that_ends_documents_inside(tmp_path: Path) -> None:
    """One that finds EOS among its ordinary words cannot be asked not to."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    plain = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2}, unk_token="a"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model = tmp_path / "model"
    model.mkdir()
    plain.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a b", "a <eos> b", "  ", "b"]))
    metadata = prepare(configure(tmp_path / "out", tmp_path / "a.jsonl", model))
    assert read(metadata) == [[1, 2, 0], [2, 0]]
    assert content(metadata)["skipped"] == {"empty": 1, "ends_itself": 1}


def test_text_on_which_the_tokenizer_fails(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Encoder.encode
    monkeypatch.setattr(
        Encoder,
        "encode",
        lambda self, texts: [
            None if text == "b" else tokens
            for text, tokens in zip(texts, encode(self, texts), strict=True)
        ],
    )
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a", "b", "c"]))
    metadata = prepare(configure(tmp_path / "out", tmp_path / "a.jsonl", model))
    assert read(metadata) == tokens(model, ["a", "c"])
    assert content(metadata)["skipped"] == {"untokenizable": 1}


def test_lone_surrogates_and_texts_of_any_size(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "\\ud800"}\n{"text": "' + "b" * 5000 + '"}\n')
    metadata = prepare(configure(tmp_path / "1", path, model, dataset__max_document_bytes=4999))
    assert read(metadata) == tokens(model, ["a"])
    assert content(metadata)["skipped_examples"] == [
        [f"{path}:2", "not_utf8"],
        [f"{path}:3", "too_large"],
    ]
    assert f"Skipped {path}:3: too large, more than dataset.max_document_bytes 4,999" in caplog.text
    metadata = prepare(configure(tmp_path / "2", path, model, dataset__max_document_bytes=5000))
    assert read(metadata) == tokens(model, ["a", "b" * 5000])


def test_a_file_of_millions_of_tokens_is_named(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "LARGE_DOCUMENT", 5000)
    (tmp_path / "small.txt").write_text(synthetic.text(0, 10))
    (tmp_path / "wiki.txt").write_text(synthetic.text(0, 6000))
    (tmp_path / "rows.jsonl").write_bytes(jsonl([synthetic.text(0, 6000)]))
    with caplog.at_level(logging.INFO):
        prepare(configure(tmp_path / "1", f"{tmp_path}/*.txt", model))
        prepare(configure(tmp_path / "2", tmp_path / "rows.jsonl", model))
    assert re.findall(
        r"(\S+) is one document of [\d,]+ tokens: each text file is a document", caplog.text
    ) == [f"{tmp_path}/wiki.txt"]
