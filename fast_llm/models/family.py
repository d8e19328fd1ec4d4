"""What other code asks of a family of models. No torch."""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

from fast_llm.config.model import BaseModelConfig
from fast_llm.models.flops import BlockBackward, Cost
from fast_llm.models.tensor_plan import TensorPlan

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class StoredPart:
    """Where files hold a parameter, or one expert of a parameter: a tensor, or a region of one."""

    name: str  # of the tensor
    shape: tuple[int, ...]  # of the tensor
    region: tuple[slice, ...] = ()  # of the tensor, by its first dimensions; () means all of it
    expert: int | None = None  # of a parameter [experts, …]
    transposed: bool = False  # files have the last two dimensions in the other order


@dataclass(frozen=True)
class Family:
    """The functions and names of one family; config_json.py and parameters.py document each."""

    title: str  # in messages
    class_name: str  # of transformers
    ties: bool  # whether a config.json without `tie_word_embeddings` means yes
    architecture: Callable[[Mapping[str, Any], str], dict[str, Any]]  # config.json → settings
    export_config: Callable[..., dict[str, Any]]  # settings → config.json
    with_length: Callable[[Mapping[str, Any], int], dict[str, Any]]  # config.json, longer context
    notes: Callable[[Mapping[str, Any]], list[str]]  # what of a config.json is not followed
    shapes: Callable[[BaseModelConfig], dict[str, tuple[int, ...]]]  # of each parameter, by name
    # At a sequence length in tokens, and the names of frozen parameters.
    cost: Callable[..., Cost]
    # What the backward passes of blocks and head compute, by the names of frozen parameters.
    backward: Callable[..., tuple[list[BlockBackward], BlockBackward]]
    tensor_plan: Callable[[BaseModelConfig], TensorPlan]  # how tensor parallelism cuts each module
    embedding: str  # name of the embedding's weight
    head: str  # name of the head's weight
    is_optional_tensor: Callable[[str], bool]  # whether a folder may hold it in addition
    stored_name: Callable[[str, Container[str], Container[str]], str]  # of a parameter, in files
    # Where files hold a parameter, by its name and the shapes of all parameters. None if they have
    # it as it is, under `stored_name`.
    stored_parts: Callable[[str, Shapes], list[StoredPart] | None] = lambda name, shapes: None
    # Numbers that files hold in addition, next to a parameter: their names and values.
    constants: Callable[[str], Mapping[str, float]] = lambda name: {}
