"""Runs in stages: every layout reads and trains what one process does, also from border to border.

Each process reports the sequences that it reads. Over all starts of a run, each sequence is read
once, each source continues in its own order, and `fast-llm why` names the documents that were read.
"""

import json
from collections import Counter
from pathlib import Path
from shutil import rmtree
from typing import Any, NamedTuple

import numpy as np
import pytest

from fast_llm.cli import main
from fast_llm.config.document import read
from fast_llm.config.train import TrainConfig
from fast_llm.config.validate import validate
from fast_llm.data.dataset import Dataset, open_dataset
from fast_llm.parallel.mesh import Mesh
from tests.helpers import slow, some_fast, spawn
from tests.layouts.test_experts import EXPERTS, NAMES, TRANSFORMER
from tests.layouts.test_layouts import MODEL, words
from tests.training.runs import losses, records, run, settings, weights, write_tokens

STEPS, BATCH = 8, 8
DOCUMENTS = {"a": 300, "b": 120, "c": 30}
STAGES = "[{until: 3, weights: {a: 0.7, b: 0.3}}, {until: 6, weights: {b: 1}}, {}]"
# As in test_layouts.py, with the packing of documents.
LAYOUTS = [
    "2 zero=1",
    "2 zero=3",
    "3 zero=2 micro=1",  # eight sequences are uneven over three processes
    "4 zero=2 shard=2",
    "2 tp=2 sp=yes",
    "2 cp=2",
    "2 pp=2",
    "2 pp=2 schedule=interleaved_zero_bubble layers=1",
    "2 ep=2 zero=2",
    "4 ep=2 tp=2 sp=yes zero=3",
    "8 pp=2 cp=2 tp=2 sp=yes",
]
ALL = [f"{layout} {packing}" for layout in LAYOUTS for packing in ("concatenate", "best_fit")]
FAST = {"2 cp=2 best_fit"}


class Read(NamedTuple):
    """A sequence that a process read."""

    place: int  # in the run
    source: str
    number: int  # in its source
    tokens: bytes


def arguments(root: Path, name: str, layout: str, *further: str, last: int = STEPS) -> list[str]:
    """A run of a layout in `root/name`."""
    # Router losses count the rows that fill up a batch, which depend on the layout.
    losses_of_routers = ("expert_auxiliary_loss_coefficient", "expert_z_loss_coefficient")
    experts = [*EXPERTS, *(f"{TRANSFORMER}.{name}=0" for name in losses_of_routers)]
    model = [f"model.base_model.{key}={value}" for key, value in MODEL.items()]
    lines = words(" ".join(word for word in layout.split() if word[0].isdigit() or "=" in word))
    return [
        *(one for one in settings(root) if not one.startswith("data.path")),
        *(experts if "experts" in layout or "ep" in lines else model),
        "data.format=mixture",
        f"data.sources={{a: {root}/a, b: {root}/b, c: {root}/c}}",
        f"data.stages={STAGES}",
        f"data.packing={'best_fit' if 'best_fit' in layout else 'concatenate'}",
        f"batch.batch_size={BATCH}",
        f"training.train_iters={last}",
        "training.checkpoint.interval=1",
        "training.checkpoint.keep=null",
        "training.num_workers=0",
        "optimizer.learning_rate.base=1e-3",
        "optimizer.epsilon=1e-4",  # as in test_layouts.py
        f"run.experiment_dir={root}/{name}",
        *(f"{NAMES[key]}={value}" for key, value in lines.items()),
        *further,
    ]


def reading(given: list[str]) -> tuple[int, list[Read]]:
    """Train; the exit code, and what this process read of training."""
    found, read_one = list[Read](), Dataset.read

    def reported(data: Dataset, split: str, index: int) -> Any:
        packed = read_one(data, split, index)
        if split == "training":
            source, number, _ = data.splits[split].find(index)
            filled = packed.tokens[: len(packed.tokens) - packed.padding]
            found.append(Read(index, source.name[-1], number, filled.astype(np.int64).tobytes()))
        return packed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dataset, "read", reported)
        patch.setattr(Mesh, "close", lambda _: None)  # as in run_all
        return run(given), found


