"""Each document's file and row, and bytes of text, as `prepare` records them."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from fast_llm.data import tokenizer
from fast_llm.data.metadata import verify
from fast_llm.data.origins import Origin, RowRuns, find_origins
from fast_llm.data.prepare import prepare
from fast_llm.data.tokenfile import TokenFile
from fast_llm.errors import DataError
from tests.data import synthetic
from tests.data.preparing import configure, content, everything, jsonl

# Some are skipped, the last one too.
TEXTS: list[Any] = [synthetic.text(seed, 1 + 30 * (seed % 5)) for seed in range(60)]
for place in (0, 7, 8, 30, 59):
    TEXTS[place] = ""
TEXTS[11] = 5  # no text


def lines(texts: list[Any]) -> bytes:
    return b"\n".join(
        [*jsonl(texts[:20]).splitlines(), b"", b"  ", *jsonl(texts[20:]).splitlines()]
    )


def write(folder: Path, kind: str) -> Path:
    """Two files, and a third one that is between them in the order of names."""
    folder.mkdir()
    if kind == "text":
        for number, text in enumerate(TEXTS):
            (folder / f"{number:03}.txt").write_text(str(text))
    elif kind == "lines":
        (folder / "a.jsonl").write_bytes(lines(TEXTS[:40]))
        (folder / "b.jsonl").write_bytes(b"\n")
        (folder / "c.jsonl").write_bytes(lines(TEXTS[40:]))
    elif kind == "gz":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS[:40])))
        (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS[40:])))
    elif kind == "array":
        for name, texts in (("a", TEXTS[:9]), ("b", TEXTS[9:])):
            (folder / f"{name}.json").write_text(json.dumps([{"text": text} for text in texts]))
    else:
        texts = [None if text == 5 else text for text in TEXTS]
        for name, some in (("a", texts[:40]), ("b", texts[40:])):
            table = pyarrow.table({"text": pyarrow.array(some, pyarrow.string())})
            pyarrow.parquet.write_table(table, folder / f"{name}.parquet", row_group_size=7)
    return folder


def original(origin: Origin) -> Any:
    """Read what an origin names, without the code that read it for `prepare`."""
    path = Path(origin.path)
    if origin.number is None:
        assert origin.unit == "file"
        return path.read_text()
    if origin.unit == "line":
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return json.loads(data.split(b"\n")[origin.number - 1])["text"]
    if origin.unit == "item":
        return json.loads(path.read_text())[origin.number - 1]["text"]
    return pyarrow.parquet.read_table(path)["text"][origin.number].as_py()


def documents(metadata: Path) -> list[tuple[str, int]]:
    return [
        (str(metadata.parent / entry["prefix"]), number)
        for entry in content(metadata)["datasets"]
        for number in range(entry["num_documents"])
    ]


def texts_of(metadata: Path, model: Path) -> list[str]:
    loaded = tokenizer.load(str(model)).tokenizer
    found = []
    for prefix, number in documents(metadata):
        file = TokenFile(Path(prefix))
        tokens = file.tokens_at(file.start_of(number), file.start_of(number + 1)).tolist()
        found.append(loaded.decode(tokens[1:-1], skip_special_tokens=False))
    return found


@pytest.mark.parametrize("kind", ["text", "lines", "gz", "array", "parquet"])
def test_every_document_is_found_in_its_file(kind: str, tmp_path: Path, model: Path) -> None:
    source = write(tmp_path / "source", kind)
    metadata = prepare(configure(tmp_path / "out", source, model))
    origins = find_origins(documents(metadata))
    kept = texts_of(metadata, model)
    assert len(kept) == 54 + (kind == "text")  # "5" is a text there
    assert [original(origin) for origin in origins if origin] == kept
    sizes = sum(len(text.encode()) for text in kept)
    found = content(metadata)
    assert found["num_bytes"] == found["datasets"][0]["num_bytes"] == sizes


def test_slices_and_several_token_files(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    texts = [synthetic.text(seed, 800) for seed in range(300)]
    texts[5] = texts[250] = ""
    (folder / "a.jsonl").write_bytes(lines(texts[:150]))
    (folder / "b.jsonl").write_bytes(lines(texts[150:]))
    split = "train[5:40]+train[100:]"
    metadata = prepare(configure(tmp_path / "out", folder, model, dataset__split=split))
    found = content(metadata)
    assert len(found["datasets"]) > 2
    origins, kept = find_origins(documents(metadata)), texts_of(metadata, model)
    assert kept == [text for text in [*texts[5:40], *texts[100:]] if text]
    assert [original(origin) for origin in origins if origin] == kept
    assert found["num_bytes"] == sum(each["num_bytes"] for each in found["datasets"])
    assert found["num_bytes"] == sum(len(text.encode()) for text in kept)


def test_two_workers_write_the_same_bytes(tmp_path: Path, model: Path, large: Path) -> None:
    made = []
    for workers in (1, 2):
        output = tmp_path / str(workers) / "out"
        prepare(configure(output, large, model, tokenize_workers=workers))
        made.append(everything(output.parent))
    assert made[0] == made[1]
    assert {"out/files.jsonl.gz", "out/shard_0_1.rows.npy"} <= made[0].keys()


def test_data_of_an_earlier_version_has_unknown_origins(tmp_path: Path, model: Path) -> None:
    metadata = prepare(configure(tmp_path / "out", write(tmp_path / "source", "lines"), model))
    some = documents(metadata)[:3]
    (tmp_path / "out/shard_0_0.rows.npy").unlink()
    assert find_origins(some) == [None] * 3
    assert find_origins([]) == []


def test_a_run_ends_where_rows_are_left_out(tmp_path: Path) -> None:
    runs = RowRuns()
    for rows in ([3, 4, 5], [], [6, 8], [9], [20]):
        runs.add(np.array(rows, np.int64), np.ones(len(rows), np.int64))
    runs.write(tmp_path / "a", 0)
    assert np.load(tmp_path / "a.rows.npy").tolist() == [[0, 4, 6], [3, 8, 20]]
    assert runs.text_bytes == 7


def test_names_of_origins() -> None:
    assert str(Origin("a.txt", "file", None)) == "a.txt"
    assert str(Origin("a.jsonl", "line", 3)) == "a.jsonl:3"
    assert str(Origin("a.parquet", "row", 0)) == "a.parquet, row 0"


def test_verify_reads_the_records_of_origins(tmp_path: Path, model: Path) -> None:
    write(tmp_path / "in", "gz")
    metadata = prepare(configure(tmp_path / "data", tmp_path / "in", model))
    rows, table = tmp_path / "data" / "shard_0_0.rows.npy", tmp_path / "data" / "files.jsonl.gz"
    read = verify(metadata)
    changed = "its content is not what was prepared (sha256 differs)"
    missing = "no such file, so that no document's origin is known"
    for path in (rows, table):
        before = path.read_bytes()
        for damaged, words in ((before[:-9] + b"other row", changed), (None, missing)):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            with pytest.raises(DataError) as caught:
                verify(metadata)
            assert str(caught.value) == f"{path}: {words}"
            path.write_bytes(before)
    table.write_bytes(gzip.compress(gzip.decompress(before), 1))  # as another zlib might
    assert verify(metadata) == read
    described = content(metadata)  # as earlier versions wrote it
    del described["sha256"], described["source"]["files_sha256"]
    for entry in described["datasets"]:
        del entry["sha256"]["rows"]
    metadata.write_text(json.dumps(described))
    rows.unlink()
    table.unlink()
    verify(metadata)


def test_what_is_renamed_was_flushed(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power failure can leave a complete name with no content."""
    flushed, renamed, fsync, replace = set[str](), list[str](), os.fsync, Path.replace

    def flush(descriptor: int) -> None:
        flushed.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def rename(path: Path, to: Path) -> Path:
        renamed.append(to.name)
        assert str(path) in flushed, f"{path} was not flushed"
        return replace(path, to)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "replace", rename)
    write(tmp_path / "in", "gz")
    for name, further in (("one", {}), ("two", {"dataset__deduplicate": True})):
        prepare(configure(tmp_path / name / "data", tmp_path / "in", model, **further))
    assert {
        "shard_0_0.bin",
        "shard_0_0.idx",
        "shard_0_0.rows.npy",
        "shard_0_0.json",
        "files.jsonl.gz",
        "tokenizer.json",
        "data.json",
        "0.npz",
        "0.bin",
        "0.digests.npy",
        "0.copies.npy",
    } <= set(renamed)
