"""Rotary positions in config.json: both spellings, and exports that keep the angles."""

import json
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fast_llm.config.rotary import RotaryConfig
from fast_llm.models.rope import rope_problems, rope_scaling, rotary_of, with_length

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LONG = {"rope_type": "longrope", "short_factor": [1.5] * 4, "long_factor": [3.0] * 4}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {**YARN, "beta_fast": 16.0, "truncate": False, "attention_factor": 1.25},
    "longrope": {**LONG, "original_max_position_embeddings": 1024},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 2.0,
        "original_max_position_embeddings": 1024,
    },
}


@pytest.mark.parametrize("name", SCALINGS)
def test_every_spelling_means_the_same(name: str) -> None:
    rope, rest = SCALINGS[name], {"max_position_embeddings": 4096}
    later = {"rope_parameters": {**rope, "rope_theta": 5000.0}, **rest}
    published = {"rope_scaling": rope, "rope_theta": 5000.0, **rest}
    older = {**rope, "type": name}
    del older["rope_type"]
    found = rotary_of(later)
    assert found["type"] == name and found["theta"] == 5000
    assert rotary_of(published) == found
    assert rotary_of({**published, "rope_scaling": older}) == found
    # For layers of two kinds.
    nested = {"full_attention": later["rope_parameters"], "sliding_attention": None}
    both = {**rest, "rope_parameters": nested, "rope_theta": 10.0}
    assert rotary_of(both, "full_attention") == found
    assert rotary_of(both, "sliding_attention") == {"type": "default", "theta": 10.0}


def test_problems_name_the_key_of_the_file() -> None:
    nested = {"rope_parameters": {"full_attention": {"type": "axial"}, "sliding_attention": {}}}
    assert rope_problems(nested, "sliding_attention") == []
    (problem,) = rope_problems(nested, "full_attention", ("default", "yarn"))
    assert problem == ("rope_parameters.full_attention.type", "axial", '"default" or "yarn"')
    (problem,) = rope_problems({"rope_scaling": {"rope_type": None}}, types=("default",))
    assert problem == ("rope_scaling.rope_type", None, '"default"')


@pytest.mark.parametrize("name", SCALINGS)
def test_settings_and_config_json_there_and_back(name: str) -> None:
    rotary = RotaryConfig.model_validate(
        rotary_of({"rope_scaling": SCALINGS[name], "max_position_embeddings": 4096})
    )
    written = {"rope_scaling": rope_scaling(rotary), "rope_theta": rotary.theta}
    longest = rotary.original_context_length if name == "dynamic" else 8192
    back = rotary_of({**written, "max_position_embeddings": longest})
    assert RotaryConfig.model_validate(back) == rotary
    json.dumps(written)


def angles(config: dict[str, Any], length: int) -> torch.Tensor:
    """Cosines and sines of transformers for a sequence of so many tokens."""
    theirs = LlamaConfig(hidden_size=32, num_attention_heads=4, **config)
    found = LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.arange(length)[None])
    return torch.stack(found)


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", [*SCALINGS, "no length", "no factor", "length outside"])
def test_a_longer_context_does_not_change_angles(name: str, spelling: str) -> None:
    rope = {
        **SCALINGS,
        "no length": {"rope_type": "yarn", "factor": 4.0},
        "no factor": {**YARN, "factor": None},
        "length outside": {**LONG, "factor": None},
    }[name]
    config = {spelling: {**rope, "rope_theta": 10000.0}, "max_position_embeddings": 4096}
    if name == "length outside":
        config["original_max_position_embeddings"] = 512
    longer = with_length(json.loads(json.dumps(config)), 6000)
    assert torch.equal(angles(json.loads(json.dumps(longer)), 6000), angles(config, 6000))
    kept = name == "dynamic"  # whose angles depend on the context length of the file
    assert longer["max_position_embeddings"] == (4096 if kept else 6000)
    assert with_length(config, 4096) == config
    # A resumed run trains at the same angles.
    one, two = (RotaryConfig.model_validate(rotary_of(each)) for each in (config, longer))
    assert one == two


def test_a_longer_context_of_layers_of_two_kinds() -> None:
    config = {
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "full_attention": {"rope_type": "yarn", "factor": 4.0},
            "sliding_attention": {"rope_type": "default"},
        },
    }
    longer = with_length(config, 8192)
    named = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    assert longer["rope_parameters"] == {
        "full_attention": named,
        "sliding_attention": {"rope_type": "default"},
    }
    assert longer["max_position_embeddings"] == 8192
