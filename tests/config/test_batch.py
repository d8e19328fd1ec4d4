"""Sizes of a batch, and messages about sizes that contradict each other."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fast_llm.config.batch import BatchSizes, derive_batch_sizes, with_smallest_micro_batch
from fast_llm.config.train import BatchConfig
from fast_llm.errors import ConfigError

NAMES = {
    "size": "batch_size",
    "micro": "micro_batch_size",
    "depth": "depth_first_micro_batches",
    "breadth": "breadth_first_micro_batches",
    "sequential": "sequential_micro_batches",
}


def sizes(processes: int, **values: Any) -> BatchSizes:
    batch = BatchConfig(**{NAMES[name]: value for name, value in values.items()})
    return derive_batch_sizes(with_smallest_micro_batch(batch), processes)


@pytest.mark.parametrize(
    ("processes", "values", "expected"),
    [
        (8, {"size": 256, "micro": 2}, (256, 2, 16)),  # the recipe
        (1, {"size": 256, "micro": 2}, (256, 2, 128)),
        (1, {}, (1, 1, 1)),
        (4, {}, (4, 1, 1)),
        (4, {"micro": 3}, (12, 3, 1)),
        (4, {"micro": 3, "depth": 5}, (60, 3, 5)),
        (4, {"depth": 5}, (20, 1, 5)),
        (4, {"size": 40}, (40, 10, 1)),
        (4, {"size": 40, "depth": 5}, (40, 2, 5)),
        (4, {"size": 40, "sequential": 5}, (40, 2, 5)),
        (4, {"size": 40, "micro": 2, "sequential": 5}, (40, 2, 5)),
        (4, {"size": 40, "micro": 2, "depth": 5, "breadth": 1, "sequential": 5}, (40, 2, 5)),
    ],
)
def test_what_is_not_given_follows(
    processes: int, values: dict[str, int], expected: tuple[int, int, int]
) -> None:
    assert sizes(processes, **values) == BatchSizes(*expected)


@pytest.mark.parametrize(
    ("processes", "values", "expected"),
    [
        (3, {"size": 256, "micro": 2}, (256, 2, 43, 2)),
        (1, {"size": 5, "micro": 2}, (5, 2, 3, 1)),
        (4, {"size": 41, "depth": 5}, (41, 3, 5, 19)),
        (4, {"size": 6, "micro": 1}, (6, 1, 2, 2)),
        (3, {"size": 8}, (8, 3, 1, 1)),
    ],
)
def test_what_does_not_divide_is_padded(
    processes: int, values: dict[str, int], expected: tuple[int, ...]
) -> None:
    assert sizes(processes, **values) == BatchSizes(*expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"size": 40, "micro": 2, "depth": 2},
            (40, 2, 5),
        ),  # with the number of rounds given, which test_checks.py covers
        ({"size": 40, "micro": 2, "breadth": 5}, (40, 2, 5)),
        ({"micro": 2, "depth": 2, "breadth": 3}, (48, 2, 6)),
    ],
)
def test_pipelines_take_some_micro_batches_at_a_time(
    values: dict[str, int], expected: tuple[int, ...]
) -> None:
    given = {NAMES[name]: value for name, value in values.items()}
    batch = BatchConfig.model_validate(given)
    assert derive_batch_sizes(batch, 4, pipeline=True) == BatchSizes(*expected)


@pytest.mark.parametrize(
    ("processes", "values", "problem"),
    [
        (
            8,
            {"size": 4, "micro": 2},
            "batch.batch_size: batch_size 4 / micro_batch_size 2 = 2 micro-batches for 8"
            " processes: 6 would have nothing to do; raise it, lower micro_batch_size or start"
            " fewer",
        ),
        (
            4,
            {"size": 40, "micro": 2, "depth": 6},
            "batch.depth_first_micro_batches: given 6, but batch_size 40 / (micro_batch_size 2 × 4"
            " processes) = 5; leave it out",
        ),
        (
            4,
            {"size": 40, "micro": 2, "sequential": 6},
            "batch.sequential_micro_batches: given 6, but batch_size 40 / (micro_batch_size 2 × 4"
            " processes) = 5; leave it out",
        ),
        (
            1,
            {"depth": 2, "breadth": 1, "sequential": 3},
            "batch.sequential_micro_batches: given 3, must be depth_first_micro_batches 2 ×"
            " breadth_first_micro_batches 1 = 2; leave it out",
        ),
    ],
)
def test_numbers_that_do_not_fit(processes: int, values: dict[str, int], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sizes(processes, **values)
    assert caught.value.problems == [problem]


number = st.integers(1, 12)


@settings(max_examples=300, deadline=None)
@given(
    number,
    st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("size", "micro", "depth", "sequential"), number)
    ),
)
def test_sizes_multiply_out_and_keep_what_was_given(processes: int, values: dict[str, int]) -> None:
    try:
        found = sizes(processes, **values)
    except ConfigError as error:
        # A process would have no work, or the given number of micro-batches is wrong.
        assert len(error.problems) == 1
        size, micro = values.get("size"), values.get("micro", 1)
        many = {values[name] for name in ("depth", "sequential") if name in values}
        assert len(many) == 2 or (
            size is not None and (min(size, -(-size // micro)) < processes or many)
        )
        return
    assert (
        found.batch_size + found.padding == found.micro_batch_size * found.micro_batches * processes
    )
    assert found.padding >= 0 and (
        "micro" not in values or found.padding < found.micro_batch_size * processes
    )
    assert values.get("size", found.batch_size) == found.batch_size
    assert values.get("micro", found.micro_batch_size) == found.micro_batch_size
    assert {
        values.get("depth", found.micro_batches),
        values.get("sequential", found.micro_batches),
    } == {found.micro_batches}


def test_auto_counts_as_one_sequence_until_it_is_resolved() -> None:
    assert sizes(4, size=40, micro="auto") == BatchSizes(40, 1, 10)
    with pytest.raises(ConfigError, match="given auto, which needs batch_size; give it"):
        sizes(4, micro="auto")
    for name in ("depth", "breadth", "sequential"):
        with pytest.raises(
            ConfigError,
            match=f"batch.{NAMES[name]}: follows from micro_batch_size: auto; leave it out",
        ):
            sizes(4, size=40, micro="auto", **{name: 2})
