"""`fast-llm inspect` on prepared data: statistics, documents, sequences as a step reads them."""

import html
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fast_llm.cli import main
from fast_llm.config.batch import BatchSizes
from fast_llm.config.train import DataConfig
from fast_llm.data.dataset import open_dataset
from fast_llm.data.inspect.statistics import Lengths, count_duplicates
from fast_llm.data.loader import Loader
from fast_llm.data.prepare import prepare
from fast_llm.data.tokenfile import TokenFile, TokenFileWriter
from fast_llm.model.loss import IGNORE_INDEX
from tests.data import synthetic
from tests.data.preparing import configure, jsonl

TEXTS = [synthetic.text(seed, 5 + 7 * seed) for seed in range(40)]


@pytest.fixture(scope="module")
def data(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset.json of 43 documents, of which three are copies of others."""
    folder = tmp_path_factory.mktemp("inspected")
    (folder / "a.jsonl").write_bytes(jsonl([*TEXTS[:20], "", *TEXTS[:2]]))
    (folder / "b.jsonl").write_bytes(jsonl([*TEXTS[20:], TEXTS[0]]))
    return prepare(configure(folder / "tokens", folder / "*.jsonl", model))


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    assert main(["inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["inspect", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def token_file(prefix: Path, documents: list[list[int]]) -> TokenFile:
    writer = TokenFileWriter(prefix, np.dtype("uint16"))
    for document in documents:
        writer.append(np.array(document, np.uint16))
    writer.close()
    return TokenFile(prefix)


def test_lengths_are_those_of_the_sorted_documents(tmp_path: Path) -> None:
    draw = random.Random(0)
    sizes = [int(draw.lognormvariate(4, 1.5)) for _ in range(5001)]
    file = token_file(tmp_path / "a", [[1] * size for size in sizes])
    lengths = Lengths.of([file])
    lengths.add(np.array([2**20, 2**21, 2**21]))  # longer than what is counted one by one
    sizes = sorted([*sizes, 2**20, 2**21, 2**21])
    found = lengths.summary()
    assert (found["documents"], found["tokens"]) == (len(sizes), sum(sizes))
    for key, share in (("median", 0.5), ("p90", 0.9), ("p99", 0.99)):
        # The shortest length that so many documents do not exceed.
        assert sum(size <= found[key] for size in sizes) >= share * len(sizes)
        assert sum(size < found[key] for size in sizes) < share * len(sizes)
    assert (found["shortest"], found["longest"]) == (sizes[0], 2**21)
    for row in found["histogram"]:
        inside = [size for size in sizes if row["from"] <= size <= row["to"]]
        assert (row["documents"], row["tokens"]) == (len(inside), sum(inside))
    assert sum(row["documents"] for row in found["histogram"]) == len(sizes)
    longer = [size for size in sizes if size > 100]
    assert lengths.longer_than(100) == {
        "documents": len(longer),
        "share_of_documents": len(longer) / len(sizes),
        "tokens": sum(longer),
        "share_of_tokens": sum(longer) / sum(sizes),
    }


def test_duplicates_are_counted_over_all_files(tmp_path: Path) -> None:
    a = token_file(tmp_path / "a", [[1, 2, 3], [4], [], [1, 2, 3], [1, 2]])
    b = token_file(tmp_path / "b", [[], [1, 2, 3], [4], [3, 2, 1]])
    found = count_duplicates([a, b])
    assert (found.documents, found.tokens, found.groups) == (3, 3 + 3 + 1, 2)
    none = count_duplicates([token_file(tmp_path / "c", [[1], [2], []])])
    assert (none.documents, none.tokens, none.groups) == (0, 0, 0)


def test_statistics_of_a_dataset(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(data.read_text())
    found = inspect(capsys, data)
    assert (found["kind"], found["paths"]) == ("dataset", [str(data)])
    assert found["documents"] == content["num_documents"] == 43
    assert found["tokens"] == content["num_tokens"]
    assert found["skipped"] == {"empty": 1}
    assert found["duplicates"]["documents"] == 3 and found["duplicates"]["groups"] == 2
    assert found["longer"] is None and "splits" not in found  # without a sequence length
    assert [source["tokens"] for source in found["sources"]] == [found["tokens"]]
    text = shown(capsys, data, "--sequence-length", 64)
    assert f"documents   43\ntokens      {found['tokens']:,} in 1 token file\n" in text
    assert "\nskipped     1 empty\n" in text and "\nduplicates  3 documents (7.0 %)" in text
    assert "\ntraining " in text and "█" in text


def test_a_training_yaml_gives_epochs_and_splits(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(
        f"training: {{train_iters: 10}}\nbatch: {{batch_size: 4, sequence_length: 32}}\n"
        f"data: {{format: file, path: {data}, split: [80, 20, 0]}}\n"
    )
    found = inspect(capsys, "--config", file)
    dataset = open_dataset(DataConfig(format="file", path=[str(data)], split=[80, 20]), 32, 1234, 9)
    assert found["sequence_length"] == 32
    assert found["splits"]["validation"]["sequences"] == dataset.sequences("validation") > 0
    assert found["run"]["epochs"] == [
        {
            "source": str(data),
            "share": 1,
            "epochs": 40 / dataset.sequences("training"),
            "padding": 0,
        }
    ]
    assert "10 steps of 4 sequences: 1.28k tokens" in shown(capsys, "-c", file)
    changed = inspect(capsys, "-c", file, "training.train_iters=20")
    assert changed["run"]["epochs"][0]["epochs"] == 2 * found["run"]["epochs"][0]["epochs"]


def test_padding_is_shown(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of best-fit packing: its share of each split, and its place in a sequence."""
    file = tmp_path / "train.yaml"
    file.write_text(
        f"training: {{train_iters: 10}}\nbatch: {{batch_size: 4, sequence_length: 32}}\n"
        f"data: {{packing: best_fit, path: {data}, split: [80, 20, 0]}}\n"
    )
    settings = ["--config", file]
    found = inspect(capsys, *settings)
    config = DataConfig(path=[str(data)], split=[80, 20], packing="best_fit")
    dataset = open_dataset(config, 32, 1234, 9)
    share = dataset.padding("training")
    assert 0 < share < 0.2
    assert found["splits"]["training"]["padding"] == share
    assert found["run"]["epochs"][0]["padding"] == share
    assert found["run"]["tokens"] == round(10 * 4 * 32 * (1 - share))
    assert "tokens  sequences  padding" in shown(capsys, *settings)
    sequences = inspect(capsys, *settings, "--step", 1)["sequences"]
    index = next(each["index"] for each in sequences if each["padding"])
    text, page = shown(capsys, *settings, "--sequence", index), tmp_path / "page.html"
    read = dataset.read("training", index)
    assert f"tokens {33 - read.padding} to 32: padding, without a loss" in text
    (sequence,) = inspect(capsys, *settings, "--sequence", index)["sequences"]
    assert sequence["targets"] == 32 - read.padding - len(read.ends)
    assert sum(part["tokens"] for part in sequence["documents"]) == 33 - read.padding
    shown(capsys, *settings, "--sequence", index, "--html", page)
    assert "padding, without a loss" in page.read_text()


@pytest.mark.parametrize(
    ("isolate", "packing", "length"),
    [(True, "concatenate", 48), (False, "concatenate", 48), (True, "best_fit", 700)],
)
def test_a_step_is_what_the_loader_gives(
    isolate: bool, packing: Any, length: int, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [
        f"batch.cross_document_attention={'no' if isolate else 'yes'}",
        "batch.batch_size=4",
        "data.split=[90,10,0]",
        f"data.packing={packing}",
        "model.distributed.seed=7",
    ]
    found = inspect(capsys, data, "--sequence-length", length, "--step", 3, *settings)
    config = DataConfig(path=[str(data)], split=[90, 10], packing=packing)
    dataset = open_dataset(config, length, 7, 320)
    sizes = BatchSizes(batch_size=4, micro_batch_size=4, micro_batches=1)
    with Loader(
        dataset, "training", sizes, rank=0, processes=1, vocab_size=320, first_sample=0, steps=3,
        isolate=isolate, workers=0, prefetch=0,
    ) as loader:  # fmt: skip
        batch = list(loader)[2][0]
    sequences = found["sequences"]
    assert [sequence["index"] for sequence in sequences] == [8, 9, 10, 11]
    targets = torch.full((4, length), IGNORE_INDEX)
    for row, sequence in enumerate(sequences):
        ids = torch.tensor(sequence["ids"])
        assert torch.equal(batch.tokens[row], ids[:-1])
        targets[row] = ids[1:]
        targets[row, sequence["masked"]] = IGNORE_INDEX
        assert sequence["targets"] == length - len(sequence["masked"])
        places = [part["position"] for part in sequence["documents"]]
        assert places == sequence["starts"][: len(places)]
        if isolate:
            begins = torch.nonzero(batch.positions[row] == 0).flatten().tolist()
            assert begins == [start for start in sequence["starts"] if start < length]
    assert torch.equal(batch.labels, targets)
    assert any(sequence["masked"] for sequence in sequences) == isolate


def test_documents_and_borders_are_decoded(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = inspect(capsys, data, "--document", 21)["shown_documents"][0]
    assert document["text"] == f"{synthetic.BOS}{TEXTS[1]}{synthetic.EOS}"
    # Row 20 of the file was skipped: document 21 is its line 23.
    origin = {"path": str(data.parent / "a.jsonl"), "unit": "line", "number": 23}
    assert (document["document"], document["origin"]) == (21, origin)
    assert document["name"] == f"{data.parent / 'a.jsonl'}:23"
    text = shown(capsys, data, "--document", 21)
    assert f"{synthetic.BOS}{TEXTS[1]}{synthetic.EOS}\n" in text
    sample = inspect(capsys, data, "--sample", 5)["shown_documents"]
    assert [each["number"] for each in sample] == [0, 10, 21, 32, 42]
    sequence = inspect(capsys, data, "--sequence-length", 400, "--sequence", 1)["sequences"][0]
    assert sum(part["tokens"] for part in sequence["documents"]) == 401
    assert len(sequence["documents"]) > 1
    for part in sequence["documents"]:
        inside = part["text"].removeprefix(synthetic.BOS).removesuffix(synthetic.EOS)
        assert any(inside in each for each in TEXTS)
    text = shown(capsys, data, "--sequence-length", 400, "--sequence", 1)
    assert text.count("no loss here: the next token belongs to another document") == len(
        sequence["masked"]
    )


def test_token_files_without_a_dataset_json_show_ids(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token_file(tmp_path / "plain", [[5, 6, 7], [8]])
    assert inspect(capsys, tmp_path / "plain")["documents"] == 2
    assert shown(capsys, tmp_path / "plain", "--document", 0).endswith(
        " document 0, 3 tokens\n5 6 7\n"
    )


def test_mistakes(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([], "nothing to inspect: give PATH, or a YAML file as --config FILE"),
        (
            [data, "--sequence", 1],
            "--sequence and --step need a training YAML (--config train.yaml), or"
            " --sequence-length N for its default seed and data.split",
        ),
        (
            [data, "--sequence-length", 8, "--step", 1],
            "batch.batch_size: missing: --step needs the number of sequences in a step; give it as"
            " batch.batch_size=N",
        ),
        (
            [data, "--document", 43],
            "--document: given 43, must be from 0 to 42: the dataset has 43 documents",
        ),
        (
            [data, "--sequence-length", 8, "--sequence", 1, "--split", "validaton"],
            "--split: given validaton, must be training or validation; did you mean validation?",
        ),
        (
            [data, "--sequence-length", 8, "--sequence", 1, "--split", "test"],
            "--split: given test, must be training or validation: data.split gives test no"
            " documents",
        ),
    ):
        assert refused(capsys, *arguments) == f"fast-llm inspect: {message}\n"
    file = tmp_path / "train.yaml"
    file.write_text(f"training: {{train_iters: 3}}\ndata: {{path: {data}}}\n")
    step = ("--step", 4, "batch.batch_size=2", "batch.sequence_length=8")
    assert refused(capsys, "-c", file, *step) == (
        "fast-llm inspect: --step: given 4, must be from 1 to 3 (training.train_iters)\n"
    )
    file.write_text("data: {format: random}\n")
    assert refused(capsys, "-c", file) == (
        f"fast-llm inspect: {file}:1: data.format: random has no documents to inspect\n"
    )
    file.write_text("data: {path: [1, x, 2]}\n")
    assert refused(capsys, "-c", file).startswith(
        f"fast-llm inspect: {file}:1: data.path: format: list needs one path"
    )


def test_a_page_has_everything_and_needs_no_other_file(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def page(*arguments: object) -> str:
        file = tmp_path / "page.html"
        assert shown(capsys, *arguments, "--html", file) == (
            f"{file}: written; open it in a browser\n"
        )
        text = file.read_text()
        tags = re.findall(r"<(/?)(\w+)", text)
        for name in ("table", "tr", "details", "div", "pre", "h2", "style", "html"):
            assert tags.count(("", name)) == tags.count(("/", name))
        assert not re.search(r"https?:|src=|href=|url\(|@import|<script", text)
        return text

    found = inspect(capsys, data, "--sequence-length", 64)
    text = page(data, "--sequence-length", 64)
    for value in (found["documents"], found["tokens"], found["lengths"]["longest"]):
        assert f"<b>{value:,}</b>" in text
    assert text.count("<details>") == 10 and text.count("<details open>") == 3
    assert text.count('<td class="bar">') == len(found["lengths"]["histogram"])
    sequence = inspect(capsys, data, "--sequence-length", 400, "--sequence", 1)["sequences"][0]
    text = page(data, "--sequence-length", 400, "--sequence", 1)
    assert text.count("no loss: the next token") == len(sequence["masked"]) > 0
    for part in sequence["documents"]:
        assert html.escape(part["text"]) in text and html.escape(part["name"]) in text
    model = data.parent / "tokens" / "tokenizer"
    assert "<span>&lt;b&gt;</span>" not in page(model, "--text", "x")
    assert "<span>&amp;</span>" in page(model, "--text", "x&y")
    (tmp_path / "a.txt").write_text("<b>bold</b>")
    assert "&lt;b&gt;bold&lt;/b&gt;" in page(tmp_path / "a.txt")
    assert refused(capsys, data, "--html", tmp_path / "none" / "x.html") == (
        f"fast-llm inspect: --html: {tmp_path}/none/x.html: cannot be written: No such file or"
        " directory\n"
    )
