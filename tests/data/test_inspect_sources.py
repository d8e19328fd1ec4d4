"""`fast-llm inspect` on documents before they are prepared, and on tokenizers."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fast_llm import cli
from fast_llm.cli import main
from fast_llm.data import tokenizer
from fast_llm.data.inspect.pieces import pieces
from fast_llm.data.prepare import prepare
from tests.data import synthetic
from tests.data.preparing import configure, jsonl, read
from tests.data.test_inspect import inspect, refused, shown


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.jsonl").write_bytes(jsonl(["one", "", "three"]))
    (tmp_path / "texts/b.jsonl").write_text('{"text": null}\n\n{"text": 5}\n')
    (tmp_path / "texts/README.md").write_text("about")
    return tmp_path / "texts"


def test_a_folder_of_tables(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect(capsys, folder, "--sample", 5)
    assert (found["kind"], found["format"], found["field"]) == ("raw", "json", "text")
    assert (found["documents"], found["files"], found["columns"]) == (5, 2, ["id", "text"])
    assert [[file["path"], file["documents"]] for file in found["listed_files"]] == [
        [f"{folder}/a.jsonl", 3],
        [f"{folder}/b.jsonl", 2],
    ]
    assert found["left_out"] == [["README.md", "no table"]]
    assert found["unusable"] == [{"path": f"{folder}/b.jsonl", "reason": "not text"}]
    assert {"name": f"{folder}/a.jsonl:1", "text": "one"} in found["sample"]
    assert {"name": f"{folder}/a.jsonl:2", "skipped": "empty"} in found["sample"]
    text = shown(capsys, folder)
    assert "documents   5 in split train, about " in text
    assert "columns     id, text; read: text\n" in text
    assert f"no text     {folder}/b.jsonl: not text\n" in text
    assert "left out    README.md (no table)\n" in text


def test_lines_that_are_not_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Data is looked at before it is clean."""
    with (folder / "a.jsonl").open("a") as file:
        file.write("broken\n" + '{"text": "four"}\n')
    found = inspect(capsys, folder, "--sample", 20)
    assert found["not_json"] == [f"{folder}/a.jsonl:4"] and found["not_json_lines"] == 1
    assert {"name": f"{folder}/a.jsonl:4", "skipped": "not_json"} in found["sample"]
    assert {"name": f"{folder}/a.jsonl:5", "text": "four"} in found["sample"]
    assert (
        f"not JSON    1 line, the first {folder}/a.jsonl:4; `prepare` stops there, unless"
        " dataset.max_bad_lines is 1 or more\n" in shown(capsys, folder)
    )
    page = folder.parent / "page.html"
    assert main(["inspect", str(folder), "--html", str(page)]) == 0
    assert "Lines that are not JSON" in page.read_text() and "a.jsonl:4" in page.read_text()
    (folder / "a.jsonl").write_text("broken\n" * 1002)
    assert "a.jsonl:1001: not JSON" in refused(capsys, folder)


