"""Documents in an object store: the bytes of local files, and every way to fail."""

import gzip
import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fast_llm.cli import main
from fast_llm.config.prepare import SourceConfig
from fast_llm.data import files, object_store
from fast_llm.data.documents import Corpus, open_documents
from fast_llm.data.object_store import StoredObject
from fast_llm.data.prepare import prepare
from fast_llm.errors import DataError, MissingPackage
from tests.data import synthetic
from tests.data.object_server import ObjectServer
from tests.data.preparing import configure, content, everything, start
from tests.data.ray_cluster import cluster
from tests.helpers import slow, some_fast

TEXTS = [f"{number} {synthetic.text(number % 40, 30 + number % 300)}" for number in range(900)]
LINES = "".join(json.dumps({"id": 7, "text": text}) + "\n" for text in TEXTS).encode()


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectServer]:
    found = ObjectServer()
    yield found
    found.close()


@pytest.fixture(autouse=True)
def settings(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server.forget()
    for name, value in {
        "AWS_ENDPOINT_URL": server.address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",  # so that faults reach this package at once
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(object_store, "_WAITS", (0.01, 0.02))
    forget_connections()
    yield
    forget_connections()


def forget_connections() -> None:
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows in every format."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "lines.jsonl").write_bytes(LINES)
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(LINES, 1))
    (folder / "value.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    table = pa.table({"text": TEXTS, "id": list(range(len(TEXTS)))})
    pq.write_table(table, folder / "groups.parquet", row_group_size=150)
    with pa.ipc.new_file(str(folder / "batches.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=80)
    with pa.ipc.new_stream(str(folder / "stream.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=80)
    (folder / "files").mkdir()
    for number, text in enumerate(TEXTS[:40]):
        (folder / "files" / f"{number:04}.txt").write_text(text)
    (folder / "files" / "packed.txt.gz").write_bytes(gzip.compress(TEXTS[40].encode()))
    return folder


def client() -> Any:
    return boto3.client("s3", region_name="us-east-1")


def put(address: str, data: bytes) -> str:
    bucket, _, key = address.removeprefix("s3://").partition("/")
    client().create_bucket(Bucket=bucket)
    client().put_object(Bucket=bucket, Key=key, Body=data)
    return address


def put_all(path: Path, address: str) -> str:
    """Copy a file or a folder to an address."""
    if path.is_file():
        return put(address, path.read_bytes())
    for each in sorted(path.rglob("*")):
        if each.is_file():
            put(f"{address}/{each.relative_to(path)}", each.read_bytes())
    return address


def token_files(folder: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in folder.glob("shard_*_*.???")}
    assert len(found) >= 2
    return found


def find(path: str, **settings: Any) -> files.DatasetFiles:
    return files.find(SourceConfig(path=path, **settings))


def opened(path: str, **settings: Any) -> Corpus:
    return open_documents(find(path, **settings), 1)


def texts(corpus: Corpus) -> list[Any]:
    tasks = corpus.tasks(0, len(corpus), 2**20)
    return [text for task in tasks for text in corpus.reader.texts(task)]


NAMES = [
    "lines.jsonl",
    "packed.jsonl.gz",
    "value.json",
    "groups.parquet",
    "batches.arrow",
    "stream.arrow",
    "files",
]


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_those_of_local_files(name: str, sources: Path) -> None:
    address = put_all(sources / name, f"s3://formats/{name}")
    expected = texts(opened(str(sources / name)))
    found = opened(address)
    assert texts(found) == expected and len(expected) == (41 if name == "files" else 900)
    middle = len(expected) // 2  # read from within the file, in a process that gets a copy
    tasks = pickle.loads(pickle.dumps(list(found.tasks(middle, middle + 3, 1))))
    some = [text for task in tasks for text in found.reader.texts(task)]
    assert some == expected[middle : middle + 3]


@pytest.mark.parametrize("name", some_fast(NAMES, lambda name: name == "groups.parquet"))
@pytest.mark.parametrize(
    "changes",
    some_fast(
        [{}, {"tokenize_workers": 2}, {"dataset__deduplicate": True}], lambda changes: not changes
    ),
)
def test_token_files_are_those_of_local_files(
    name: str, changes: dict[str, Any], sources: Path, tmp_path: Path, model: Path
) -> None:
    address = put_all(sources / name, f"s3://prepared/{name}")
    prepare(configure(tmp_path / "one" / "data", sources / name, model, **changes))
    metadata = prepare(configure(tmp_path / "two" / "data", address, model, **changes))
    assert token_files(tmp_path / "two" / "data") == token_files(tmp_path / "one" / "data")
    assert content(metadata)["source"]["path"] == address


def test_lines_are_read_twice_and_columns_once(
    sources: Path, server: ObjectServer, tmp_path: Path, model: Path
) -> None:
    """JSON once to count its rows and once to tokenize; some samples come on top."""
    for name, times in (("lines.jsonl", 2), ("groups.parquet", 1)):
        address = put_all(sources / name, f"s3://traffic/{name}")
        server.forget()
        texts(opened(address))
        size = (sources / name).stat().st_size
        assert times * size * 0.6 < server.sent < times * size + 2**18
        assert len(server.requests) < 40


def test_selection_follows_the_rules_for_folders(tmp_path: Path) -> None:
    names = [
        "train/a.jsonl",
        "train/b.jsonl",
        "test/c.jsonl",
        "README.md",
        ".hidden.jsonl",
        "old.tar",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}\n')
        put(f"s3://rules/corpus/{name}", b'{"text": "x"}\n')
    put("s3://rules/corpus-2/d.jsonl", b"{}\n")  # only the beginning of its name is the same

    def compare(suffix: str = "", **settings: Any) -> list[str]:
        local = find(str(tmp_path) + suffix, **settings)
        stored = find("s3://rules/corpus" + suffix, **settings)
        for split in {**local.files, **stored.files}:
            here, there = local.files[split], stored.files[split]
            assert [path.removeprefix(f"{tmp_path}/") for path in here] == [
                path.removeprefix("s3://rules/corpus/") for path in there
            ]
        assert sorted(local.left_out) == sorted(stored.left_out)
        return [path for paths in stored.files.values() for path in paths]

    assert len(compare()) == 3
    assert len(compare(split="test")) == 3
    assert len(compare("/train")) == 2
    assert len(compare("/train/a.jsonl")) == 1
    assert len(compare("/*/*.jsonl")) == 3
    assert len(compare("/**/*.jsonl")) == 3
    assert len(compare(data_files="train/*.jsonl")) == 2
    assert len(compare(data_files=["train/a.jsonl", "test/*"])) == 2
    assert len(compare(data_directory="train")) == 2
    assert find("s3://rules/corpus/").digest == find("s3://rules/corpus").digest


def test_a_changed_object_is_refused_on_resume(tmp_path: Path, model: Path) -> None:
    address = put("s3://resumed/a.jsonl", LINES)
    config = configure(tmp_path / "data", address, model)
    prepare(config)
    prepare(config)  # nothing to do
    put(address, LINES.replace(b"7", b"8", 1))  # of the same size
    with pytest.raises(DataError, match="was started with other documents than there are now"):
        prepare(config)


@slow
def test_a_killed_preparation_resumes_with_the_same_bytes(
    sources: Path, server: ObjectServer, tmp_path: Path, model: Path
) -> None:
    large = tmp_path / "large.jsonl"
    large.write_bytes(LINES * 4)
    address = put_all(large, "s3://killed/large.jsonl")
    prepare(configure(tmp_path / "one" / "data", large, model))
    output = tmp_path / "two" / "data"
    for delay in (3, 4, 5):
        process = start(tmp_path, output, address, model)
        try:
            process.wait(delay)
        except Exception:
            process.kill()
        process.communicate()
    prepare(configure(output, address, model))
    assert token_files(output) == token_files(tmp_path / "one" / "data")


@slow
def test_ray_reads_objects(
    server: ObjectServer, sources: Path, tmp_path: Path, model: Path
) -> None:
    address = put_all(sources / "lines.jsonl", "s3://on-ray/lines.jsonl")
    prepare(configure(tmp_path / "one" / "data", address, model))
    with cluster(1):  # whose node has the credentials of this process
        before = len(server.requests)
        output = tmp_path / "ray" / "data"
        process = start(tmp_path, output, address, model, "distributed.engine=ray")
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
    read = [path for method, path in server.requests[before:] if method == "GET"]
    assert sum(path.endswith("lines.jsonl") for path in read) >= 3  # also by the node
    assert everything(tmp_path / "ray") == everything(tmp_path / "one")


def test_an_object_that_changes_while_it_is_read_is_noticed() -> None:
    changed = r"changed since it was listed"
    address = put("s3://changing/a.jsonl", LINES)
    found = find(address)
    put(address, LINES.replace(b"7", b"8", 1))
    forget_connections()
    with pytest.raises(DataError, match=changed):  # before it is opened
        open_documents(found, 1)
    (path,) = find(address).files["train"]
    assert isinstance(path, StoredObject)
    with object_store.open_object(path, ranges=True) as file:
        assert file.read(10) == LINES.replace(b"7", b"8", 1)[:10]
        put(address, LINES)
        with pytest.raises(DataError, match=changed):  # while it is open
            file.read(10)
    (path,) = find(address).files["train"]
    assert isinstance(path, StoredObject)
    client().delete_object(Bucket="changing", Key="a.jsonl")
    forget_connections()
    with pytest.raises(DataError, match="is gone since it was listed"):
        object_store.open_object(path)


def test_passing_failures_change_nothing(
    server: ObjectServer, caplog: pytest.LogCaptureFixture
) -> None:
    address = put("s3://flaky/a.jsonl", LINES)
    expected = texts(opened(address))
    server.forget()
    server.fault = lambda method, path, number: 500 if number % 3 == 1 else None
    forget_connections()
    assert texts(opened(address)) == expected == TEXTS
    assert len(server.requests) > 4


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (403, r"s3://lasting/a.jsonl: refused by the object store: .*; check the credentials and"),
        (500, r"s3://lasting/a.jsonl: cannot be read from the object store: .* to resume"),
    ],
)
def test_a_lasting_failure_ends_the_preparation(
    status: int, words: str, server: ObjectServer
) -> None:
    """It never skips documents."""
    address = put("s3://lasting/a.jsonl", LINES)
    corpus = opened(address)
    server.fault = lambda method, path, number: status
    with pytest.raises(DataError, match=words):
        texts(corpus)
    with pytest.raises(DataError, match=words):
        find(address)


def test_text_files_are_never_skipped_for_a_failure(server: ObjectServer) -> None:
    address = put("s3://skipped/a.txt", b"text")
    corpus = opened(address)
    server.fault = lambda method, path, number: 403
    forget_connections()
    with pytest.raises(DataError, match="refused by the object store"):
        texts(corpus)


def test_mistakes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    put("s3://mistakes/data/a.jsonl", LINES)
    put("s3://mistakes/saved/state.json", b"{}")
    for path, settings, words in (
        ("s3://mistakes/none", {}, r"s3://mistakes/none: no files there"),
        ("s3://no-such-bucket/a", {}, r"s3://no-such-bucket/a: no files there"),
        ("s3://mistakes/saved", {}, "a saved dataset, which is only read from a local folder"),
        ("s3://mistakes/data", {"config_name": "x"}, "in an object store, not on the Hub"),
        ("s3://mistakes/data", {"data_files": "*.x"}, r"dataset.data_files \*.x: no files there"),
        ("s3://mistakes/data/a.jsonl", {"data_files": "a"}, "names objects already"),
        ("s3://mistakes/data", {"split": "test"}, 'Unknown split "test"'),
    ):
        with pytest.raises(DataError, match=words):
            find(path, **settings)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    forget_connections()
    with pytest.raises(DataError, match="no credentials for the object store; set AWS_ACCESS_KEY"):
        find("s3://mistakes/data")
    settings_of = ["output_path=out", f"tokenizer.path={model}"]
    assert main(["prepare", "dataset.path=s3://mistakes/data", *settings_of]) == 2
    assert capsys.readouterr().err.count("no credentials for the object store") == 1


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(MissingPackage, match=r"reading gs://b/a needs the package gcsfs: pip inst"):
        find("gs://b/a")
