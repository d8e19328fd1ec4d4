"""Every kind of source; the same bytes whatever happens on the way; every way in which it can go wrong."""

import errno
import fcntl
import gzip
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import zstandard

from fast_llm import cli
from fast_llm.config.prepare import PrepareConfig
from fast_llm.data import documents, files, job, progress, shards, tokenizer, workers
from fast_llm.data import prepare as module
from fast_llm.data.encode import Encoder
from fast_llm.data.prepare import prepare
from fast_llm.data.tokenfile import TokenFile, TokenFileWriter, file_digest
from fast_llm.errors import DataError, MissingPackage
from tests import hub
from tests.data import synthetic

TEXTS = [synthetic.text(seed, 40) for seed in range(30)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files that make several token files, with odd ones among them."""
    folder = tmp_path_factory.mktemp("large")
    draw = random.Random(0)
    for number in range(600):
        (folder / f"{number:04}.py").write_text(synthetic.text(number, draw.randrange(1, 1400)))
    (folder / "0100.py").write_bytes(b"")
    (folder / "0200.py").write_bytes(b"\xff\xfe not UTF-8")
    (folder / "0599.py").write_bytes(b"")
    return folder


def configure(output: Path, path: Path | str, model: Path, **changes: Any) -> PrepareConfig:
    """A configuration; `dataset__field="x"` sets dataset.field."""
    values: dict[str, Any] = {
        "output_path": str(output),
        "tokens_per_shard": 100_000,
        "dataset": {"path": str(path)},
        "tokenizer": {"path": str(model)},
    }
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (values.setdefault(section, {}) if section else values)[key] = value
    return PrepareConfig.model_validate(values)


def content(metadata: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(metadata.read_text())
    return result


def read(metadata: Path) -> list[list[int]]:
    """The documents of a dataset.json."""
    found = []
    for entry in content(metadata)["datasets"]:
        file = TokenFile(metadata.parent / entry["prefix"])
        assert (file.documents, file.tokens) == (entry["num_documents"], entry["num_tokens"])
        assert str(file.dtype) == entry["dtype"]
        assert entry["sha256"] == {"bin": file_digest(file.bin), "idx": file_digest(file.idx)}
        ends = np.cumsum(file.lengths)
        found += [
            file.tokens_at(int(end - n), int(end)).tolist()
            for n, end in zip(file.lengths, ends, strict=True)
        ]
    return found


def tokens(
    model: Path, texts: list[str], front: tuple[int, ...] = (0,), back: tuple[int, ...] = (1,)
) -> list[list[int]]:
    plain = tokenizer.load(str(model)).tokenizer
    plain.encode_special_tokens = True
    return [[*front, *plain.encode(text, add_special_tokens=False).ids, *back] for text in texts]


def everything(folder: Path) -> dict[str, bytes]:
    """All files but the lock, by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".lock")
    }


# --- what is read -------------------------------------------------------------------------------------------------------


def _jsonl(texts: list[str]) -> bytes:
    return "".join(
        json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)
    ).encode()


def _write_parquet(path: Path) -> None:
    datasets.Dataset.from_dict({"id": range(len(TEXTS)), "text": TEXTS}).to_parquet(path)


def _write_arrow(path: Path) -> None:
    import pyarrow as pa

    table = pa.table({"text": TEXTS})
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", lambda path: path.write_bytes(_jsonl(TEXTS))),
        ("a.json", lambda path: path.write_text(json.dumps([{"text": text} for text in TEXTS]))),
        ("a.jsonl.gz", lambda path: path.write_bytes(gzip.compress(_jsonl(TEXTS)))),
        ("a.jsonl.zst", lambda path: path.write_bytes(zstandard.compress(_jsonl(TEXTS)))),
        ("a.parquet", _write_parquet),
        ("a.arrow", _write_arrow),
    ],
)
def test_tables(tmp_path: Path, model: Path, name: str, write: Callable[[Path], Any]) -> None:
    write(tmp_path / name)
    metadata = prepare(configure(tmp_path / "out", tmp_path / name, model))
    assert metadata == tmp_path / "out.json"
    assert read(metadata) == tokens(model, TEXTS)
    described = content(metadata)
    assert described["format"] == "fast_llm dataset 1"
    assert described["datasets"][0]["prefix"] == "out/shard_0_0"
    assert described["datasets"][0]["weight"] == 1
    assert described["num_documents"] == 30 and described["skipped_documents"] == 0
    assert described["num_tokens"] == sum(map(len, read(metadata)))
    assert described["max_token_id"] == max(max(document) for document in read(metadata))
    made_with = described["tokenizer"]
    assert (made_with["bos"], made_with["eos"], made_with["vocab_size"]) == (0, 1, 320)
    assert made_with["fingerprint"] == tokenizer.fingerprint(model)
    assert tokenizer.fingerprint(tmp_path / made_with["path"]) == tokenizer.fingerprint(model)
    assert tokenizer.load(str(tmp_path / made_with["path"])).eos == 1
    # The smallest integer that holds 320 tokens.
    assert described["datasets"][0]["dtype"] == "uint16"


