"""Mixtures whose shares change by stages: counts, borders, resumes, rewinds and limits."""

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fast_llm import cli
from fast_llm.checkpoint import folder as folders
from fast_llm.config.document import read
from fast_llm.config.train import TrainConfig
from fast_llm.config.validate import validate
from fast_llm.data.dataset import Dataset, Split, open_dataset
from fast_llm.data.source import RandomSource
from fast_llm.errors import ConfigError
from fast_llm.planning import history as histories
from fast_llm.planning.history import History
from fast_llm.planning.preflight import preflight
from fast_llm.planning.stages import epoch_problems, remaining_stages, stage_problems
from fast_llm.training.audit import inspect_step
from tests.helpers import slow, spawn
from tests.training.runs import losses, records, run, weights, write_tokens
from tests.training.runs import settings as run_settings
from tests.training.test_spikes import spiking

NAMES = ("a", "b", "c")
STAGES = "[{until: 4, weights: {a: 0.7, b: 0.3}}, {until: 9, weights: {b: 1}}, {}]"


def mixture(*overrides: str) -> TrainConfig:
    sources = "{" + ", ".join(f"{name}: {name}" for name in NAMES) + "}"
    return validate(
        TrainConfig,
        read(None, ["data.format=mixture", f"data.sources={sources}", *overrides]),
    )


def split_of(config: TrainConfig) -> Split:
    """Sources without files, which differ in their seeds."""
    sources = [RandomSource(config.batch.sequence_length, 9, seed) for seed in range(3)]
    for source, size in zip(sources, (40, 7, 300), strict=True):
        source.inputs = size * source.length
    return Split("training", sources, [2, 1, 1], config.model.distributed.seed, NAMES)


def drawn(split: Split, first: int, last: int) -> list[tuple[int, int, int]]:
    """Source, number and epoch of each sequence."""
    found = []
    for index in range(first, last):
        order = split.order_at(index)
        place, inside = order.mixture.find(index - order.first)
        _, number, epoch = order.samplers[place].find(inside)
        found.append((place, number, epoch))
    return found


WEIGHTS = st.lists(st.sampled_from([0, 0, 0.02, 0.3, 1, 7]), min_size=3, max_size=3).filter(any)


@settings(max_examples=40, deadline=None)
@given(
    stages=st.lists(st.tuples(st.integers(1, 9), WEIGHTS), min_size=1, max_size=5),
    batch=st.integers(1, 9),
    in_tokens=st.booleans(),
    data=st.data(),
)
def test_any_stages(
    stages: list[tuple[int, list[float]]], batch: int, in_tokens: bool, data: st.DataObject
) -> None:
    """Counts in every prefix of a stage, each source's own order, and the same after a resume."""
    given_, borders = list[dict[str, Any]](), [0]
    for steps, shares in stages:
        borders.append(borders[-1] + steps)
        last = {"until_tokens": borders[-1] * batch * 4} if in_tokens else {"until": borders[-1]}
        weights_ = dict(zip(NAMES, shares, strict=True))
        given_.append({**last, "weights": weights_})
    config = mixture(
        f"data.stages={json.dumps(given_)}",
        "batch.sequence_length=4",
        f"training.train_iters={borders[-1]}",
    )
    dataset = Dataset({"training": split_of(config)}, {}, 4, 0)
    split, total = dataset.splits["training"], borders[-1] * batch
    history = histories.new_history(config, batch, dataset)
    histories.apply_orders(split, history, 0)
    found = drawn(split, 0, total)
    # Stages that are alike are one, whose shares are exact as a whole.
    first = 0
    for (_, shares), (_, later), end in zip(
        stages, [*stages[1:], (0, None)], borders[1:], strict=True
    ):
        if shares == later:
            continue
        counts: Counter[int] = Counter()
        for number, (place, _, _) in enumerate(found[first * batch : end * batch], 1):
            counts[place] += 1
            for source, share in enumerate(shares):
                wanted = number * Fraction(share) / sum(map(Fraction, shares))
                # Two halvings of three sources, each off by half a sequence; weights are rounded
                # to 2^-53.
                assert abs(counts[source] - wanted) <= 1 + Fraction(1, 2**40)
                assert share or not counts[source]
        first = end
    # Each source gives its sequences in its own order, whatever the stages.
    for place in range(3):
        mine = [(number, epoch) for source, number, epoch in found if source == place]
        alone = split_of(config).orders[0].samplers[place]
        assert mine == [alone.find(i)[1:] for i in range(len(mine))]
    # A resume computes the same from its own step, also from what version 0.1 or JSON keeps of it.
    step = data.draw(st.integers(0, borders[-1]))
    again = History.model_validate_json(history.model_dump_json())
    resumed = again.with_data(step, step * batch, config, split_of(config))
    assert resumed == history
    later_split = split_of(config)
    histories.apply_orders(later_split, resumed, step * batch)
    assert drawn(later_split, step * batch, total) == found[step * batch :]
    assert history.inputs(total) == total * 4


