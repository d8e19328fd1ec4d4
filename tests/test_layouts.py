"""Every layout trains what one process trains: five steps' losses and gradient norms, and every parameter after them.

A layout is the lines that a user adds to the YAML. Each runs as `fast-llm train` does, in processes of its own, and its
checkpoint is read back whole.
"""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fast_llm.checkpoint import state
from fast_llm.config.section import read, validate
from fast_llm.config.train import TrainConfig
from fast_llm.model.cost import shapes
from tests.helpers import spawn
from tests.training.runs import records, run, settings, write_tokens

MODEL = {
    "vocab_size": 128,
    "transformer.num_layers": 4,
    "transformer.hidden_size": 32,
    "transformer.num_attention_heads": 8,
    "transformer.head_groups": 4,
    "transformer.kv_channels": 6,
    "transformer.ffn_hidden_size": 56,
}
# The lines of a layout, by short names.
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
    "flash": "model.base_model.transformer.use_flash_attention",
    "across": "batch.cross_document_attention",
    "depth": "batch.depth_first_micro_batches",
    "micro": "batch.micro_batch_size",
    "dtype": "model.distributed.training_dtype",
}
# What changes the numbers: each has a one-process run of its own to be compared with.
MEANING = ("tied", "biases", "across", "dtype")

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
    # tensor parallelism, with and without sequences cut, with each ZeRO stage and each cross entropy
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
    # all together
    "8 pp=2 cp=2 tp=2 sp=yes",
    "8 pp=2 tp=2 sp=yes zero=3 tied=no",
    # bf16
    "2 zero=2 dtype=bf16",
    "2 tp=2 sp=yes dtype=bf16 micro=8",
    "2 cp=2 dtype=bf16",
    "2 pp=2 dtype=bf16",
    "2 pp=2 schedule=interleaved_zero_bubble layers=1 dtype=bf16",
    "8 pp=2 cp=2 tp=2 sp=yes dtype=bf16",
]


def lines(layout: str) -> list[str]:
    """A layout's lines as overrides."""
    return [f"{NAMES[name]}={value}" for name, _, value in (word.partition("=") for word in layout.split()[1:])]


def arguments(root: Path, name: str, layout: str, steps: int = 5) -> list[str]:
    """A run of a layout in `root/name`."""
    return [
        *settings(root),
        *(f"model.base_model.{key}={value}" for key, value in MODEL.items()),
        "batch.micro_batch_size=2",
        f"training.train_iters={steps}",
        "training.checkpoint.interval=5",
        "optimizer.learning_rate.base=1e-3",
        # Adam divides by the size of a gradient: where that is rounding alone, updates would be noise.
        "optimizer.epsilon=1e-4",
        "optimizer.gradient_norm_clipping=0.5",
        f"run.experiment_dir={root}/{name}",
        *lines(layout),
    ]


def whole(checkpoint: Path, overrides: list[str]) -> dict[str, Tensor]:
    """All that a checkpoint holds."""
    config = validate(TrainConfig, read(None, overrides))
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


@functools.cache
def reference(root: Path, meaning: str) -> Path:
    """The run of one process with the same meaning."""
    name = f"one {meaning}".strip()
    assert spawn(1, run, arguments(root, name, f"1 {meaning}")) == [0]
    return root / name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_five_steps(root: Path, layout: str) -> None:
    meaning = " ".join(word for word in layout.split()[1:] if word.partition("=")[0] in MEANING)
    expected = reference(root, meaning)
    world = int(layout.split()[0])
    assert spawn(world, run, arguments(root, layout, layout)) == [0] * world
    # fp32: sums in another order, 6e-8 an addition, magnified by five updates of Adam: measured 3e-7 and 2e-6.
    # bf16: as above, but 4e-3 a rounding. Micro-batches, cuts of matrices and of sequences are rounded one by one, so
    # sums of rounded parts differ by their rounding: measured 7e-4 (loss), 2e-2 (norm) and 4e-4 (parameters).
    loss_bound, norm_bound, weight_bound = (2e-3, 5e-2, 2e-3) if "bf16" in layout else (1e-5, 1e-5, 1e-5)
    one, other = records(expected), records(root / layout)
    assert one.keys() == other.keys() == set(range(1, 6))
    for step, record in one.items():
        assert other[step]["target_tokens"] == record["target_tokens"]
        assert other[step]["language_model_loss"] == pytest.approx(record["language_model_loss"], rel=loss_bound)
        assert other[step]["grad_norm"] == pytest.approx(record["grad_norm"], rel=norm_bound)
    overrides = arguments(root, layout, layout)
    wanted = whole(expected / "checkpoint" / "5", overrides)
    found = whole(root / layout / "checkpoint" / "5", overrides)
    for name, tensor in wanted.items():
        if name.startswith("exp_avg/"):
            assert tensor.any() and found[name].any(), f"{name}: no gradient"
        if name.startswith("weight/"):
            distance = (found[name] - tensor).norm() / tensor.norm().clamp_min(1e-3)
            assert distance < weight_bound, (name, distance)
    assert np.isfinite(sum(float(tensor.sum()) for tensor in found.values()))
