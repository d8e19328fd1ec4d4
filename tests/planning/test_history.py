"""Runs whose settings change by consent, and runs of version 0.1.

No token of an epoch is repeated or skipped.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fast_llm.cli import main
from fast_llm.config.batch import BatchSizes
from fast_llm.config.document import read
from fast_llm.config.train import BatchConfig, DataConfig, TrainConfig
from fast_llm.data.dataset import Dataset, open_dataset
from fast_llm.data.loader import Loader
from fast_llm.data.sampling import SourceSampler, keys, permute, permute_many
from fast_llm.data.source import Source
from fast_llm.data.tokenfile import TokenFileWriter
from fast_llm.errors import DataError
from fast_llm.model.loss import IGNORE_INDEX
from fast_llm.planning import history as histories
from fast_llm.planning.history import (
    BatchSizeEntry,
    DataOrder,
    History,
    SourceState,
    _logged_batch_sizes,
)
from fast_llm.planning.preflight import preflight
from fast_llm.training.audit import inspect_step
from fast_llm.training.job import train
from tests.helpers import slow
from tests.training.runs import losses, records, run

OLD = Path(__file__).parents[1] / "fixtures" / "v0.1"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a run of version 0.1, as the working directory, since its paths are relative."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def read_by(run_folder: str, steps: Sequence[int]) -> list[dict[str, Any]]:
    """The tokens that steps read, as in the fixtures' expected.json."""
    return [
        {
            "step": step,
            "index": sequence["index"],
            "source": sequence["source"],
            "documents": [
                [d["file"], d["document"], d["first_token"], d["tokens"]]
                for d in sequence["documents"]
            ],
        }
        for step in steps
        for sequence in inspect_step(run_folder, step).sequences
    ]


def test_a_run_of_version_0_1_continues_as_it_would_have(old: Path) -> None:
    expected = json.loads((old / "expected.json").read_text())
    assert read_by("run", range(1, 21)) == expected["order"]  # before this version writes anything
    given = ["training.shutdown.interval=null"]
    assert train(preflight(read("run/config.yaml", given), 1, weights=True)) == 0
    assert read_by("run", range(1, 21)) == expected["order"]
    for phase in ("training", "validation"):
        then = {int(step): loss for step, loss in expected["losses"][phase].items()}
        # fp32: another processor sums in another order, 6e-8 an addition; twenty updates of Adam
        # magnify it.
        assert losses(old / "run", phase) == pytest.approx(then, rel=1e-4), phase
    assert records(old / "run")[20]["consumed_samples"] == 80
    assert records(old / "run")[20]["consumed_tokens"] == 80 * 16


