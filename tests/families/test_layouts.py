"""Every family in every kind of layout: gradients of the first step are those of one process.

A checkpoint's first moment is the gradient times 1 - beta1. Differences are at most 1e-5 of a
gradient's norm: fp32, summed in other orders. docs/decisions/bounds-on-every-processor.md has what
was measured against float64.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fast_llm.checkpoint import huggingface
from fast_llm.checkpoint import state as tensor_files
from fast_llm.models import FAMILIES, family_of
from tests.families.architectures import VOCABULARY, architecture
from tests.families.reference import EXPERTS, make, settings_of
from tests.families.test_transformers import larger
from tests.helpers import some_fast, spawn
from tests.training.runs import losses, run_all, write_tokens

D, M = "model.distributed", "model.multi_stage"
# Name → tied embeddings, and settings.
LAYOUTS: dict[str, tuple[bool, list[str]]] = {
    "tp": (False, [f"{D}.tensor_parallel=2"]),
    "tp sp": (True, [f"{D}.tensor_parallel=2", f"{D}.sequence_tensor_parallel=yes"]),
    "pp tied": (True, [f"{D}.pipeline_parallel=2"]),
    "pp": (False, [f"{D}.pipeline_parallel=2"]),
    "cp": (True, [f"{D}.sequence_data_parallel=2"]),
    "zero 3": (
        False,
        [f"{M}.zero_stage=3", "model.base_model.transformer.mlp_recompute_level=selective"],
    ),
}
# Of families whose experts differ from Qwen3-MoE's, which tests/layouts/test_experts.py has.
EXPERT_LAYOUTS = {
    "ep": (False, [f"{D}.expert_parallel=2"]),
    "ep zero 3": (True, [f"{D}.expert_parallel=2", f"{M}.zero_stage=3"]),
}
FAST = "qwen3", "olmo2", "gemma3_text"


def arguments(root: Path, name: str, tied: bool, further: list[str]) -> list[str]:
    return [
        f"pretrained.path={root}/{'tied' if tied else 'untied'}",
        f"data.path={root}/tokens",
        "data.split=[1,0,0]",
        "batch.batch_size=4",
        "batch.micro_batch_size=2",
        "batch.sequence_length=24",
        "training.train_iters=2",
        "training.logs.interval=1",
        "training.checkpoint.interval=1",
        "training.export.interval=2",
        "optimizer.learning_rate.base=1e-4",
        "optimizer.gradient_norm_clipping=1e9",
        f"run.experiment_dir={root}/{name}",
        *further,
    ]


def moments(root: Path, name: str, tied: bool) -> dict[str, Tensor]:
    """The first moments after the first step, by parameter."""
    config = huggingface.read_json(root / ("tied" if tied else "untied") / "config.json")
    model = settings_of(config)
    found = {
        f"exp_avg/{name}": torch.empty(shape)
        for name, shape in family_of(model).shapes(model).items()
    }
    tensor_files.load(root / name / "checkpoint" / "1", found)
    return {name.removeprefix("exp_avg/"): tensor for name, tensor in found.items()}


DENSE = [name for name in FAMILIES if name not in EXPERTS]


@pytest.mark.parametrize("family", some_fast([*DENSE, "gpt_oss"], FAST.__contains__))
def test_gradients_are_those_of_one_process(tmp_path: Path, family: str) -> None:
    write_tokens(tmp_path / "tokens", vocabulary=VOCABULARY)
    for name, tied in (("tied", True), ("untied", False)):
        make(family, architecture(family) | {"tie_word_embeddings": tied}, tmp_path / name)
    alone = [arguments(tmp_path, f"one {tied}", tied, []) for tied in (True, False)]
    assert spawn(1, run_all, alone) == [[0, 0]]
    layouts = LAYOUTS | (EXPERT_LAYOUTS if family in EXPERTS else {})
    together = [
        arguments(tmp_path, name, tied, further) for name, (tied, further) in layouts.items()
    ]
    assert spawn(2, run_all, together) == [[0] * len(together)] * 2
    for name, (tied, _) in layouts.items():
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / f"one {tied}"), rel=1e-6)
        wanted, found = moments(tmp_path, f"one {tied}", tied), moments(tmp_path, name, tied)
        for weight, moment in wanted.items():
            scale = max(moment.norm(), wanted[larger(weight)].norm())
            assert (found[weight] - moment).norm() <= 1e-5 * scale, (name, weight)
        exported = list((tmp_path / name / "export" / family).iterdir())
        assert [folder.name for folder in exported] == ["2"]


@pytest.mark.slow
def test_experts_with_biases_on_two_axes(tmp_path: Path) -> None:
    """Experts are divided, and their matrices cut: one of two processes adds an output's bias."""
    write_tokens(tmp_path / "tokens", vocabulary=VOCABULARY)
    make("gpt_oss", architecture("gpt_oss") | {"tie_word_embeddings": True}, tmp_path / "tied")
    assert spawn(1, run_all, [arguments(tmp_path, "one", True, [])]) == [[0]]
    axes = [f"{D}.expert_parallel=2", f"{D}.tensor_parallel=2"]
    both = arguments(tmp_path, "both", True, [*axes, "batch.micro_batch_size=1"])
    assert spawn(4, run_all, [both]) == [[0]] * 4
    wanted, found = (moments(tmp_path, name, True) for name in ("one", "both"))
    for weight, moment in wanted.items():
        scale = max(moment.norm(), wanted[larger(weight)].norm())
        assert (found[weight] - moment).norm() <= 1e-5 * scale, weight


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_norms_in_bf16_are_as_near_to_fp32_as_in_one_process(tmp_path: Path, family: str) -> None:
    """FSDP2 sums the gradients of replicated weights over tensor ranks in bf16.

    That is one rounding more; the distance to fp32 stays within 1.5 times that of one process.
    """
    write_tokens(tmp_path / "tokens", vocabulary=VOCABULARY)
    make(family, architecture(family) | {"tie_word_embeddings": True}, tmp_path / "tied")
    bf16 = f"{D}.training_dtype=bf16"
    alone = [
        arguments(tmp_path, "fp32", True, []),
        arguments(tmp_path, "bf16", True, [bf16]),
    ]
    assert spawn(1, run_all, alone) == [[0, 0]]
    cut = arguments(tmp_path, "cut", True, [bf16, *LAYOUTS["tp sp"][1]])
    assert spawn(2, run_all, [cut]) == [[0]] * 2
    exact, one, two = (moments(tmp_path, name, True) for name in ("fp32", "bf16", "cut"))
    norms = [name for name in exact if "norm" in name]
    distances = [
        sum(float((found[name] - exact[name]).norm() / exact[name].norm()) for name in norms)
        for found in (one, two)
    ]
    assert distances[1] <= 1.5 * distances[0]