def test_folder_pattern_and_saved(tmp_path: Path, model: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "b.jsonl").write_bytes(_jsonl(TEXTS[10:]))
    (source / "sub" / "c.jsonl").write_bytes(b"")
    (source / "a.jsonl").write_bytes(_jsonl(TEXTS[:10]))
    (source / "README.md").write_text("about")
    expected = tokens(model, TEXTS)
    assert read(prepare(configure(tmp_path / "1", source, model))) == expected
    assert read(prepare(configure(tmp_path / "2", f"{source}/*.jsonl", model))) == expected
    assert (
        read(prepare(configure(tmp_path / "3", source, model, dataset__data_files="a*")))
        == expected[:10]
    )
    assert (
        read(prepare(configure(tmp_path / "4", tmp_path, model, dataset__data_directory="source")))
        == expected
    )
    assert (
        read(prepare(configure(tmp_path / "5", source, model, dataset__split="train[5:20]")))
        == expected[5:20]
    )

    saved = datasets.Dataset.from_dict({"text": TEXTS})
    saved.save_to_disk(tmp_path / "saved")
    assert read(prepare(configure(tmp_path / "6", tmp_path / "saved", model))) == expected
    both = datasets.DatasetDict(
        {"train": saved.select(range(20, 30)), "test": saved.select(range(2))}
    )
    both.save_to_disk(tmp_path / "both")
    assert read(prepare(configure(tmp_path / "7", tmp_path / "both", model))) == expected[20:]
    assert (
        read(prepare(configure(tmp_path / "8", tmp_path / "both", model, dataset__split="test")))
        == expected[:2]
    )
    with pytest.raises(DataError, match="both: it has no split other; it has train, test"):
        prepare(configure(tmp_path / "9", tmp_path / "both", model, dataset__split="other"))
    with pytest.raises(DataError, match="saved: it has no split test"):
        prepare(configure(tmp_path / "9", tmp_path / "saved", model, dataset__split="test"))


def test_splits_of_a_folder(tmp_path: Path, model: Path) -> None:
    """As in a clone of a dataset of the Hub."""
    source = tmp_path / "source"
    source.mkdir()
    for split, number in (("train", 0), ("test", 1), ("validation", 2)):
        (source / f"{split}-00000-of-00001.jsonl").write_bytes(_jsonl([TEXTS[number]]))
    for split, number in (("train", 0), ("test", 1), ("validation", 2)):
        metadata = prepare(configure(tmp_path / split, source, model, dataset__split=split))
        assert read(metadata) == tokens(model, [TEXTS[number]])
    with pytest.raises(DataError, match='Unknown split "dev"'):
        prepare(configure(tmp_path / "dev", source, model, dataset__split="dev"))


def test_source_files(tmp_path: Path, model: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / ".git").mkdir()
    (source / ".git" / "config").write_text("hidden")
    (source / "b.py").write_bytes("x = 'é'\r\n\0".encode())
    (source / "deep" / "a.c").write_bytes(b"\xef\xbb\xbfint main;")  # a byte order mark is no text
    (source / "notes.txt").write_text("two\n\nparagraphs\n")
    metadata = prepare(configure(tmp_path / "1", source, model))
    assert read(metadata) == tokens(model, ["x = 'é'\r\n\0", "int main;", "two\n\nparagraphs\n"])
    metadata = prepare(
        configure(tmp_path / "2", source, model, dataset__data_files=["**/*.c", "*.py"])
    )
    assert read(metadata) == tokens(model, ["x = 'é'\r\n\0", "int main;"])
    assert read(prepare(configure(tmp_path / "3", source / "notes.txt", model))) == tokens(
        model, ["two\n\nparagraphs\n"]
    )


