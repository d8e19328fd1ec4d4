"""Units of work: ranks that share them write the bytes of one process."""

import errno
import fcntl
import gzip
import json
import logging
import os
import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fast_llm.data import assemble, documents, files, ranks, units
from fast_llm.data import prepare as prepare_module
from fast_llm.data.claims import Claims
from fast_llm.data.columns import ArrowTable
from fast_llm.data.prepare import _check_coverage, prepare
from fast_llm.data.reading import Reader
from fast_llm.data.units import Unit, divide
from fast_llm.errors import DataError
from tests.data import synthetic
from tests.data.preparing import TEXTS, all_gone, configure, content, everything, jsonl, start
from tests.helpers import slow, some_fast

TWO = {"distributed__world_size": 2, "distributed__rank": 1}


def rows() -> list[str | None]:
    """Texts of some megabytes, with odd ones among them."""
    draw = random.Random(0)
    some: list[str | None] = [
        f"{number} {synthetic.text(number % 40, draw.randrange(1, 900))}" for number in range(1300)
    ]
    some[97::97] = [None] * len(some[97::97])
    return [*some, "", None]  # the last token file has a tail without documents


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows in every format, and as files."""
    folder = tmp_path_factory.mktemp("sources")
    lines = "".join(json.dumps({"id": 7, "text": text}) + "\n" for text in rows()).encode()
    (folder / "lines.jsonl").write_bytes(lines)
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(lines, 1))
    (folder / "value.json").write_text(json.dumps([{"text": text} for text in rows()]))
    table = pa.table({"text": rows(), "id": list(range(len(rows())))})
    pq.write_table(table, folder / "groups.parquet", row_group_size=150)
    with pa.ipc.new_file(str(folder / "batches.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=80)
    (folder / "files").mkdir()
    for number, text in enumerate(rows()):
        (folder / "files" / f"{number:04}.txt").write_text(text or "")
    return folder


def corpus_of(path: Path, model: Path, **changes: Any) -> documents.Corpus:
    config = configure(path.parent, path, model, **changes)
    return documents.open_documents(files.find(config.dataset), 1)


DIVIDED = {
    "lines.jsonl": True,
    "packed.jsonl.gz": False,
    "value.json": False,
    "groups.parquet": True,
    "batches.arrow": True,
    "files": True,
}


@pytest.mark.parametrize("name", some_fast(DIVIDED, lambda name: name == "lines.jsonl"))
def test_every_format_in_units_has_the_bytes_of_one_process(
    name: str, sources: Path, tmp_path: Path, model: Path
) -> None:
    found = divide(corpus_of(sources / name, model))
    assert len(found) > 2 if DIVIDED[name] else len(found) == 1
    assert [unit.first for unit in found] == [0, *(unit.last for unit in found[:-1])]
    assert max(unit.bytes for unit in found) < 2**22 or not DIVIDED[name]
    prepare(configure(tmp_path / "one" / "data", sources / name, model))
    prepare(configure(tmp_path / "two" / "data", sources / name, model, **TWO))
    assert everything(tmp_path / "two") == everything(tmp_path / "one")


@slow
def test_rows_without_documents_behind_a_full_token_file(
    sources: Path, tmp_path: Path, model: Path
) -> None:
    source = sources / "lines.jsonl"
    each = content(prepare(configure(tmp_path / "count", source, model)))["num_tokens"]
    prepare(configure(tmp_path / "one" / "data", source, model, tokens_per_shard=each))
    metadata = prepare(
        configure(tmp_path / "two" / "data", source, model, tokens_per_shard=each, **TWO)
    )
    assert everything(tmp_path / "two") == everything(tmp_path / "one")
    described = content(metadata)
    assert len(described["datasets"]) == 1
    assert sum(described["skipped"].values()) == 15
    record = content(tmp_path / "two" / "data" / "rank_0.json")
    assert sum(record["skipped"].values()) == 2


@slow
def test_part_of_a_split_in_units(sources: Path, tmp_path: Path, model: Path) -> None:
    split = {"dataset__split": "train[30:1100]+train[5:9]"}
    for name in ("lines.jsonl", "groups.parquet"):
        one, two = tmp_path / f"one {name}", tmp_path / f"two {name}"
        prepare(configure(one / "data", sources / name, model, **split))
        prepare(configure(two / "data", sources / name, model, **split, **TWO))
        assert everything(two) == everything(one)


def test_units_of_large_corpora_are_bounded() -> None:
    """Of 3 TB there are as many units as a folder holds easily, of 1 GB enough for many workers."""

    def number(size: int) -> int:
        groups = np.linspace(0, size // 100, 300_000).astype(np.int64)
        table = ArrowTable("a", "text", True, size // 100, size, None, groups)
        starts = np.array([0, table.rows])
        reader = Reader("text", 1)
        part = documents.Corpus([(table, 0, table.rows)], starts, reader, "", "parquet", [])
        return len(divide(part))

    assert 40_000 < number(3 * 10**12) <= 2**16
    assert 500 < number(10**9) <= 4096


def test_ranks_at_once_and_killed(sources: Path, tmp_path: Path, model: Path) -> None:
    """The rank that is left does all the work, also what the other had claimed."""
    source = sources / "lines.jsonl"
    prepare(configure(tmp_path / "one" / "data", source, model))
    output = tmp_path / "two" / "data"
    both = [
        start(
            tmp_path,
            output,
            source,
            model,
            "tokenize_workers=2",
            f"distributed.rank={rank}",
            "distributed.world_size=2",
        )
        for rank in range(2)
    ]
    while not list((output / "units").glob("*.npz")):
        assert both[0].poll() is None, both[0].communicate()
        time.sleep(0.005)
    os.kill(both[0].pid, signal.SIGKILL)
    both[0].communicate()
    all_gone(both[0].pid)
    _, stderr = both[1].communicate(timeout=120)
    assert both[1].returncode == 0, stderr
    assert everything(tmp_path / "two") == everything(tmp_path / "one")


def test_interrupted_in_each_phase(
    sources: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Units that are done are not done again, and one process can complete what ranks began."""
    source = sources / "lines.jsonl"
    prepare(configure(tmp_path / "one" / "data", source, model))
    config = configure(tmp_path / "two" / "data", source, model, **TWO)
    tokenize, done = units.UnitTokenizer.__call__, list[int]()

    def counted(worker: units.UnitTokenizer, unit: Unit) -> units.UnitSummary:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(unit.number)
        return tokenize(worker, unit)

    monkeypatch.setattr(units.UnitTokenizer, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    monkeypatch.setattr(units.UnitTokenizer, "__call__", tokenize)
    assert len(list((tmp_path / "two" / "data" / "units").glob("*.npz"))) == 2

    write, written = assemble.write_file, list[int]()

    def some(*given: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(given[2].number)
        write(*given)

    monkeypatch.setattr(ranks, "write_file", some)
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    monkeypatch.setattr(ranks, "write_file", write)
    assert not (tmp_path / "two" / "data.json").exists()
    with pytest.raises(DataError, match=r"was started with tokenizer.eos 1, now it is null"):
        prepare(configure(tmp_path / "two" / "data", source, model, tokenizer__eos=False))
    prepare(configure(tmp_path / "two" / "data", source, model))
    assert everything(tmp_path / "two") == everything(tmp_path / "one")


def test_without_locks_each_rank_does_its_share(
    sources: Path,
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = sources / "lines.jsonl"
    prepare(configure(tmp_path / "one" / "data", source, model))

    def lockf(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    caplog.set_level(logging.INFO)

    def rank(number: int) -> Path:
        return prepare(
            configure(
                tmp_path / "two" / "data",
                source,
                model,
                distributed__world_size=2,
                distributed__rank=number,
            )
        )

    metadata = rank(1)
    assert "units: the file system has no locks (No locks available); each rank" in caplog.text
    assert f"Rank 1 has finished its share. {metadata} is written by the last" in caplog.text
    done = len(list((tmp_path / "two" / "data" / "units").glob("*.npz")))
    assert 0 < done < len(divide(corpus_of(source, model)))
    rank(0)
    assert everything(tmp_path / "two") == everything(tmp_path / "one")


def test_a_line_that_is_not_json_ends_a_rank(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": oops}\n')
    with pytest.raises(DataError, match=r"a.jsonl:2: not JSON"):
        prepare(configure(tmp_path / "out", tmp_path / "a.jsonl", model, **TWO))


@slow
@pytest.mark.parametrize("seed", range(6))
def test_random_corpora_in_units(
    seed: int, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiny units and token files: their borders meet in every way."""
    draw = random.Random(seed)
    monkeypatch.setattr(units, "_SMALLEST", 2000)
    monkeypatch.setattr(units, "_UNITS", 50)
    monkeypatch.setattr(units, "_CHUNK", draw.choice((1, 500, 10_000)))
    (tmp_path / "in").mkdir()
    for number in range(60):
        text = synthetic.text(draw.randrange(99), draw.choice((0, 1, 30, 300, 30_000)))
        (tmp_path / "in" / f"{number:03}.txt").write_text(text)
    for name, world in (("one", 1), ("five", 5)):
        config = configure(
            tmp_path / name / "data",
            tmp_path / "in",
            model,
            tokens_per_shard=100_000,
            distributed__world_size=world,
            distributed__rank=world - 1,
        )
        prepare(config)
    assert everything(tmp_path / "five") == everything(tmp_path / "one")


def test_a_rank_leaves_token_files_to_others(
    sources: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It claims no more of them than it writes at a time."""
    take, release, held, most = Claims.take, Claims.release, set[int](), list[int]()

    def taken(claims: Claims, number: int) -> bool:
        held.add(number)
        most.append(sum(ranks._FILES <= each < ranks._PROGRESS for each in held))
        return take(claims, number)

    def released(claims: Claims, number: int) -> None:
        held.discard(number)
        release(claims, number)

    monkeypatch.setattr(Claims, "take", taken)
    monkeypatch.setattr(Claims, "release", released)
    metadata = prepare(configure(tmp_path / "data", sources / "lines.jsonl", model, **TWO))
    assert len(content(metadata)["datasets"]) > 3
    assert max(most) == 1


def test_what_a_dead_rank_was_writing_is_removed(tmp_path: Path, model: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(jsonl(TEXTS))
    prepare(configure(tmp_path / "one" / "data", source, model))
    output = tmp_path / "two" / "data"
    (output / "tokenizer").mkdir(parents=True)
    for name in ("shard_0_1.bin", "shard_0_1.rows.npy", "rank_0.json", "tokenizer/tokenizer.json"):
        (output / f"{name}.0.partial").write_bytes(b"half")
    (tmp_path / "two" / "data.json.0.partial").write_bytes(b"half")
    prepare(configure(output, source, model, **TWO))
    assert everything(tmp_path / "two") == everything(tmp_path / "one")


def test_a_file_that_another_rank_renames_meanwhile(tmp_path: Path, model: Path) -> None:
    """It is listed and gone, as a link to nowhere is."""
    source, output = tmp_path / "a.jsonl", tmp_path / "two" / "data"
    source.write_bytes(jsonl(TEXTS))
    output.mkdir(parents=True)
    (output / "shard_0_9.bin.0.partial").symlink_to(tmp_path / "nowhere")
    prepare(configure(output, source, model, **TWO))


PHASES = ["_agree_on_settings", "_tokenize", "plan_files", "_write_files", "_copy_tokenizer"]


@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_finds_that_another_has_finished(
    phase: str, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other deletes the units, in whatever phase this one is."""
    source = tmp_path / "a.jsonl"
    source.write_bytes(jsonl(TEXTS))
    prepare(configure(tmp_path / "one" / "data", source, model))
    module = ranks if hasattr(ranks, phase) else prepare_module
    original = getattr(module, phase)

    def after_the_other(*given: Any) -> Any:
        monkeypatch.setattr(module, phase, original)
        other = {**TWO, "distributed__rank": 0}
        prepare(configure(tmp_path / "two" / "data", source, model, **other))
        return original(*given)

    monkeypatch.setattr(module, phase, after_the_other)
    prepare(configure(tmp_path / "two" / "data", source, model, **TWO))
    assert everything(tmp_path / "two") == everything(tmp_path / "one")


def test_a_rank_finds_that_there_is_no_document(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 3)
    config = configure(tmp_path / "out", tmp_path / "a.jsonl", model, **TWO)
    tokenize = units.UnitTokenizer.__call__

    def after_the_other(worker: units.UnitTokenizer, unit: Unit) -> units.UnitSummary:
        monkeypatch.setattr(units.UnitTokenizer, "__call__", tokenize)
        other = configure(
            tmp_path / "out", tmp_path / "a.jsonl", model, **{**TWO, "distributed__rank": 0}
        )
        with pytest.raises(DataError, match=r"a.jsonl has no document to write: 3 empty$"):
            prepare(other)
        return tokenize(worker, unit)

    monkeypatch.setattr(units.UnitTokenizer, "__call__", after_the_other)
    with pytest.raises(
        DataError,
        match=r"^dataset.path: .*a.jsonl has no document to write; the message of another rank"
        r" says why$",
    ):
        prepare(config)


def test_ranks_that_start_together_agree_on_settings(tmp_path: Path) -> None:
    """None has left a record yet, so the first one's settings are those of all."""

    def agree(rank: int, text: str, last: int = 7) -> None:
        job: Any = SimpleNamespace(units=tmp_path, rank=rank, settings={"dataset.filter": text})
        ranks._agree_on_settings(job, [Unit(0, 0, last, 100)])

    agree(0, "a")
    agree(1, "a")
    with pytest.raises(DataError, match=r'dataset.filter "a", now it is "b"'):
        agree(2, "b")
    with pytest.raises(DataError, match="rows of the units of work"):
        agree(3, "a", last=8)
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_token_files_cover_all_rows(tmp_path: Path) -> None:
    job: Any = SimpleNamespace(output=tmp_path, record=lambda number: tmp_path / f"{number}.json")
    records = [{"first_row": 0, "next_row": 5}, {"first_row": 5, "next_row": 9}]
    _check_coverage(job, records)
    records[1]["first_row"] = 6
    with pytest.raises(DataError, match="begins with document 6, must begin with 5"):
        _check_coverage(job, records)
