"""config.json ↔ settings, and parameters and FLOPs against published numbers."""

import json
from typing import Any

import pytest

from fast_llm.config.model import BaseModelConfig, TransformerConfig
from fast_llm.errors import CheckpointError
from fast_llm.models import llama
from fast_llm.models.flops import peak_flops
from fast_llm.models.parameters import cost, shapes
from tests.helpers import TINY
from tests.models.published import LLAMA_8B_JSON

LLAMA_8B = BaseModelConfig(
    vocab_size=128256,
    tie_word_embeddings=False,
    transformer=TransformerConfig(
        num_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        head_groups=8,
        ffn_hidden_size=14336,
    ),
)


def test_llama_8b() -> None:
    found = cost(LLAMA_8B, 4096)
    assert found.parameters == 8_030_261_248  # as published with the model
    # 10,100 tokens/s at 487 TFLOP/s, the pair that Fast-LLM published: 48.2 GFLOP a token.
    assert round(found.model_flops_per_token / 1e9, 2) == 48.25
    assert found.hardware_flops_per_token - found.model_flops_per_token == 6 * 32 * 4096 * 4096 / 6


def test_peaks() -> None:
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("Some other device") is None


MINIMAL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def test_llama_3_1_as_published() -> None:
    assert llama.FAMILY.architecture(LLAMA_8B_JSON, "config.json") == {
        "family": "llama",
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "embedding_multiplier": 1.0,
        "logits_divisor": 1.0,
        "logits_softcap": None,
        "transformer": {
            "num_layers": 32,
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "head_groups": 8,
            "kv_channels": 128,
            "ffn_hidden_size": 14336,
            "gated": True,
            "activation_type": "silu",
            "add_linear_biases": "nowhere",
            "normalization": {"type": "rms_norm", "epsilon": 1e-5, "zero_centered": False},
            "norm_placement": "pre",
            "qk_norm": "none",
            "layer_types": None,
            "window_size": None,
            "softmax_scale": None,
            "attention_softcap": None,
            "attention_sinks": False,
            "attention_temperature": None,
            "residual_multiplier": 1.0,
            "num_experts": 1,
            "num_experts_per_token": 1,
            "expert_hidden_size": None,
            "layers_without_experts": [],
            "rotary": {
                "type": "llama3",
                "theta": 500000.0,
                "scale_factor": 8.0,
                "low_frequency_factor": 1.0,
                "high_frequency_factor": 4.0,
                "original_context_length": 8192,
            },
            "sliding_rotary": None,
            "layers_without_rotary": [],
        },
    }
    model = BaseModelConfig.model_validate(llama.FAMILY.architecture(LLAMA_8B_JSON, "config.json"))
    assert sum(a * (b[0] if b else 1) for a, *b in shapes(model).values()) == 8_030_261_248


def test_both_spellings_mean_the_same() -> None:
    later = {
        k: v
        for k, v in LLAMA_8B_JSON.items()
        if k not in ("rope_scaling", "rope_theta", "torch_dtype")
    }
    later |= {
        "rope_parameters": {**LLAMA_8B_JSON["rope_scaling"], "rope_theta": 500000.0},
        "dtype": "bfloat16",
    }
    assert llama.FAMILY.architecture(later, "") == llama.FAMILY.architecture(LLAMA_8B_JSON, "")
    older = {**LLAMA_8B_JSON, "rope_scaling": {**LLAMA_8B_JSON["rope_scaling"], "type": "llama3"}}
    del older["rope_scaling"]["rope_type"]
    assert llama.FAMILY.architecture(older, "") == llama.FAMILY.architecture(LLAMA_8B_JSON, "")


def test_absent_or_null_keys_have_the_defaults_of_transformers() -> None:
    nulls = dict.fromkeys(
        ("num_key_value_heads", "head_dim", "rope_scaling", "quantization_config")
    )
    for config in (MINIMAL, MINIMAL | nulls):
        found = llama.FAMILY.architecture(config, "")
        assert found["tie_word_embeddings"] is False
        assert found["max_position_embeddings"] == 2048
        assert found["transformer"]["head_groups"] == 4
        assert found["transformer"]["kv_channels"] == 16
        assert found["transformer"]["add_linear_biases"] == "nowhere"
        assert found["transformer"]["normalization"]["epsilon"] == 1e-6
        assert found["transformer"]["rotary"] == {"type": "default", "theta": 10000.0}


