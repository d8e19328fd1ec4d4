"""Only one field is read: its text is kept exactly as written, and everything left out is named."""

import bz2
import gzip
import json
import lzma
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fast_llm.config.prepare import SourceConfig
from fast_llm.data import files as finding
from fast_llm.data import tables
from fast_llm.data.documents import Corpus, open_documents
from fast_llm.data.files import describe, find
from fast_llm.data.reading import SkippedDocument
from fast_llm.errors import DataError


def opened(path: Path | str, **further: Any) -> Corpus:
    return open_documents(find(SourceConfig(path=str(path), **further)), 2)


def rows(
    source: Corpus, first: int = 0, last: int | None = None, target: int = 2**20
) -> list[str | SkippedDocument | None]:
    """What is read, row by row, with a check that tasks cover the rows in order."""
    found: list[str | SkippedDocument | None] = []
    at, last = first, len(source) if last is None else last
    for task in source.tasks(first, last, target):
        assert task.first == at and task.last > at
        texts = list(source.reader.texts(task))
        assert len(texts) == task.last - task.first
        found += texts
        at = task.last
    assert at == last
    return found


def texts(path: Path | str, **further: Any) -> list[str]:
    """The documents; nothing may be left out."""
    found = [text for text in rows(opened(path, **further)) if text is not None]
    assert all(isinstance(text, str) for text in found), found
    return found  # type: ignore[return-value]


def write(path: Path, *lines: str | dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    )
    return path


# --- which files --------------------------------------------------------------------------------


def test_files_do_not_vanish_by_their_names(tmp_path: Path) -> None:
    write(tmp_path / "latest_news.jsonl", {"text": "a"}, {"text": "b"})
    write(tmp_path / "train_timetables.jsonl", {"text": "c"})
    write(tmp_path / "zoo.jsonl", {"text": "d"})
    assert texts(tmp_path) == ["a", "b", "c", "d"]
    assert texts(f"{tmp_path}/*.jsonl") == ["a", "b", "c", "d"]
    assert texts(tmp_path, data_files=["zoo*", "l*"]) == ["a", "b", "d"]
    assert opened(tmp_path).left_out == []


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("train-00000-of-00002.parquet", "train"),
        ("train-00000-of-00001-a09b74b3ef9c3b56.parquet", "train"),
        ("train_0.jsonl.gz", "train"),
        ("train1.json", "train"),
        ("data/Train/x.jsonl", "train"),
        ("python/dev/x.jsonl", "validation"),
        ("val.jsonl", "validation"),
        ("eval/test_cases.jsonl", "test"),
        ("test-3.arrow", "test"),
        ("latest_news.jsonl", ""),
        ("train_timetables.jsonl", ""),
        ("contest.jsonl", ""),
        ("training-material/x.jsonl", ""),
        ("validate.jsonl", ""),
        ("x.train", ""),
    ],
)
def test_a_split_is_a_folder_or_a_name(name: str, split: str) -> None:
    assert finding._split_of(name) == split


def test_files_of_no_split_are_named(tmp_path: Path) -> None:
    for name in ("train", "test", "zoo"):
        write(tmp_path / f"{name}.jsonl", {"text": name})
    (tmp_path / ".gitattributes").write_text("x")
    (tmp_path / "README.md").write_text("x")
    write(tmp_path / ".git" / "x.jsonl", {"text": "hidden"})
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "old.tar.gz").write_text("")
    write(tmp_path / "dataset_infos.json", {"default": {"splits": []}})
    source = opened(tmp_path)
    assert rows(source) == ["train"]
    assert describe(source.left_out) == (
        "old.tar.gz (an archive: unpack it), empty.jsonl (empty), test.jsonl (split test),"
        " zoo.jsonl (of no split),"
        " .git/ (hidden), .gitattributes (hidden), dataset_infos.json (about a dataset), README.md"
        " (no table)"
    )
    assert describe(source.left_out, 2).endswith("empty.jsonl (empty) and 6 more")
    assert texts(tmp_path, split="test") == ["test"]
    assert texts(f"{tmp_path}/t*.jsonl") == ["test", "train"]
    # Without a split that is `train`, files of none are.
    (tmp_path / "train.jsonl").unlink()
    assert texts(tmp_path) == ["zoo"]


