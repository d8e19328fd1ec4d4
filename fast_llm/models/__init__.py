"""Families of models: config.json, parameter names and shapes, FLOPs. No torch.

`models/` describes an architecture; `model/` computes it; `config/model.py` has its settings. A
family is one torch-free file and a row of `FAMILIES`. Other packages read families from here only.
"""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

from fast_llm.config.model import BaseModelConfig
from fast_llm.models import llama
from fast_llm.models.flops import Cost
from fast_llm.models.tensor_plan import TensorPlan


@dataclass(frozen=True)
class Family:
    """The functions and names of one family; models/llama.py documents each."""

    architecture: Callable[[Mapping[str, Any], str], dict[str, Any]]  # config.json → settings
    export_config: Callable[..., dict[str, Any]]  # settings → config.json
    with_length: Callable[[Mapping[str, Any], int], dict[str, Any]]  # config.json, longer context
    shapes: Callable[[BaseModelConfig], dict[str, tuple[int, ...]]]  # of each parameter, by name
    cost: Callable[[BaseModelConfig, float], Cost]  # at a sequence length, in tokens
    tensor_plan: TensorPlan  # how tensor parallelism cuts each module
    embedding: str  # name of the embedding's weight
    head: str  # name of the head's weight
    is_optional_tensor: Callable[[str], bool]  # whether a folder may hold it in addition
    stored_name: Callable[[str, Container[str], Container[str]], str]  # of a parameter, in files


# `model_type` of a config.json → family
FAMILIES = {
    "llama": Family(
        architecture=llama.architecture,
        export_config=llama.export_config,
        with_length=llama.with_length,
        shapes=llama.shapes,
        cost=llama.cost,
        tensor_plan=llama.TENSOR_PLAN,
        embedding=llama.EMBEDDING,
        head=llama.HEAD,
        is_optional_tensor=llama.is_optional_tensor,
        stored_name=llama.stored_name,
    ),
}


def family_of(config: BaseModelConfig) -> Family:
    """The family of a configuration. Everything but the reading of config.json asks here."""
    # All settings of `model.base_model` describe a Llama. A second family needs one that names it.
    return FAMILIES["llama"]


def family_of_json(config: Mapping[str, Any]) -> Family:
    """The family of a config.json, by its `model_type`.

    Llama for an unknown one: its `architecture` then raises and says which types are allowed.
    """
    return FAMILIES.get(str(config.get("model_type")), FAMILIES["llama"])
