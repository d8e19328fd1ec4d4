"""Every layout trains what one process trains.

Compared are the losses and gradient norms of five steps, and every parameter after them. A layout
is the lines that a user adds to the YAML. Each runs as `fast-llm train` does, in its own processes;
its checkpoint is then read by one process.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from fast_llm.checkpoint import state
from fast_llm.config.checks import violations
from fast_llm.config.compat import REFUSED, RENAMED
from fast_llm.config.document import read
from fast_llm.config.train import TrainConfig
from fast_llm.config.validate import validate
from fast_llm.demo import RECIPE
from fast_llm.models.parameters import shapes
from tests.helpers import slow, some_fast, spawn
from tests.training.runs import losses, records, run_all, settings, weights, write_tokens

MODEL = {
    "vocab_size": 128,
    "transformer.num_layers": 4,
    "transformer.hidden_size": 32,
    "transformer.num_attention_heads": 8,
    "transformer.head_groups": 4,
    "transformer.kv_channels": 6,
    "transformer.ffn_hidden_size": 56,
}
# The YAML lines of a layout, by short names.
NAMES = {
    "tp": "model.distributed.tensor_parallel",
    "sp": "model.distributed.sequence_tensor_parallel",
    "cp": "model.distributed.sequence_data_parallel",
    "pp": "model.distributed.pipeline_parallel",
    "zero": "model.multi_stage.zero_stage",
    "shard": "model.multi_stage.shard_size",
    "schedule": "model.multi_stage.pipeline_schedule",
    "layers": "model.multi_stage.layers_per_stage",
    "recompute": "model.base_model.transformer.mlp_recompute_level",
    "tied": "model.base_model.tie_word_embeddings",
    "biases": "model.base_model.transformer.add_linear_biases",
    "loss": "model.base_model.cross_entropy_impl",
    "family": "model.base_model.family",
    "window": "model.base_model.transformer.window_size",
    "flash": "model.base_model.transformer.use_flash_attention",
    "across": "batch.cross_document_attention",
    "depth": "batch.depth_first_micro_batches",
    "micro": "batch.micro_batch_size",
    "dtype": "model.distributed.training_dtype",
    "moments": "optimizer.moments_dtype",
    "z": "model.base_model.z_loss_coefficient",
}
# Settings that change the numbers: each has a one-process run of its own as reference.
MEANING = ("z", "tied", "biases", "across", "dtype", "moments", "family", "window")

# Processes, and lines.
LAYOUTS = [
    "1",
    # ZeRO, hybrid sharding, accumulation
    "2 zero=1",
    "3 zero=3",
    "4 zero=2",
    "8 zero=1 micro=1",
    "4 zero=2 shard=2",
    "4 zero=3 shard=1",
    "8 zero=3 shard=4 tied=no micro=1",
    # recomputation
    "2 zero=2 recompute=activation",
    "2 tp=2 sp=yes recompute=activation_and_input micro=8",
    "2 cp=2 recompute=full",
    "4 zero=3 tp=2 sp=yes recompute=selective micro=4",
    "4 pp=2 tp=2 sp=yes recompute=block",
    "2 pp=2 schedule=interleaved_zero_bubble layers=1 recompute=full",
    # tensor parallelism, with and without sequences cut, with each ZeRO stage and each cross
    # entropy
    "2 tp=2 biases=yes micro=4",
    "2 tp=2 sp=yes biases=yes loss=torch micro=8",
    "4 tp=4 sp=yes tied=no micro=8",
    "4 tp=2 zero=1 loss=fused",
    "4 tp=2 sp=yes zero=2 flash=no micro=1",
    "6 tp=2 sp=yes zero=3",
    "8 tp=2 sp=yes zero=3 shard=2 micro=1",
    # context parallelism
    "2 cp=2",
    "4 cp=4 tied=no",
    "4 cp=2 zero=3 micro=1",
    "2 cp=2 across=yes",
    "4 cp=2 shard=1 flash=no",
    "4 cp=2 tp=2 sp=yes zero=2 micro=4",
    # windows shorter and longer than a chunk
    "2 cp=2 family=mistral window=4",
    "4 cp=2 tp=2 sp=yes family=mistral window=11 micro=4",
    # pipelines: each schedule, uneven stages, each ZeRO stage
    "2 pp=2",
    "2 pp=2 tied=no schedule=gpipe zero=1",
    "3 pp=3 micro=1",
    "4 pp=4 tied=no",
    "2 pp=2 schedule=looped_bfs layers=[1,1,2,0]",
    "2 pp=2 schedule=interleaved_1f1b layers=1",
    "2 pp=2 schedule=interleaved_zero_bubble layers=1",
    "2 pp=2 schedule=zbv_zero_bubble layers=1 tied=no",
    "4 pp=2 zero=1",
    "4 pp=2 zero=2 layers=[3,1]",
    "4 pp=2 zero=3 schedule=interleaved_1f1b layers=1",
    "4 pp=2 zero=2 schedule=interleaved_zero_bubble layers=1",
    "4 pp=2 zero=2 schedule=zbv_zero_bubble layers=1 tied=no",
    "4 pp=2 zero=3 shard=1 depth=2 micro=1",
    "4 pp=2 cp=2",
    # all dimensions together
    "8 pp=2 cp=2 tp=2 sp=yes",
    "8 pp=2 tp=2 sp=yes zero=3 tied=no",
    # bf16
    "2 zero=2 dtype=bf16",
    "2 tp=2 sp=yes dtype=bf16 micro=8",
    "2 cp=2 dtype=bf16",
    "2 pp=2 dtype=bf16",
    "2 pp=2 schedule=interleaved_zero_bubble layers=1 dtype=bf16",
    "8 pp=2 cp=2 tp=2 sp=yes dtype=bf16",
    # z-loss
    "2 tp=2 sp=yes z=0.01 micro=4",
    "2 cp=2 z=0.01 loss=torch",
    "2 pp=2 z=0.01 schedule=interleaved_zero_bubble layers=1",
    "4 pp=2 tp=2 sp=yes z=0.01 dtype=bf16",
    # 8-bit moments
    "3 zero=3 moments=int8",
    "4 zero=2 shard=2 moments=int8",
    "2 tp=2 sp=yes micro=4 moments=int8",
    "8 pp=2 cp=2 tp=2 sp=yes moments=int8",
]


# The layouts of `make test`: each kind of one dimension, and each pair of dimensions, once.
FAST = {
    "1",
    "2 zero=1",
    "3 zero=3",
    "2 zero=2 recompute=activation",
    "2 tp=2 sp=yes biases=yes loss=torch micro=8",
    "2 cp=2",
    "2 cp=2 family=mistral window=4",
    "2 pp=2",
    "2 pp=2 schedule=interleaved_zero_bubble layers=1 recompute=full",
    "2 pp=2 schedule=zbv_zero_bubble layers=1 tied=no",
    "2 zero=2 dtype=bf16",
    "2 tp=2 sp=yes dtype=bf16 micro=8",
    "2 pp=2 z=0.01 schedule=interleaved_zero_bubble layers=1",
    "2 tp=2 sp=yes micro=4 moments=int8",
    "4 zero=2 shard=2",
    "4 zero=3 tp=2 sp=yes recompute=selective micro=4",
    "4 cp=2 tp=2 sp=yes zero=2 micro=4",
    "4 pp=2 zero=3 schedule=interleaved_1f1b layers=1",
    "4 pp=2 cp=2",
    "8 pp=2 cp=2 tp=2 sp=yes",
}


def words(layout: str) -> dict[str, str]:
    """A short name for the layout."""
    return {name: value for name, _, value in (word.partition("=") for word in layout.split()[1:])}


def lines(layout: str) -> list[str]:
    """A layout's lines as overrides."""
    return [f"{NAMES[name]}={value}" for name, value in words(layout).items()]