def test_borders_move_with_rewinds() -> None:
    """Borders are steps: after a rewind the same steps have later sequences."""
    config = mixture(f"data.stages={STAGES}", "batch.sequence_length=4")
    split = split_of(config)
    history = histories.new_history(config, 2, Dataset({"training": split}, {}, 4, 0))
    assert [order.index for order in history.orders] == [0, 8, 18]
    # A spike at step 6, of the second stage: back to step 3, of the first. 6 sequences are skipped.
    moved = history.with_data(3, 12, config, split)
    assert [order.index for order in moved.orders] == [0, 8, 12, 14, 24]
    assert moved.orders[2].edges == history.orders[0].edges
    for source in (0, 1, 2):  # what was skipped is not drawn again
        states = [order.states_at(12)[source].drawn for order in (history.orders[1],)]
        assert moved.orders[2].sources[source].drawn == states[0]
    assert [span.index for span in remaining_stages(config, 3, 12, 48, 2)] == [12, 14, 24]


def test_a_border_in_tokens_is_the_step_that_reaches_it() -> None:
    stages = "[{until_tokens: 33}, {until_tokens: 64, weights: {a: 1}}, {weights: {b: 1}}]"
    config = mixture(f"data.stages={stages}", "batch.sequence_length=4")
    assert [(span.after, span.last) for span in remaining_stages(config, 0, 0, 0, 2)] == [
        (0, 5),
        (5, 8),
        (8, None),
    ]
    # After a rewind from 40 tokens to step 2, 16 tokens were skipped: the border is passed.
    assert [(span.number, span.after) for span in remaining_stages(config, 2, 10, 40, 2)] == [
        (1, 2),
        (2, 5),
    ]


def test_stages_that_are_past_are_not_judged_by_a_larger_batch() -> None:
    stages = "[{until_tokens: 96}, {until_tokens: 192}, {until_tokens: 100_000}]"
    config = mixture(f"data.stages={stages}", "batch.sequence_length=24")
    assert not stage_problems(config, 0, 0, 0, 2)
    (problem,) = stage_problems(config, 0, 0, 0, 16)
    assert problem.startswith("data.stages.1.until_tokens: given 192, so the stage has no step")
    assert not stage_problems(config, 10, 20, 480, 16)


def test_a_source_beyond_its_epochs_may_go_on_unused() -> None:
    """A rewind may have taken more of it; the run is refused only if it takes still more."""
    config = mixture("training.train_iters=20", "data.sources.a={path: a, max_epochs: 1}")

    def split(growth: float) -> Any:
        order = SimpleNamespace(epochs=lambda index: [1.2 + growth * (index - 40)] * 3)
        source = SimpleNamespace(name="a", tokens=10)
        return SimpleNamespace(labels=NAMES, order_at=lambda index: order, sources=[source] * 3)

    assert epoch_problems(config, split(0.0), 10, 40, 0, 4) == []
    (problem,) = epoch_problems(config, split(0.01), 10, 40, 0, 4)
    assert problem.startswith("data.sources.a.max_epochs: given 1, but the run takes 1.6 epochs")


# Runs.


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, documents in (("a", 300), ("b", 120), ("c", 30)):
        write_tokens(tmp_path / name, documents)
    return tmp_path


def arguments(folder: str, *further: str) -> list[str]:
    given_ = [one for one in run_settings(Path()) if not one.startswith("data.")]
    return [
        *given_,
        "data.format=mixture",
        "data.sources={a: a, b: {path: b, max_epochs: 4}, c: c}",
        f"data.stages={STAGES}",
        "data.split=[8,1,1]",
        "training.train_iters=14",
        "training.checkpoint.interval=1",
        "training.checkpoint.keep=null",
        "training.num_workers=2",
        f"run.experiment_dir={folder}",
        *further,
    ]