def test_files_of_version_0_1_are_read(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "run", "changed", "a.json", "b.json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert main(["convert", "gpt", "input.path=run/checkpoint/11", "output.path=again"]) == 0
    for path in (old / "run" / "export" / "llama" / "11").glob("*.safetensors"):
        settings_ = [f"output.data_type={dtype}" for dtype in ("bf16",)]
        assert (
            main(["convert", "input.path=run/checkpoint/11", "output.path=bf16", *settings_]) == 0
        )
        assert (old / "bf16" / path.name).read_bytes() == path.read_bytes()


def test_a_batch_size_that_version_0_1_changed(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its checkpoint does not say when the batch size changed; metrics.jsonl does."""
    expected = json.loads((old / "expected.json").read_text())["order of changed"]
    assert read_by("changed", range(1, 8)) == expected
    assert main(["why", "changed", "2", "--json"]) == 0
    out, error = capsys.readouterr()
    assert json.loads(out)["step"] == 2 and "version 0.1 did not record changes of data" in error
    (old / "changed" / "metrics.jsonl").unlink()
    assert read_by("changed", [6, 7]) == [one for one in expected if one["step"] > 5]
    with pytest.raises(DataError, match=r"step 5: the batch size changed .* known from step 6 on"):
        inspect_step("changed", 5)


@pytest.mark.parametrize("every", [1, 2, 3, 5])
@pytest.mark.parametrize("change", [0, 1, 4, 7, 9])
def test_when_a_batch_size_changed(every: int, change: int) -> None:
    """With any logging interval, and with data skipped before and after."""
    skipped_ranges = [
        {"after": 2, "spike": 3, "sequences": 6},
        {"after": 8, "spike": 9, "sequences": 10},
    ]
    sizes = [6 if step <= change else 5 for step in range(1, 11)]
    ends = np.cumsum(sizes) + [
        sum(one["sequences"] for one in skipped_ranges if one["after"] < step)
        for step in range(1, 11)
    ]
    logged = [
        {
            "phase": "training",
            "step": s,
            "batch_size": sizes[s - 1],
            "consumed_samples": int(ends[s - 1]),
        }
        for s in range(every, 11, every)
    ]
    info = {
        "step": 10,
        "samples": int(ends[-1]),
        "identity": {"batch.batch_size": 5},
        "passed_over": skipped_ranges,
    }
    found = History.model_construct(batches=_logged_batch_sizes(info, logged), orders=[])
    for step in range(1, 11):
        if step > found.batches[0].after:
            assert found.first_sequence(step, skipped_ranges) == ends[step - 1] - sizes[step - 1]
    # A change before the first record cannot be found.
    assert found.batches[0].after == 0 or 0 < change < every


def numbered(prefix: Path, lengths: Sequence[int], start: int) -> str:
    """A file with the tokens start, start + 1 and so on."""
    writer = TokenFileWriter(prefix, np.dtype("int32"))
    edges = np.cumsum([0, *lengths])
    for a, b in pairwise(edges):
        writer.append(np.arange(start + a, start + b))
    writer.close()
    return str(prefix)


SETTINGS = st.fixed_dictionaries(
    {
        "length": st.sampled_from([1, 2, 3, 4, 6, 7, 12]),
        "seed": st.sampled_from([0, 0, 0, 1]),
        "weights": st.lists(st.sampled_from([0, 0.02, 0.3, 1, 2]), min_size=3, max_size=3),
        "swap": st.booleans(),
        "steps": st.integers(0, 9),
        "batch": st.integers(1, 9),
    }
)


ANY_HISTORY = given(
    documents=st.lists(
        st.lists(st.integers(0, 9), min_size=4, max_size=20), min_size=3, max_size=3
    ),
    changes=st.lists(SETTINGS, min_size=1, max_size=6),
)


def each_target_once_an_epoch(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    changes: list[dict[str, Any]],
) -> None:
    """Tokens are consecutive numbers, so that each input's right target is the next number."""
    root = tmp_path_factory.mktemp("history")
    documents = [[13, *lengths] for lengths in documents]
    paths = [numbered(root / f"s{n}", lengths, 1000 * n) for n, lengths in enumerate(documents)]
    history, samples, done = None, 0, 0
    used: dict[tuple[int, int], list[int]] = defaultdict(list)  # source and epoch → targets
    length_at_begin: dict[tuple[int, int], int] = {}
    length_at_end: dict[tuple[int, int], int] = {}
    drawn: list[tuple[int, list[int]]] = []  # index and targets of each sequence
    for change in changes:
        chosen = [(w, p) for w, p in zip(change["weights"], paths, strict=True) if w] or [
            (1, paths[0])
        ]
        chosen = chosen[::-1] if change["swap"] else chosen
        config = TrainConfig(
            data=DataConfig(path=[item for pair in chosen for item in pair], split=[1]),
            batch={  # type: ignore[arg-type]
                "sequence_length": change["length"],
                "batch_size": change["batch"],
            },
            model={"distributed": {"seed": change["seed"]}},  # type: ignore[arg-type]
        )
        data = open_dataset(config.data, change["length"], change["seed"], 2**31)
        phase = data.splits["training"]
        if history is None:
            history = histories.new_history(config, change["batch"], data)
        else:
            history = History.model_validate_json(history.model_dump_json())
            history = history.with_batches(done, samples, change["batch"])
            history = history.with_data(done, samples, config, phase)
            histories.apply_orders(phase, history, samples)
        for step in range(done + 1, done + change["steps"] + 1):
            assert history.first_sequence(step, []) == samples
            for index in range(samples, samples + change["batch"]):
                source, number, epoch = phase.find(index)
                packed = source.read(number)
                assert packed.targets.tolist() == (packed.tokens[:-1] + 1).tolist()
                place = int(packed.tokens[0]) // 1000
                check_documents(packed, documents[place], 1000 * place)
                used[place, epoch] += packed.targets.tolist()
                length_at_end[place, epoch] = change["length"]
                length_at_begin.setdefault((place, epoch), change["length"])
                drawn.append((index, packed.targets.tolist()))
            samples += change["batch"]
        done += change["steps"]
    assert history is not None
    for (place, epoch), targets in used.items():
        assert len(set(targets)) == len(targets)
        total = sum(documents[place]) - 1
        if (place, epoch + 1) in used:
            # The rest that an epoch leaves out is shorter than a sequence, of the length before or
            # after the change.
            longest = max(length_at_end[place, epoch], length_at_begin[place, epoch + 1])
            assert total - len(targets) < longest
    for place, epoch in used:
        assert all((place, before) in used or sum(documents[place]) < 26 for before in range(epoch))
    check_why(history, drawn)
    assert history.inputs(samples) == sum(len(targets) for _, targets in drawn)


test_any_history_uses_each_target_once_an_epoch = settings(max_examples=50, deadline=None)(
    ANY_HISTORY(each_target_once_an_epoch)
)
test_many_histories_do = slow(
    settings(max_examples=300, deadline=None)(ANY_HISTORY(each_target_once_an_epoch))
)


def check_documents(packed: Any, lengths: Sequence[int], start: int) -> None:
    """Check attention and targets: neither crosses documents or parts of a sequence."""
    borders = set(start + np.cumsum([0, *lengths]))
    inputs = packed.tokens[:-1]
    jumps = {0} | {i for i in range(1, len(inputs)) if inputs[i] != inputs[i - 1] + 1}
    begins = {i for i in range(len(inputs)) if int(inputs[i]) in borders}
    assert {s for s in packed.starts.tolist() if s < len(inputs)} == jumps | begins
    assert packed.ends.tolist() == [
        i for i, t in enumerate(packed.targets.tolist()) if t in borders
    ]


def check_why(history: History, drawn: Sequence[tuple[int, list[int]]]) -> None:
    """Check that the history finds each sequence again afterwards."""
    from fast_llm.data.sampling import Mixture

    for index, targets in drawn:
        order = history.order_at(index)
        sources = histories.open_sources(order.data, order, 2**31)
        place, inside = Mixture(order.edges).find(index - order.index)
        state = order.sources[place]
        source = sources[state.digest]
        assert isinstance(source, Source)
        sampler = SourceSampler(
            source.inputs, order.sequence_length, order.seed, state.key, state.drawn
        )
        stream, number, _ = sampler.find(inside)
        assert source.with_stream(stream).read(number).targets.tolist() == targets


@given(st.integers(1, 2**40), st.integers(0, 2**32), st.data())
def test_many_are_permuted_as_one_is(count: int, seed: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, count - 1), max_size=20))
    cut = keys(seed, 1, 2)
    found = permute_many(np.array(values, np.uint64), count, cut)
    assert found.tolist() == [permute(value, count, cut) for value in values]