@pytest.mark.parametrize("name", ["texts[v2]", "a*b", "what?", "[", "**"])
def test_names_are_not_patterns(tmp_path: Path, name: str) -> None:
    write(tmp_path / "texts" / name / "a[1].jsonl", {"text": "a"})
    write(tmp_path / "texts" / name / "a1.jsonl", {"text": "b"})
    (tmp_path / "texts" / name / "c.txt").write_text("c")
    write(tmp_path / "texts" / "texts2" / "a.jsonl", {"text": "another"})
    folder = tmp_path / "texts" / name
    assert texts(folder) == ["b", "a"]
    assert texts(folder / "a[1].jsonl") == ["a"]
    assert texts(folder / "c.txt") == ["c"]
    assert texts(f"{folder}/*.jsonl") == ["b", "a"]
    assert texts(folder, data_files="a[1].jsonl") == ["a"]
    assert texts(folder, data_files="a[0-9].jsonl") == ["b"]
    assert texts(tmp_path / "texts", data_directory=name) == ["b", "a"]


def test_links(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "b.jsonl", {"text": "b"})
    write(tmp_path / "here" / "a.jsonl", {"text": "a"})
    (tmp_path / "here" / "loop").symlink_to(tmp_path / "here")
    (tmp_path / "here" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "here" / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "here" / "pipe.jsonl")
    source = opened(tmp_path / "here")
    assert rows(source) == ["a", "b"]
    assert source.left_out == [("gone.jsonl", "a broken link"), ("pipe.jsonl", "not a file")]


def test_what_several_links_lead_to_is_read_once(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "b.jsonl", {"text": "b"})
    here = tmp_path / "here"
    write(here / "z" / "a.jsonl", {"text": "a"})
    (here / "a").symlink_to(here / "z")
    (here / "c").symlink_to(tmp_path / "elsewhere")
    (here / "d").symlink_to(tmp_path / "elsewhere")
    (here / "e").mkdir()
    (here / "e" / "back").symlink_to(tmp_path)  # to a folder around the one that is read
    (here / "f.jsonl").symlink_to(here / "z" / "a.jsonl")
    source = opened(here)
    assert rows(source) == ["b", "a"]
    assert source.left_out == [
        ("a", "a link to z"),
        ("d", "a link to c"),
        ("f.jsonl", "a link to z/a.jsonl"),
    ]
    # What the user names is read as often as it is named.
    assert texts(here, data_files=["a/*.jsonl", "f.jsonl"]) == ["a", "a"]


@pytest.mark.parametrize("form", ['{"text": "%s"}\n', '["%s"]'])
def test_a_line_that_would_fill_the_memory_is_refused(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    path.write_text(form % ("x" * 3_000_000))
    assert rows(opened(path, max_document_bytes=10**6)) == [SkippedDocument("too_large")]
    monkeypatch.setattr(tables, "_LARGEST_JSON", 10**6)
    with pytest.raises(
        DataError,
        match=r"a.json: the line at byte 1,048,576 is longer than 0.000931 GiB; write one document"
        r" in each line$",
    ):
        opened(path)


def test_slices(tmp_path: Path) -> None:
    write(
        tmp_path / "train_0.jsonl", "", {"text": "0"}, " ", {"text": "1"}, "\t", {"text": "2"}, ""
    )
    write(tmp_path / "train_1.jsonl", *({"text": str(number)} for number in range(3, 10)))
    write(tmp_path / "test.jsonl", {"text": "x"})
    for split, expected in (
        ("train", "0123456789"),
        ("train[:2]", "01"),
        ("train[2:4]", "23"),
        ("train[-2:]", "89"),
        ("train[:-8]", "01"),
        ("train[10%:30%]", "12"),
        ("train[90%:]+test+train[:1]", "9x0"),
        ("train[5:100]", "56789"),
    ):
        assert "".join(texts(tmp_path, split=split)) == expected, split
    with pytest.raises(
        DataError,
        match=r"dataset.split: given train\[1\], must be a split such as train, or slices",
    ):
        opened(tmp_path, split="train[1]")


def test_wrong_paths_are_answered_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without asking the Hub."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data" / "news.jsonl", {"text": "a"})
    for path, message in (
        ("data/new", r"dataset.path: data/new: no such file or folder$"),
        ("data/newz.jsonl", r"no such file or folder; did you mean data/news.jsonl\?"),
        ("dat/", r"dataset.path: dat/: no such file or folder; did you mean data\?"),
        ("./dat/news.jsonl", r"no such file or folder; did you mean data\?"),
    ):
        with pytest.raises(DataError, match=message):
            find(SourceConfig(path=path))
    with pytest.raises(
        DataError, match=r"did you mean data\? For a dataset on the Hub give hf://datasets/dataa$"
    ):
        find(SourceConfig(path="dataa"))
    (tmp_path / "data" / "news").mkdir()
    with pytest.raises(
        DataError, match=r"dta/news: no such file or folder; did you mean data/news\? For a dataset"
    ):
        find(SourceConfig(path="dta/news"))
    assert find(SourceConfig(path="hf://datasets/dta/news")).kind == "hub"
    assert find(SourceConfig(path="hf://datasets/dataa")).kind == "hub"
    assert find(SourceConfig(path="squad")).kind == "hub"
    assert find(SourceConfig(path="org/name")).kind == "hub"
    (tmp_path / "org").mkdir()
    assert find(SourceConfig(path="hf://datasets/org/name")).kind == "hub"
    with pytest.raises(
        DataError,
        match=r"dataset.data_files nws.jsonl: no files there; did you mean data/news.jsonl",
    ):
        find(SourceConfig(path="data", data_files=["news.jsonl", "nws.jsonl"]))
    with pytest.raises(DataError, match=r"dataset.data_directory: data/x: no such folder"):
        find(SourceConfig(path="data", data_directory="x"))