def trained(world: int, given: list[str]) -> list[Read]:
    """Train; each sequence that was read. All processes of a model read the same."""
    results = spawn(world, reading, given)
    assert [code for code, _ in results] == [0] * world
    every = Counter(one for _, found in results for one in found)
    model = validate(TrainConfig, read(None, given)).model.distributed
    copies = (
        model.tensor_parallel * model.pipeline_parallel * model.sequence_data_parallel
    )  # that share a model
    assert set(every.values()) == {copies}
    return sorted(every)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three sources."""
    root = tmp_path_factory.mktemp("stages")
    for name, documents in DOCUMENTS.items():
        write_tokens(root / name, documents)
    return root


_ALONE: dict[str, list[Read]] = {}


def alone(root: Path, layout: str) -> tuple[Path, list[Read]]:
    """The run of one process that a layout must equal, and what it read."""
    kinds = [kind for kind in ("experts", "best_fit") if kind in layout.replace("ep=", "experts=")]
    name = " ".join(["1", *kinds])
    if name not in _ALONE:
        _ALONE[name] = trained(1, arguments(root, name, name))
    return root / name, _ALONE[name]


def check_once(found: list[Read], given: list[str]) -> None:
    """Each sequence is read once, and each source gives its sequences in its own order."""
    assert [one.place for one in found] == list(range(STEPS * BATCH))
    config = validate(TrainConfig, read(None, given))
    seed, length = config.model.distributed.seed, config.batch.sequence_length
    split = open_dataset(config.data, length, seed, 128).splits["training"]
    for source, sampler in zip(split.sources, split.orders[0].samplers, strict=True):
        numbers = [one.number for one in found if one.source == source.name[-1]]
        assert numbers == [sampler.find(place)[1] for place in range(len(numbers))]
        assert len(set(numbers)) == len(numbers)  # of less than an epoch


def check_why(root: Path, name: str, found: list[Read], capsys: pytest.CaptureFixture[str]) -> None:
    """`why --json` names the documents whose tokens were read."""
    made = {source: write_tokens(root / f"again-{source}", n) for source, n in DOCUMENTS.items()}
    shown = []
    for step in range(1, STEPS + 1):
        capsys.readouterr()
        assert main(["why", str(root / name), str(step), "--json"]) == 0
        shown += json.loads(capsys.readouterr().out)["sequences"]
    assert len(shown) == len(found)
    for sequence, one in zip(shown, found, strict=True):
        parts = [
            made[part["file"][-1]][part["document"]][part["first_token"] :][: part["tokens"]]
            for part in sequence["documents"]
        ]
        assert sequence["index"] == one.place
        assert np.concatenate(parts).astype(np.int64).tobytes() == one.tokens


def check_losses(found: Path, expected: Path, steps: range) -> None:
    """Losses, also of each source, and counts are those of the other run."""
    one, other = records(expected), records(found)
    assert set(other) == set(steps)
    for step in steps:
        # As in test_layouts.py: fp32 sums in another order, magnified by updates of Adam.
        wanted = {name: one[step][name] for name in ("language_model_loss", "grad_norm")}
        assert {name: other[step][name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
        for name in ("target_tokens", "consumed_samples", "consumed_tokens", "padding"):
            assert other[step].get(name) == one[step].get(name), (step, name)
        for source, values in one[step]["sources"].items():
            its = other[step]["sources"][source]
            assert its.keys() == values.keys()
            for name, value in values.items():  # None: the source has no target in this step
                assert its[name] == (value and pytest.approx(value, rel=1e-5)), (step, source, name)


@pytest.mark.parametrize("layout", some_fast(ALL, FAST.__contains__))
def test_every_layout_trains_the_same_stages(
    root: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, read_alone = alone(root, layout)
    given = arguments(root, layout, layout)
    found = trained(int(layout.split()[0]), given)
    assert found == read_alone
    check_once(found, given)
    check_losses(root / layout, expected, range(1, STEPS + 1))
    check_why(root, layout, found, capsys)


@slow
@pytest.mark.parametrize(
    "starts",
    [
        [("1", 3), ("4 zero=2 micro=1", 6), ("2 tp=2 sp=yes", 8)],
        [("2 pp=2 best_fit", 2), ("3 zero=3 micro=1", 3), ("4 cp=2 zero=1", 7), ("1", 8)],
        [("8 pp=2 cp=2 tp=2 sp=yes", 3), ("1", 4), ("2 zero=1", 6), ("3 zero=2 micro=1", 8)],
        [("2 ep=2", 3), ("4 ep=2 tp=2 zero=3", 6), ("1 experts", 8)],
        [("1 experts best_fit", 3), ("2 pp=2", 6), ("2 ep=2 zero=3", 7), ("3 zero=1 micro=1", 8)],
    ],
    ids=str,
)
def test_a_run_changes_its_processes_at_borders(
    root: Path, starts: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = [kind for kind in ("experts", "best_fit") if kind in starts[0][0]]
    kinds += ["experts"] * ("ep=" in starts[0][0])
    name, found = " then ".join(layout for layout, _ in starts), list[Read]()
    for layout, last in starts:
        given = arguments(root, name, " ".join([layout, *kinds]), last=last)
        found += trained(int(layout.split()[0]), given)
    expected, read_alone = alone(root, " ".join(kinds))
    assert found == read_alone  # sorted within a start, so also in order over all
    check_once(found, given)
    check_losses(root / name, expected, range(1, STEPS + 1))
    check_why(root, name, found, capsys)


@slow
@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize("step", [2, 3, 4])  # before a border, at it, after it
def test_branches_around_a_border(
    root: Path, step: int, packing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trunk, read_trunk = alone(root, packing)
    origin = f"run.branch_from={{run: {trunk}, step: {step}}}"
    steps = range(step + 1, STEPS + 1)
    for layout in ("1", "2 zero=3", "2 tp=2 sp=yes"):
        name = f"branch {layout} {packing} {step}"
        found = trained(int(layout[0]), arguments(root, name, f"{layout} {packing}", origin))
        assert found == read_trunk[step * BATCH :]
        check_losses(root / name, trunk, steps)
        check_why(root, name, read_trunk[: step * BATCH] + found, capsys)
        if layout == "1":
            ends = [weights(folder / f"checkpoint/{STEPS}") for folder in (root / name, trunk)]
            assert ends[0] == ends[1] and losses(root / name) == {
                step: loss for step, loss in losses(trunk).items() if step in steps
            }


@slow
@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_branch_with_other_stages_continues_each_source(
    root: Path, step: int, packing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stages of the branch count from the start of the trunk, in any layout and after a resume
    in another one.
    """
    trunk, read_trunk = alone(root, packing)
    further = [
        f"run.branch_from={{run: {trunk}, step: {step}}}",
        "data.stages=[{until: 3, weights: {c: 1}}, {until: 5, weights: {a: 1, b: 1}}, {}]",
    ]
    name, found = f"other {packing} {step}", read_trunk[: step * BATCH]
    for layout, last in (("2 zero=2", 5), ("4 cp=2 zero=1", 6), ("1", 8)):
        given = arguments(root, name, f"{layout} {packing}", *further, last=last)
        found += trained(int(layout[0]), given)
    check_once(found, given)
    of_steps = [
        "".join(sorted(one.source for one in found[at : at + BATCH]))
        for at in range(0, STEPS * BATCH, BATCH)
    ]
    assert of_steps[2] == ("cccccccc" if step == 2 else "aaaaaabb")
    assert of_steps[3] == ("bbbbbbbb" if step == 4 else "aaaabbbb")
    assert of_steps[4] == "aaaabbbb"
    check_why(root, name, found, capsys)


@slow
def test_steps_around_a_border_are_trained_again(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest checkpoints are lost, and another number of processes trains the border again."""
    name = "lost"
    first = trained(2, arguments(root, name, "2 zero=2", last=5))
    for step in (3, 4, 5):
        rmtree(root / name / "checkpoint" / str(step))
    again = trained(3, arguments(root, name, "3 zero=3 micro=1"))
    _, read_alone = alone(root, "")
    assert first == read_alone[: 5 * BATCH] and again == read_alone[2 * BATCH :]
    check_losses(root / name, root / "1", range(1, STEPS + 1))
    check_why(root, name, read_alone, capsys)
