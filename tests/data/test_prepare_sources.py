"""Every kind of source: tables, text files, folders, the Hub."""

import errno
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import zstandard

from fast_llm.data import tokenizer
from fast_llm.data.prepare import prepare
from fast_llm.errors import DataError, MissingPackage
from tests import hub
from tests.data import synthetic
from tests.data.preparing import TEXTS, configure, content, jsonl, read, tokens

pytestmark = pytest.mark.usefixtures("datasets_cache")


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
        ("a.jsonl", lambda path: path.write_bytes(jsonl(TEXTS))),
        ("a.json", lambda path: path.write_text(json.dumps([{"text": text} for text in TEXTS]))),
        ("a.jsonl.gz", lambda path: path.write_bytes(gzip.compress(jsonl(TEXTS)))),
        ("a.jsonl.zst", lambda path: path.write_bytes(zstandard.compress(jsonl(TEXTS)))),
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
    copy = tokenizer.load(str(tmp_path / made_with["path"]))
    assert copy.eos == 1
    for loaded in (copy, tokenizer.load(str(model))):
        assert made_with["fingerprint"] == loaded.fingerprint([], [0, 1])
    # The smallest integer that holds 320 tokens.
    assert described["datasets"][0]["dtype"] == "uint16"


def test_folder_pattern_and_saved(tmp_path: Path, model: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "b.jsonl").write_bytes(jsonl(TEXTS[10:]))
    (source / "sub" / "c.jsonl").write_bytes(b"")
    (source / "a.jsonl").write_bytes(jsonl(TEXTS[:10]))
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
        (source / f"{split}-00000-of-00001.jsonl").write_bytes(jsonl([TEXTS[number]]))
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
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(jsonl(TEXTS)))
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
    (data / "train-00000-of-00001.jsonl").write_bytes(jsonl(TEXTS))
    (data / "test-00000-of-00001.jsonl").write_bytes(jsonl(["another"]))
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


def test_hub_cannot_be_reached(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError,
        match=r"dataset.path: org/name: no such local file or folder, and not loaded from the"
        r" Hugging Face Hub: HF_HUB_OFFLINE is set, and it is not in the cache of `datasets`$",
    ):
        prepare(configure(tmp_path / "out", "org/name", model))


def test_a_hub_that_cannot_be_reached_is_asked_once(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its client would repeat for half a minute."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    offline, load_dataset = list[bool](), datasets.load_dataset

    def observed(*given: Any, **further: Any) -> Any:
        offline.append(datasets.config.HF_HUB_OFFLINE)
        return load_dataset(*given, **further)

    monkeypatch.setattr(datasets, "load_dataset", observed)
    with pytest.raises(
        DataError,
        match=r"^dataset.path: org/name: no such local file or folder, and not loaded from the"
        r" Hugging Face Hub: no connection to http://127.0.0.1:9, and it is not in the cache of"
        r" `datasets`$",
    ):
        prepare(configure(tmp_path / "out", "org/name", model))
    assert offline == [True] and not datasets.config.HF_HUB_OFFLINE


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
        "dataset.path: org/name: no such local file or folder, and not loaded from the Hugging"
        " Face Hub: " in answer
    )


def test_left_out_files_are_named(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("train", "zoo"):
        (source / f"{name}.jsonl").write_bytes(jsonl([name]))
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


def test_saved_dataset_has_no_files(tmp_path: Path, model: Path) -> None:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    with pytest.raises(
        DataError, match=r"dataset.data_files: .*saved is a saved dataset; leave data_files and"
    ):
        prepare(configure(tmp_path / "out", tmp_path / "saved", model, dataset__data_files="*"))


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
