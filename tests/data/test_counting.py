"""Ranks count the rows of JSON files together."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fast_llm.data import counting, documents, tables, units
from fast_llm.data.prepare import prepare
from fast_llm.errors import DataError
from tests.data.preparing import TEXTS, configure, everything, jsonl

BAD = {"dataset__max_bad_lines": 2}


def rank(number: int) -> dict[str, Any]:
    return {"distributed__world_size": 3, "distributed__rank": number}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of every form of JSON, in several groups."""
    monkeypatch.setattr(counting, "_GROUP", 4000)
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(jsonl(TEXTS[:9]) + b'\n{"text"\n \n' + jsonl(TEXTS[9:12]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS[12:20]) + b"{oops\n"))
    (folder / "c.json").write_text(json.dumps([{"text": text} for text in TEXTS[20:]]))
    (folder / "d.jsonl").write_bytes(b'{"title": "no text"}\n')
    return folder


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose rows were counted."""
    found, open_json = list[str](), tables.open_json

    def observed(path: str, *given: Any) -> Any:
        found.append(Path(path).name)
        return open_json(path, *given)

    monkeypatch.setattr(documents, "open_json", observed)
    return found


def test_each_file_is_counted_by_one_rank(
    source: Path, counted: list[str], tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["a.jsonl", "b.jsonl.gz", "c.json", "d.jsonl"]
    prepare(configure(tmp_path / "one" / "data", source, model, **BAD))
    assert sorted(counted) == names
    counted.clear()
    output = tmp_path / "three" / "data"

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(units.UnitTokenizer, "__call__", stopped)
        for number in (1, 2):
            with pytest.raises(KeyboardInterrupt):
                prepare(configure(output, source, model, **BAD, **rank(number)))
            assert sorted(counted) == names
    with pytest.raises(DataError, match=r"b.jsonl.gz:9: not JSON, after 1 other such line"):
        prepare(configure(output, source, model, dataset__max_bad_lines=1, **rank(0)))
    assert sorted(counted) == sorted([*names, *names])  # for another limit
    prepare(configure(output, source, model, **BAD, **rank(0), loading_workers=2))
    assert len(counted) == 2 * len(names)
    assert everything(tmp_path / "three") == everything(tmp_path / "one")


def test_counts_that_another_rank_deletes(
    source: Path, counted: list[str], tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(configure(tmp_path / "one" / "data", source, model, **BAD))
    counted.clear()
    read = counting._read

    def after_the_other(*given: Any) -> Any:
        monkeypatch.setattr(counting, "_read", read)
        prepare(configure(tmp_path / "three" / "data", source, model, **BAD, **rank(0)))
        return read(*given)

    monkeypatch.setattr(counting, "_read", after_the_other)
    prepare(configure(tmp_path / "three" / "data", source, model, **BAD, **rank(1)))
    assert len(counted) == 8  # together, then by the rank that was late
    assert everything(tmp_path / "three") == everything(tmp_path / "one")


def test_a_mistake_in_a_file_ends_each_rank(source: Path, tmp_path: Path, model: Path) -> None:
    (source / "b.jsonl.gz").write_bytes(b"not gzip" * 2000)
    for number in (1, 0):
        with pytest.raises(DataError, match=r"b.jsonl.gz: damaged, or not the format"):
            prepare(configure(tmp_path / "data", source, model, **BAD, **rank(number)))