TINY = [
    "model.base_model.vocab_size=4000",
    "model.base_model.transformer.num_layers=1",
    "model.base_model.transformer.hidden_size=8",
    "model.base_model.transformer.num_attention_heads=1",
    "model.base_model.transformer.ffn_hidden_size=8",
    "batch.micro_batch_size=1",
    "data.split=[1]",
    "training.logs.interval=1",
    "training.checkpoint.interval=3",
    "run.experiment_dir=run",
]
LIFE = [  # the settings, and those of them that need consent
    (["data.path=[0.9,a,0.1,b]", "batch.batch_size=4", "batch.sequence_length=8"], ""),
    (
        ["data.path=[0.9,a,0.1,b]", "batch.batch_size=6", "batch.sequence_length=8"],
        "batch.batch_size",
    ),
    (["data.path=[0.5,a,0.5,b]", "batch.batch_size=6", "batch.sequence_length=8"], "data.path"),
    (
        ["data.path=[0.5,a,0.5,b]", "batch.batch_size=3", "batch.sequence_length=16"],
        "batch.sequence_length, batch.batch_size, data.path",
    ),
    (
        ["data.path=[1,c,2,b,2,./a]", "batch.batch_size=5", "batch.sequence_length=4"],
        "batch.sequence_length, batch.batch_size, data.path",
    ),
]