# --- one field ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "adjacent_texts",
    [
        ["2020-01-05", "2020-01-05T10:00:00Z", "1.50", "12", "true", "null"],
        ["ordinary text", "2020-01-05"],
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_text_is_what_was_written(tmp_path: Path, adjacent_texts: list[str], suffix: str) -> None:
    for number, text in enumerate(adjacent_texts):
        if suffix == "parquet":
            pq.write_table(pa.table({"text": [text]}), tmp_path / f"{number}.parquet")
        else:
            write(tmp_path / f"{number}.{suffix}", {"text": text})
    assert texts(tmp_path) == adjacent_texts


@pytest.mark.parametrize(
    "value", ["1.50", "12", "true", "null", "[1]", '{"a": "b"}', "NaN", '["a"]']
)
def test_what_is_no_text_is_named(tmp_path: Path, value: str) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "a"}, f'{{"text": {value}}}', {"text": "c"})
    source = opened(path)
    assert rows(source) == ["a", SkippedDocument("not_text"), "c"]
    assert source.name(1) == f"{path}:2"


def test_other_columns_do_not_matter(tmp_path: Path) -> None:
    """More keys, other types, no match, deep nesting, long numbers, invalid UTF-8."""
    deep = "[" * 100_000 + "]" * 100_000
    write(
        tmp_path / "a.jsonl",
        {"text": "a", "id": 1, "meta": None},
        {"text": "b", "id": "x", "meta": {"a": 1}},
    )
    write(tmp_path / "b.jsonl", {"url": [], "text": "c"}, {"id": {}, "text": "d"})
    write(
        tmp_path / "c.jsonl",
        '{"n": ' + "1" * 5000 + ', "text": "e"}',
        {"id": 2**70, "text": "f"},
        {"id": 1},
    )
    (tmp_path / "d.jsonl").write_bytes(
        b'{"x": "\xff", "text": "g"}\n{"text": "h", "x": "\\ud800"}\n'
    )
    write(tmp_path / "e.jsonl", '{"deep": ' + deep + ', "text": "i"}', {"text": "j"})
    assert rows(opened(tmp_path)) == [
        *"abcdef",
        SkippedDocument("not_text"),
        *"gh",
        SkippedDocument("unreadable"),
        "j",
    ]
    write(tmp_path / "f.json", '[{"n": ' + "1" * 5000 + ', "text": "k"}, "x", 3, {"text": "l"}]')
    found = rows(opened(tmp_path / "f.json"))
    assert found == ["k", "x", SkippedDocument("not_text"), "l"]