def sources_of(folder: str, steps: range) -> dict[int, list[str]]:
    """The sources of the sequences of each step, as `why` has them."""
    return {
        step: [sequence["source"] for sequence in inspect_step(folder, step).sequences]
        for step in steps
    }


def test_a_run_that_stops_at_each_border_ends_on_the_same_bits(here: Path) -> None:
    assert run(arguments("whole")) == 0
    for last in (3, 4, 5, 9, 14):
        assert run(arguments("parts", f"training.train_iters={last}")) == 0
    assert losses(here / "parts") == losses(here / "whole")
    assert weights(here / "parts/checkpoint/14") == weights(here / "whole/checkpoint/14")
    found = sources_of("parts", range(1, 15))
    assert found == sources_of("whole", range(1, 15))
    assert {step: "".join(sorted(names)) for step, names in found.items()} == {
        **dict.fromkeys((1, 3), "aaaaaabb"),
        **dict.fromkeys((2, 4), "aaaaabbb"),
        **dict.fromkeys(range(5, 10), "b" * 8),
        # By size: 9,125, 3,605 and 953 tokens; 66.7, 26.3 and 7.0 % of 40 sequences.
        **{step: "".join(sorted(found[step])) for step in range(10, 15)},
    }
    totals = Counter(name for step in range(10, 15) for name in found[step])
    assert totals == {"a": 27, "b": 10, "c": 3}
    info = folders.read_manifest(here / "parts/checkpoint/5").info
    assert [order["index"] for order in info["history"]["orders"]] == [0, 32, 72]


def _ids(arguments_: list[str]) -> list[tuple[int, str]]:
    """Train; the index of each training sequence that this process read, and its tokens."""
    read, found = Dataset.read, []

    def reported(self: Dataset, split: str, index: int) -> Any:
        packed = read(self, split, index)
        if split == "training":
            found.append((index, packed.tokens.tobytes().hex()))
        return packed

    Dataset.read = reported  # type: ignore[method-assign]
    try:
        assert run(arguments_) == 0
    finally:
        Dataset.read = read  # type: ignore[method-assign]
    return found


@slow
def test_each_sequence_once_over_numbers_of_processes(here: Path) -> None:
    """One, two, then four processes, with borders inside the starts."""
    found = []
    for world, last in ((1, 3), (2, 7), (4, 14)):
        given_ = arguments("run", f"training.train_iters={last}", "batch.micro_batch_size=1")
        for ids in spawn(world, _ids, given_):
            found += ids
    (alone,) = spawn(1, _ids, arguments("alone", "batch.micro_batch_size=1"))
    assert sorted(index for index, _ in found) == list(range(14 * 8))
    assert sorted(found) == sorted(alone)
    assert losses(here / "run").keys() == losses(here / "alone").keys()


def test_why_knows_borders_that_a_rewind_has_moved(here: Path) -> None:
    """Killed after a rewind over a border, before the next checkpoint; then complete."""
    given_ = arguments(
        "run",
        "training.checkpoint.interval=3",
        "training.spikes.policy=rewind",
        "training.spikes.window=5",
        "training.spikes.threshold=8",
        "optimizer.learning_rate.base=1e-3",
        "training.num_workers=0",
        f"data.stages={STAGES.replace('until: 4', 'until: 7')}",
        "data.sources={a: a, b: {path: b, max_epochs: 0.4}, c: c}",
    )
    # A spike at step 8, the first of the second stage: back to step 6, of the first.
    (killed,) = spawn(1, spiking, given_, (8,), 10)
    assert killed == ("", [*range(1, 9), 9, 10])
    before = sources_of("run", range(1, 15))
    assert [set(before[step]) for step in (6, 7, 8)] == [{"a", "b"}, {"a", "b"}, {"b"}]
    ((code, _),) = spawn(1, spiking, given_, (8,))
    assert code == 0 and sources_of("run", range(1, 15)) == before
    info = folders.read_manifest(here / "run/checkpoint/14").info
    orders = [order["index"] for order in info["history"]["orders"]]
    assert info["samples"] == 16 * 8 and orders == [0, 56, 64, 72, 88]
    # 43 of 125 sequences as planned, and 10 of the 16 that were skipped.
    said = (here / "run/runs/1/logs/logs_rank_0.txt").read_text()
    assert "data.sources.b.max_epochs: given 0.4, but the run takes 0.424 epochs of b" in said
    (problem,) = problems_of([*given_, "training.train_iters=15"])
    assert "data.sources.b.max_epochs: given 0.4" in problem