def test_a_run_with_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real runs: the data that they read, the answers of `why`, and the counts of metrics."""
    monkeypatch.chdir(tmp_path)
    starts = {"a": 0, "b": 1000, "c": 2000}
    for name, start in starts.items():
        numbered(tmp_path / name, [40, 1, 300, 0, 59], start)
    given: dict[int, list[int]] = {}
    read_one = Dataset.read

    def recorded(data: Dataset, phase: str, index: int) -> Any:
        packed = read_one(data, phase, index)
        given[index] = [*packed.tokens.tolist(), *packed.targets.tolist()]
        return packed

    monkeypatch.setattr(Dataset, "read", recorded)
    for number, (how, consent) in enumerate(LIFE):
        steps = f"training.train_iters={3 * (number + 1)}"
        assert run([*TINY, *how, steps, f"run.accept_changes=[{consent}]"]) == 0
        said = capsys.readouterr().out
        if number == 2:
            assert "skipped data: 384 tokens by the end" in said  # (3·4 + 6·6)·8
            assert "a: continues after 0.551 epochs" in said and "b: continues after" in said
        if number == 4:
            assert "c: is new" in said
    sizes = [4] * 3 + [6] * 6 + [3] * 3 + [5] * 3
    lengths = [8] * 9 + [16] * 3 + [4] * 3
    samples = np.cumsum(sizes)
    logged = records(tmp_path / "run")
    assert [logged[step]["consumed_samples"] for step in range(1, 16)] == samples.tolist()
    tokens = np.cumsum(np.array(sizes) * lengths).tolist()
    assert [logged[step]["consumed_tokens"] for step in range(1, 16)] == tokens
    assert sorted(given) == list(range(samples[-1]))
    seen = [
        token
        for index in given
        for token in given[index][lengths_of(index, samples, lengths) + 1 :]
    ]
    assert len(set(seen)) == len(seen) == tokens[-1]  # less than an epoch: each target at most once
    for step in range(1, 16):
        assert main(["why", "run", str(step), "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        first = samples[step - 1] - sizes[step - 1]
        assert answer["step"] == step
        indices = [sequence["index"] for sequence in answer["sequences"]]
        assert indices == list(range(first, samples[step - 1]))
        for sequence in answer["sequences"]:
            name = sequence["source"]
            assert name in (("c", "b", "./a") if step > 12 else ("a", "b"))
            begins = starts[name[-1]] + np.cumsum([0, 40, 1, 300, 0, 59])
            read_: list[int] = []
            for part in sequence["documents"]:
                assert part["file"] == name.removeprefix("./")
                begin = begins[part["document"]] + part["first_token"]
                read_ += range(begin, begin + part["tokens"])
            assert read_ == given[sequence["index"]][: lengths[step - 1] + 1]
    # `why` also answers for earlier steps when a later source is missing, and the other way round.
    (tmp_path / "c.bin").unlink()
    assert main(["why", "run", "9"]) == 0
    capsys.readouterr()
    assert main(["why", "run", "15", "--json"]) == 2
    out, error = capsys.readouterr()
    assert (
        out == ""
        and "is of c, whose files are missing or are not those that the run was trained on" in error
    )


def lengths_of(index: int, samples: Any, lengths: Sequence[int]) -> int:
    """The length of a sequence."""
    return lengths[int(np.searchsorted(samples, index, "right"))]


def test_a_length_that_changes_in_the_midst_of_an_epoch_reads_what_is_left(tmp_path: Path) -> None:
    """Adjacent sequences that are left become one text, from which longer ones are cut."""
    numbered(tmp_path / "a", [8 * 50 + 1], 0)
    path = str(tmp_path / "a")
    config = TrainConfig(
        data=DataConfig(path=[path], split=[1]), batch=BatchConfig(sequence_length=8, batch_size=1)
    )
    data = open_dataset(config.data, 8, 1234, 2**31)
    history = histories.new_history(config, 1, data)
    used = {token for i in range(5) for token in data.read("training", i).tokens[:-1].tolist()}
    longer = config.model_copy(
        update={"batch": config.batch.model_copy(update={"sequence_length": 40})}
    )
    data = open_dataset(config.data, 40, 1234, 2**31)
    history = history.with_data(5, 5, longer, data.splits["training"])
    histories.apply_orders(data.splits["training"], history, 5)
    left = [token for token in range(400) if token not in used]
    drawn = [data.read("training", i).tokens[:-1].tolist() for i in range(5, 14)]
    assert sorted(drawn) == [left[40 * i : 40 * i + 40] for i in range(9)]
    (epochs,) = data.epochs("training", 14)
    assert epochs[1] == 1.0
    with pytest.raises(IndexError, match="belongs to an earlier order"):
        data.read("training", 4)


def test_batch_sizes_that_changed_before_a_rewind() -> None:
    source = SourceState(name="a", digest="a", key=0)
    order = DataOrder(index=0, sequence_length=8, seed=0, data={}, edges=[0, 1], sources=[source])
    history = History(batches=[BatchSizeEntry(after=0, index=0, batch_size=8)], orders=[order])
    history = history.with_batches(6, 48, 4)  # a start with another batch size
    assert [history.first_sequence(step, []) for step in (1, 6, 7, 9)] == [0, 40, 48, 56]
    # A spike at step 8, at 56 sequences: back to the checkpoint of step 6, or where that is damaged
    # to that of step 3.
    again = history.with_batches(6, 48, 4)
    assert again == history
    passed = [{"after": 6, "spike": 8, "sequences": 8}]
    assert [again.first_sequence(step, passed) for step in (6, 7, 8)] == [40, 56, 60]
    earlier = history.with_batches(3, 24, 4)
    passed = [{"after": 3, "spike": 8, "sequences": 32}]
    assert [earlier.first_sequence(step, passed) for step in (3, 4, 5)] == [16, 56, 60]
    # A start from an earlier checkpoint with its batch size.
    assert history.with_batches(3, 24, 8).batches == [
        BatchSizeEntry(after=0, index=0, batch_size=8)
    ]


OLD_CHANGES = [
    "training.train_iters=16",
    "training.shutdown.interval=null",
    "training.export.interval=null",
]


@pytest.mark.parametrize("gone", [False, True])
def test_a_run_of_version_0_1_changes_by_consent(
    old: Path, gone: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its sources continue where they were, also if one of them was deleted."""
    how = ["data.path=[1,a.json,1,b.json]", "batch.sequence_length=8"]
    if gone:
        (old / "b.json").unlink()
        how = ["data.path=a.json"]
    consent = "run.accept_changes=[data.path, batch.sequence_length]"
    document = read("run/config.yaml", [*OLD_CHANGES, *how, consent])
    assert train(preflight(document, 1, weights=True)) == 0
    assert "a.json: continues after 0.0" in capsys.readouterr().out
    expected = json.loads((old / "expected.json").read_text())["order"]
    before = [one for one in expected if one["step"] <= 11]
    later = read_by("run", range(12, 17))
    assert [one["index"] for one in later] == list(range(44, 64))
    inputs: set[tuple[str, int, int]] = set()
    for one in [*before, *later]:
        if one["source"] != "a.json":
            continue
        mine = [(f, d, t) for f, d, first, n in one["documents"] for t in range(first, first + n)][
            :-1
        ]
        assert not inputs.intersection(mine)
        inputs |= set(mine)
    if gone:
        with pytest.raises(
            DataError, match=r"step 3: sequence \d+ is of b\.json, whose files are missing"
        ):
            inspect_step("run", 3)
    else:
        assert read_by("run", range(1, 12)) == before


