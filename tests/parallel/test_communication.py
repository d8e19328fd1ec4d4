"""Collectives and bytes of a step, counted and compared with the formulas of docs/layouts.md."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fast_llm.training.step import TrainStep
from tests.helpers import spawn
from tests.layouts.test_layouts import MODEL, arguments
from tests.training.runs import run, write_tokens

# Gathers count their output, reductions their input: the full tensor in either case.
KINDS = {
    "_allgather_base_": ("all-gather", 0),
    "all_gather_into_tensor": ("all-gather", None),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_tensor": ("reduce-scatter", 0),
    "allreduce_": ("all-reduce", 0),
    "all_reduce": ("all-reduce", 0),
    "send": ("send", 0),
    "recv_": ("receive", 0),
}


class Counting(TorchDispatchMode):
    """Counts collectives by kind, and their bytes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        namespace, _, name = func._schema.name.partition("::")
        if namespace in ("c10d", "_c10d_functional") and name in KINDS:
            kind, place = KINDS[name]
            counted = out if place is None else args[place]
            counted = counted if isinstance(counted, Tensor) else counted[0]
            self.calls[kind] += 1
            self.bytes[kind] += counted.nbytes
        return out


def count(overrides: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Counts of the last step that this process trains."""
    seen = Counting()
    original = TrainStep.__call__

    def call(step: TrainStep, *args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        with Counting() as seen:
            return original(step, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "__call__", call)
        run(overrides)
    return dict(seen.calls), dict(seen.bytes)


BLOCKS, HIDDEN, HEADS, WIDTH = (
    4,
    32,
    4,
    6,
)  # the model of the tables: layers, hidden size, key and value heads, head size
SEQUENCES, LENGTH = 8, 24  # of a step
PARAMETERS = (
    2 * 128 * HIDDEN
    + HIDDEN
    + BLOCKS * (2 * HIDDEN + (8 + 8 + 4 + 4) * WIDTH * HIDDEN + 3 * 56 * HIDDEN)
)
SUM = 4 * 8  # the step's one sum: loss, targets, squared norm, request to stop


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokens."""
    root = tmp_path_factory.mktemp("communication")
    write_tokens(root / "tokens", 400)
    return root


def check(root: Path, layout: str, calls: dict[str, int], sizes: dict[str, int]) -> None:
    for counted, size in spawn(int(layout[0]), count, arguments(root, layout, layout, 2)):
        assert counted == calls
        assert size == sizes


def test_the_model_is_the_one_that_the_formulas_mean() -> None:
    assert MODEL["transformer.num_layers"] == BLOCKS and MODEL["transformer.hidden_size"] == HIDDEN
    assert MODEL["transformer.head_groups"] == HEADS and MODEL["transformer.kv_channels"] == WIDTH


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_zero(root: Path, zero: int) -> None:
    """Two micro-batches: weights gathered once or twice a block, gradients once or twice."""
    units, micro, weights = (
        BLOCKS + 2,
        2,
        4 * PARAMETERS,
    )  # the embedding with the last norm, and the head
    blocks = weights - 4 * (2 * 128 * HIDDEN + HIDDEN)
    gathers, gathered = (
        (micro * (units + BLOCKS), micro * (weights + blocks)) if zero == 3 else (units, weights)
    )
    reductions = micro if zero > 1 else 1
    check(
        root,
        f"2 zero={zero} tied=no",
        {"all-gather": gathers, "reduce-scatter": reductions * units, "all-reduce": 1},
        {"all-gather": gathered, "reduce-scatter": reductions * weights, "all-reduce": SUM},
    )


def test_tensor_parallelism(root: Path) -> None:
    """Around attention and MLP, after the embedding, before the head; in both passes."""
    micro, activations = 2, 4 * SEQUENCES * LENGTH * HIDDEN  # bytes of a step's residual stream
    sums = 2 * (2 * BLOCKS + 1)
    reported = 2 * 2 * 4 * SEQUENCES * LENGTH  # log Σ exp and a logit of each token, from two
    check(
        root,
        "2 tp=2 tied=no micro=4",
        {"all-reduce": micro * sums + 1, "all-gather": 2 * micro},
        {"all-reduce": sums * activations + SUM, "all-gather": reported},
    )
    norms = 2 * BLOCKS + 1
    check(
        root,
        "2 tp=2 sp=yes tied=no micro=4",
        {
            "all-gather": micro * sums + 2 * micro,
            "reduce-scatter": micro * sums,
            "all-reduce": norms + 1,
        },
        {
            "all-gather": sums * activations + reported,
            "reduce-scatter": sums * activations,
            "all-reduce": 4 * HIDDEN * norms + SUM,
        },
    )


def test_context_parallelism(root: Path) -> None:
    """Each block gathers keys and values, and reduces their gradients; ZeRO over both."""
    micro, weights, keys = 2, 4 * PARAMETERS, 4 * SEQUENCES * LENGTH * 2 * HEADS * WIDTH
    check(
        root,
        "2 cp=2 tied=no micro=4",
        {
            "all-gather": micro * BLOCKS + BLOCKS + 2,
            "reduce-scatter": micro * BLOCKS + BLOCKS + 2,
            "all-reduce": 1,
        },
        {
            "all-gather": BLOCKS * keys + weights,
            "reduce-scatter": BLOCKS * keys + weights,
            "all-reduce": SUM,
        },
    )


def test_pipeline_parallelism(root: Path) -> None:
    """Hidden states forward and their gradients backward, one micro-batch at a time."""
    micro, activations = 4, 4 * SEQUENCES * LENGTH * HIDDEN
    check(
        root,
        "2 pp=2 tied=no",
        {"send": micro, "receive": micro, "all-reduce": 1},
        {"send": activations, "receive": activations, "all-reduce": SUM},
    )
