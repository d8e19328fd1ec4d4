"""Changes of packing, sequence length and seed by consent: no target of an epoch is repeated or
skipped.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fast_llm.config.train import DataConfig, TrainConfig
from fast_llm.data.best_fit import BestFit
from fast_llm.data.dataset import Split, open_dataset
from fast_llm.data.sampling import Mixture
from fast_llm.data.source import Source
from fast_llm.planning import history as histories
from fast_llm.planning.history import History
from tests.data.test_best_fit import numbered, targets_of
from tests.helpers import slow

CHANGES = st.fixed_dictionaries(
    {
        "length": st.sampled_from([1, 2, 3, 4, 7, 12]),
        "seed": st.sampled_from([0, 0, 1]),
        "packing": st.sampled_from(["best_fit", "best_fit", "concatenate"]),
        "weights": st.lists(st.sampled_from([0, 0.3, 1]), min_size=2, max_size=2),
        "sequences": st.integers(0, 40),
    }
)


def change_data(
    history: History | None, samples: int, change: dict[str, Any], paths: Sequence[str]
) -> tuple[History, Split]:
    """The history with the data of a change, and the data in this order."""
    chosen = [(w, p) for w, p in zip(change["weights"], paths, strict=True) if w]
    chosen = chosen or [(1, paths[0])]
    flat = [item for pair in chosen for item in pair]
    config = TrainConfig(
        data=DataConfig(path=flat, split=[1], packing=change["packing"]),
        batch={"sequence_length": change["length"], "batch_size": 1},  # type: ignore[arg-type]
        model={"distributed": {"seed": change["seed"]}},  # type: ignore[arg-type]
    )
    data = open_dataset(config.data, change["length"], change["seed"], 2**31)
    split = data.splits["training"]
    if history is None:
        return histories.new_history(config, 1, data), split
    history = History.model_validate_json(history.model_dump_json())
    history = history.with_data(samples, samples, config, split)
    histories.apply_orders(split, history, samples)
    return history, split


def test_stages_share_what_is_left_of_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an accepted change leaves of an epoch is computed once, not for each stage."""
    path = numbered(tmp_path / "source", [13, 4, 7, 9, 2, 25, 6, 5], 0)
    config = DataConfig(path=[path], split=[1], packing="best_fit")

    def opened() -> Source:
        source = open_dataset(config, 7, 0, 2**31).splits["training"].sources[0]
        assert isinstance(source, Source)
        return source

    before, remaining, calls = (4, 0, 3, "best_fit"), BestFit.remaining, list[int]()

    def counted(self: BestFit, used: int, order: Any, deal: Any) -> Any:
        calls.append(used)
        return remaining(self, used, order, deal)

    def given_by(source: Source, count: int) -> list[list[int]]:
        sampler = source.sampler(0, 0, [before, (7, 0, count, "best_fit")])  # type: ignore[list-item]
        found = [sampler.find(index) for index in range(12)]
        return [source.with_stream(s).read(n).tokens.tolist() for s, n, _ in found]

    alone = [given_by(opened(), count) for count in (1, 2, 3)]
    monkeypatch.setattr(BestFit, "remaining", counted)
    source = opened()
    assert [given_by(source, count) for count in (1, 2, 3)] == alone
    assert alone[0][1:] == alone[1][:-1] and alone[0] != alone[1]
    assert calls == [3]


ANY_HISTORY = given(
    documents=st.lists(
        st.lists(st.integers(0, 9) | st.sampled_from([13, 25]), min_size=2, max_size=12),
        min_size=2,
        max_size=2,
    ),
    changes=st.lists(CHANGES, min_size=1, max_size=6),
)


def each_target_once_an_epoch(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    changes: list[dict[str, Any]],
) -> None:
    root = tmp_path_factory.mktemp("history")
    documents = [[13, *lengths] for lengths in documents]
    paths = [numbered(root / f"s{n}", lengths, 1000 * n) for n, lengths in enumerate(documents)]
    inner = [
        {1000 * n + sum(lengths[:d]) + k for d, size in enumerate(lengths) for k in range(1, size)}
        for n, lengths in enumerate(documents)
    ]
    used: dict[tuple[int, int], list[int]] = defaultdict(list)  # source and epoch → targets
    lost: dict[tuple[int, int], int] = defaultdict(int)  # that the ways may leave out
    drawn: list[tuple[int, list[int]]] = []
    history, samples = None, 0
    for change in changes:
        history, split = change_data(history, samples, change, paths)
        for index in range(samples, samples + change["sequences"]):
            source, number, epoch = split.find(index)
            packed = source.read(number)
            targets = targets_of(packed)
            place = int(packed.tokens[0]) // 1000
            assert set(targets) <= inner[place]
            used[place, epoch] += targets
            # A concatenated epoch, or rest of one, leaves out less than a sequence.
            left_out = change["length"] if change["packing"] == "concatenate" else 0
            for one in (epoch, epoch - 1):
                lost[place, one] = max(lost[place, one], left_out)
            drawn.append((index, packed.tokens.tolist()))
        samples += change["sequences"]
    for (place, epoch), targets in used.items():
        assert len(set(targets)) == len(targets)
        if (place, epoch + 1) in used:
            assert len(inner[place]) - len(targets) <= lost[place, epoch]
    assert history is not None
    for index, tokens in drawn:  # what `why` does
        order = history.order_at(index)
        state_place, inside = Mixture(order.edges).find(index - order.index)
        state = order.sources[state_place]
        source = histories.open_sources(order.data, order, 2**31)[state.digest]
        stream, number, _ = source.sampler(order.seed, state.key, state.drawn).find(inside)
        assert source.with_stream(stream).read(number).tokens.tolist() == tokens


test_any_history_uses_each_target_once_an_epoch = settings(max_examples=16, deadline=None)(
    ANY_HISTORY(each_target_once_an_epoch)
)
test_many_histories_do = slow(
    settings(max_examples=100, deadline=None)(ANY_HISTORY(each_target_once_an_epoch))
)