@slow
def test_why_reads_what_the_run_read(here: Path) -> None:
    (read_,) = spawn(1, _ids, arguments("run"))
    texts = dict(read_)
    for step in range(1, 15):
        for sequence in inspect_step("run", step).sequences:
            held = b"".join(
                write_tokens(Path(f"again-{d['file']}"), {"a": 300, "b": 120, "c": 30}[d["file"]])[
                    d["document"]
                ][d["first_token"] : d["first_token"] + d["tokens"]].tobytes()
                for d in sequence["documents"]
            )
            assert held.hex() == texts[sequence["index"]]


def plan(*further: str) -> str:
    from fast_llm.planning.report import describe_run

    return describe_run(preflight(read(None, arguments("run", *further)), 1, weights=False))


def test_the_plan_shows_the_stages(here: Path) -> None:
    lines = [line[14:].rstrip() for line in plan().splitlines()]
    start = next(i for i, line in enumerate(lines) if line.split()[:2] == ["steps", "tokens"])
    assert [line.split() for line in lines[start : start + 10]] == [
        ["steps", "tokens", "share", "epochs", "source"],
        ["1", "to", "4", "768", "70", "%", "0.0731", "a"],
        ["30", "%", "0.08", "b"],
        ["0", "%", "0", "c"],
        ["5", "to", "9", "960", "0", "%", "0.0731", "a"],
        ["100", "%", "0.4", "b"],
        ["0", "%", "0", "c"],
        ["10", "to", "14", "960", "66.7", "%", "0.163", "a"],
        ["26.3", "%", "0.48", "b"],
        ["6.96", "%", "0.0968", "c"],
    ]
    assert run(arguments("run", "training.train_iters=6")) == 0
    resumed = plan("training.train_iters=8")
    assert "7 to 8     384    0 %  0.0731  a" in resumed
    assert "stage 3 is after the last step" in resumed


