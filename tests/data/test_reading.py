"""Rows of JSON lines are the same with orjson and without it."""

import json
import random
import string
from collections.abc import Sequence
from pathlib import Path

import pytest

from fast_llm.data import reading
from fast_llm.data.reading import LinesTask, Reader, SkippedDocument
from fast_llm.errors import DataError

Row = str | SkippedDocument | None
LINES = [
    b'{"text": "plain"}',
    b' \t{"text": "spaces"} \r',
    b"",
    b"   ",
    b"\x0b\x0c",
    b'\xef\xbb\xbf{"text": "byte order mark"}',
    b'{"text": "\xff\xfe"}',
    b'{"text": "fine", "other": "\xff"}',
    b'{"text": "\xed\xa0\x80"}',
    rb'{"text": "\ud83d\ude00 \u0000 \" \\ \/ \b\f\n\r\t"}',
    rb'{"text": "half \ud83d"}',
    rb'{"text": "fine", "other": "\udc00"}',
    rb'{"te\u0078t": "an escaped key"}',
    b'{"text": "first", "text": "last"}',
    b'{"text": null}',
    b'{"text": 18446744073709551616}',
    b'{"text": "fine", "n": 18446744073709551616, "x": 1e999, "y": -0.0, "z": NaN}',
    b'{"text": "fine", "n": ' + b"9" * 5000 + b"}",
    b'{"text": ["list"]}',
    b'{"other": 1}',
    b"[]",
    b'"text"',
    b"5",
    b"[" * 5000 + b"]" * 5000,
    *(b'{"text": "deep", "x": ' + b"[" * n + b"]" * n + b"}" for n in (400, 990, 1010, 1023, 1030)),
    *(b"[" * n + b"]" * n for n in (990, 1010, 1023)),
    b'{"text": "control \x01"}',
    b'{"text": "not closed',
    b'{"text": "x"} {"text": "y"}',
    b'{"text": 01}',
    b"{'text': 'quotes'}",
]


def read(lines: Sequence[bytes], path: Path) -> list[Row]:
    block = b"".join(line + b"\n" for line in lines)
    path.write_bytes(block)
    task = LinesTask(0, len(lines), str(path), 1, 0, 0, len(block), None)
    return list(Reader("text", 2**20, max_bad_lines=len(lines)).texts(task))


def without_orjson(
    lines: Sequence[bytes], path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[Row]:
    with monkeypatch.context() as patch:
        patch.setattr(reading, "_fast_parser", lambda: reading._leave_to_json)
        return read(lines, path)


def test_lines_that_parsers_read_differently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = read(LINES, tmp_path / "a.jsonl")
    assert found == without_orjson(LINES, tmp_path / "a.jsonl", monkeypatch)
    assert found[:4] == ["plain", "spaces", None, None]
    assert found[5:10] == [
        "byte order mark",
        SkippedDocument("not_utf8"),
        "fine",
        SkippedDocument("not_utf8"),
        '\U0001f600 \0 " \\ / \b\f\n\r\t',
    ]


def test_damaged_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    lines = []
    for number in range(3000):
        text = "".join(draw.choices(string.printable + "é中\U0001f600\ud83d\u2028", k=20))
        row = {"text": text, "n": draw.choice([1, 2**70, 0.1, None, [{"a": [text]}], text])}
        line = bytearray(json.dumps(row, ensure_ascii=number % 2 == 0).encode(errors="replace"))
        for _ in range(number % 3):
            line[draw.randrange(len(line))] = draw.choice(b'"\\{}[],:0e\xff\xe9 u')
        lines.append(bytes(line).replace(b"\n", b" "))
    found = read(lines, tmp_path / "a.jsonl")
    assert found == without_orjson(lines, tmp_path / "a.jsonl", monkeypatch)
    kinds = {
        row.reason if isinstance(row, SkippedDocument) else type(row).__name__ for row in found
    }
    assert kinds == {"str", "not_json", "not_text", "not_utf8"}


def test_message_is_that_of_python(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n{"text": "y"\n')
    task = LinesTask(0, 2, str(tmp_path / "a.jsonl"), 1, 0, 0, 29, None)
    with pytest.raises(DataError, match=r"a\.jsonl:2: not JSON: Expecting ',' delimiter"):
        list(Reader("text", 2**20).texts(task))
