"""Families of models. A family is one torch-free file and a row of this table.

The file says what the family's config.json means in our settings, and back; the names and shapes of
its parameters; and what it costs. `model/` computes what the settings describe.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fast_llm.config.model import BaseModelConfig
from fast_llm.models import llama
from fast_llm.models.flops import Cost
from fast_llm.models.tensor_plan import TensorPlan


@dataclass(frozen=True)
class Family:
    """What a family's file provides."""

    architecture: Callable[[Mapping[str, Any], str], dict[str, Any]]  # config.json → settings
    export_config: Callable[..., dict[str, Any]]  # settings → config.json
    shapes: Callable[[BaseModelConfig], dict[str, tuple[int, ...]]]  # of each parameter, by name
    cost: Callable[[BaseModelConfig, float], Cost]  # at a sequence length, in tokens
    tensor_plan: TensorPlan  # how tensor parallelism cuts each module


# `model_type` of a config.json → family
FAMILIES = {
    "llama": Family(
        llama.architecture, llama.export_config, llama.shapes, llama.cost, llama.TENSOR_PLAN
    ),
}


def architecture(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The values of `model.base_model` for a config.json, read by the family of its `model_type`.

    `source` names the file in errors. Raises CheckpointError for a model that cannot be trained.
    """
    family = FAMILIES.get(str(config.get("model_type")), FAMILIES["llama"])
    return family.architecture(config, source)
