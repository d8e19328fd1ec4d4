"""Exact deduplication: the first copy stays, whatever the workers or ranks."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fast_llm.data import duplicates
from fast_llm.data.prepare import prepare
from fast_llm.errors import DataError
from tests.data import synthetic
from tests.data.preparing import configure, content, everything, read, tokens
from tests.data.ray_cluster import ROOT
from tests.helpers import slow


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts() -> list[str]:
    """Some megabytes, of which a third are copies, far apart and next to each other."""
    draw = random.Random(0)
    some = [f"{number} {synthetic.text(number % 40, draw.randrange(900))}" for number in range(900)]
    some += draw.choices(some, k=400)
    draw.shuffle(some)
    return [*some, some[-1], some[0], "", ""]


def unique(some: list[str]) -> list[str]:
    return [text for text in dict.fromkeys(some) if text]


def test_the_first_copy_stays(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = texts()
    source = write(tmp_path / "rows.jsonl", some)
    monkeypatch.setattr(duplicates, "_SLICE", 300)
    metadata = prepare(configure(tmp_path / "1" / "data", source, model, dataset__deduplicate=True))
    assert read(metadata) == tokens(model, unique(some))
    described = content(metadata)
    copies = len(some) - 2 - len(unique(some))
    assert copies > 350
    assert described["skipped"] == {"empty": 2, "duplicate": copies}
    assert [reason for _, reason in described["skipped_examples"]] == ["empty"] * 2
    # They are the bytes of a corpus without copies.
    plain = prepare(
        configure(tmp_path / "2" / "data", write(tmp_path / "u.jsonl", unique(some)), model)
    )
    for one, other in zip(described["datasets"], content(plain)["datasets"], strict=True):
        for suffix in ("bin", "idx"):  # its rows have other numbers
            assert one["sha256"][suffix] == other["sha256"][suffix]
    monkeypatch.setattr(duplicates, "_SLICE", 2**24)
    # Two workers; a rank of two; what is lost is written again.
    changes: tuple[dict[str, Any], ...] = (
        {"tokenize_workers": 2},
        {"distributed__world_size": 2, "distributed__rank": 1},
    )
    for number, change in enumerate(changes):
        config = configure(
            tmp_path / f"{number + 3}" / "data", source, model, dataset__deduplicate=True, **change
        )
        prepare(config)
        assert everything(tmp_path / f"{number + 3}") == everything(tmp_path / "1")
    (tmp_path / "4" / "data" / "shard_0_2.bin").unlink()
    prepare(config)
    assert everything(tmp_path / "4") == everything(tmp_path / "1")
    with pytest.raises(DataError, match=r"dataset.deduplicate true, now it is false"):
        prepare(configure(tmp_path / "1" / "data", source, model))


@slow
def test_duplicates_on_ray(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    source = write(tmp_path / "rows.jsonl", texts())
    for name, engine in (("one", "ranks"), ("ray", "ray")):
        prepare(
            configure(
                tmp_path / name / "data",
                source,
                model,
                dataset__deduplicate=True,
                distributed__engine=engine,
            )
        )
    assert everything(tmp_path / "ray") == everything(tmp_path / "one")


def test_only_copies(tmp_path: Path, model: Path) -> None:
    source = write(tmp_path / "rows.jsonl", ["a"] * 5)
    metadata = prepare(configure(tmp_path / "out", source, model, dataset__deduplicate=True))
    assert read(metadata) == tokens(model, ["a"])
    assert content(metadata)["skipped"] == {"duplicate": 4}


@slow
def test_digests_at_the_borders_of_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any digests, also the smallest and the largest, in any number of slices."""
    draw = random.Random(0)
    ends = [bytes(16), b"\xff" * 16, b"\xff" * 8 + bytes(8), b"\x80" + bytes(15)]
    pool = [*ends, *(draw.randbytes(16) for _ in range(50))]
    rows = [[draw.choice(pool) for _ in range(draw.randrange(40))] for _ in range(9)]
    seen: set[bytes] = set()
    expected: list[list[int]] = []
    for some in rows:
        expected.append([])
        for number, one in enumerate(some):
            if one in seen:
                expected[-1].append(number)
            seen.add(one)
    for size in (1, 7, 1000):
        folder = tmp_path / str(size)
        folder.mkdir()
        monkeypatch.setattr(duplicates, "_SLICE", size)
        for number, some in enumerate(rows):
            array = duplicates.sorted_digests(b"".join(some))
            duplicates.write_array(folder / f"{number}.digests.npy", "0", array)
        duplicates.find_duplicates(folder, range(len(rows)), "0")
        found = [np.load(folder / f"{number}.copies.npy").tolist() for number in range(len(rows))]
        assert found == expected