def test_local_files_need_no_datasets(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_parquet(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.md").write_text("text")
    assert read(prepare(configure(tmp_path / "out", tmp_path / "a.md", model))) == tokens(
        model, ["text"]
    )
    (tmp_path / "a.jsonl").write_bytes(_jsonl(TEXTS))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(_jsonl(TEXTS)))
    assert read(prepare(configure(tmp_path / "1", tmp_path / "a.jsonl", model))) == tokens(
        model, TEXTS
    )
    assert read(prepare(configure(tmp_path / "2", tmp_path / "a.parquet", model))) == tokens(
        model, TEXTS
    )
    for package, path in (
        ("datasets", "org/name"),
        ("pyarrow", "a.parquet"),
        ("zstandard", "a.jsonl.zst"),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(
            MissingPackage,
            match=rf"reading .*{path} needs the package {package}: pip install {package}",
        ):
            prepare(
                configure(
                    tmp_path / "other", path if package == "datasets" else tmp_path / path, model
                )
            )
    # JSON lines need none of them.
    assert read(prepare(configure(tmp_path / "3", tmp_path / "a.jsonl", model))) == tokens(
        model, TEXTS
    )


def test_hub(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, **settings: Any) -> Any:
        asked.append((path, settings))
        rows = datasets.Dataset.from_dict({"content": TEXTS, "id": range(30)})
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    chosen = {
        "dataset__config_name": "x",
        "dataset__data_directory": "data/python",
        "dataset__data_files": "*.parquet",
    }
    config = configure(
        tmp_path / "out",
        "bigcode/the-stack",
        model,
        dataset__field="content",
        loading_workers=4,
        **chosen,
    )
    assert read(prepare(config)) == tokens(model, TEXTS)
    assert asked == [
        (
            "bigcode/the-stack",
            {
                "name": "x",
                "data_dir": "data/python",
                "data_files": "*.parquet",
                "split": "train",
                "num_proc": 4,
            },
        )
    ]
    prepare(config)  # is finished: the Hub is not asked again
    assert len(asked) == 1


def test_hub_itself(tmp_path: Path) -> None:
    """With the Hub's real clients, and a stand-in for its servers."""
    synthetic.llama(tmp_path / "hub" / "models" / "meta" / "llama")
    (tmp_path / "hub" / "models" / "meta" / "llama" / "model.safetensors").write_bytes(b"large")
    data = tmp_path / "hub" / "datasets" / "bigcode" / "stack" / "data" / "python"
    data.mkdir(parents=True)
    (data / "train-00000-of-00001.jsonl").write_bytes(_jsonl(TEXTS))
    (data / "test-00000-of-00001.jsonl").write_bytes(_jsonl(["another"]))
    settings = [
        "dataset.path=bigcode/stack",
        "dataset.data_directory=data/python",
        "tokenizer.path=meta/llama",
    ]
    with hub.serve(tmp_path / "hub") as address:
        result = subprocess.run(
            [
                sys.executable,
                "-m",
                "fast_llm.cli",
                "prepare",
                f"output_path={tmp_path}/out",
                *settings,
            ],
            env={**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
        )
    assert result.returncode == 0, result.stderr
    assert read(tmp_path / "out.json") == tokens(
        tmp_path / "hub" / "models" / "meta" / "llama", TEXTS
    )
    assert not list((tmp_path / "home").rglob("model.safetensors"))


def test_hub_can_not_be_reached(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError,
        match=r"dataset.path: org/name: no such local file or folder, and not loaded from the Hugging Face Hub: Could",
    ):
        prepare(configure(tmp_path / "out", "org/name", model))


def test_hub_is_not_there(tmp_path: Path, model: Path) -> None:
    """One line that it is asked, one that it does not answer, and none of its client's retries."""
    settings = [f"output_path={tmp_path}/out", "dataset.path=org/name", f"tokenizer.path={model}"]
    code = """
import sys, time
time.sleep = lambda _: None
from fast_llm.cli import main
sys.exit(main(["prepare", *sys.argv[1:]]))
"""
    result = subprocess.run(
        [sys.executable, "-c", code, *settings],
        env={
            **os.environ,
            "HF_ENDPOINT": "http://127.0.0.1:9",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
        },
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    asked, answer = result.stderr.splitlines()
    assert result.returncode == 2
    assert asked == "org/name is not a local file or folder: loading it from the Hugging Face Hub."
    assert (
        "dataset.path: org/name: no such file or folder here, and not from the Hugging Face Hub: "
        in answer
    )


# --- odd documents ------------------------------------------------------------------------------------------------------


def test_odd_rows(tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"text": "one\\u0000two"}',
        b'{"text": ""}',
        b'{"text": null}',
        b'{"text": "\xff"}',
        b'{"text": "last"}',
    ]
    path.write_bytes(b"\n".join(lines))
    with caplog.at_level(logging.INFO):
        metadata = prepare(configure(tmp_path / "out", path, model))
    assert read(metadata) == tokens(model, ["one\0two", "last"])
    described = content(metadata)
    assert described["skipped"] == {"empty": 1, "not_text": 1, "not_utf8": 1}
    assert described["skipped_documents"] == 3
    assert described["skipped_examples"] == [
        [f"{path}:2", "empty"],
        [f"{path}:3", "not_text"],
        [f"{path}:4", "not_utf8"],
    ]
    assert f"Skipped {path}:4: not UTF-8" in caplog.text
    assert "skipped 1 empty, 1 not text, 1 not UTF-8" in caplog.text


def test_column_of_several_types(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"text": "a"}\n{"text": 3}\n{"text": ["b"]}\n{"text": "d"}\n'
    )
    metadata = prepare(configure(tmp_path / "out", tmp_path / "a.jsonl", model))
    assert read(metadata) == tokens(model, ["a", "d"])
    assert content(metadata)["skipped"] == {"not_text": 2}


def test_odd_files(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(12):
        (source / f"{number:02}.bin").write_bytes(b"\x80")
    (source / "a.txt").write_text("a")
    (source / "large.txt").write_text("b" * 50)
    (source / "z.txt").write_text("gone when it is read")
    config = configure(tmp_path / "out", source, model, dataset__max_document_bytes=49)
    found = documents.open_documents(files.find(config.dataset), 1)
    assert len(found) == 15
    (source / "z.txt").unlink()
    monkeypatch.setattr(documents, "open_documents", lambda *_: found)
    metadata = prepare(config)
    assert read(metadata) == tokens(model, ["a"])
    assert content(metadata)["skipped"] == {"not_utf8": 12, "unreadable": 1, "too_large": 1}
    assert len(content(metadata)["skipped_examples"]) == 10
    # Ten are named, the others only counted.
    assert caplog.text.count("Skipped") == 10
    assert f"{source}/09.bin: not UTF-8; further ones are only counted" in caplog.text


def test_disk_that_fails(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")

    def stat(path: str) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    config = configure(tmp_path / "out", tmp_path / "a.txt", model)
    found = documents.open_documents(files.find(config.dataset), 1)
    monkeypatch.setattr(documents, "open_documents", lambda *_: found)
    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(
        DataError, match=r"a.txt: cannot be read: Input/output error; run the same command again"
    ):
        found.reader.file(str(tmp_path / "a.txt"))


def test_spelled_special_tokens_end_nothing(tmp_path: Path, model: Path) -> None:
    text = f"stop = '{synthetic.EOS}'  # after {synthetic.BOS}"
    (tmp_path / "a.py").write_text(text)
    (document,) = read(prepare(configure(tmp_path / "out", tmp_path / "a.py", model)))
    assert document[0] == 0 and document[-1] == 1
    assert not {0, 1} & set(document[1:-1])
    assert (
        tokenizer.load(str(model)).tokenizer.decode(document[1:-1], skip_special_tokens=False)
        == text
    )


def test_tokenizer_that_ends_documents_inside(tmp_path: Path) -> None:
    """One that finds EOS among its ordinary words cannot be asked not to."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    plain = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2}, unk_token="a"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model = tmp_path / "model"
    model.mkdir()
    plain.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    (tmp_path / "a.jsonl").write_bytes(_jsonl(["a b", "a <eos> b", "  ", "b"]))
    metadata = prepare(configure(tmp_path / "out", tmp_path / "a.jsonl", model))
    assert read(metadata) == [[1, 2, 0], [2, 0]]
    assert content(metadata)["skipped"] == {"empty": 1, "ends_itself": 1}


def test_text_on_which_the_tokenizer_fails(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Encoder.encode
    monkeypatch.setattr(
        Encoder,
        "encode",
        lambda self, texts: [
            None if text == "b" else tokens
            for text, tokens in zip(texts, encode(self, texts), strict=True)
        ],
    )
    (tmp_path / "a.jsonl").write_bytes(_jsonl(["a", "b", "c"]))
    metadata = prepare(configure(tmp_path / "out", tmp_path / "a.jsonl", model))
    assert read(metadata) == tokens(model, ["a", "c"])
    assert content(metadata)["skipped"] == {"untokenizable": 1}


def test_left_out_files_are_named(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("train", "zoo"):
        (source / f"{name}.jsonl").write_bytes(_jsonl([name]))
    (source / "train_1.jsonl").write_text('{"body": "x"}\n{"body": "y"}\n')
    metadata = prepare(configure(tmp_path / "out", source, model))
    assert read(metadata) == tokens(model, ["train"])
    assert f"{source}: left out 1 file: zoo.jsonl (of no split)." in caplog.text
    assert (
        f"{source}/train_1.jsonl has no column text; it has body: its 2 rows are left out."
        in caplog.text
    )
    described = content(metadata)
    assert described["source"]["left_out_files"] == 1
    assert described["source"]["left_out_examples"] == [["zoo.jsonl", "of no split"]]
    assert described["skipped"] == {"not_text": 2}
    assert described["skipped_examples"][1] == [f"{source}/train_1.jsonl:2", "not_text"]


def test_lone_surrogates_and_texts_of_any_size(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "\\ud800"}\n{"text": "' + "b" * 5000 + '"}\n')
    metadata = prepare(configure(tmp_path / "1", path, model, dataset__max_document_bytes=4999))
    assert read(metadata) == tokens(model, ["a"])
    assert content(metadata)["skipped_examples"] == [
        [f"{path}:2", "not_utf8"],
        [f"{path}:3", "too_large"],
    ]
    assert f"Skipped {path}:3: too large, more than dataset.max_document_bytes 4,999" in caplog.text
    metadata = prepare(configure(tmp_path / "2", path, model, dataset__max_document_bytes=5000))
    assert read(metadata) == tokens(model, ["a", "b" * 5000])


def test_a_file_of_millions_of_tokens_is_named(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_LARGE_DOCUMENT", 5000)
    (tmp_path / "small.txt").write_text(synthetic.text(0, 10))
    (tmp_path / "wiki.txt").write_text(synthetic.text(0, 6000))
    (tmp_path / "rows.jsonl").write_bytes(_jsonl([synthetic.text(0, 6000)]))
    with caplog.at_level(logging.INFO):
        prepare(configure(tmp_path / "1", f"{tmp_path}/*.txt", model))
        prepare(configure(tmp_path / "2", tmp_path / "rows.jsonl", model))
    assert re.findall(
        r"(\S+) is one document of [\d,]+ tokens: each text file is a document", caplog.text
    ) == [f"{tmp_path}/wiki.txt"]


def test_hint_at_more_workers(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text(synthetic.text(0, 1000))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    hint = "tokenize_workers is 1, and this machine has 16 cores: tokenize_workers=16 is up to 16 times as fast."
    with caplog.at_level(logging.INFO):
        prepare(configure(tmp_path / "1", tmp_path / "a.txt", model))
        assert hint not in caplog.text
        monkeypatch.setattr(module, "_LARGE_CORPUS", 1000)
        prepare(configure(tmp_path / "2", tmp_path / "a.txt", model, tokenize_workers=2))
        assert hint not in caplog.text
        prepare(configure(tmp_path / "3", tmp_path / "a.txt", model))
    assert hint in caplog.text


def test_a_failed_preparation_leaves_no_folder(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": oops}\n')
    (tmp_path / "b.jsonl").write_text('{"text": null}\n')
    before = sorted(tmp_path.iterdir())
    for name in ("a.jsonl", "b.jsonl", "none.jsonl"):
        with pytest.raises(DataError):
            prepare(configure(tmp_path / "new" / "deep" / "out", tmp_path / name, model))
        assert sorted(tmp_path.iterdir()) == before
    # What was there stays.
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError):
        prepare(configure(tmp_path / "out", tmp_path / "a.jsonl", model))
    assert (tmp_path / "out").is_dir()


def test_check(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.jsonl").write_bytes(_jsonl(TEXTS))
    (source / "b.jsonl").write_text('{"body": "x"}\n\n')
    (source / "README.md").write_text("about")

    def command(*further: str) -> int:
        given = [
            f"output_path={tmp_path}/out",
            f"dataset.path={source}",
            f"tokenizer.path={model}",
            *further,
        ]
        return cli.main(["prepare", "gpt_memmap", "--validate", *given])

    assert command() == 0
    out = capsys.readouterr().out
    assert out.startswith(f"output_path: {tmp_path}/out\n")
    size = sum(len(text.encode()) for text in TEXTS) / 1e6
    found = re.search(r"^documents   31 in .*/source, about ([\d.]+) MB of text$", out, re.M)
    assert found and float(found[1]) == pytest.approx(size, rel=0.15)
    found = re.search(
        r"^tokens      about ([\d,.]+(?:e\+\d+)?) with BOS and EOS: .* GB free$", out, re.M
    )
    exact = sum(map(len, tokens(model, TEXTS)))
    assert found and float(found[1].replace(",", "")) == pytest.approx(exact, rel=0.3)
    assert "left out    1 file: README.md (no table)\n" in out
    assert f"left out    1 rows of {source}/b.jsonl, which has no column text; it has body\n" in out
    assert f"tokenizer   {model}/tokenizer.json: 320 tokens, stored as uint16\n" in out
    assert (
        f"a document  begins with BOS 0 {synthetic.BOS} and ends with EOS 1 {synthetic.EOS}\n"
        in out
    )
    assert f"written to  {tmp_path}/out/ and {tmp_path}/out.json\n" in out
    assert not (tmp_path / "out").exists()
    assert command("tokenizer.bos=no", "distributed.world_size=2", "distributed.rank=1") == 0
    out = capsys.readouterr().out
    assert (
        "a document  begins with no BOS and ends" in out and "of which this is rank 1 of 2" in out
    )
    for setting, message in (
        ("dataset.field=content", "dataset.field: "),
        ("dataset.path=none.jsonl", "no such file"),
        ("tokenizer.path=./none", "./none: no such file or folder"),
    ):
        assert command(setting) == 2
        assert message in capsys.readouterr().err
    assert command("dataset.path=org/name") == 0
    assert (
        "org/name on the Hugging Face Hub, which a check does not download"
        in capsys.readouterr().out
    )


def test_a_line_that_is_no_json_is_said_once(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        _jsonl(["a"] * 1200) + b'{"text": oops}\n' + _jsonl(["a"] * 1200)
    )
    for count in (1, 2):
        process = _start(
            tmp_path, tmp_path / "out", tmp_path / "a.jsonl", model, f"tokenize_workers={count}"
        )
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 2
        assert stderr.count("not JSON") == 1 and "Traceback" not in stderr
        assert f"{tmp_path}/a.jsonl:1201: not JSON: Expecting value, at character 10" in stderr


# --- BOS, EOS and the integer type --------------------------------------------------------------------------------------


def test_bos_and_eos(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    synthetic.gpt2(tmp_path / "gpt2")

    def written(which: Path, **changes: Any) -> list[list[int]]:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return read(prepare(configure(tmp_path / "out", tmp_path / "a.txt", which, **changes)))

    assert written(model) == tokens(model, ["text"])
    assert written(model, tokenizer__bos=False) == tokens(model, ["text"], front=())
    assert written(model, tokenizer__eos=False) == tokens(model, ["text"], back=())
    gpt2 = tmp_path / "gpt2"
    assert written(gpt2) == tokens(gpt2, ["text"], (), (0,))
    assert written(gpt2, tokenizer__bos=True) == tokens(gpt2, ["text"], (0,), (0,))
    (gpt2 / "tokenizer_config.json").write_text("{}")
    assert written(gpt2, tokenizer__eos=False) == tokens(gpt2, ["text"], (), ())
    with pytest.raises(DataError, match=r"tokenizer.bos: given yes, but .*gpt2 names no BOS token"):
        written(gpt2, tokenizer__bos=True, tokenizer__eos=False)
    for eos in ("auto", True):
        with pytest.raises(
            DataError,
            match=r"tokenizer.eos: .*gpt2 names no EOS token, without which documents run tog",
        ):
            written(gpt2, tokenizer__eos=eos)


@pytest.mark.parametrize(
    ("vocabulary", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "int32")]
)
def test_smallest_integer(vocabulary: int, dtype: str, tmp_path: Path, model: Path) -> None:
    loaded = tokenizer.load(str(model))
    config = configure(tmp_path, "x", model)
    assert job._dtype(
        config, tokenizer.Loaded(**{**vars(loaded), "vocab_size": vocabulary})
    ) == np.dtype(dtype)


def test_chosen_integer(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    metadata = prepare(
        configure(tmp_path / "out", tmp_path / "a.txt", model, dataset__data_type="int64")
    )
    assert content(metadata)["datasets"][0]["dtype"] == "int64"
    assert read(metadata) == tokens(model, ["text"])
    message = r"dataset.data_type: given uint8, which holds numbers up to 255, but .* is 319; uint16 holds it"
    with pytest.raises(DataError, match=message):
        prepare(
            configure(tmp_path / "other", tmp_path / "a.txt", model, dataset__data_type="uint8")
        )


# --- the same bytes -----------------------------------------------------------------------------------------------------


def test_number_of_workers_changes_nothing(
    tmp_path: Path, large: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for count in (1, 3):
        output = tmp_path / str(count)
        metadata = prepare(configure(output / "data", large, model, tokenize_workers=count))
        results.append(everything(output))
    described = content(metadata)
    assert len(described["datasets"]) > 5
    # A token file ends with the document that fills it.
    for entry in described["datasets"][:-1]:
        lengths = TokenFile(metadata.parent / entry["prefix"]).lengths
        assert entry["num_tokens"] - int(lengths[-1]) < 100_000 <= entry["num_tokens"]
    assert sum(entry["weight"] for entry in described["datasets"]) == pytest.approx(1, abs=1e-12)
    assert described["skipped"] == {"empty": 2, "not_utf8": 1}
    assert described["skipped_examples"][1] == [f"{large}/0200.py", "not_utf8"]
    assert results[0] == results[1]
    # Nor does how much a worker is given at a time.
    monkeypatch.setattr(workers, "_RANGE_BYTES", 5_000)
    prepare(configure(tmp_path / "4" / "data", large, model, tokenize_workers=2))
    assert everything(tmp_path / "4") == results[0]
    texts = [
        text
        for path in sorted(large.iterdir())
        if (text := path.read_text(errors="ignore")) and "UTF" not in text
    ]
    assert read(metadata) == tokens(model, texts)


_COMMAND = """
import os, pathlib, sys, time
from fast_llm.cli import main
if __name__ == "__main__":
    if "SLOWLY" in os.environ:  # so that it is often killed between two files that belong together
        replace = pathlib.Path.replace
        def slowly(*paths):
            time.sleep(0.015)
            replace(*paths)
            time.sleep(0.015)
        pathlib.Path.replace = slowly
    code = main(["prepare", *sys.argv[1:]])
    print("torch" in sys.modules)
    sys.exit(code)
"""


def _start(
    folder: Path, output: Path, source: Path, model: Path, *further: str
) -> subprocess.Popen[str]:
    (folder / "run.py").write_text(_COMMAND)
    settings = [
        f"output_path={output}",
        f"dataset.path={source}",
        f"tokenizer.path={model}",
        "tokens_per_shard=100000",
    ]
    return subprocess.Popen(
        [sys.executable, str(folder / "run.py"), *settings, *further],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _of_session(session: int) -> list[str]:
    """Processes of a session that are left."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, owner = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(owner) == session and state != "Z":
            found.append(stat.parent.name)
    return found


def _all_gone(session: int) -> None:
    """Also what ends a moment after the main process."""
    deadline = time.monotonic() + 20
    while _of_session(session):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_again_and_again(
    tmp_path: Path, large: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLOWLY", "1")
    prepare(configure(tmp_path / "whole" / "data", large, model))
    output = tmp_path / "killed" / "data"
    draw = random.Random(0)
    kills = 0
    for attempt in range(30):
        before = len(list(output.glob("shard_*.json")))
        process = _start(tmp_path, output, large, model, f"tokenize_workers={1 + attempt % 2}")
        # Two of three times it gets somewhere first.
        while (
            process.poll() is None
            and attempt % 3
            and len(list(output.glob("shard_*.json"))) <= before
        ):
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.1 if attempt % 3 else 0.8))
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)  # not its workers: they must notice
        process.wait()
        _all_gone(process.pid)
        process.communicate()
        kills += 1
    assert process.returncode == 0, process.communicate()
    assert kills >= 5
    assert everything(tmp_path / "killed") == everything(tmp_path / "whole")


def test_interrupted(
    tmp_path: Path, large: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLOWLY", "1")
    process = _start(tmp_path, tmp_path / "data", large, model, "tokenize_workers=2")
    while not (tmp_path / "data" / "shard_0_0.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: the workers too
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.endswith("fast-llm prepare: stopped by SIGINT; the same command resumes it\n")
    assert "Traceback" not in stderr
    assert not list((tmp_path / "data").glob("*.partial"))


def test_worker_that_is_killed(tmp_path: Path, large: Path, model: Path) -> None:
    process = _start(tmp_path, tmp_path / "data", large, model, "tokenize_workers=2")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    worker, loaded = "", ""
    while "tokenizers" not in loaded:  # then it is about to begin
        assert process.poll() is None, process.communicate()
        for worker in children.read_text().split():
            if "spawn_main" in Path(f"/proc/{worker}/cmdline").read_text():
                loaded = Path(f"/proc/{worker}/maps").read_text()
                break
    assert "libtorch" not in loaded
    os.kill(int(worker), signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2, stderr
    assert (
        "a worker process died, most likely because memory ran out; lower tokenize_workers (now 2)"
        in stderr
    )


def test_worker_that_is_killed_in_the_midst_of_an_answer(
    tmp_path: Path, large: Path, model: Path
) -> None:
    for number in range(4):  # enough to do
        shutil.copytree(large, tmp_path / "source" / str(number))
    process = _start(tmp_path, tmp_path / "data", tmp_path / "source", model, "tokenize_workers=2")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

    def computed() -> dict[str, int]:
        """Ticks that each worker has computed."""
        found = {}
        for worker in children.read_text().split():
            if "spawn_main" in Path(f"/proc/{worker}/cmdline").read_text():
                found[worker] = sum(
                    map(
                        int,
                        Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[11:13],
                    )
                )
        return found

    while not (tmp_path / "data" / "shard_0_0.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)
    # An answer is longer than what a pipe holds, so both stop in the middle of one.
    before: dict[str, int] = {}
    while (now := computed()) != before:
        before = now
        time.sleep(0.5)
    assert len(now) == 2
    os.kill(int(min(now)), signal.SIGKILL)
    os.kill(process.pid, signal.SIGCONT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 2, stderr
    assert (
        "a worker process died, most likely because memory ran out; lower tokenize_workers (now 2)"
        in stderr
    )
    _all_gone(process.pid)


_WITH_TROUBLE = """
import multiprocessing, os, resource, signal, sys, threading, time
from multiprocessing import util
from fast_llm import cli
from fast_llm.data import shards, workers

workers._RANGE_BYTES = 40_000

def signal_while_starting():
    # To another thread, which Python's handlers never run in.
    other = threading.Thread(target=time.sleep, args=(60,), daemon=True)
    other.start()
    begin = util.spawnv_passfds
    def begun(path, words, files):
        process = begin(path, words, files)
        if "spawn_main" in str(words):
            signal.pthread_kill(other.ident, signal.SIGTERM)
            time.sleep(0.1)
        return process
    util.spawnv_passfds = begun

def killed_at_birth():
    def begun(self):
        raise BrokenPipeError
    multiprocessing.context.SpawnProcess.start = begun

def few_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))

def killed_as_they_leave():
    fill = shards._write_range
    def filled(*given):
        skipped = fill(*given)
        for worker in multiprocessing.active_children()[:2]:
            os.kill(worker.pid, signal.SIGKILL)
        time.sleep(0.1)
        return skipped
    shards._write_range = filled

class Broken(workers.RangeTokenizer):
    def __init__(self, *parts):
        raise OSError(5, "the table is gone")

if __name__ == "__main__":
    if sys.argv[-1] in globals():
        globals()[sys.argv[-1]]()
    sys.exit(cli.main(sys.argv[1:-1]))
elif sys.argv[-1] == "unmade":
    workers.RangeTokenizer = Broken
elif sys.argv[-1] == "endless":
    def endless(worker, task):
        open(f"{__file__}.{os.getpid()}", "w").close()
        time.sleep(200)
    workers.RangeTokenizer.tokenize = endless
"""


def _troubled(
    folder: Path, source: Path, model: Path, trouble: str, workers: int
) -> subprocess.Popen[str]:
    script = folder / "command.py"
    script.write_text(_WITH_TROUBLE)
    settings = [f"output_path={folder}/data", f"dataset.path={source}", f"tokenizer.path={model}"]
    return subprocess.Popen(
        [sys.executable, str(script), "prepare", *settings, f"tokenize_workers={workers}", trouble],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    ("trouble", "code", "said"),
    [
        (
            "signal_while_starting",
            143,
            "stopped by SIGTERM; the same command resumes it",
        ),
        ("killed_at_birth", 2, "a worker process died"),
        ("killed_as_they_leave", 0, "data.json: "),
        (
            "few_files",
            2,
            r"tokenize_workers: only \d+ of 30 worker processes could be started: .*open files.*lower",
        ),
        ("unmade", 1, "the table is gone"),
    ],
)
def test_trouble_with_workers(
    tmp_path: Path, large: Path, model: Path, trouble: str, code: int, said: str
) -> None:
    process = _troubled(tmp_path, large, model, trouble, 30 if trouble == "few_files" else 3)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert re.search(said, stderr), stderr
    assert "Traceback" not in stderr and "leaked" not in stderr
    _all_gone(process.pid)


def test_workers_of_a_parent_that_is_killed_finish_nothing(
    tmp_path: Path, large: Path, model: Path
) -> None:
    """A range may take minutes, and gigabytes."""
    process = _troubled(tmp_path, large, model, "endless", 3)
    while len(list(tmp_path.glob("command.py.*"))) < 3:  # all have begun
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    _all_gone(process.pid)
    process.communicate()


def test_nobody_reads_what_is_said(tmp_path: Path) -> None:
    code = """
import os, sys
reading, writing = os.pipe()
os.dup2(writing, 2)
os.close(reading)
from fast_llm.data.progress import Progress
progress = Progress(10)
progress._write("half done\\n")
progress._write("done\\n")
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_table_with_workers_and_without_torch(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_jsonl([synthetic.text(seed, 3000) for seed in range(100)]))
    process = _start(
        tmp_path, tmp_path / "1" / "data", tmp_path / "a.jsonl", model, "tokenize_workers=2"
    )
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert stdout == "False\n"
    assert "Tokenized 100 documents" in stderr and "tokens/s" in stderr
    assert "data.json: 100 documents" in stderr
    prepare(configure(tmp_path / "2" / "data", tmp_path / "a.jsonl", model))
    assert everything(tmp_path / "1") == everything(tmp_path / "2")


def test_help_loads_nothing() -> None:
    code = "import sys, fast_llm.cli\ntry: fast_llm.cli.main(['prepare', '--help'])\nexcept SystemExit: pass\nprint(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"datasets", "torch", "tokenizers", "numpy", "pydantic"} & set(result.stdout.split())


# --- started again ------------------------------------------------------------------------------------------------------


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
        f"{tmp_path}/data.json: already finished, nothing to do. To prepare it again, delete {tmp_path}/data."
        in caplog.text
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
            "was started with tokens_per_shard 100000, now it is 200000; restore it, choose another",
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
        (
            {"distributed__world_size": 2, "distributed__rank": 1},
            "was started with distributed.world_size 1, now it is 2",
        ),
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
        path.write_bytes({"jsonl": _jsonl(texts), "txt": texts[0].encode(), "txt.gz": packed}[kind])
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


# --- several nodes ------------------------------------------------------------------------------------------------------


def test_several_nodes(
    tmp_path: Path, large: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = prepare(configure(tmp_path / "whole", large, model))

    def node(rank: int) -> Path:
        return prepare(
            configure(
                tmp_path / "data", large, model, distributed__world_size=3, distributed__rank=rank
            )
        )

    with caplog.at_level(logging.INFO):
        metadata = node(2)
    assert f"Rank 2 has finished. {metadata} is written when rank 0, 1 has too." in caplog.text
    node(0)
    assert not metadata.exists()
    node(1)
    assert read(metadata) == read(whole)
    first = everything(tmp_path / "data")
    assert {name.split("_")[1] for name in first if name.startswith("shard")} == {"0", "1", "2"}
    # Another order gives the same.
    described = metadata.read_bytes()
    shutil.rmtree(tmp_path / "data")
    for rank in range(3):
        node(rank)
    assert everything(tmp_path / "data") == first and metadata.read_bytes() == described
    # What another node has lost is not passed over.
    (tmp_path / "data" / "shard_1_0.bin").unlink()
    node(0)
    assert not metadata.exists()
    node(1)
    assert metadata.read_bytes() == described


def test_what_a_node_left_half_written_goes_though_others_finished(
    tmp_path: Path, large: Path, model: Path
) -> None:
    for rank in (0, 1, 0):
        prepare(
            configure(
                tmp_path / "data", large, model, distributed__world_size=2, distributed__rank=rank
            )
        )
    before = everything(tmp_path)
    strays = [
        tmp_path / "data" / "rank_0.json.0.partial",
        tmp_path / "data" / "shard_0_7.bin.partial",
    ]
    strays += [
        tmp_path / "data" / "tokenizer" / "tokenizer.json.0.partial",
        tmp_path / "data.json.0.partial",
    ]
    for stray in strays:
        stray.write_text("{")
    other = tmp_path / "data" / "rank_1.json.1.partial"
    other.write_text("{")  # which may be writing it now
    prepare(
        configure(tmp_path / "data", large, model, distributed__world_size=2, distributed__rank=0)
    )
    assert other.exists()
    prepare(
        configure(tmp_path / "data", large, model, distributed__world_size=2, distributed__rank=1)
    )
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


def test_rank_of_the_environment(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(tmp_path, "x", model)
    assert job._rank_and_world(config) == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert job._rank_and_world(config) == (3, 4)
    assert job._rank_and_world(configure(tmp_path, "x", model, distributed__rank=1)) == (1, 4)
    with pytest.raises(
        DataError, match=r"distributed.rank: given 3, must be below distributed.world_size 2"
    ):
        job._rank_and_world(configure(tmp_path, "x", model, distributed__world_size=2))
    monkeypatch.delenv("RANK")
    with pytest.raises(
        DataError, match=r"distributed.rank: missing, with distributed.world_size 4; give each node"
    ):
        job._rank_and_world(config)
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(
        DataError,
        match=r"distributed.world_size: WORLD_SIZE in the environment is 'many', must be a number",
    ):
        job._rank_and_world(config)


# --- mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "changes", "message"),
    [
        (
            {},
            {"dataset__path": "DIR/none.jsonl"},
            r"dataset.path: .*none.jsonl: no such file or folder",
        ),
        ({}, {"dataset__path": "none.jsonl"}, r"dataset.path: none.jsonl: no such file or folder"),
        ({}, {}, r"dataset.path: .*: no files there"),
        (
            {"a.txt": "x"},
            {"dataset__data_files": "*.py"},
            r"with dataset.data_files \*.py: no files there",
        ),
        (
            {"a.txt": "x"},
            {"dataset__path": "DIR/a.txt", "dataset__data_files": "*"},
            r"dataset.data_files: .* names files already",
        ),
        (
            {"a.txt": "x"},
            {"dataset__config_name": "en"},
            r"dataset.config_name: given en, but .* is a local path, not on the Hub",
        ),
        (
            {"a.txt": "x"},
            {"dataset__split": "test"},
            r"dataset.split: given test, but files of text are all `train`",
        ),
        ({"a.csv": "x"}, {}, r"a.csv: csv is not read; convert it to jsonl or parquet"),
        (
            {"a.jsonl": "{}", "b.parquet": ""},
            {},
            r"files of several kinds: a.jsonl \(json\), b.parquet \(parquet\); choose",
        ),
        (
            {"a.jsonl": "{}", "b.py": ""},
            {"dataset__data_files": "*"},
            r"files of several kinds: b.py \(file\), a.jsonl \(json\)",
        ),
        ({"a.jsonl": ""}, {}, r"all files are empty"),
        (
            {"a.jsonl": '{"body": "x", "id": 1}'},
            {},
            r"dataset.field: .* has no column text; it has body, id",
        ),
        ({"a.jsonl": '{"text": [1]}'}, {}, r"has no document to write: 1 not text"),
        (
            {"a.jsonl": '{"text": "x"}\n{"text": oops}'},
            {},
            r"/a.jsonl:2: not JSON: Expecting value, at character 10 of the line; fix the line or delete it",
        ),
        (
            {"a.parquet": "nonsense"},
            {},
            r"/a.parquet: damaged, or not a parquet file: .*magic bytes",
        ),
        ({"a.jsonl": '{"text": null}'}, {}, r"has no document to write: 1 not text"),
    ],
)
def test_mistakes(
    tmp_path: Path, model: Path, files: dict[str, str], changes: dict[str, Any], message: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, text in files.items():
        (source / name).write_text(text)
    changes = {name: value.replace("DIR", str(source)) for name, value in changes.items()}
    with pytest.raises(DataError, match=message):
        prepare(
            configure(tmp_path / "out", changes.pop("dataset__path", str(source)), model, **changes)
        )
    assert not (tmp_path / "out.json").exists()


def test_saved_dataset_has_no_files(tmp_path: Path, model: Path) -> None:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    with pytest.raises(
        DataError, match=r"dataset.data_files: .*saved is a saved dataset; leave data_files and"
    ):
        prepare(configure(tmp_path / "out", tmp_path / "saved", model, dataset__data_files="*"))


def test_two_at_once(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("text")
    config = configure(tmp_path / "data", tmp_path / "a.txt", model)
    (tmp_path / "data").mkdir()
    with (tmp_path / "data" / ".lock_0").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(
            DataError,
            match=r"data: another process is preparing rank 0 in this folder; wait for it",
        ):
            prepare(config)

    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert read(prepare(config)) == tokens(model, ["text"])
    assert (
        "cannot be locked (No locks available); never run two preparations at once" in caplog.text
    )


def test_room_on_the_disk(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text(synthetic.text(0, 20_000))
    needed = 0
    usage = shutil.disk_usage(tmp_path)
    for free, fits in ((10_000, False), (10_000_000, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        if fits:
            metadata = prepare(configure(tmp_path / "data", tmp_path / "a.txt", model))
            needed = (tmp_path / "data" / "shard_0_0.bin").stat().st_size
        else:
            with pytest.raises(
                DataError,
                match=r"the token files will need about \d\S* GB more, but 1e-05 GB are free; make",
            ):
                prepare(configure(tmp_path / "data", tmp_path / "a.txt", model))
    # The estimate is good: a tenth less than what it took is refused, a tenth more is enough.
    for free, fits in ((int(0.9 * needed), False), (int(1.1 * needed), True)):
        shutil.rmtree(tmp_path / "data")
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        if fits:
            prepare(configure(tmp_path / "data", tmp_path / "a.txt", model))
        else:
            with pytest.raises(
                DataError, match=r"make room, or set dataset.disable_disk_space_check: yes"
            ):
                prepare(configure(tmp_path / "data", tmp_path / "a.txt", model))
            prepare(
                configure(
                    tmp_path / "data",
                    tmp_path / "a.txt",
                    model,
                    dataset__disable_disk_space_check=True,
                )
            )
            metadata.unlink()


def test_disk_that_fills_up(
    tmp_path: Path, large: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(configure(tmp_path / "whole" / "data", large, model))
    append = TokenFileWriter.append_many

    def full(self: TokenFileWriter, *arguments: Any) -> None:
        if self.prefix.name == "shard_0_3":
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, *arguments)

    monkeypatch.setattr(TokenFileWriter, "append_many", full)
    config = configure(tmp_path / "other" / "data", large, model)
    with pytest.raises(
        DataError,
        match=r"data: the disk is full; free some space and run the same command again to resume",
    ):
        prepare(config)
    assert not list((tmp_path / "other" / "data").glob("*.partial"))
    monkeypatch.undo()
    prepare(config)
    assert everything(tmp_path / "other") == everything(tmp_path / "whole")


def test_cache_of_datasets_fills_up(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise datasets.exceptions.DatasetGenerationError("An error occurred") from error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        DataError,
        match=r"no room for it in the cache of `datasets`, .*; set HF_HOME to a folder on a larger",
    ):
        prepare(configure(tmp_path / "data", "org/name", model))


def test_output_that_can_not_be_written(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"output_path: .*a.txt: cannot be written to: File exists"):
        prepare(configure(tmp_path / "a.txt", tmp_path / "a.txt", model))
    with pytest.raises(DataError, match=r"output_path: .*: cannot be written to: Not a directory"):
        prepare(configure(tmp_path / "a.txt" / "data", tmp_path / "a.txt", model))


def test_progress(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    shown = progress.Progress(1000)
    now[0] += 4
    shown.advance(100, 90, 50_000)
    assert capsys.readouterr().err == ""
    now[0] += 4
    shown.advance(100, 90, 50_000)
    assert (
        capsys.readouterr().err
        == "20.0 %, 180 documents, 100,000 tokens, 12,500 tokens/s, 0:00:32 left\n"
    )
    with caplog.at_level(logging.INFO):
        shown.finish()
    assert "Tokenized 180 documents: 100,000 tokens in 8.0 s, 12,500 tokens/s." in caplog.text
    shown.terminal = True
    now[0] += 1
    shown.advance(700, 90, 50_000)
    assert capsys.readouterr().err.startswith("\r\x1b[K90.0 %")