def arguments(root: Path, name: str, layout: str, steps: int = 5) -> list[str]:
    """A run of a layout in `root/name`."""
    return [
        *settings(root),
        *(f"model.base_model.{key}={value}" for key, value in MODEL.items()),
        "batch.micro_batch_size=2",
        f"training.train_iters={steps}",
        f"training.checkpoint.interval={steps}",
        "optimizer.learning_rate.base=1e-3",
        # Adam divides by the size of a gradient: where a gradient is rounding alone, so would be
        # the update.
        "optimizer.epsilon=1e-4",
        "optimizer.gradient_norm_clipping=0.5",
        # also compare the tensors that all processes must hold alike
        "training.double_check.interval=3",
        f"run.experiment_dir={root}/{name}",
        *lines(layout),
    ]


def read_checkpoint(checkpoint: Path, given: list[str]) -> dict[str, Tensor]:
    """All tensors of a checkpoint, read by one process."""
    config = validate(TrainConfig, read(None, given))
    tensors = {
        f"{part}/{name}": torch.full(shape, torch.nan)
        for part in ("weight", "exp_avg", "exp_avg_sq")
        for name, shape in shapes(config.model.base_model).items()
    }
    state.load(checkpoint, tensors)
    return tensors


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokens."""
    root = tmp_path_factory.mktemp("layouts")
    write_tokens(root / "tokens", 400)
    return root


def meaning(layout: str) -> str:
    """The one-process layout that must train the same."""
    return " ".join(
        ["1", *(f"{name}={value}" for name, value in words(layout).items() if name in MEANING)]
    )


def once(function: Callable[..., None]) -> Callable[..., None]:
    """The result of the first call; if that failed, later calls fail with its error."""
    outcomes: dict[tuple[Any, ...], BaseException | None] = {}

    def call(*args: Any) -> None:
        if args not in outcomes:
            outcomes[args] = None
            try:
                function(*args)
            except BaseException as error:
                outcomes[args] = error
        if (failure := outcomes[args]) is not None:
            raise failure

    return call


@once
def trained(root: Path, world: int, fast: bool) -> None:
    """Train the fast layouts of `world` processes, or the slow ones."""
    layouts = [layout for layout in LAYOUTS if (layout in FAST) == fast]
    if world == 1:
        known = {meaning(layout) for layout in FAST}
        layouts = sorted(known if fast else {meaning(layout) for layout in layouts} - known)
    layouts = [layout for layout in layouts if int(layout.split()[0]) == world]
    every = [arguments(root, layout, layout) for layout in layouts]
    assert spawn(world, run_all, every, timeout=240) == [[0] * len(every)] * world


@pytest.mark.parametrize("layout", some_fast(LAYOUTS, FAST.__contains__))
def test_five_steps(root: Path, layout: str) -> None:
    expected = meaning(layout)
    trained(root, 1, True)
    trained(root, 1, layout in FAST)
    trained(root, int(layout.split()[0]), layout in FAST)
    # fp32: sums in another order, 6e-8 an addition, magnified by five updates of Adam: measured
    # 3e-7 and 2e-6. bf16: as above, but 4e-3 a rounding. Micro-batches, cuts of matrices and of
    # sequences are rounded one by one, so sums of rounded parts differ by their rounding: measured
    # 7e-4 (loss), 2e-2 (norm) and 4e-4 (parameters). 8-bit moments: chances go by the place within
    # a shard, 12 % of an update: measured 5e-5 (loss), 3e-4 (norm), 1.6e-3 (parameters, of the
    # fifth that they move).
    bounds = {"bf16": (2e-3, 5e-2, 2e-3), "int8": (2e-4, 1e-3, 5e-3)}
    rounded = next((word for word in bounds if word in layout), "")
    loss_bound, norm_bound, weight_bound = bounds.get(rounded, (1e-5, 1e-5, 1e-5))
    one, other = records(root / expected), records(root / layout)
    assert one.keys() == other.keys() == set(range(1, 6))
    for step, record in one.items():
        assert other[step]["target_tokens"] == record["target_tokens"]
        assert ("z_loss" in record) == ("z=" in layout)
        if "z_loss" in record:
            assert other[step]["z_loss"] == pytest.approx(record["z_loss"], rel=loss_bound)
        assert other[step]["language_model_loss"] == pytest.approx(
            record["language_model_loss"], rel=loss_bound
        )
        assert other[step]["grad_norm"] == pytest.approx(record["grad_norm"], rel=norm_bound)
    (log, *_) = sorted((root / layout / "runs" / "0" / "logs").glob("logs_rank_*.txt"))
    assert (
        "Corruption check at step 3: " in log.read_text()
        and "only the latter are compared" not in log.read_text()
    )
    given = arguments(root, layout, layout)
    wanted = read_checkpoint(root / expected / "checkpoint" / "5", given)
    found = read_checkpoint(root / layout / "checkpoint" / "5", given)
    for name, tensor in wanted.items():
        if name.startswith("exp_avg/"):
            assert tensor.any() and found[name].any(), f"{name}: no gradient"
        if name.startswith("weight/"):
            distance = (found[name] - tensor).norm() / tensor.norm().clamp_min(1e-3)
            assert distance < weight_bound, (name, distance)
    assert np.isfinite(sum(float(tensor.sum()) for tensor in found.values()))


# Layouts between which a run may change.
RESUMED = [
    "1",
    "3 zero=3",
    "2 tp=2 sp=yes micro=4",
    "4 cp=2 zero=1 shard=2",
    "2 pp=2 schedule=interleaved_1f1b layers=1",
    "8 pp=2 cp=2 tp=2 sp=yes zero=2",
]


# Of the layouts of at most three processes, `make test` has the pairs of each with itself and with
# the next one; `make test-all` has all pairs.
PAIRS = [(before, after) for before in RESUMED for after in RESUMED]
SMALL = [layout for layout in RESUMED if int(layout[0]) <= 3]
FAST_PAIRS = {
    pair for place, one in enumerate(SMALL) for pair in ((one, one), (SMALL[place - 1], one))
}


@once
def begun(root: Path, layout: str) -> None:
    """Train a layout for five steps without a break, and for three."""
    every = [
        arguments(root, f"{layout} to 5", layout),
        arguments(root, f"{layout} to 3", layout, 3),
    ]
    world = int(layout.split()[0])
    assert spawn(world, run_all, every, timeout=240) == [[0, 0]] * world


@once
def continued(root: Path, fast: bool) -> None:
    """Train two more steps after the three, for the fast pairs or the slow ones."""
    for layout in SMALL if fast else RESUMED:
        begun(root, layout)
    for layout in RESUMED:
        every = []
        for before, after in PAIRS:
            if after == layout and ((before, after) in FAST_PAIRS) == fast:
                name = f"{before} then {after}"
                copytree(root / f"{before} to 3" / "checkpoint", root / name / "checkpoint")
                every.append([*arguments(root, name, after), "training.export.interval=5"])
        world = int(layout.split()[0])
        if every:
            assert spawn(world, run_all, every, timeout=240) == [[0] * len(every)] * world


@pytest.mark.parametrize(("before", "after"), some_fast(PAIRS, FAST_PAIRS.__contains__))
def test_resume(root: Path, before: str, after: str) -> None:
    continued(root, (before, after) in FAST_PAIRS)
    name = f"{before} then {after}"
    expected, found = losses(root / f"{after} to 5"), losses(root / name)
    assert found.keys() == {4, 5}
    for step, loss in found.items():
        assert loss == pytest.approx(expected[step], rel=2e-6)
    if before == after:
        assert found == {step: expected[step] for step in found}
        one, other = (
            weights(root / folder / "checkpoint" / "5") for folder in (name, f"{after} to 5")
        )
        assert one == other and one


@slow
def test_one_checkpoint_exports_to_the_same_bytes(root: Path) -> None:
    """Any layout exports the same bytes, on whichever processes its weights are."""
    begun(root, "8 pp=2 cp=2 tp=2 sp=yes zero=2")
    exports = {}
    for layout in RESUMED:
        name = f"export {layout}"
        copytree(
            root / "8 pp=2 cp=2 tp=2 sp=yes zero=2 to 5" / "checkpoint", root / name / "checkpoint"
        )
        given = [*arguments(root, name, layout), "training.export.interval=5"]
        world = int(layout.split()[0])
        assert spawn(world, run_all, [given]) == [[0]] * world
        folder = root / name / "export" / "llama" / "5"
        exports[layout] = {
            path.name: path.read_bytes()
            for path in folder.iterdir()
            if path.suffix == ".safetensors"
        }
        assert exports[layout]
    assert len({tuple(sorted(files.items())) for files in exports.values()}) == 1


@slow
def test_each_starts_from_a_model_and_validates_alike(root: Path) -> None:
    """Every layout starts from a Hugging Face folder, with equal validation losses."""
    made = "made"
    assert spawn(1, run_all, [[*arguments(root, made, "1", 1), "training.export.interval=1"]]) == [
        [0]
    ]
    measured = {}
    for layout in RESUMED:
        name = f"start {layout}"
        given = [
            *arguments(root, name, layout, 1),
            f"pretrained.path={root}/{made}/export/llama/1",
            "training.validation.interval=1",
            "training.validation.iterations=2",
        ]
        world = int(layout.split()[0])
        assert spawn(world, run_all, [given]) == [[0]] * world
        measured[layout] = losses(root / name, "validation")
    expected = measured["1"]
    assert expected.keys() == {0, 1} and expected[1] < expected[0]
    for layout, found in measured.items():
        assert found == {step: pytest.approx(loss, rel=1e-6) for step, loss in expected.items()}, (
            layout
        )


def test_the_layouts_of_the_guide_are_valid() -> None:
    """Each YAML block of docs/layouts.md, added to the recipe, on its number of processes."""
    guide = (Path(__file__).parent.parent.parent / "docs" / "layouts.md").read_text()
    blocks = re.findall(r"^```yaml\n# processes: (\d+)\n(.*?)^```", guide, flags=re.M | re.S)
    assert len(blocks) == guide.count("```yaml") == 3
    for processes, block in blocks:
        recipe = read(RECIPE, [*LLAMA_8B, *overrides(yaml.safe_load(block))])
        config = validate(TrainConfig, recipe, REFUSED, RENAMED)
        assert list(violations(config, int(processes))) == []
    (command,) = re.findall(r"^```bash\n(.*?)^```", guide, flags=re.M | re.S)
    command = command.replace("fast-llm ", f"{sys.executable} -m fast_llm.cli ")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "8, zero_stage 1, tensor parallel 2" in done.stdout


LLAMA_8B = [
    "model.base_model.vocab_size=128256",
    "model.base_model.transformer.num_layers=32",
    "model.base_model.transformer.hidden_size=4096",
    "model.base_model.transformer.num_attention_heads=32",
    "model.base_model.transformer.head_groups=8",
    "model.base_model.transformer.ffn_hidden_size=14336",
]


def overrides(values: dict[str, Any], above: str = "") -> list[str]:
    """Nested values as overrides."""
    found = []
    for key, value in values.items():
        found += (
            overrides(value, f"{above}{key}.")
            if isinstance(value, dict)
            else [f"{above}{key}={value}"]
        )
    return found
