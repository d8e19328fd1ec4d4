"""Lines that are not JSON: where a preparation stops, and dataset.max_bad_lines."""

import gzip
from pathlib import Path
from typing import Any

import pytest

from fast_llm.data import ranks
from fast_llm.data.prepare import prepare
from fast_llm.errors import DataError
from tests.data import synthetic
from tests.data.preparing import configure, content, everything, jsonl, read, tokens

TEXTS = [synthetic.text(seed, 300) for seed in range(400)]
# Lines of the first file, from 1: cut off, found while rows are counted; wrong inside, found later.
CUT, INSIDE = (7, 20), (1, 390)


def write(folder: Path, bad: tuple[int, ...] = (*CUT, *INSIDE), packed: bool = False) -> Path:
    lines = jsonl(TEXTS).splitlines(keepends=True)
    for number in bad:
        line = lines[number - 1]
        lines[number - 1] = line[:40] + b"\n" if number in CUT else line.replace(b'"id":', b'"id"')
    folder.mkdir()
    for name, some in (("a.jsonl", lines), ("b.jsonl", jsonl(TEXTS[:3]).splitlines(True))):
        data = b"".join(some)
        path = folder / (name + ".gz" * packed)
        path.write_bytes(gzip.compress(data) if packed else data)
    return folder


def kept(bad: tuple[int, ...] = (*CUT, *INSIDE)) -> list[str]:
    return [text for number, text in enumerate(TEXTS, 1) if number not in bad] + TEXTS[:3]


def fails(output: Path, source: Path, model: Path, **changes: Any) -> str:
    with pytest.raises(DataError) as caught:
        prepare(configure(output, source, model, **changes))
    return str(caught.value)


@pytest.mark.parametrize("packed", [False, True])
def test_bad_lines_are_skipped_counted_and_named(packed: bool, tmp_path: Path, model: Path) -> None:
    source = write(tmp_path / "source", packed=packed)
    metadata = prepare(configure(tmp_path / "out", source, model, dataset__max_bad_lines=4))
    found = content(metadata)
    assert read(metadata) == tokens(model, kept())
    assert found["skipped"] == {"not_json": 4}
    name = source / ("a.jsonl" + ".gz" * packed)
    assert found["bad_lines"] == [f"{name}:{number}" for number in (1, 7, 20, 390)]
    assert found["skipped_examples"] == [[line, "not_json"] for line in found["bad_lines"]]
    assert len(found["datasets"]) > 1


def test_two_workers_skip_the_same_lines(tmp_path: Path, model: Path) -> None:
    source = write(tmp_path / "source")
    made = []
    for workers in (1, 2):
        output = tmp_path / str(workers) / "out"
        changes = {"dataset__max_bad_lines": 4, "tokenize_workers": workers}
        prepare(configure(output, source, model, **changes))
        made.append(everything(output.parent))
    assert made[0] == made[1]


@pytest.mark.parametrize("workers", [1, 2])
def test_one_more_stops_at_its_place_and_a_higher_limit_resumes(
    workers: int, tmp_path: Path, model: Path
) -> None:
    source = write(tmp_path / "source")
    changes = {"tokenize_workers": workers}
    output = tmp_path / "out"
    assert fails(output, source, model, dataset__max_bad_lines=3, **changes) == (
        f"{source}/a.jsonl:390: not JSON, after 3 other such lines; dataset.max_bad_lines allows 3:"
        " fix the lines or delete them, or raise it and run the same command again"
    )
    assert list(output.glob("shard_*.bin"))  # what is complete is kept
    prepare(configure(output, source, model, dataset__max_bad_lines=4, **changes))
    prepare(configure(tmp_path / "other/out", source, model, dataset__max_bad_lines=4))
    assert everything(output) == everything(tmp_path / "other/out")


def test_cut_lines_are_found_before_anything_is_tokenized(tmp_path: Path, model: Path) -> None:
    source = write(tmp_path / "source", CUT)
    assert fails(tmp_path / "out", source, model, dataset__max_bad_lines=1) == (
        f"{source}/a.jsonl:20: not JSON, after 1 other such line; dataset.max_bad_lines allows 1:"
        " fix the lines or delete them, or raise it and run the same command again"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [CUT, INSIDE])
def test_none_is_skipped_by_default(bad: tuple[int, ...], tmp_path: Path, model: Path) -> None:
    source = write(tmp_path / "source", bad)
    message = fails(tmp_path / "out", source, model)
    assert message.startswith(f"{source}/a.jsonl:{bad[0]}: not JSON: ")
    assert message.endswith(
        "; fix the line or delete it, or set dataset.max_bad_lines to skip such lines"
    )


@pytest.mark.parametrize(
    "content_of_file", [b"\xff\xfe{\0}\0", b"version https://git-lfs\noid 1\n"]
)
def test_a_file_of_another_format_is_never_skipped(
    content_of_file: bytes, tmp_path: Path, model: Path
) -> None:
    source = write(tmp_path / "source", ())
    (source / "c.jsonl").write_bytes(content_of_file)
    message = fails(tmp_path / "out", source, model, dataset__max_bad_lines=100)
    assert message.startswith(f"{source}/c.jsonl: ")
    assert "UTF-16" in message or "a Git LFS pointer" in message


def test_the_limit_is_that_of_all_ranks(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "source")
    changes = {"dataset__max_bad_lines": 3, "distributed__world_size": 2}
    message = fails(tmp_path / "out", source, model, distributed__rank=1, **changes)
    place = f"{source}/a.jsonl:390: not JSON, after 3 other such lines; "
    assert message.startswith(place)
    # No rank has four of them: the one that finishes counts those of all.
    tokenize, other = ranks._tokenize, changes | {"distributed__rank": 0}

    def after_the_other(*given: Any) -> bool:
        monkeypatch.setattr(ranks, "check_bad_lines", lambda *_: None)
        return tokenize(*given)

    monkeypatch.setattr(ranks, "_tokenize", after_the_other)
    assert fails(tmp_path / "out", source, model, **other).startswith(place)


def test_the_limit_is_that_of_all_files(tmp_path: Path, model: Path) -> None:
    """Lines that are seen while rows are counted end the preparation at once."""
    source = write(tmp_path / "source", CUT)
    (source / "c.jsonl").write_bytes(b'{"text"\n' + jsonl(TEXTS[:2]))
    message = fails(tmp_path / "out", source, model, dataset__max_bad_lines=2)
    assert message.startswith(f"{source}/c.jsonl:1: not JSON, after 2 other such lines; ")
    assert not (tmp_path / "out").exists()
    split = {"dataset__split": "train[:400]"}  # without c.jsonl
    prepare(configure(tmp_path / "out", source, model, dataset__max_bad_lines=2, **split))
