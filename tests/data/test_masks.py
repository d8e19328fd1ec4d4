"""Masked spans: from characters to tokens, into a side file, and out of the targets."""

import json
import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from fast_llm.cli import main
from fast_llm.config.batch import BatchSizes
from fast_llm.config.document import read
from fast_llm.config.train import DataConfig
from fast_llm.data import tokenizer
from fast_llm.data.columns import open_arrow
from fast_llm.data.dataset import Dataset, open_dataset
from fast_llm.data.loader import Loader
from fast_llm.data.masks import (
    NONE,
    MaskedText,
    Masks,
    masked_text,
    masked_tokens,
    masks_path,
    runs,
)
from fast_llm.data.metadata import verify
from fast_llm.data.prepare import prepare
from fast_llm.data.reading import Reader, SkippedDocument
from fast_llm.errors import ConfigError, DataError
from fast_llm.planning.preflight import preflight
from fast_llm.planning.report import describe_run
from tests.data import synthetic
from tests.data.preparing import configure, content, everything
from tests.data.test_fim import PREFIX, with_tokens
from tests.helpers import slow, spawn
from tests.training.runs import MODEL, records, run, run_all, write_tokens

SPANS = {"dataset__loss_masking_spans": "spans"}


def rows(count: int = 400) -> list[dict[str, Any]]:
    """Documents with prompts that are masked; some without, and some with wrong spans."""
    draw, found = random.Random(0), []
    for number in range(count):
        text = f"{number}: {synthetic.text(number % 37, draw.randrange(3, 120))} ß é 漢字 🙂"
        edges = sorted(draw.sample(range(len(text)), 2 * draw.randrange(1, 4)))
        spans: Any = [[a, b] for a, b in zip(edges[::2], edges[1::2], strict=True)]
        if number % 7 == 0:
            spans = [None, []][number % 2]
        found.append({"text": text, "spans": spans})
    found[50]["spans"] = [[0, 10**6]]
    found[51]["spans"] = [[5, 4]]
    found[52]["spans"] = "0-3"
    del found[53]["spans"]
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("masks") / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path


@pytest.fixture(scope="module")
def prepared(source: Path, model: Path) -> Path:
    """The dataset.json, written by one process."""
    return prepare(configure(source.parent / "data", source, model, **SPANS))


def expected(model: Path) -> list[tuple[list[int], list[bool]]]:
    """The tokens of each document, and whether each is masked: character by character."""
    plain = tokenizer.load(str(model)).tokenizer
    plain.encode_special_tokens = True
    found = []
    for number, row in enumerate(rows()):
        if number in (50, 51, 52):
            continue
        encoding = plain.encode(row["text"], add_special_tokens=False)
        hidden = {c for a, b in row.get("spans") or () for c in range(a, b + 1)}
        masked = [any(c in hidden for c in range(*offsets)) for offsets in encoding.offsets]
        found.append(([0, *encoding.ids, 1], [False, *masked, False]))
    return found


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (None, []),
        ([], []),
        ([[0, 0], [2, 4]], [[0, 1], [2, 5]]),
        ([[0, 5]], None),
        ([[-1, 2]], None),
        ([[3, 2]], None),
        ([1, 2], None),
        ([[0], [4]], None),
        ([[0, 1, 2, 3]], None),
        ([[1, 2], [3]], None),
        ([[0.0, 1.0]], None),
        ([[True, True]], None),
        ("12", None),
        ({"begin": 1}, None),
        (7, None),
    ],
)
def test_spans_of_characters(given: Any, wanted: list[list[int]] | None) -> None:
    found = masked_text("abcde", given)
    if wanted is None:
        assert found is None
    else:
        assert isinstance(found, MaskedText) and found == "abcde"
        assert found.spans.T.tolist() == wanted