def test_columns_of_parquet(tmp_path: Path) -> None:
    """Shards that differ: one without text, one without the column, one with numbers in it."""
    kinds: list[Any] = [
        pa.array(["a", None], pa.string()),
        pa.array(["a", None], pa.large_string()),
        pa.array(["a", None], pa.string_view()),
        pa.array([b"a", None], pa.binary()),
        pa.array([b"a", None], pa.large_binary()),
        pa.array([b"a", None], pa.binary_view()),
        pa.array(["a", None]).dictionary_encode(),
        pa.array([None, None], pa.null()),
        pa.array([None, None], pa.string()),
    ]
    for number, column in enumerate(kinds):
        table = pa.table(
            {"id": pa.array([1, 2], pa.int64() if number % 2 else pa.float32()), "text": column}
        )
        pq.write_table(table, tmp_path / f"{number}.parquet")
        with (
            pa.OSFile(str(tmp_path / f"{number}.arrow"), "wb") as file,
            pa.ipc.new_file(file, table.schema) as to,
        ):
            to.write_table(table)
    pq.write_table(pa.table({"id": [1], "body": ["x"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "b.parquet")
    no = SkippedDocument("not_text")
    source = opened(f"{tmp_path}/*.parquet")
    assert rows(source) == ["a", no] * 7 + [no] * 4 + [no] + [no] * 2
    assert [
        (Path(table.path).name, table.missing_field) for table in source.tables_without_field
    ] == [
        ("a.parquet", "has no column text; it has id, body"),
        ("b.parquet", "holds int64 in column text, must be text"),
    ]
    assert source.name(19) == f"{tmp_path}/b.parquet, row 0"
    assert rows(opened(f"{tmp_path}/*.arrow")) == ["a", no] * 7 + [no] * 4
    with pytest.raises(
        DataError, match=r"dataset.field: .*b.parquet holds int64 in column text, must be text"
    ):
        opened(tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes((tmp_path / "1.parquet").read_bytes()[:-100])
    with pytest.raises(DataError, match=r"c.parquet: damaged, or not a parquet file: "):
        opened(f"{tmp_path}/*.parquet")


def test_text_under_a_null_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    array = pa.StringArray.from_buffers(
        3,
        pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0\4\0\0\0"),
        pa.py_buffer(b"a\xff\xffc"),
        pa.py_buffer(b"\x05"),
    )
    pq.write_table(pa.table({"text": array}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": pa.array([b"\xff", b"b"])}), tmp_path / "b.parquet")
    assert rows(opened(tmp_path)) == [
        "a",
        SkippedDocument("not_text"),
        "c",
        SkippedDocument("not_utf8"),
        "b",
    ]


def test_a_column_that_is_in_no_file(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {"body": "x", "id": 1})
    write(tmp_path / "b.jsonl", {"body": "x", "title": 1})
    with pytest.raises(DataError, match=r"dataset.field: .* has no column text; it has body, id"):
        opened(tmp_path)
    write(tmp_path / "c.jsonl", *([{"body": "x"}] * 200), {"text": "late"})
    source = opened(tmp_path)
    assert [row for row in rows(source) if isinstance(row, str)] == ["late"]
    assert [Path(table.path).name for table in source.tables_without_field] == [
        "a.jsonl",
        "b.jsonl",
    ]
    assert texts(write(tmp_path / "umlaut.jsonl", '{"te\\u00dft": "x"}'), field="teßt") == ["x"]
    with pytest.raises(DataError, match=r"has no column text; its rows are not JSON objects"):
        opened(write(tmp_path / "strings.jsonl", '"a"', '"b"'))


def test_a_lone_surrogate_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "a"}\n{"text": "x\\ud83d"}\n{"text": "\xed\xa0\xbd"}\n{"text":'
        b' "\\ud83d\\ude00"}\n'
    )
    assert rows(opened(path)) == [
        "a",
        SkippedDocument("not_utf8"),
        SkippedDocument("not_utf8"),
        "\U0001f600",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "b', r"a.jsonl:1202: not JSON: Unterminated string"),
        (
            b'{"text": oops}',
            r"a.jsonl:1202: not JSON: Expecting value, at character 10 of the line; fix",
        ),
        (b'{"text": "b"} {"text": "c"}', r"a.jsonl:1202: not JSON: Extra data, at character 15"),
        (b"\0\0\0\0", r"a.jsonl:1202: not JSON: Expecting value"),
    ],
)
def test_a_line_that_is_no_json(tmp_path: Path, line: bytes, message: str) -> None:
    good = b'{"text": "a"}\n' * 1200 + b"\n"
    for name, pack in (("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress)):
        (tmp_path / name).write_bytes(pack(good + line + b"\n" + good))
        with pytest.raises(DataError, match=message.replace("a.jsonl", name)):
            rows(opened(tmp_path / name))


def test_lines_that_were_cut_off_are_found_before_anything_is_tokenized(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' * 500_000 + b'{"text": "b')
    with pytest.raises(DataError, match=r"a.jsonl:500001: not JSON: Unterminated string"):
        opened(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.arrow"])
def test_what_git_left_for_a_large_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    )
    with pytest.raises(
        DataError, match=rf"{name}: a Git LFS pointer, not the file itself; fetch it with `git lfs"
    ):
        opened(tmp_path)


def test_json_of_other_shapes(tmp_path: Path) -> None:
    write(tmp_path / "a.json", json.dumps([{"text": "a"}, {"id": 1}, {"text": "b"}], indent=2))
    write(tmp_path / "b.json", json.dumps({"text": "c", "id": 1}, indent=2))
    write(tmp_path / "c.json", '{"text":\n"d"}{"text": "e"}\n{"text"\n: "f"}')
    write(tmp_path / "d.jsonl", "\ufeff\n", '[{"text": "g"},', '{"text": "h"}]')
    write(tmp_path / "e.json", " [] ")
    assert rows(opened(tmp_path)) == ["a", SkippedDocument("not_text"), *"bcdefgh"]
    assert opened(tmp_path / "a.json").name(1) == f"{tmp_path}/a.json, item 2"
    for content, message in (
        ('[{"text": "a"},\n{"text": "b"}', r"x.json:2: not JSON: Expecting ',' or '\]'"),
        ('[{"text": "a"}\n{"text": "b"}]', r"x.json:2: not JSON: Expecting ',' or"),
        ('[{"text": "a"}]\nx', r"x.json:2: not JSON: Extra data, at character 1 "),
        ('[{"text": "a"},\n', r"x.json:\d: not JSON: Expecting "),
        ("[" * 100_000, r"x.json: nested too deeply"),
    ):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(DataError, match=message):
            opened(tmp_path / "x.json")


def test_utf16_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"text": "a"}\n'.encode("utf-16"))
    with pytest.raises(
        DataError, match=r"a.jsonl: encoded as UTF-16, must be UTF-8; convert it with `iconv"
    ):
        opened(tmp_path / "a.jsonl")


# --- compressed ---------------------------------------------------------------------------------


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


@pytest.mark.parametrize("suffix", PACK)
def test_compressed(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BLOCK", 1000)
    pack = PACK[suffix]
    written = [random.Random(number).randbytes(number % 70).hex() + "é" for number in range(300)]
    content = "".join(json.dumps({"text": text}) + "\n" for text in written).encode()
    # Several streams in one file, as `cat a.gz b.gz` makes.
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(content[:7000]) + pack(content[7000:]))
    (tmp_path / f"b.txt{suffix}").write_bytes(pack("text é\n".encode()))
    (tmp_path / f"c.py{suffix}").write_bytes(pack(b"x" * 5000))
    (tmp_path / f"d.py{suffix}").write_bytes(pack(os.urandom(5000))[:-2000])
    source = opened(tmp_path / f"a.jsonl{suffix}")
    assert rows(source) == written
    assert rows(source, 100, 137, 50) == written[100:137]
    assert len(list(source.sample(64))) == 64
    texts_of = opened(f"{tmp_path}/*.[pt]*{suffix}", max_document_bytes=4999)
    assert rows(texts_of) == [
        "text é\n",
        SkippedDocument("too_large"),
        SkippedDocument("unreadable"),
    ]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(content)[:-20])
    with pytest.raises(
        DataError,
        match=rf"a.jsonl{suffix}: damaged, or not the format that its name says: .*; download it"
        r" again",
    ):
        opened(tmp_path / f"a.jsonl{suffix}")
    (tmp_path / f"a.jsonl{suffix}").write_bytes(b"nothing of the kind")
    with pytest.raises(
        DataError, match=rf"a.jsonl{suffix}: damaged, or not the format that its name says"
    ):
        opened(tmp_path / f"a.jsonl{suffix}")


def test_archives_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    for name in ("x.tar", "x.tar.gz", "x.TGZ", "x.zip", "x.parquet.gz"):
        (tmp_path / name).write_text("tar")
    source = opened(tmp_path)
    assert rows(source) == ["a"] and len(source.left_out) == 5
    with pytest.raises(
        DataError, match=r"x.tar: archives are not read; unpack it and give the folder"
    ):
        opened(tmp_path / "x.tar")


# --- any text, in any place ---------------------------------------------------------------------

# Half surrogates cannot be written to files of text; what becomes of them is tested above.
_TEXT = st.text(
    st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40
) | st.sampled_from(
    [
        "2020-01-05",
        "1e5",
        "\0",
        "\ufeff",
        "\u2028x\x85\r",
        "{",
        "}",
        "]\n[",
        '"',
        "\\",
        "\\ud800",
        "null",
        " ",
    ]
)
_OTHER: st.SearchStrategy[Any] = (
    st.none()
    | st.integers()
    | st.floats()
    | st.booleans()
    | _TEXT
    | st.just([{}])
    | st.just({"text": ["x"]})
)
_ROW = st.tuples(
    _TEXT | st.none() | st.integers() | st.just("") | st.just(["a"]),
    st.dictionaries(_TEXT, _OTHER, max_size=2),
)


def _expected(value: Any) -> str | SkippedDocument:
    return (
        SkippedDocument("not_text")
        if not isinstance(value, str)
        else value or SkippedDocument("empty")
    )


def _as_lines(draw: random.Random, table: list[dict[str, Any]]) -> bytes:
    lines = []
    for row in table:
        spaced, ascii_only = draw.random() < 0.5, draw.random() < 0.5
        line = json.dumps(
            row, ensure_ascii=ascii_only, separators=(" , ", " : ") if spaced else (",", ":")
        )
        lines.append(
            draw.choice(["", "", " "])
            + line
            + draw.choice(["\n", "\n", "\r\n", "\n\n", " \n \t\n"])
        )
    return "".join(lines).rstrip("\n" * draw.randrange(2)).encode()


def _write_any(draw: random.Random, stem: Path, kind: str, table: list[dict[str, Any]]) -> None:
    if kind.startswith("jsonl"):
        packed = kind.removeprefix("jsonl")
        stem.with_name(f"{stem.name}.{kind}").write_bytes(
            PACK.get(packed, bytes)(_as_lines(draw, table))
        )
    elif kind == "json":
        content = json.dumps(table, indent=draw.choice([None, 1]), ensure_ascii=draw.random() < 0.5)
        stem.with_name(f"{stem.name}.json").write_text(content)
    else:
        columns = {
            "text": pa.array(
                [row["text"] if isinstance(row["text"], str) else None for row in table],
                draw.choice([pa.string(), pa.large_string(), pa.string_view()]),
            ),
            draw.choice("xyz"): pa.array(range(len(table)), draw.choice([pa.int8(), pa.int64()])),
        }
        whole = pa.table(columns)
        if kind == "parquet":
            pq.write_table(
                whole, stem.with_name(f"{stem.name}.parquet"), row_group_size=draw.randrange(1, 5)
            )
        else:
            make = draw.choice([pa.ipc.new_file, pa.ipc.new_stream])
            with (
                pa.OSFile(str(stem.with_name(f"{stem.name}.arrow")), "wb") as file,
                make(file, whole.schema) as to,
            ):
                to.write_table(whole, max_chunksize=draw.randrange(1, 5))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "json", "parquet", "arrow"])
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    files=st.lists(st.lists(_ROW, min_size=1, max_size=6), min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
    block=st.sampled_from([1, 30, 2**20]),
)
def test_text_read_is_text_written(
    kind: str,
    files: list[list[Any]],
    seed: int,
    block: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Any text, any adjacent texts, any order of files; from any row, in pieces of any size."""
    draw = random.Random(seed)
    folder = tmp_path_factory.mktemp("any")
    names = [f"{number:02}" for number in range(len(files))]
    in_order = sorted(zip(draw.sample(names, len(names)), files, strict=True))
    expected: list[str | SkippedDocument] = []
    for name, content in in_order:
        table = []
        for value, other in content:
            items = [
                *((key, each) for key, each in other.items() if key != "text"),
                ("text", value),
            ]
            draw.shuffle(items)
            table.append(dict(items))
        _write_any(draw, folder / name, kind, table)
        expected += [_expected(row["text"]) for row in table]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "BLOCK", block)
        source = opened(folder)
        found = rows(source, target=draw.choice([1, 20, 2**20]))
        assert [row for row in found if row is not None] == expected
        assert len(source) - source.blank_rows == len(expected)
        # Any part of the rows is what it is in all of them.
        first, last = sorted((draw.randrange(len(source) + 1), draw.randrange(len(source) + 1)))
        assert rows(source, first, last, draw.choice([1, 20])) == found[first:last]
        if kind.startswith("jsonl"):
            for row in range(len(source)):
                path, _, line = source.name(row).rpartition(":")
                packs: dict[str, Any] = {"gz": gzip.open, "zst": zstandard.open}
                pack = packs.get(path.rpartition(".")[2], open)
                with pack(path, "rb") as file:
                    content_of = file.read().split(b"\n")[int(line) - 1]
                value = (
                    None if not content_of.strip() else _expected(json.loads(content_of)["text"])
                )
                assert value == found[row]
