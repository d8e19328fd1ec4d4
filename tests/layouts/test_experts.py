"""Every layout trains a model with experts as one process does: losses, norms and parameters."""

from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from torch import Tensor

from fast_llm.checkpoint import state
from fast_llm.config.document import read
from fast_llm.config.train import TrainConfig
from fast_llm.config.validate import validate
from fast_llm.models import family_of
from tests.helpers import some_fast, spawn
from tests.layouts import test_layouts
from tests.training.runs import records, run_all, settings, write_tokens

TRANSFORMER = "model.base_model.transformer"
EXPERTS = [
    "model.base_model.family=qwen3_moe",
    f"{TRANSFORMER}.qk_norm=head",
    f"{TRANSFORMER}.num_layers=4",
    f"{TRANSFORMER}.hidden_size=32",
    f"{TRANSFORMER}.num_attention_heads=8",
    f"{TRANSFORMER}.head_groups=4",
    f"{TRANSFORMER}.kv_channels=6",
    f"{TRANSFORMER}.ffn_hidden_size=56",
    f"{TRANSFORMER}.num_experts=6",
    f"{TRANSFORMER}.num_experts_per_token=2",
    f"{TRANSFORMER}.expert_hidden_size=24",
    f"{TRANSFORMER}.layers_without_experts=[1]",
    f"{TRANSFORMER}.expert_auxiliary_loss_coefficient=0.05",
    f"{TRANSFORMER}.expert_z_loss_coefficient=0.01",
    f"{TRANSFORMER}.expert_bias_update_rate=0.01",
]
NAMES = {**test_layouts.NAMES, "ep": "model.distributed.expert_parallel"}
# A step has 12 sequences. The load that balancing sees depends on how these are divided into
# micro-batches one after another, so rows with two of these are compared with "1 micro=6".
LAYOUTS = [
    "2 zero=1 micro=6",
    "4 zero=3 micro=3",
    "3 zero=2 micro=4",
    "2 tp=2 micro=12",
    "2 tp=2 sp=yes micro=12",
    "2 cp=2 micro=12",
    "2 pp=2 micro=6",
    "2 ep=2 micro=6",
    "3 ep=3 micro=4",
    "2 ep=2 zero=3 micro=6 recompute=full",
    "4 ep=2 zero=1 micro=3",
    "4 ep=2 zero=2 micro=3 recompute=selective",
    "4 ep=2 zero=3 micro=3 recompute=block",
    "4 ep=2 shard=2 micro=3",
    "4 ep=2 cp=2 micro=6",
    "4 ep=2 tp=2 micro=6",
    "4 ep=2 tp=2 sp=yes micro=6 zero=3",
    "8 ep=2 tp=2 sp=yes zero=2 micro=3",
    "8 ep=2 shard=4 cp=2 zero=3 micro=3",
]
# Two micro-batches of the same sequences on one process.
LAYOUTS_OF_TWO = [
    "4 pp=2 ep=2 micro=3",
    "2 pp=2 micro=6",
    "2 pp=2 schedule=interleaved_1f1b layers=1 micro=6",
]
FAST = {"2 zero=1 micro=6", "4 ep=2 tp=2 sp=yes micro=6 zero=3", "2 pp=2 micro=6"}
ALL = [layout for layout in LAYOUTS if "pp=" not in layout] + LAYOUTS_OF_TWO


def arguments(root: Path, name: str, layout: str, steps: int = 5) -> list[str]:
    """A run of a layout in `root/name`."""
    return [
        *settings(root),
        *EXPERTS,
        "batch.batch_size=12",
        f"training.train_iters={steps}",
        f"training.checkpoint.interval={steps}",
        "optimizer.learning_rate.base=1e-3",
        "optimizer.epsilon=1e-4",
        "optimizer.gradient_norm_clipping=0.5",
        "training.double_check.interval=3",
        f"run.experiment_dir={root}/{name}",
        *(f"{NAMES[key]}={value}" for key, value in test_layouts.words(layout).items()),
    ]


def read_checkpoint(checkpoint: Path, given: list[str]) -> dict[str, Tensor]:
    """All weights and moments of a checkpoint, read by one process."""
    base = validate(TrainConfig, read(None, given)).model.base_model
    tensors = {
        f"{part}/{name}": torch.full(shape, torch.nan)
        for part in ("weight", "exp_avg", "exp_avg_sq")
        for name, shape in family_of(base).shapes(base).items()
    } | {
        f"router_bias/layers.{layer}": torch.full((base.transformer.num_experts,), torch.nan)
        for layer in base.transformer.expert_layers()
    }
    state.load(checkpoint, tensors)
    return tensors


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("experts")
    write_tokens(root / "tokens", 400)
    return root


def train(root: Path, name: str, layout: str, steps: int = 5, *further: str) -> None:
    if not (root / name).exists() or further:
        world = int(layout.split()[0])
        given = [*arguments(root, name, layout, steps), *further]
        assert spawn(world, run_all, [given], timeout=240) == [[0]] * world


def compare(root: Path, expected: str, found: str, layout: str) -> None:
    one, other = records(root / expected), records(root / found)
    for step, record in other.items():
        names = ("language_model_loss", "grad_norm", "expert_auxiliary_loss", "expert_z_loss")
        for name in names:
            # fp32, with sums in another order.
            assert record[name] == pytest.approx(one[step][name], rel=1e-5), (step, name)
        assert record["expert_load"] == one[step]["expert_load"]
    given = arguments(root, found, layout)
    wanted = read_checkpoint(root / expected / "checkpoint" / "5", given)
    tensors = read_checkpoint(root / found / "checkpoint" / "5", given)
    for name, tensor in wanted.items():
        if name.startswith("exp_avg/"):
            assert tensor.any() and tensors[name].any(), f"{name}: no gradient"
        if name.startswith("router_bias/"):
            # Sums of ±0.01 over five steps, by integer counts: equal to the bit.
            assert tensor.any() and torch.equal(tensors[name], tensor), name
        if name.startswith("weight/"):
            distance = (tensors[name] - tensor).norm() / tensor.norm().clamp_min(1e-3)
            assert distance < 1e-5, (name, distance)


@pytest.mark.parametrize("layout", some_fast(ALL, FAST.__contains__))
def test_five_steps(root: Path, layout: str) -> None:
    expected = "1 micro=6" if layout in LAYOUTS_OF_TWO else "1 micro=12"
    train(root, expected, expected)
    train(root, layout, layout)
    assert records(root / layout).keys() == set(range(1, 6))
    compare(root, expected, layout, layout)


PAIRS: list[Any] = [
    ("4 ep=2 zero=1 micro=3", "1 micro=12"),
    ("1 micro=12", "4 ep=2 tp=2 sp=yes micro=6 zero=3"),
    ("3 ep=3 micro=4", "2 ep=2 micro=6"),
]


@pytest.mark.parametrize(("before", "after"), some_fast(PAIRS, PAIRS[:1].__contains__))
def test_resume(root: Path, before: str, after: str) -> None:
    train(root, "1 micro=12", "1 micro=12")
    name = f"{before} to 3"
    train(root, name, before, 3)
    then = f"{before} then {after}"
    copytree(root / name / "checkpoint", root / then / "checkpoint")
    train(root, then, after, 5, "training.export.interval=5")
    assert records(root / then).keys() == {4, 5}
    compare(root, "1 micro=12", then, after)
