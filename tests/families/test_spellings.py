"""Unusual spellings of config.json: read as transformers reads them, or refused.

The loss of a small model, in fp32, sums the same numbers in another order: 1e-6.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fast_llm.errors import CheckpointError
from tests.families.architectures import random_architecture
from tests.families.reference import make, our_loss, read, settings_of, their_loss
from tests.helpers import some_fast

FULL, SLIDING = "full_attention", "sliding_attention"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 77.0}
BOTH = {"layer_types": [FULL, SLIDING], "num_hidden_layers": 2, "sliding_window": 5}
ROPES: list[dict[str, Any]] = [
    {"rope_theta": 50.0},
    {"rope_theta": 50.0, "rope_local_base_freq": 70.0},
    {"rope_theta": 50.0, "rope_scaling": YARN},
    {"rope_theta": 50.0, "rope_parameters": {FULL: YARN, SLIDING: {"rope_type": "default"}}},
    {"rope_local_base_freq": 70.0, "rope_parameters": {SLIDING: {"rope_type": "default"}}},
    {"rope_local_base_freq": 70.0, "rope_parameters": {FULL: LINEAR}},
    {"rope_parameters": {FULL: None, SLIDING: LINEAR}},
    {"rope_parameters": {FULL: {"rope_theta": 50.0}, SLIDING: None}, "rope_scaling": YARN},
    {"rope_parameters": {FULL: LINEAR}, "rope_scaling": {"factor": 2.0}},
]
READ = [(family, rope) for family in ("gemma3_text", "olmo3") for rope in ROPES]
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "gpt_oss",
        {"quantization_config": {"quant_method": "mxfp4"}},
        'quantization_config: given {"quant_method": "mxfp4"}, must be absent: MXFP4 weights cannot'
        " be trained. Save a bf16 copy with AutoModelForCausalLM.from_pretrained(…,"
        " quantization_config=Mxfp4Config(dequantize=True)) and save_pretrained(…)",
    ),
    ("apertus", {"qk_norm": False}, "qk_norm: given false, must be true: transformers ignores it"),
    (
        "apertus",
        {"rope_parameters": None, "rope_theta": 5e5},
        "rope_theta: given 500000.0, must be 12000000.0, or with rope_scaling",
    ),
    (
        "gemma3_text",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
        'rope_parameters: given {"rope_type": "linear", "factor": 4.0}, must be an object of'
        " full_attention and sliding_attention",
    ),
    (
        "olmo3",
        {"rope_parameters": {"rope_theta": 50.0}},
        'rope_parameters: given {"rope_theta": 50.0}, must be an object of full_attention and'
        " sliding_attention",
    ),
    (
        "smollm3",
        {"rope_parameters": {FULL: {"rope_theta": 50.0}}},
        'rope_parameters: given {"full_attention": {"rope_theta": 50.0}}, must be one object for'
        " all layers, with rope_type",
    ),
    (
        "gemma3_text",
        {"attn_logit_softcapping": 50.0},
        "attn_logit_softcapping: given 50.0, must be null: Gemma 3 has no cap of scores",
    ),
    *(
        (
            family,
            {"use_sliding_window": False},
            f"not a {title}'s configuration: layers with sliding_attention need sliding_window,"
            " which is null",
        )
        for family, title in (("smollm3", "SmolLM3"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"))
    ),
    *(
        (
            family,
            {"sliding_window": None, "layer_types": layers},
            f"not a {title}'s configuration: layers with sliding_attention need sliding_window,"
            " which is null",
        )
        for family, title in (
            ("gemma2", "Gemma 2"),
            ("gemma3_text", "Gemma 3"),
            ("olmo3", "OLMo 3"),
        )
        for layers in (None, [FULL, SLIDING])
    ),
]


@pytest.mark.parametrize(("family", "rope"), some_fast(READ, lambda one: one[1] in ROPES[2:4]))
def test_losses(tmp_path: Path, family: str, rope: dict[str, Any]) -> None:
    values = random_architecture(family, 0) | BOTH
    del values["rope_parameters"]
    file = {**values, **rope, "model_type": family}
    # transformers changes what it is given.
    theirs = make(family, json.loads(json.dumps(values | rope)), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(file))
    expected = float(their_loss(theirs).detach())
    assert float(our_loss(read(tmp_path)).detach()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("family", "change", "message"), REFUSED)
def test_refusals(family: str, change: dict[str, Any], message: str) -> None:
    values = random_architecture(family, 0) | BOTH | change
    with pytest.raises(CheckpointError) as caught:
        settings_of({**values, "model_type": family})
    assert str(caught.value) == f"config.json: {message}"


def test_another_number_of_xielu_is_refused(tmp_path: Path) -> None:
    """Its weights would be of another activation."""
    make("apertus", random_architecture("apertus", 0) | {"num_hidden_layers": 1}, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.act_fn.beta"
    save_file(tensors | {name: torch.tensor(0.25)}, path, {"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path)
    assert str(caught.value) == f"{path}: {name} is 0.25, must be 0.5"
