"""Fill-in-the-middle: equal to its definition, of constant length, and the same on every layout."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fast_llm import cli
from fast_llm.config.batch import BatchSizes
from fast_llm.config.train import DataConfig, FimConfig
from fast_llm.data.dataset import Dataset, open_dataset
from fast_llm.data.fim import FIM_COUNTS, Fim, FimCounts, make_fim
from fast_llm.data.loader import Loader
from fast_llm.data.prepare import prepare
from fast_llm.data.source import PackedSample
from fast_llm.data.tokenizer import Loaded, load
from fast_llm.errors import ConfigError
from fast_llm.model.loss import IGNORE_INDEX
from tests.data import synthetic
from tests.data.preparing import configure, read
from tests.data.test_tokenizer import rewrite
from tests.data.test_tokenizer_formats import trained
from tests.helpers import slow, spawn
from tests.training.runs import MODEL, records, run

TOKENS = ["<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<file_sep>"]
PREFIX, MIDDLE, SUFFIX, PAD, SPLIT = range(320, 325)
LENGTH, SEED, VOCABULARY = 60, 7, 325
Encode = Callable[[str], list[int]]


def with_tokens(folder: Path) -> Path:
    """A tokenizer like Llama 3's with the tokens of FIM, which are special."""
    synthetic.llama(folder)
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    added += [{**added[1], "id": PREFIX + n, "content": token} for n, token in enumerate(TOKENS)]
    rewrite(folder, added_tokens=added)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokens(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(model: Path) -> Loaded:
    return load(str(model))


@pytest.fixture(scope="module")
def data(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "texts").mkdir()
    for number in range(40):
        (folder / "texts" / f"{number:02}.txt").write_text(synthetic.text(number, 5 + 3 * number))
    return prepare(configure(folder / "out", folder / "texts", model))


def opened(data: Path, loaded: Loaded | None = None, **settings: Any) -> Dataset:
    dataset = open_dataset(DataConfig(path=[str(data)], split=[8, 2]), LENGTH, SEED, VOCABULARY)
    if loaded is not None:
        dataset.fim = make_fim(FimConfig(**settings), loaded, SEED, VOCABULARY)
    return dataset


def fim(loaded: Loaded, **settings: Any) -> Fim:
    return make_fim(FimConfig(**settings), loaded, SEED, VOCABULARY)


def definition(
    tokens: list[int],
    draw: np.random.RandomState,
    rate: float,
    settings: dict[str, Any],
    encode: Encode,
    decode: Callable[[list[int]], str],
) -> list[int]:
    """A document without BOS and EOS, by Fast-LLM 0.2's order of draws; written independently."""
    if draw.binomial(1, rate) == 0:
        return tokens
    text = decode(tokens)
    if settings.get("ignore_prefix") and text.startswith(settings["ignore_prefix"]):
        return tokens
    if longest := settings.get("max_middle_len"):
        size = draw.randint(low=0, high=min(longest, len(text)) + 1)
        cut = draw.randint(low=0, high=len(text) - size + 1)
        cuts = [cut, cut + size]
    else:
        cuts = sorted(draw.randint(low=0, high=len(text) + 1, size=2).tolist())
    p, m, s = encode(text[: cuts[0]]), encode(text[cuts[0] : cuts[1]]), encode(text[cuts[1] :])
    if settings.get("truncate_or_pad"):
        room = len(tokens) - 3 - len(p) - len(m)
        if room < len(s) and room <= 0:
            return tokens
        s = (s + [PAD] * max(0, room - len(s)))[:room]
    if draw.binomial(1, settings.get("spm_rate", 0.5)):
        return [PREFIX, SUFFIX, *s, MIDDLE, *p, *m]
    return [PREFIX, *p, SUFFIX, *s, MIDDLE, *m]


@pytest.mark.parametrize(
    "settings",
    [
        {"rate": 1.0},
        {"rate": 0.5, "spm_rate": 0.9},
        {"rate": 1.0, "spm_rate": 0.0, "max_middle_len": 5},
        {"rate": 1.0, "truncate_or_pad": True},
        {"rate": 1.0, "truncate_or_pad": True, "max_middle_len": 3},
        {"rate": 0.7, "ignore_prefix": "def"},
    ],
    ids=str,
)
def test_documents_equal_the_definition(
    loaded: Loaded, data: Path, settings: dict[str, Any]
) -> None:
    made = fim(loaded, **settings)
    plain = load(str(loaded.path.parent)).tokenizer
    plain.encode_special_tokens = True
    changed = 0
    for number, document in enumerate(read(data)):
        found = made.document(np.array(document), np.random.RandomState(number)).tolist()
        text = definition(
            document[1:-1],
            np.random.RandomState(number),
            settings["rate"],
            settings,
            lambda text: plain.encode(text, add_special_tokens=False).ids,
            lambda ids: plain.decode(ids, skip_special_tokens=False),
        )
        assert found == [0, *text, 1]
        changed += found != document
    assert changed > 10


def test_nothing_is_lost(loaded: Loaded, data: Path) -> None:
    """Prefix, middle and suffix together are the text."""
    made = fim(loaded, rate=1.0)
    kinds = set()
    for number, document in enumerate(read(data)):
        found = made.document(np.array(document), np.random.RandomState(number)).tolist()
        ids = found[1:-1]
        suffix, middle = ids.index(SUFFIX), ids.index(MIDDLE)
        assert ids[0] == PREFIX and suffix < middle
        kinds.add(suffix == 1)
        parts = [ids[1:suffix], ids[middle + 1 :], ids[suffix + 1 : middle]]
        decode = loaded.tokenizer.decode
        assert "".join(map(decode, parts)) == decode(document[1:-1])
    assert kinds == {True, False}  # SPM and PSM


def test_fragments(loaded: Loaded) -> None:
    encode = loaded.tokenizer.encode
    pieces = [encode(text, add_special_tokens=False).ids for text in ("def a", "return b", "c x1")]
    document = np.array([0, SPLIT, *pieces[0], SPLIT, SPLIT, *pieces[1], SPLIT, *pieces[2], 1])
    made = fim(loaded, rate=1.0, split_sample="<file_sep>", fragment_rate=1.0)
    found = made.document(document, np.random.RandomState(0)).tolist()
    assert found.count(SPLIT) == 4 and [found.count(t) for t in (PREFIX, MIDDLE, SUFFIX)] == [3] * 3
    assert found[:3] == [0, SPLIT, PREFIX] and found[-1] == 1
    rarely = fim(loaded, rate=1.0, split_sample="<file_sep>", fragment_rate=0.0)
    assert np.array_equal(rarely.document(document, np.random.RandomState(0)), document)


def test_special_tokens_are_found_again(loaded: Loaded) -> None:
    """By the published definition, unless a cut falls into the spelling of a special token."""
    plain = load(str(loaded.path.parent)).tokenizer
    pieces = [plain.encode(text, add_special_tokens=False).ids for text in ("def a", "return b")]
    document = [SPLIT, *pieces[0], SPLIT, *pieces[1] * 9]
    made, settings = fim(loaded, rate=1.0), {"rate": 1.0}
    rearranged = 0
    for seed in range(60):
        found = made.document(np.array([0, *document, 1]), np.random.RandomState(seed)).tolist()
        expected = definition(
            document,
            np.random.RandomState(seed),
            1.0,
            settings,
            lambda text: plain.encode(text, add_special_tokens=False).ids,
            lambda ids: plain.decode(ids, skip_special_tokens=False),
        )
        broken = expected.count(SPLIT) < 2
        assert found == [0, *(document if broken else expected), 1]
        rearranged += not broken
    assert 20 < rearranged < 60


def test_documents_that_are_left(loaded: Loaded) -> None:
    """Tokens of FIM inside; text that spells a special token beside a real one."""
    made = fim(loaded, rate=1.0)
    encode = loaded.tokenizer.encode
    text = encode("def a return b", add_special_tokens=False).ids
    made.tokenizer.encode_special_tokens = True
    spelled = made.tokenizer.encode("<file_sep>", add_special_tokens=False).ids
    assert SPLIT not in spelled
    for inside in ([PREFIX], [SPLIT, *spelled]):
        document = np.array([0, *text, *inside, *text, 1])
        for seed in range(10):
            counts = FimCounts()
            found = made.document(document, np.random.RandomState(seed), counts)
            assert np.array_equal(found, document)
            assert (counts.rearranged, counts.left) == (0, 1)
    document = np.array([0, *text, *spelled, *text, 1])  # text alone stays text
    found = made.document(document, np.random.RandomState(0))
    assert PREFIX in found and SPLIT not in found


@pytest.mark.parametrize(
    "join",
    [[1], [1, 0], [0], [1, 1], [1, 0, 1, 0]],
    ids=["EOS", "EOS BOS", "BOS", "2 EOS", "empty"],
)
def test_bos_and_eos_inside_separate_texts(loaded: Loaded, join: list[int]) -> None:
    """As in the published code: each text has draws of its own, an empty one has none."""
    made, encode = fim(loaded, rate=0.6), loaded.tokenizer.encode
    texts = [encode(text, add_special_tokens=False).ids for text in ("def a x1", "return b", "c")]
    plain = load(str(loaded.path.parent)).tokenizer
    document = [0, *texts[0], *join, *texts[1], *join, *texts[2], 1]
    rearranged = set()
    for seed in range(30):
        draw, counts = np.random.RandomState(seed), FimCounts()
        found = made.document(np.array(document), draw, counts).tolist()
        again = np.random.RandomState(seed)
        one, other, last = (
            definition(
                text, again, 0.6, {}, lambda text: plain.encode(text, add_special_tokens=False).ids,
                lambda ids: plain.decode(ids, skip_special_tokens=False),
            )
            for text in texts
        )  # fmt: skip
        assert found == [0, *one, *join, *other, *join, *last, 1]
        assert draw.randint(2**30) == again.randint(2**30)
        assert counts.rearranged == found.count(MIDDLE) and counts.left == 0
        assert counts.documents == 3
        rearranged.add(counts.rearranged)
    assert rearranged == {0, 1, 2, 3}


def test_one_token_for_bos_and_eos(loaded: Loaded) -> None:
    """As StarCoder has it: the token that ends a document is no document."""
    made = dataclasses.replace(fim(loaded, rate=1.0), bos=1)
    text = loaded.tokenizer.encode("def a return b", add_special_tokens=False).ids
    counts = FimCounts()
    found = made.document(np.array([*text, 1, *text, 1]), np.random.RandomState(0), counts).tolist()
    assert (counts.documents, counts.rearranged, found.count(MIDDLE)) == (2, 2, 2)
    assert (found.count(1), found[-1]) == (2, 1)


def test_undecodable_text_stays(loaded: Loaded) -> None:
    """The border of a sequence may cut a character."""
    ids = loaded.tokenizer.encode("日本", add_special_tokens=False).ids
    made = fim(loaded, rate=1.0)
    cut = np.array(ids[1:])
    assert "\ufffd" in loaded.tokenizer.decode(cut.tolist())
    assert np.array_equal(made.document(cut, np.random.RandomState(0)), cut)
    assert len(made.document(np.array(ids), np.random.RandomState(0))) > len(ids)


@pytest.mark.parametrize("isolate", [True, False])
def test_sequences_keep_their_length(loaded: Loaded, data: Path, isolate: bool) -> None:
    """Documents are rearranged one by one; padding is no target; validation stays as it is."""
    plain, changed = opened(data), opened(data, loaded, rate=1.0)
    for index in range(20):
        before, after = plain.read("training", index), changed.read("training", index)
        assert len(after.tokens) == LENGTH + 1 and after.starts[0] == 0
        assert np.array_equal(after.targets, after.tokens[1:])
        assert np.array_equal(after.ends, after.starts[1:] - 1)
        assert PREFIX in after.tokens and not np.array_equal(before.tokens, after.tokens)
        for start in after.starts[1:]:  # every later document begins with BOS
            assert after.tokens[start] == 0
        validation = changed.read("validation", index).tokens
        assert np.array_equal(validation, plain.read("validation", index).tokens)

    def shorter(_: Fim, packed: PackedSample, index: int) -> PackedSample:
        """A transformation that halves the sequence."""
        half = LENGTH // 2
        tokens = np.concatenate([packed.tokens[:half], np.full(LENGTH + 1 - half, PAD, np.int64)])
        starts = packed.starts[packed.starts < half]
        return PackedSample(tokens, starts, tokens[1:], starts[1:] - 1, LENGTH + 1 - half)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fim, "sequence", shorter)
        batch = next(iter(loader(changed, 0, 1, isolate)))[0]
    assert (batch.tokens[0, LENGTH // 2 :] == PAD).all()
    assert (batch.labels[0, LENGTH // 2 - 1 :] == IGNORE_INDEX).all()
    assert batch.targets == int((batch.labels != IGNORE_INDEX).sum())


def loader(dataset: Dataset, first: int, steps: int, isolate: bool = True, **ranks: int) -> Loader:
    return Loader(
        dataset,
        "training",
        BatchSizes(2, 1, 2 // ranks.get("processes", 1)),
        rank=ranks.get("rank", 0),
        processes=ranks.get("processes", 1),
        vocab_size=VOCABULARY,
        first_sample=first,
        steps=steps,
        isolate=isolate,
        workers=2,
        prefetch=2,
    )


def test_packed_documents_keep_their_places(loaded: Loaded, data: Path) -> None:
    """With truncate_or_pad, documents of best-fit packing are rearranged and none is cut."""
    config = DataConfig(path=[str(data)], split=[1], packing="best_fit")
    plain, changed = (open_dataset(config, LENGTH, SEED, VOCABULARY) for _ in range(2))
    changed.fim = make_fim(FimConfig(rate=1, truncate_or_pad=True), loaded, SEED, VOCABULARY)
    padded = rearranged = 0
    for index in range(plain.sequences("training")):
        before, after = (each.read("training", index) for each in (plain, changed))
        filled = len(before.tokens) - before.padding
        assert after.padding == before.padding
        assert after.starts.tolist() == before.starts[before.starts < filled].tolist()
        assert after.ends.tolist() == before.ends.tolist()
        for begin in after.starts.tolist():  # BOS stays in front of a document
            assert after.tokens[begin] == before.tokens[begin] or after.tokens[begin] == PREFIX
        padded += bool(before.padding)
        rearranged += int((after.tokens == MIDDLE).sum())
    assert padded and rearranged > 20


def test_joins_are_no_targets(loaded: Loaded, data: Path) -> None:
    """After a change of length, a sequence may join inputs from several places."""
    plain = opened(data)
    split = plain.splits["training"]
    seed, given = plain.seed, [[(7, plain.seed, split.sources[0].inputs // 14)]]
    split.orders = [split.order(0, split.mixture.edges, [0], given)]
    assert seed == SEED
    made, joins = fim(loaded, rate=1.0), 0
    for index in range(20):
        before = plain.read("training", index)
        after = made.sequence(before, index)
        begins = before.starts[1:]
        torn = np.flatnonzero(before.targets[begins - 1] != before.tokens[begins]) + 1
        inside = [after.starts[k] - 1 for k in torn if k < len(after.starts)]
        assert set(inside) == set(after.breaks.tolist()) - {LENGTH}
        joins += len(inside)
    assert joins > 20


def test_the_same_on_every_layout_and_after_a_resume(loaded: Loaded, data: Path) -> None:
    dataset = opened(data, loaded, rate=0.5)
    whole = [row.tokens[0].tolist() for step in loader(dataset, 0, 4) for row in step]
    again = opened(data, loaded, rate=0.5)
    resumed = [row.tokens[0].tolist() for step in loader(again, 4, 2) for row in step]
    assert resumed == whole[4:]
    ranks = [
        [step[0].tokens[0].tolist() for step in loader(again, 0, 4, processes=2, rank=rank)]
        for rank in (0, 1)
    ]
    assert [row for pair in zip(*ranks, strict=True) for row in pair] == whole
    other = opened(data, loaded, rate=0.5)
    other.fim = make_fim(FimConfig(rate=0.5), loaded, SEED + 1000, VOCABULARY)
    assert [row.tokens[0].tolist() for step in loader(other, 0, 4) for row in step] != whole


def test_tokens_are_checked(loaded: Loaded, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        fim(loaded, rate=1.0, prefix_token="<fim_prefx>", split_sample="<repo>")
    assert error.value.problems == [
        f"data.fim.prefix_token: given <fim_prefx>, which is not a token of {loaded.path}; did you"
        " mean <fim_prefix>?; give the model's own token, or add it with fast-llm"
        " extend-vocabulary",
        f"data.fim.split_sample: given <repo>, which is not a token of {loaded.path}; give the"
        " model's own token, or add it with fast-llm extend-vocabulary",
    ]
    with pytest.raises(ConfigError) as error:
        make_fim(FimConfig(rate=1.0), loaded, SEED, PAD)
    assert error.value.problems == [
        "data.fim.pad_token: given <fim_pad>, which is token 323, but the model's vocab_size is 323"
    ]
    with pytest.raises(
        ConfigError, match=r"data.fim: needs the model's tokenizer; name its folder"
    ):
        make_fim(FimConfig(rate=1.0), None, SEED, VOCABULARY)
    (tmp_path / "tokenizer.model").write_bytes(trained(control_symbols=TOKENS))
    with pytest.raises(ConfigError, match=r"puts a space in front of each piece of text, so cut"):
        make_fim(FimConfig(rate=1.0), load(str(tmp_path)), SEED, 1000)


def test_a_run_needs_consent_to_change_it(model: Path, data: Path, tmp_path: Path) -> None:
    arguments = [
        *MODEL,
        "model.base_model.vocab_size=325",
        f"data.path={data}",
        f"data.tokenizer.path={model}",
        "data.split=[8,2,0]",
        "data.fim.rate=0.5",
        "batch.batch_size=4",
        "batch.sequence_length=24",
        "training.checkpoint.interval=1",
        f"run.experiment_dir={tmp_path / 'run'}",
    ]
    assert run([*arguments, "training.train_iters=1"]) == 0
    for changed in ("data.fim.rate=0.9", "data.fim.rate=0"):
        with pytest.raises(
            ConfigError, match=r"data.fim.rate: given 0.[09], but .* trained with 0.5"
        ):
            run([*arguments, "training.train_iters=2", changed])
    assert run([*arguments, "training.train_iters=2"]) == 0


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (1, []),
        *(
            pytest.param(2, [f"model.distributed.{axis}_parallel=2"], marks=slow)
            for axis in ("tensor", "pipeline", "sequence_data")
        ),
        pytest.param(2, [], marks=slow),
    ],
)
def test_counts_of_all_processes(
    model: Path, loaded: Loaded, data: Path, tmp_path: Path, processes: int, layout: list[str]
) -> None:
    """And `inspect` shows the sequences of a step as it reads them."""
    arguments = [
        *MODEL,
        "model.base_model.vocab_size=326",
        f"data.path={data}",
        f"data.tokenizer.path={model}",
        "data.split=[8,2,0]",
        "data.fim.rate=0.5",
        "batch.batch_size=4",
        f"batch.sequence_length={LENGTH}",
        f"model.distributed.seed={SEED}",
        "training.train_iters=4",
        "training.logs.interval=2",
        f"run.experiment_dir={tmp_path / 'run'}",
        *layout,
    ]
    ended = [run(arguments)] if processes == 1 else spawn(processes, run, arguments)
    assert ended == [0] * processes
    dataset = opened(data, loaded, rate=0.5)
    for step in (2, 4):
        read = [dataset.read("training", index) for index in range(step * 4 - 8, step * 4)]
        record = records(tmp_path / "run")[step]
        counts = [sum(packed.fim[place] for packed in read) for place in range(4)]
        assert [record[name] for name in FIM_COUNTS] == counts
        assert counts[0] == sum(len(packed.starts) for packed in opened_of(data, step))
        assert 0 < counts[1] < counts[0] and counts[3] > 10


def opened_of(data: Path, step: int) -> list[PackedSample]:
    """The sequences of a record, not rearranged."""
    plain = opened(data)
    return [plain.read("training", index) for index in range(step * 4 - 8, step * 4)]


def test_inspect_shows_what_training_reads(
    model: Path, loaded: Loaded, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [
        f"data.tokenizer.path={model}",
        "data.split=[8,2]",
        "data.fim.rate=1",
        f"batch.sequence_length={LENGTH}",
        f"model.distributed.seed={SEED}",
        f"model.base_model.vocab_size={VOCABULARY}",
    ]
    given = ["inspect", str(data), "--sequence-length", str(LENGTH), "--sequence", "3", *settings]
    assert cli.main([*given, "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)["sequences"]
    packed = opened(data, loaded, rate=1.0).read("training", 3)
    assert shown["ids"] == packed.tokens.tolist() and shown["starts"] == packed.starts.tolist()
    assert shown["fim"] == dict(zip(FIM_COUNTS, packed.fim, strict=True))
    assert sum(part["tokens"] for part in shown["documents"]) == LENGTH + 1 - packed.padding
    assert "<fim_middle>" in shown["documents"][0]["text"]
    assert cli.main(given) == 0
    out = capsys.readouterr().out
    assert f"fill-in-the-middle: {packed.fim[1]} rearranged ({packed.fim[3]:,} tokens), 0" in out