def test_other_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = pyarrow.table({"content": ["x", "y"], "n": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = inspect(capsys, tmp_path / "a.parquet", "dataset.field=content")
    assert (found["format"], found["columns"]) == ("parquet", ["content", "n"])
    assert [each["text"] for each in found["sample"]] == ["x", "y"]
    (tmp_path / "b.json").write_text(json.dumps([{"text": "x", "id": 1}]))
    assert inspect(capsys, tmp_path / "b.json")["columns"] == ["text", "id"]
    (tmp_path / "c.txt").write_text("a text")
    found = inspect(capsys, tmp_path / "c.txt")
    assert (found["format"], found["columns"], found["field"]) == ("file", [], None)
    assert "format      a document per text file\n" in shown(capsys, tmp_path / "c.txt")


def test_the_yaml_file_of_prepare(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder.parent / "prepare.yaml"
    file.write_text(f"output_path: x\ntokenizer: {{path: none}}\ndataset: {{path: {folder}}}\n")
    assert inspect(capsys, file) == inspect(capsys, "--config", file) == inspect(capsys, folder)
    file.write_text("output_path: x\ntokenizer: {path: none}\ndataset: {path: ./none}\n")
    assert refused(capsys, file) == (
        f"fast-llm inspect: {file}:3: dataset.path: ./none: no such file or folder\n"
    )


def test_mistakes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, message in (
        (folder / "c.jsonl", f"dataset.path: {folder}/c.jsonl: no such file or folder; did you"),
        (folder / "c.json", f"{folder}/c.json: no such file; `fast-llm prepare` writes it next to"),
        (folder.parent / "empty", f"dataset.path: {folder.parent}/empty: no files there"),
    ):
        (folder.parent / "empty").mkdir(exist_ok=True)
        assert refused(capsys, path).startswith(f"fast-llm inspect: {message}")


def test_the_folder_of_a_dataset_stands_for_its_dataset_json(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = prepare(configure(folder.parent / "tokens", folder, model))
    assert inspect(capsys, folder.parent / "tokens") == inspect(capsys, metadata)


@pytest.mark.parametrize("make", [synthetic.llama, synthetic.gpt2])
def test_pieces_are_the_bytes_and_tokens_of_the_document(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(tmp_path / "model")
    text = f"naïve 中文 🙂\t{synthetic.EOS} <|endoftext|>"
    found = inspect(capsys, folder, "--text", text)
    assert b"".join(bytes.fromhex(each["bytes"]) for each in found["tokens"]) == text.encode()
    (tmp_path / "a.txt").write_text(text)
    metadata = prepare(configure(tmp_path / "out", tmp_path / "a.txt", folder))
    assert [each["id"] for each in found["tokens"]] == read(metadata)[0]
    special = [each["token"] for each in found["tokens"] if each["special"]]
    bos = found["bos"]["token"] if found["adds_bos"] else None
    assert special == [token for token in (bos, found["eos"]["token"]) if token]
    assert found["added_tokens"][0]["special"]


def test_pieces_of_a_vocabulary_with_byte_tokens(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "\u2581a": 1, "<0xF0>": 2, "<0x9F>": 3, "<0x98>": 4, "<0x80>": 5}
    made = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    made.decoder = decoders.ByteFallback()
    made.save(str(tmp_path / "tokenizer.json"))
    found = pieces(tokenizer.load(str(tmp_path)), "😀")
    assert [each["bytes"] for each in found] == ["f0", "9f", "98", "80"]


def test_a_part_of_a_character_has_one_backslash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    vocabulary = {"Ã": 0, "¯": 1, "n": 2}  # the bytes c3, af and 6e
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.save(str(tmp_path / "model/tokenizer.json"))
    assert cli.main(["inspect", str(tmp_path / "model"), "--text", "nï"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert lines == [
        ["0", "2", "'n'", "6e"],
        ["1", "0", r"'\xc3'", "c3"],
        ["2", "1", r"'\xaf'", "af"],
    ]


def test_text_of_a_file_or_stdin(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "a.txt").write_text("a model")
    given = inspect(capsys, model, "--text", "a model")
    assert inspect(capsys, model, "--text-file", tmp_path / "a.txt") == given
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a model")))
    assert inspect(capsys, model, "--text-file", "-") == given
    text = shown(capsys, model, "--text", "a model")
    assert "BOS         0 <|begin_of_text|>, before each document\n" in text
    assert f"\n7 bytes of text, {len(given['tokens'])} tokens\n" in text
    assert "tokens" not in inspect(capsys, model)
    assert refused(capsys, model, "--text-file", tmp_path / "b.txt") == (
        f"fast-llm inspect: --text-file: {tmp_path}/b.txt: No such file or directory\n"
    )
    (tmp_path / "c.txt").write_bytes(b"\xff")
    assert refused(capsys, model, "--text-file", tmp_path / "c.txt") == (
        f"fast-llm inspect: --text-file: {tmp_path}/c.txt: not UTF-8\n"
    )