def test_a_token_with_a_masked_character_is_masked() -> None:
    offsets = [(0, 2), (2, 4), (4, 4), (4, 7), (7, 8)]
    assert masked_tokens(np.array([[3], [5]]), offsets).T.tolist() == [[1, 2], [3, 4]]
    assert masked_tokens(np.array([[0, 2], [3, 8]]), offsets).T.tolist() == [[0, 2], [3, 5]]
    assert masked_tokens(NONE, offsets).shape == (2, 0)
    assert masked_tokens(np.array([[0], [1]]), []).shape == (2, 0)


def test_spaces_that_offsets_leave_out_are_masked() -> None:
    """ByteLevel with trim_offsets: " h" is one token, whose offsets are those of "h"."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {piece: number for number, piece in enumerate([*sorted(letters), "Ġh"])}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, [("Ġ", "h")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    encoding = made.encode("a hi é")
    assert encoding.tokens == ["a", "Ġh", "i", "Ġ", "Ã", "©"]
    assert encoding.offsets[1] == (2, 3)
    assert masked_tokens(np.array([[1], [2]]), encoding.offsets).T.tolist() == [[1, 2]]
    assert masked_tokens(np.array([[0], [1]]), encoding.offsets).T.tolist() == [[0, 1]]
    assert masked_tokens(np.array([[5], [6]]), encoding.offsets).T.tolist()[0][1] == 6


def test_tokens_and_masks(prepared: Path, model: Path) -> None:
    (entry,) = content(prepared)["datasets"]
    prefix = prepared.parent / entry["prefix"]
    wanted = expected(model)
    flat = np.array([token for tokens, _ in wanted for token in tokens])
    masked = np.array([no for _, hidden in wanted for no in hidden])
    assert entry["num_masked_tokens"] == masked.sum() > 1000
    assert content(prepared)["skipped"] == {"wrong_spans": 3}
    masks = Masks(prefix, len(flat))
    assert np.array_equal(masks.spans, runs(masked))
    for begin in range(0, len(flat) - 50, 37):
        inside = np.flatnonzero(masked[begin : begin + 50])
        assert np.array_equal(masks.within(begin, begin + 50), inside)
        assert masks.count(np.array([begin]), np.array([begin + 50])) == len(inside)
    assert verify(prepared) > 0


def test_tokens_are_those_without_masks(
    prepared: Path, source: Path, model: Path, tmp_path: Path
) -> None:
    right = tmp_path / "right.jsonl"
    lines = [
        line for at, line in enumerate(source.read_text().splitlines()) if at not in (50, 51, 52)
    ]
    right.write_text("\n".join(lines) + "\n")
    plain = prepare(configure(tmp_path / "plain", right, model))
    for suffix in (".bin", ".idx"):
        one, other = (each.with_suffix("") / f"shard_0_0{suffix}" for each in (prepared, plain))
        assert one.read_bytes() == other.read_bytes()
    assert not list((tmp_path / "plain").glob("*.masks.npy"))
    assert "num_masked_tokens" not in plain.read_text() and "masking" not in plain.read_text()


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenize_workers": 2},
        {"distributed__world_size": 1, "dataset__deduplicate": True},
    ],
)
def test_the_same_bytes_however_it_is_prepared(
    prepared: Path, source: Path, model: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    other = prepare(configure(tmp_path / "data", source, model, **SPANS, **changes))
    for name, data in everything(prepared.with_suffix("")).items():
        if name.endswith((".bin", ".idx", ".npy")):
            assert (other.with_suffix("") / name).read_bytes() == data, name


@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved"])
def test_columns_give_the_bytes_of_json_lines(
    source: Path, model: Path, tmp_path: Path, kind: str
) -> None:
    """Of several row groups, over units of work, in two processes; one file has no such column."""
    typed = [row for number, row in enumerate(rows()) if number != 52]
    more = {"text": [f"{number} without a prompt" for number in range(9)]}
    lines = tmp_path / "rows.jsonl"
    every = [*typed, *({"text": text} for text in more["text"])]
    lines.write_text("".join(json.dumps(row) + "\n" for row in every))
    columns = {name: [row.get(name) for row in typed] for name in ("spans", "text")}
    table, path = pyarrow.table(columns), tmp_path / kind
    if kind == "saved":
        joined = pyarrow.concat_tables([table, pyarrow.table(more)], promote_options="default")
        datasets.Dataset(joined).save_to_disk(str(path))
    elif kind == "parquet":
        path.mkdir()
        pyarrow.parquet.write_table(table, path / "0.parquet", row_group_size=37)
        pyarrow.parquet.write_table(pyarrow.table(more), path / "1.parquet")
    else:
        path.mkdir()
        for number, part in enumerate((table, pyarrow.table(more))):
            with pyarrow.ipc.new_file(path / f"{number}.arrow", part.schema) as file:
                file.write_table(part, max_chunksize=37)
    wanted = prepare(configure(tmp_path / "wanted", lines, model, **SPANS))
    assert content(wanted)["skipped"] == {"wrong_spans": 2}
    more_settings: list[dict[str, Any]] = [{"tokenize_workers": 2}, {"dataset__deduplicate": True}]
    for number, changes in enumerate(more_settings):
        found = prepare(configure(tmp_path / f"{number}", path, model, **SPANS, **changes))
        assert content(found)["skipped"] == {"wrong_spans": 2}
        for suffix in (".bin", ".idx", ".masks.npy"):
            one, other = (each.with_suffix("") / f"shard_0_0{suffix}" for each in (found, wanted))
            assert one.read_bytes() == other.read_bytes(), suffix


def test_any_rows_of_a_column_have_their_own_spans(tmp_path: Path) -> None:
    """In tasks of few rows, from the middle of a row group to the middle of another."""
    typed = [row for number, row in enumerate(rows()) if number != 52]
    columns = {name: [row.get(name) for row in typed] for name in ("text", "spans")}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet", row_group_size=37)
    table = open_arrow(str(tmp_path / "a.parquet"), "text", True, "spans")
    reader = Reader("text", 2**20, masks="spans")
    for first, last in ((0, len(typed)), (5, 91), (40, 41)):
        tasks = list(table.tasks(first, last, 0, 2000))
        found = [text for task in tasks for text in reader.texts(task)]
        assert len(tasks) >= (last - first) // 20
        for text, row in zip(found, typed[first:last], strict=True):
            expected = masked_text(row["text"], row.get("spans"))
            if expected is None:
                assert text == SkippedDocument("wrong_spans")
            else:
                assert isinstance(text, MaskedText) and text == expected
                assert np.array_equal(text.spans, expected.spans)


@pytest.mark.parametrize(
    ("spans", "problem"),
    [
        (
            [[{"begin": 0, "end": 1}]],
            "holds list<item: struct<begin: int64, end: int64>> in column",
        ),
        ([[[0.0, 1.0]]], "holds list<item: list<item: double>> in column"),
        (["[[0, 1]]"], "holds string in column"),
        ([[0, 1]], "holds list<item: int64> in column"),
        ([[[[0, 1]]]], "holds list<item: list<item: list<item: int64>>> in column"),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_columns_that_hold_no_spans(
    model: Path, tmp_path: Path, kind: str, spans: Any, problem: str
) -> None:
    table, path = pyarrow.table({"text": ["a text"], "spans": spans}), tmp_path / "data"
    if kind == "saved":
        datasets.Dataset(table).save_to_disk(str(path))
    else:
        path.mkdir()
        pyarrow.parquet.write_table(table, path / "0.parquet")
    where = path if kind == "saved" else path / "0.parquet"
    with pytest.raises(DataError) as error:
        prepare(configure(tmp_path / "out", path, model, **SPANS))
    said = str(error.value).replace("element:", "item:")
    assert said == (
        f"dataset.loss_masking_spans: {where} {problem} spans, must be a list of [begin, end], both"
        " integers, for each document"
    )
    with pytest.raises(DataError) as error:
        prepare(configure(tmp_path / "out", path, model, dataset__loss_masking_spans="masks"))
    assert str(error.value) == (
        f"dataset.loss_masking_spans: {where} has no column masks; it has text, spans"
    )


@slow
def test_several_token_files_and_duplicates(source: Path, model: Path, tmp_path: Path) -> None:
    """Token files of 100,000 tokens, with copies of documents left out, by one process and in
    units.
    """
    twice = tmp_path / "twice.jsonl"
    lines = source.read_text().splitlines()
    more = [
        json.dumps({"text": f"{copy} {row['text']}", "spans": row.get("spans")})
        for copy in range(8)
        for row in map(json.loads, lines)
        if isinstance(row.get("spans"), list) and row["spans"] != [[0, 10**6]]
    ]
    random.Random(1).shuffle(more)
    twice.write_text("\n".join([*more, *more[:50]]) + "\n")
    units = prepare(configure(tmp_path / "units", twice, model, **SPANS, dataset__deduplicate=True))
    once = tmp_path / "once.jsonl"
    once.write_text("\n".join(more) + "\n")
    alone = prepare(configure(tmp_path / "alone", once, model, **SPANS))
    names = [path.name for path in sorted((tmp_path / "alone").glob("*.masks.npy"))]
    assert len(names) > 1
    for name in names:
        one, other = (each.with_suffix("") / name for each in (units, alone))
        assert one.read_bytes() == other.read_bytes(), name


def dataset(prepared: Path, length: int, seed: int = 1, **changes: Any) -> Dataset:
    config = DataConfig(format="file", path=[str(prepared)], split=[1, 0, 0], **changes)
    return open_dataset(config, length, seed, 1000)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize("isolate", [True, False])
def test_labels_equal_a_plain_loop(
    prepared: Path, model: Path, packing: str, isolate: bool
) -> None:
    """Every target that the data masks is ignored, no other one, and targets are counted."""
    data, length = dataset(prepared, 33, packing=packing), 33
    plain = dataset(prepared, 33, packing=packing, use_loss_masking_spans=False)
    documents = expected(model)

    def batches(of: Dataset) -> list[Any]:
        sizes = BatchSizes(8, 8, 1)
        with Loader(
            of, "training", sizes, rank=0, processes=1, vocab_size=1000, first_sample=0, steps=40,
            isolate=isolate, workers=0, prefetch=1,
        ) as loader:  # fmt: skip
            return [batch for step in loader for batch in step]

    changed = 0
    for number, (batch, whole) in enumerate(zip(batches(data), batches(plain), strict=True)):
        assert torch.equal(batch.tokens, whole.tokens)
        wanted = whole.labels.clone()
        for row in range(8):
            at = 0
            for span in data.locate("training", number * 8 + row):
                hidden = documents[span.document][1][span.begin : span.begin + span.tokens]
                for position, masked in enumerate(hidden, at):
                    if masked and 0 < position <= length:
                        changed += wanted[row, position - 1].item() != -100
                        wanted[row, position - 1] = -100
                at += span.tokens
        assert torch.equal(batch.labels, wanted)
        assert batch.targets == (wanted != -100).sum()
    assert changed > 1000


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_inspected_sequences_show_the_masks(
    prepared: Path, model: Path, packing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every masked token is marked, also the first of a sequence; `masked` has what the loader
    ignores; and padding is not called a document.
    """
    length, documents = 60, expected(model)
    settings = [f"data.packing={packing}", "data.split=[1,0,0]", "batch.batch_size=32"]
    command = ["inspect", str(prepared), "--sequence-length", str(length), *settings]
    data, firsts, padded = dataset(prepared, length, 1234, packing=packing), 0, 0
    sizes = BatchSizes(32, 32, 1)
    with Loader(
        data, "training", sizes, rank=0, processes=1, vocab_size=1000, first_sample=0, steps=2,
        isolate=True, workers=0, prefetch=1,
    ) as loader:  # fmt: skip
        labels = [batch.labels for step in loader for batch in step]
    isolate = "batch.cross_document_attention=no"
    for step in (1, 2):
        assert main([*command, isolate, "--step", str(step), "--json"]) == 0
        sequences = json.loads(capsys.readouterr().out)["sequences"]
        for row, sequence in enumerate(sequences):
            ignored = torch.nonzero(labels[step - 1][row] == -100).flatten().tolist()
            assert sequence["masked"] == ignored
            for part in sequence["documents"]:
                begin = part["first_token"]
                hidden = documents[part["document"]][1][begin : begin + part["tokens"]]
                assert part["masked_tokens"] == np.flatnonzero(hidden).tolist()
                firsts += part["position"] == 0 and bool(hidden[0])
            if sequence["padding"]:
                padded += 1
                assert sequence["documents"][-1]["without_loss"] == "padding follows"
    assert firsts
    assert bool(padded) == (packing == "best_fit")
    assert main([*command, isolate, "--step", "1"]) == 0
    assert ("no loss here: padding follows" in capsys.readouterr().out) == bool(padded)