@pytest.mark.parametrize(
    ("attention", "mlp", "expected"),
    [
        (True, True, "everywhere"),
        (True, False, "only_attention"),
        (False, True, "only_mlp"),
        (False, False, "nowhere"),
    ],
)
def test_biases(attention: bool, mlp: bool, expected: str) -> None:
    found = llama.FAMILY.architecture({**MINIMAL, "attention_bias": attention, "mlp_bias": mlp}, "")
    assert found["transformer"]["add_linear_biases"] == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, 'hidden_act: given "gelu", must be "silu"'),
        (
            {"quantization_config": {"bits": 4}},
            r'quantization_config: given {"bits": 4}, must be absent: unquantized',
        ),
        (
            {"auto_map": {"AutoModel": "evil.Model"}},
            "auto_map: given .* must be absent: no code of a model is run",
        ),
        (
            {"rope_scaling": {"type": "su", "factor": 2.0}},
            'rope_scaling.type: given "su", must be "default", "linear", "dynamic", "yarn",'
            ' "llama3" or "longrope"',
        ),
        (
            {"rope_parameters": {"rope_type": "proportional"}},
            'rope_parameters.rope_type: given "proportional", must be "default"',
        ),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "short_factor is missing"),
        (
            {"rope_scaling": ["linear"]},
            'rope_scaling: given \\["linear"\\], must be an object or null',
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: given 0.5, must be 1"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.25}},
            "partial_rotary_factor: given 0.25, must be 1",
        ),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"num_attention_heads": 0}, "not a Llama's configuration"),
        ({"num_attention_heads": "four"}, "not a Llama's configuration"),
        ({"rope_theta": None}, "not a Llama's configuration"),
    ],
)
def test_unsupported_settings_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        llama.FAMILY.architecture({**MINIMAL, **changes}, "folder/config.json")
    assert str(caught.value).startswith("folder/config.json: ")


@pytest.mark.parametrize("key", sorted(MINIMAL.keys() - {"model_type"}))
def test_missing_keys_are_named(key: str) -> None:
    with pytest.raises(
        CheckpointError, match=f"config.json: {key} is missing; it is not a Llama's"
    ):
        llama.FAMILY.architecture({k: v for k, v in MINIMAL.items() if k != key}, "config.json")


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(CheckpointError) as caught:
        llama.FAMILY.architecture(
            {**MINIMAL, "hidden_act": "relu", "auto_map": {"a": "b"}}, "config.json"
        )
    assert len(str(caught.value).splitlines()) == 2


def test_exports_keep_the_original_but_for_the_dtype() -> None:
    model = BaseModelConfig.model_validate(llama.FAMILY.architecture(LLAMA_8B_JSON, ""))
    exported = llama.FAMILY.export_config(LLAMA_8B_JSON, model, "fp32", {"bos": 1, "eos": 2})
    assert json.dumps(exported) == json.dumps(
        {**LLAMA_8B_JSON, "torch_dtype": "float32"}
    )  # the order too
    later = {"dtype": "float32", **{k: v for k, v in LLAMA_8B_JSON.items() if k != "torch_dtype"}}
    assert json.dumps(llama.FAMILY.export_config(later, model, "bf16", {})) == json.dumps(
        {**later, "dtype": "bfloat16"}
    )
    both = {"dtype": "float32", "torch_dtype": "float32", **MINIMAL}
    assert llama.FAMILY.export_config(both, model, "fp16", {}) == {
        **both,
        "dtype": "float16",
        "torch_dtype": "float16",
    }
    assert llama.FAMILY.export_config(MINIMAL, model, "bf16", {}) == {
        **MINIMAL,
        "torch_dtype": "bfloat16",
    }


def test_exports_from_scratch_are_complete() -> None:
    model = BaseModelConfig.model_validate(llama.FAMILY.architecture(LLAMA_8B_JSON, ""))
    exported = llama.FAMILY.export_config(None, model, "bf16", {"bos": 128000, "eos": 128001})
    assert {k: v for k, v in exported.items() if k != "head_dim"} == {
        k: v for k, v in LLAMA_8B_JSON.items() if k != "transformers_version"
    }
    assert exported["head_dim"] == 128
    tiny = BaseModelConfig.model_validate(TINY)
    assert (
        llama.FAMILY.architecture(llama.FAMILY.export_config(None, tiny, "fp32", {}), "")[
            "transformer"
        ]["num_layers"]
        == 2
    )
