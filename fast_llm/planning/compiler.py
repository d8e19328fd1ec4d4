"""`multi_stage.compile_all: auto`: whether the blocks of a run are compiled. No torch.

On where a GPU has shown that compiled blocks compute the same and are faster (docs/gpus.md), off
everywhere else. A run that resumes keeps what it began with: other kernels round differently.
"""

from collections.abc import Mapping
from typing import Any

from fast_llm.config.stages import stage_sizes
from fast_llm.config.train import TrainConfig

COMPILE = "model.multi_stage.compile_all"
# Families whose compiled blocks were compared on a GPU: tests/gpu/families.py, and the recipe.
PROVEN_FAMILIES = (
    *("llama", "qwen2", "qwen3", "mistral", "olmo2", "olmo3", "gemma2", "gemma3_text"),
    *("smollm3", "granite", "phi3", "apertus", "gpt_oss", "qwen3_moe"),
)
_AXES = ("tensor_parallel", "sequence_data_parallel", "pipeline_parallel")


def why_not_compiled(config: TrainConfig, device_kind: str, triton: bool = True) -> str:
    """Why `auto` means no; empty if it means yes.

    `device_kind`: cuda or another. `triton`: whether Triton, which compiled blocks need, is
    installed.
    """
    if device_kind != "cuda":
        return "the CPU has kernels of its own"
    if not config.run.torch_dynamo_enable:
        return "run.torch_dynamo_enable is no"
    if not config.run.enable_triton_kernels:
        return "run.enable_triton_kernels is no"
    if not triton:
        return "Triton is not installed"
    if (family := config.model.base_model.family) not in PROVEN_FAMILIES:
        return f"compiled blocks of {family} are not tested on GPUs yet"
    distributed, multi_stage = config.model.distributed, config.model.multi_stage
    if distributed.expert_parallel > 1:
        return "compiled blocks are not tested with expert_parallel yet"
    used = [axis for axis in _AXES if getattr(distributed, axis) > 1]
    if len(used) > 1:
        return f"compiled blocks are not tested with {' and '.join(used)} together yet"
    schedules = (None, "gpipe", "1f1b")
    if used == ["pipeline_parallel"] and (
        len(stage_sizes(config)) > distributed.pipeline_parallel
        or multi_stage.pipeline_schedule not in schedules
    ):
        return "compiled blocks are not tested with several stages in a process yet"
    return ""


def resolve_compiler(
    config: TrainConfig,
    device_kind: str,
    triton: bool = True,
    before: Mapping[str, Any] | None = None,
) -> bool:
    """Whether blocks are compiled. `before`: the settings in the checkpoint that is resumed."""
    given = config.model.multi_stage.compile_all
    if given != "auto":
        return given
    if why_not_compiled(config, device_kind, triton):
        return False
    return before is None or _was_compiled(before)


def describe_compiler(config: TrainConfig, before: Mapping[str, Any] | None) -> str:
    """What `compile_all` means for a run, for the plan."""
    given = config.model.multi_stage.compile_all
    if given != "auto":
        return "each block, with torch.compile" if given else "not used"
    if reason := why_not_compiled(config, "cuda"):
        return f"not used: {reason}"
    if before is not None:
        kept = "each block" if _was_compiled(before) else "not used"
        return f"on GPUs {kept}, as before the checkpoint; not on the CPU"
    return "on GPUs each block, with torch.compile; not on the CPU"


def _was_compiled(before: Mapping[str, Any]) -> bool:
    """Whether the run that wrote these settings compiled its blocks."""
    multi_stage: Mapping[str, Any] = before.get("model", {}).get("multi_stage", {})
    return multi_stage.get("compile_all", False) is True