def problems_of(given_: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        preflight(read(None, given_), 1, weights=False)
    return caught.value.problems


def refused(*further: str) -> list[str]:
    return problems_of(arguments("run", *further))


def test_a_source_that_would_exceed_its_epochs(here: Path) -> None:
    sources = "{a: a, b: b, c: {path: c, max_epochs: 0.09}}"
    (problem,) = refused(f"data.sources={sources}")
    assert problem.endswith(
        "data.sources.c.max_epochs: given 0.09, but the run takes 0.0968 epochs of c (767 tokens"
        " for training), more than 0.09 from step 14 on; lower its weight, prepare more of it,"
        " train fewer steps, or raise max_epochs"
    )
    # The limit itself may be reached: 3 of 31 sequences.
    for limit, allowed in ((3 / 31, True), (3 / 31 - 1e-9, False)):
        given_ = [f"data.sources={sources.replace('0.09', str(limit))}"]
        assert (
            (preflight(read(None, arguments("run", *given_)), 1, weights=False) is not None)
            if (allowed)
            else refused(*given_)
        )


def test_a_stage_without_a_step(here: Path) -> None:
    (problem,) = refused(
        "data.stages=[{until_tokens: 100, weights: {a: 1}}, {until_tokens: 190}, {}]"
    )
    assert problem.endswith(
        "data.stages.1.until_tokens: given 190, so the stage has no step: the stage before ends"
        " with the same one, as a step takes 192 tokens; give it more tokens, or leave the stage"
        " out"
    )


def test_changes_by_consent_inside_a_stage(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stages change during the second one: sources continue from their own counts."""
    assert run(arguments("run", "training.train_iters=6")) == 0
    before = sources_of("run", range(1, 7))
    changed = "data.stages=[{until: 4, weights: {a: 0.7, b: 0.3}}, {until: 8, weights: {b: 1}}, {}]"
    (problem,) = refused(changed)
    assert problem.endswith(
        "data.stages.1.until: given 8, but run/checkpoint/6 was trained with 9; set it back, choose"
        " another run.experiment_dir, or consent with run.accept_changes=[data.stages]"
    )
    weight = STAGES.replace("a: 0.7", "a: 0.8")
    (problem,) = refused(f"data.stages={weight}")
    assert problem == (
        f"override data.stages={weight}: data.stages.0.weights.a: given 0.8, but run/checkpoint/6"
        " was trained with 0.7; set it back, choose another run.experiment_dir, or consent with"
        " run.accept_changes=[data.stages]"
    )
    others = "data.stages=[{until: 5, weights: {a: 1}}, {until: 9, weights: {c: 1}}, {}]"
    assert refused(others) == [  # one mistake, one message
        f"override {others}: data.stages: differs from run/checkpoint/6 (data.stages.0.until: given"
        " 5, trained with 4; data.stages.0.weights.a: given 1.0, trained with 0.7; and 3 more); set"
        " it back, choose another run.experiment_dir, or consent with"
        " run.accept_changes=[data.stages]"
    ]
    (problem,) = refused("data.stages=[]")
    assert problem.startswith("override data.stages=[]: data.stages: differs from run/checkpoint/6")
    assert run(arguments("run", changed, "run.accept_changes=[data.stages]")) == 0
    found = sources_of("run", range(1, 15))
    assert {step: found[step] for step in range(1, 7)} == before
    assert set(found[8]) == {"b"} and set(found[9]) == {"a", "b", "c"}
    # Other limits need no consent; another seed does, and starts an order in which nothing repeats.
    capsys.readouterr()
    more = [changed, "training.train_iters=16", "model.distributed.seed=5"]
    more += ["data.sources={a: a, b: {path: b, max_epochs: 5}, c: c}"]
    consent = "run.accept_changes=[model.distributed.seed, data.path, data.stages]"
    assert run(arguments("run", *more, consent)) == 0
    out = capsys.readouterr().out
    assert "data.sources.b.max_epochs: 4.0 → 5.0" in out and "b: continues after 0.4" in out
    spans = Counter(
        (part["file"], part["document"], token)
        for step in range(1, 17)
        for sequence in inspect_step("run", step).sequences
        for part in sequence["documents"][:1]
        for token in range(part["first_token"], part["first_token"] + min(part["tokens"], 20))
    )
    assert max(spans.values()) == 1  # of less than an epoch
    assert records(here / "run")[16]["consumed_samples"] == 16 * 8


def test_a_list_of_paths_becomes_a_mixture(here: Path) -> None:
    """Sources are recognised by content, so each continues from its own count."""
    listed = [*run_settings(Path()), "training.train_iters=3", "training.checkpoint.interval=3"]
    listed += ["data.path=[3, a, 1, b]", "run.experiment_dir=run"]
    assert run(listed) == 0
    consent = "run.accept_changes=[data.format, data.path, data.sources, data.stages]"
    described = plan(consent)
    assert "a: continues after 0.0598 epochs" in described
    assert "b: continues after 0.048 epochs" in described and "c: is new" in described
    assert run(arguments("run", consent)) == 0
    assert {name for names in sources_of("run", range(1, 4)).values() for name in names} == {
        "a",
        "b",
    }


def test_inspect_shows_the_sequences_of_a_stage(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given_ = [one for one in arguments("run") if not one.startswith(("run.", "training.logs"))]
    Path("train.yaml").write_text("training: {logs: {interval: 1}}\n")
    assert cli.main(["inspect", "train.yaml", "--step", "5", "--json", *given_]) == 0
    shown = json.loads(capsys.readouterr().out)["sequences"]
    assert [one["source"] for one in shown] == ["b"] * 8
    assert cli.main(["inspect", "train.yaml", "--json", *given_]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in content["sources"]] == ["a", "b", "c"]
    assert [one["epochs"] for one in content["run"]["epochs"]] == pytest.approx(
        [49 / 301, 60 / 125, 3 / 31]
    )
    without = [one for one in given_ if not one.startswith("batch.batch_size")]
    assert cli.main(["inspect", "train.yaml", *without]) == 2
    assert "data.stages needs the number of sequences in a step" in capsys.readouterr().err


def test_weights_of_a_dataset_with_several_sources(here: Path) -> None:
    """A dataset.json with weights of its own keeps them inside of its source's weight."""
    entries = [{"prefix": "a", "weight": 3}, {"prefix": "c", "weight": 1}]
    Path("ac.json").write_text(json.dumps({"datasets": entries}))
    config = validate(
        TrainConfig,
        read(
            None,
            [
                "data.format=mixture",
                "data.sources={both: ac.json, b: b}",
                "data.stages=[{weights: {both: 2, b: 2}}]",
                "data.split=[1]",
            ],
        ),
    )
    split = open_dataset(config.data, 24, 0, 128).splits["training"]
    assert [source.name for source in split.sources] == ["both (a)", "both (c)", "b"]
    edges = [Fraction(edge, 2**53) for edge in split.edges({"both": 2, "b": 2})]
    assert edges == [0, Fraction(3, 8), Fraction(1, 2), 1]