def test_a_history_that_no_run_wrote() -> None:
    source = {"name": "a", "digest": "a", "key": 0}
    order = {
        "index": 0,
        "sequence_length": 8,
        "seed": 0,
        "data": {},
        "edges": [0, 1],
        "sources": [source],
    }
    batches = {"after": 0, "index": 0, "batch_size": 8}
    good = {"batches": [batches], "orders": [order]}
    History.model_validate(good)
    for bad in (
        {"batches": [], "orders": [order]},
        {"batches": [batches, batches], "orders": [order]},
        {"batches": [{**batches, "batch_size": 0}], "orders": [order]},
        {"batches": [batches], "orders": [{**order, "index": 3}]},
        {"batches": [batches], "orders": [{**order, "edges": [0, 0]}]},
        {"batches": [batches], "orders": [{**order, "edges": [0, 2, 1]}]},
        {"batches": [batches], "orders": [{**order, "sources": [], "edges": [0]}]},
        {"batches": [batches], "orders": [{**order, "sequence_length": 0}]},
    ):
        with pytest.raises(ValidationError):
            History.model_validate(bad)


@pytest.mark.parametrize("isolate", [True, False])
def test_batches_of_sequences_from_several_places(tmp_path: Path, isolate: bool) -> None:
    """Joined sequences keep their labels, get none across the joint; attention restarts."""
    path = numbered(tmp_path / "a", [7] * 60, 0)
    config = TrainConfig(
        data=DataConfig(path=[path], split=[1]), batch=BatchConfig(sequence_length=8, batch_size=4)
    )
    history = histories.new_history(config, 4, open_dataset(config.data, 8, 1234, 2**31))
    data = open_dataset(config.data, 20, 1234, 2**31)
    longer = config.model_copy(
        update={"batch": config.batch.model_copy(update={"sequence_length": 20})}
    )
    history = history.with_data(7, 28, longer, data.splits["training"])
    histories.apply_orders(data.splits["training"], history, 28)
    assert any(
        isinstance(source, Source) and len(source.input_ranges(n)) > 1
        for source, n, _ in map(data.splits["training"].find, range(28, 36))
    )
    loader = Loader(
        data,
        "training",
        BatchSizes(4, 4, 1),
        rank=0,
        processes=1,
        vocab_size=420,
        first_sample=28,
        steps=2,
        isolate=isolate,
        workers=0,
        prefetch=1,
    )
    for (batch,) in loader:
        tokens, labels, positions = (
            x.numpy() for x in (batch.tokens, batch.labels, batch.positions)
        )
        kept = labels != IGNORE_INDEX
        assert batch.targets == kept.sum()
        assert (labels[kept] == tokens[kept] + 1).all()
        assert (
            kept == (((tokens + 1) % 7 != 0) | (not isolate))
        ).all()  # all but the last token of each document
        if isolate:
            begins = (tokens[:, 1:] != tokens[:, :-1] + 1) | (tokens[:, 1:] % 7 == 0)
            assert (positions[:, 1:] == np.where(begins, 0, positions[:, :-1] + 1)).all()
    loader.vocab_size = 300
    with pytest.raises(DataError, match=r"vocab_size is 300"):
        list(loader)
