"""Names of the families of models, which are `model_type` in config.json.

`fast_llm.models.FAMILIES` has a row for each.
"""

from typing import Literal

FamilyName = Literal[
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "ministral3",
    "granite",
    "seed_oss",
    "smollm3",
    "olmo2",
    "olmo3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "exaone4",
    "phi3",
    "apertus",
    "qwen3_moe",
    "mixtral",
    "gpt_oss",
]