def test_masks_belong_to_the_identity_of_the_data(prepared: Path) -> None:
    data, plain = dataset(prepared, 33), dataset(prepared, 33, use_loss_masking_spans=False)
    assert data.fingerprint() != plain.fingerprint()
    (source,) = data.masked_sources
    assert source.masked_tokens == content(prepared)["datasets"][0]["num_masked_tokens"]
    assert not plain.masked_sources
    # The order of data is the same, so a run that changes it by consent repeats nothing.
    digests = [each.splits["training"].sources[0].digest for each in (data, plain)]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("masks", ["yes", "no"])
def test_why_finds_the_data_of_a_run(
    prepared: Path, tmp_path: Path, masks: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also after a change of `use_loss_masking_spans`, which begins no order of data."""
    folder = tmp_path / "run"
    given = [
        *MODEL,
        "model.base_model.vocab_size=1000",
        f"data.path={prepared}",
        "data.split=[1,0,0]",
        "batch.sequence_length=32",
        "batch.batch_size=4",
        "training.checkpoint.interval=1",
        f"run.experiment_dir={folder}",
    ]
    other = {"yes": "no", "no": "yes"}[masks]
    first = f"data.use_loss_masking_spans={masks}"
    assert run([*given, first, "training.train_iters=1"]) == 0
    assert main(["why", str(folder), "1"]) == 0
    consent = "run.accept_changes=[data.path]"
    changed = [f"data.use_loss_masking_spans={other}", consent, "training.train_iters=2"]
    assert run([*given, *changed]) == 0
    assert main(["why", str(folder), "2"]) == 0
    info = json.loads((folder / "checkpoint/2/fast_llm_manifest.json").read_text())["info"]
    assert len(info["history"]["orders"]) == 1


def test_the_plan_has_the_masked_share_of_what_is_read(prepared: Path, tmp_path: Path) -> None:
    write_tokens(tmp_path / "plain")
    given = [
        *MODEL,
        "model.base_model.vocab_size=1000",
        "data.format=mixture",
        f"data.sources={{chats: {prepared}, plain: {tmp_path}/plain}}",
        "data.split=[1,0,0]",
        "batch.sequence_length=32",
        "batch.batch_size=4",
        "training.train_iters=4",
    ]
    stages = "data.stages=[{until: 3, weights: {plain: 1}}, {weights: {chats: 1}}]"
    spec = preflight(read(None, [*given, stages]), 1, weights=True)
    (chats,) = spec.dataset.masked_sources
    share = chats.masked_tokens / chats.tokens
    assert share > 0.1
    shown = " ".join(describe_run(spec).split())
    assert f"training tokens are no targets, {share / 4:.1%} of what the run reads" in shown


def test_a_mixture_masks_and_rearranges_by_source(
    prepared: Path, model: Path, tmp_path: Path
) -> None:
    """Masks apply to the source that has them, fill-in-the-middle to the other one."""
    folder = with_tokens(tmp_path / "model")
    given = [
        *MODEL,
        "model.base_model.vocab_size=1000",
        "data.format=mixture",
        f"data.sources={{chats: {prepared}, plain: {plain_data(model, tmp_path)}}}",
        "data.stages=[{until: 3, weights: {plain: 1}}, {weights: {chats: 1, plain: 1}}]",
        "data.split=[1,0,0]",
        "data.fim.rate=1",
        f"data.tokenizer.path={folder}",
        "batch.sequence_length=48",
        "batch.batch_size=4",
        "training.train_iters=6",
        "training.logs.interval=1",
        f"run.experiment_dir={tmp_path / 'run'}",
    ]
    spec = preflight(read(None, given), 1, weights=True)
    shown = " ".join(describe_run(spec).split())
    assert "of what the run reads; data.fim leaves chats as it is" in shown
    assert run(given) == 0
    data, found = spec.dataset, records(tmp_path / "run")
    for step in range(1, 7):
        packed = [data.read("training", index) for index in range(step * 4 - 4, step * 4)]
        masked = [sequence for sequence in packed if sequence.source == 0]
        assert len(masked) == (0 if step < 4 else 2)
        for sequence in packed:
            assert sequence.source == 0 or not len(sequence.masked)
            assert (PREFIX in sequence.tokens) == bool(sequence.fim[1]) == (sequence.source == 1)
        assert found[step]["fim_documents"] == sum(one.fim[0] for one in packed)
        # Isolated documents end without a target, so that the sum counts masks alone too.
        hidden = sum(len(set(one.masked) | set(one.ends)) for one in masked)
        if masked:
            assert hidden > sum(len(one.ends) for one in masked)
            (chats, _) = found[step]["sources"].values()
            assert chats["target_tokens"] == 48 * len(masked) - hidden


def plain_data(model: Path, folder: Path) -> Path:
    """Documents without masks."""
    path = folder / "plain.jsonl"
    path.write_text("".join(json.dumps({"text": synthetic.text(n, 30)}) + "\n" for n in range(200)))
    return prepare(configure(folder / "plain", path, model))


def test_mistakes(prepared: Path, source: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        prepare(configure(tmp_path / "a", source, model, dataset__loss_masking_spans="masks"))
    assert str(error.value) == (
        "dataset.loss_masking_spans: no document has spans in column masks; give the right column,"
        f" or leave it out, and delete {tmp_path / 'a'}"
    )
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("text")
    with pytest.raises(DataError) as error:
        prepare(configure(tmp_path / "b", tmp_path / "text", model, **SPANS))
    assert str(error.value) == (
        f"dataset.loss_masking_spans: given spans, but {tmp_path / 'text'} has files of text, which"
        " have no columns; write its documents to JSON Lines or parquet, with columns text and"
        " spans"
    )
    with pytest.raises(DataError, match=r"was started with dataset.loss_masking_spans \"spans\""):
        prepare(configure(prepared.with_suffix(""), source, model))
    given = [
        *MODEL,
        "model.base_model.vocab_size=1000",
        "data.format=file",
        f"data.path={prepared}",
        "data.split=[1,0,0]",
        "data.fim.rate=0.5",
        f"data.tokenizer.path={model}",
        "training.train_iters=1",
        "batch.sequence_length=32",
    ]
    with pytest.raises(ConfigError) as found:
        preflight(read(None, given), 1, True)
    assert found.value.problems == [
        "override data.fim.rate=0.5: data.fim: rearranges documents, but tokens of"
        f" {prepared} are masked; train without data.fim, or on all tokens with"
        " data.use_loss_masking_spans: no"
    ]


def test_inspect_refuses_what_training_refuses(
    prepared: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.yaml").write_text("training: {train_iters: 1}\n")
    given = ["data.fim.rate=1", f"data.path={prepared}", f"data.tokenizer.path={model}"]
    settings = [*given, "batch.sequence_length=16", "data.split=[1]"]
    assert main(["inspect", "--config", f"{tmp_path}/train.yaml", *settings]) == 2
    assert "data.fim: rearranges documents, but tokens of" in capsys.readouterr().err


def test_a_damaged_file(prepared: Path, tmp_path: Path) -> None:
    prefix = prepared.with_suffix("") / "shard_0_0"
    path, tokens = masks_path(prefix), content(prepared)["num_tokens"]
    kept = path.read_bytes()
    try:
        for wrong in ([[5, 3], [9, 4]], [[0], [10**9]], [[3], [3]]):
            np.save(path, np.array(wrong, np.int64))
            with pytest.raises(DataError, match=f"{path}: does not hold ascending spans of the"):
                Masks(prefix, tokens)
            with pytest.raises(DataError, match=r"sha256 differs"):
                verify(prepared)
        path.unlink()
        with pytest.raises(DataError, match=f"{path}: cannot be read, but tokens of"):
            dataset(prepared, 33)
    finally:
        path.write_bytes(kept)


@slow
def test_runs_with_masks(prepared: Path, model: Path, tmp_path: Path) -> None:
    """Loss and target tokens of a step: of transformers with the labels of the plain loop, of one
    process, and of layouts that cut sequences, layers and packed documents.
    """
    shape = [f"model.base_model.{name}" for name in ("vocab_size=1000", "tie_word_embeddings=yes")]
    given = [
        *MODEL,
        *shape,
        "data.format=file",
        f"data.path={prepared}",
        "data.split=[1,0,0]",
        f"data.tokenizer.path={model}",
        "batch.sequence_length=32",
        "batch.batch_size=8",
        "batch.micro_batch_size=2",
        "batch.cross_document_attention=yes",  # a condition of the plain loop
        "training.train_iters=3",
        "training.logs.interval=1",
        "optimizer.learning_rate.base=0",
    ]
    start = tmp_path / "start"
    made = ["training.train_iters=0", "training.export.interval=1", f"run.experiment_dir={start}"]
    assert spawn(1, run_all, [[*given, *made]]) == [[0]]
    export = start / "export" / "llama" / "0"
    given.append(f"pretrained.path={export}")
    layouts = {
        "1": [],
        "2 context": ["model.distributed.sequence_data_parallel=2"],
        "2 stages": ["model.distributed.pipeline_parallel=2"],
        "2 zero": ["model.multi_stage.zero_stage=2"],
    }
    for name, lines in layouts.items():
        further = [*given, *lines, f"run.experiment_dir={tmp_path / name}"]
        world = int(name[0])
        assert spawn(world, run_all, [further]) == [[0]] * world
    network = LlamaForCausalLM.from_pretrained(export, dtype=torch.float32)
    data, documents = dataset(prepared, 32, seed=1234), expected(model)
    found = {name: records(tmp_path / name) for name in layouts}
    for step in range(3):
        losses: list[torch.Tensor] = []
        for index in range(step * 8, step * 8 + 8):
            tokens, hidden = torch.from_numpy(data.read("training", index).tokens), list[bool]()
            for span in data.locate("training", index):
                hidden += documents[span.document][1][span.begin : span.begin + span.tokens]
            with torch.no_grad():
                each = cross_entropy(
                    network(tokens[None, :-1]).logits[0], tokens[1:], reduction="none"
                )
            losses += [loss for loss, no in zip(each, hidden[1:], strict=True) if not no]
        for name in layouts:
            record = found[name][step + 1]
            assert record["target_tokens"] == len(losses) < 8 * 32
            mean = torch.stack(losses).mean().item()
            assert record["language_model_loss"] == pytest.approx(mean, rel=1e-5), (name, step)
