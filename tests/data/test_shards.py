"""Token files and their records: what a restarted preparation does and refuses."""

import gzip
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from fast_llm.data.prepare import prepare
from fast_llm.data.tokenfile import TokenFileWriter
from fast_llm.errors import DataError
from tests.data import synthetic
from tests.data.preparing import configure, content, everything, jsonl, read, tokens


def test_finished_is_left_alone(
    tmp_path: Path, large: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = shutil.copytree(large, tmp_path / "source")
    config = configure(tmp_path / "data", source, model)
    prepare(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").glob("*shard*")}
    with caplog.at_level(logging.INFO):
        prepare(config)
    assert (
        f"{tmp_path}/data.json: already finished, nothing to do. To prepare it again, delete"
        f" {tmp_path}/data." in caplog.text
    )
    # Also when the documents have been deleted, but not if they have become others.
    (source / "0300.py").write_text("shorter")
    with pytest.raises(DataError, match="was started with other documents than there are now"):
        prepare(config)
    shutil.rmtree(source)
    prepare(config)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "data").glob("*shard*")}


def test_what_is_missing_or_damaged_is_made_again(
    tmp_path: Path, large: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = configure(tmp_path / "data", large, model)
    metadata = prepare(config)
    before = everything(tmp_path)
    last = len(content(metadata)["datasets"]) - 1
    damages: tuple[Callable[[], object], ...] = (
        lambda: (tmp_path / "data" / "shard_0_2.bin").unlink(),
        lambda: (tmp_path / "data" / "shard_0_3.idx").write_bytes(b"MMIDIDX"),
        lambda: (tmp_path / "data" / f"shard_0_{last}.json").unlink(),
        lambda: list(map(os.unlink, (tmp_path / "data").glob("shard_0_[012].*"))),
        lambda: (tmp_path / "data" / "rank_0.json").unlink(),
        metadata.unlink,
        lambda: shutil.rmtree(tmp_path / "data" / "tokenizer"),
    )
    for damage in damages:
        damage()
        prepare(config)
        assert everything(tmp_path) == before
    assert "shard_0_2.bin: missing or damaged; it is written again." in caplog.text
    assert "shard_0_3.idx: missing or damaged; it is written again." in caplog.text
    (tmp_path / "data" / "shard_0_1.json").write_text("{")
    with pytest.raises(
        DataError, match=r"shard_0_1.json: damaged: .*; delete it and run the same command again"
    ):
        prepare(config)


def test_other_settings_are_refused(
    tmp_path: Path, large: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(large, tmp_path / "source")
    other = synthetic.llama(tmp_path / "other", vocab_size=330)
    output = tmp_path / "data"

    class Stop(Exception):
        pass

    close = TokenFileWriter.close

    def stop(self: TokenFileWriter) -> Any:
        if self.prefix.name == "shard_0_2":
            raise Stop
        return close(self)

    monkeypatch.setattr(TokenFileWriter, "close", stop)
    with pytest.raises(Stop):
        prepare(configure(output, source, model))
    monkeypatch.undo()
    assert (output / "shard_0_1.json").exists() and not list(output.glob("*.partial"))
    for changes, message in (
        (
            {"tokens_per_shard": 200_000},
            "was started with tokens_per_shard 100000, now it is 200000; restore it,"
            " choose another",
        ),
        ({"tokenizer__bos": False}, "was started with tokenizer.bos 0, now it is null"),
        ({"tokenizer__eos": False}, "was started with tokenizer.eos 1, now it is null"),
        (
            {"dataset__data_type": "int32"},
            'was started with dataset.data_type "uint16", now it is "int32"',
        ),
        (
            {"dataset__field": "content"},
            'was started with dataset.field "text", now it is "content"',
        ),
        ({"tokenizer__path": str(other)}, "was started with another tokenizer; restore it"),
        ({"dataset__data_files": "0*.py"}, None),  # the same files by another name
    ):
        if message is not None:
            with pytest.raises(DataError, match=message):
                prepare(configure(output, source, model, **changes))
    (source / "more.py").write_text("more")
    with pytest.raises(DataError, match="was started with documents 600, now it is 601"):
        prepare(configure(output, source, model))
    (source / "0000.py").unlink()
    with pytest.raises(DataError, match="was started with other documents than there are now"):
        prepare(configure(output, source, model))
    # An emptied folder is begun anew.
    shutil.rmtree(output)
    prepare(configure(output, source, model, tokens_per_shard=200_000))


def _as_of_an_earlier_version(output: Path) -> None:
    """Records as they were before max_document_bytes and a reader of our own."""
    for path in [*output.glob("shard_*.json"), *output.glob("rank_*.json")]:
        record = json.loads(path.read_text())
        for name in ("reading", "dataset.max_document_bytes"):
            record["settings"].pop(name, None)
        path.write_text(json.dumps(record, indent=1) + "\n")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt", "txt.gz"])
def test_preparations_of_earlier_versions(
    tmp_path: Path, model: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / f"a.{kind}"
    texts = (
        [synthetic.text(seed, 3000) for seed in range(40)]
        if "txt" not in kind
        else [synthetic.text(0, 30_000)]
    )
    if kind == "parquet":
        datasets.Dataset.from_dict({"text": texts}).to_parquet(path)
    else:
        packed = gzip.compress(texts[0].encode())
        path.write_bytes({"jsonl": jsonl(texts), "txt": texts[0].encode(), "txt.gz": packed}[kind])
    output = tmp_path / "out"
    metadata = prepare(configure(output, path, model))
    before = everything(tmp_path)
    prepare(configure(output, path, model))
    assert "earlier version" not in caplog.text
    _as_of_an_earlier_version(output)
    # What is finished is finished.
    prepare(configure(output, path, model))
    assert (
        "out.json: was written by an earlier version, which could change texts" in caplog.text
    ) == (kind == "jsonl")
    assert metadata.read_bytes() == before["out.json"]
    (output / "shard_0_0.json").unlink()
    if kind in ("jsonl", "txt.gz"):
        with pytest.raises(
            DataError,
            match=r"out: was started by an earlier version, which read such files differently",
        ):
            prepare(configure(output, path, model))
        return
    message = "was started with dataset.max_document_bytes 67108864, now it is 100000000"
    with pytest.raises(DataError, match=message):
        prepare(configure(output, path, model, dataset__max_document_bytes=10**8))
    prepare(configure(output, path, model))
    assert metadata.read_bytes() == before["out.json"]


def test_stale_metadata_goes(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    metadata = prepare(configure(tmp_path / "data", tmp_path / "a.txt", model))
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "b.txt").write_text("")
    (tmp_path / "c.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"has no document to write: 1 empty, 1 not UTF-8"):
        prepare(configure(tmp_path / "data", f"{tmp_path}/[bc].txt", model))
    assert not metadata.exists()
    metadata.write_text('{"something": "else"}')
    with pytest.raises(
        DataError,
        match=r"output_path: .*data: its metadata would overwrite .*data.json; choose another",
    ):
        prepare(configure(tmp_path / "data", tmp_path / "a.txt", model))
    assert metadata.read_text() == '{"something": "else"}'


def test_several_ranks(tmp_path: Path, large: Path, model: Path) -> None:
    whole = prepare(configure(tmp_path / "whole" / "data", large, model))

    def node(rank: int) -> Path:
        return prepare(
            configure(
                tmp_path / "ranks" / "data",
                large,
                model,
                distributed__world_size=3,
                distributed__rank=rank,
            )
        )

    metadata = node(2)  # which does the work of ranks that never start
    first = everything(tmp_path / "ranks")
    assert first == everything(tmp_path / "whole")
    node(0)
    assert everything(tmp_path / "ranks") == first
    # What is lost is written again, by any rank.
    (tmp_path / "ranks" / "data" / "shard_0_1.bin").unlink()
    (tmp_path / "ranks" / "data" / "shard_0_5.idx").unlink()
    node(1)
    assert everything(tmp_path / "ranks") == first
    assert metadata.read_bytes() == whole.read_bytes()


def test_data_of_an_earlier_version_on_several_nodes(
    tmp_path: Path, large: Path, model: Path
) -> None:
    """It divided rows among ranks for good, and each rank wrote its own files."""
    config = configure(tmp_path / "data", large, model)
    prepare(config)
    folder = tmp_path / "data"
    for path in folder.glob("*_0*.json"):
        path.write_text(path.read_text().replace('world_size": 1', 'world_size": 2'))
    rank = content(folder / "rank_0.json")
    for path in folder.glob("shard_0_7.*"):
        path.rename(folder / path.name.replace("0_7", "1_0"))
    for number, shards in ((0, 7), (1, 1)):
        (folder / f"rank_{number}.json").write_text(json.dumps(rank | {"shards": shards}))
    before = everything(tmp_path)
    prepare(config)  # finished
    assert everything(tmp_path) == before
    (folder / "shard_1_0.bin").unlink()
    with pytest.raises(
        DataError,
        match=r"data: was started by an earlier version on 2 nodes, whose parts this version cannot"
        r" complete; choose another output_path, or delete .*data$",
    ):
        prepare(config)


def test_partial_files_of_a_rank_are_deleted(tmp_path: Path, large: Path, model: Path) -> None:
    def node(rank: int) -> None:
        prepare(
            configure(
                tmp_path / "data",
                large,
                model,
                distributed__world_size=2,
                distributed__rank=rank,
            )
        )

    node(0)
    before = everything(tmp_path)
    strays = [
        tmp_path / "data" / "rank_0.json.0.partial",
        tmp_path / "data" / "shard_0_7.bin.partial",  # of an earlier version
        tmp_path / "data" / "shard_0_7.idx.0.partial",
        tmp_path / "data" / "tokenizer" / "tokenizer.json.0.partial",
        tmp_path / "data.json.0.partial",
    ]
    for stray in strays:
        stray.write_text("{")
    other = tmp_path / "data" / "rank_0.json.1.partial"
    other.write_text("{")  # which may be writing it now
    node(0)
    assert other.exists()
    node(1)
    assert everything(tmp_path) == before


def test_more_nodes_than_documents(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for rank in range(3):
        config = configure(
            tmp_path / "data",
            tmp_path / "a.txt",
            model,
            distributed__world_size=3,
            distributed__rank=rank,
        )
        metadata = prepare(config)
    assert read(metadata) == tokens(model, ["text"])
