"""What each model family can do here, for `fast-llm models` and docs/families.md. No torch.

Nothing is listed by hand: a small model of each family is checked in each layout as a run would be.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fast_llm.config.checks import violations
from fast_llm.config.document import Document
from fast_llm.config.train import TrainConfig
from fast_llm.config.validate import validate
from fast_llm.models import FAMILIES
from fast_llm.terminal import BOLD, style, table

# Heading → settings of `model`, on two processes.
CAPABILITIES: dict[str, dict[str, dict[str, Any]]] = {
    "TP": {"distributed": {"tensor_parallel": 2}},
    "SP": {"distributed": {"tensor_parallel": 2, "sequence_tensor_parallel": True}},
    "CP": {"distributed": {"sequence_data_parallel": 2}},
    "PP": {"distributed": {"pipeline_parallel": 2}},
    "ZeRO 3": {"multi_stage": {"zero_stage": 3}},
    "EP": {"distributed": {"expert_parallel": 2}},
    "fp8": {"distributed": {"fp8": True, "training_dtype": "bf16"}},
}
# Sizes that two processes can divide, and fp8 matmuls support.
_SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Support:
    """One family, and which capabilities its models have."""

    model_type: str  # of config.json
    title: str
    compared_with: str  # the class of transformers
    capabilities: Mapping[str, bool]


def support() -> list[Support]:
    """All families, in the order of `FAMILIES`."""
    found = []
    for name, family in FAMILIES.items():
        model = family.architecture({**_SIZES, "model_type": name}, "config.json")
        able = {heading: _trains(model, more) for heading, more in CAPABILITIES.items()}
        exports = _trains(model, {}, {"format": name})
        found.append(Support(name, family.title, family.class_name, able | {"export": exports}))
    return found


def as_table(stream: Any = None) -> str:
    """The families as a table; its headings are bold if the stream is a terminal."""
    rows = support()
    headings = ["model_type", "family", *rows[0].capabilities, "compared with"]
    cells = [
        [
            row.model_type,
            row.title,
            *("yes" if able else "-" for able in row.capabilities.values()),
            row.compared_with,
        ]
        for row in rows
    ]
    head, _, body = table(headings, cells).partition("\n")
    return f"{head if stream is None else style(head, stream, BOLD)}\n{body}"


def as_json() -> str:
    """The families as a list of objects."""
    return json.dumps(
        [
            {
                "model_type": row.model_type,
                "family": row.title,
                **{name.lower().replace(" ", "_"): able for name, able in row.capabilities.items()},
                "compared_with": row.compared_with,
            }
            for row in support()
        ],
        indent=2,
    )


def _trains(
    base_model: dict[str, Any],
    model: dict[str, dict[str, Any]],
    export: dict[str, Any] | None = None,
) -> bool:
    """Whether no constraint forbids a run on two processes."""
    values = {
        "model": {"base_model": base_model, **model},
        "training": {"train_iters": 1, **({"export": export} if export else {})},
        "batch": {"batch_size": 2, "sequence_length": 64},
        "data": {"format": "random"},
    }
    config = validate(TrainConfig, Document(values, {}, "models"))
    return not list(violations(config, processes=2))
