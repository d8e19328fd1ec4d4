"""Small random architectures of every family, as transformers configures them."""

import random
from typing import Any

from fast_llm.models import FAMILIES

Values = dict[str, Any]
VOCABULARY = 96
# Positions of the largest test; scaled positions begin within it.
LENGTH = 48


def random_architecture(family: str, seed: int) -> Values:
    """Arguments of the family's configuration class in transformers."""
    rng = random.Random(f"{family} {seed}")
    groups = rng.choice([1, 2, 3])
    heads = groups * rng.choice([2, 4])
    head_dim = rng.choice([6, 8, 16])
    values: Values = {
        "vocab_size": VOCABULARY,
        "hidden_size": heads * head_dim,
        "intermediate_size": rng.choice([20, 33, 48]),
        "num_hidden_layers": rng.randint(1, 4),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": 128,
        "rms_norm_eps": rng.choice([1e-5, 1e-6]),
        "tie_word_embeddings": rng.random() < 0.5,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    rope = {"rope_type": "default", "rope_theta": rng.choice([100.0, 10000.0, 5e5])}
    values["rope_parameters"] = rope
    return values | _OWN.get(family, _nothing)(rng, values)


def architecture(family: str) -> Values:
    """A fixed architecture that two processes can share: every size is even."""
    values = random_architecture(family, 0) | {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    for key, value in (("sliding_window", 7), ("max_window_layers", 1)):
        if key in values:
            values[key] = value
    if "layer_types" in values:
        kinds = ["sliding_attention", "full_attention"]
        values["layer_types"] = kinds * 2
    if "use_sliding_window" in values:
        values["use_sliding_window"] = True
    if "num_local_experts" in values:  # losses of routers depend on micro-batches
        values |= {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}
    if "no_rope_layers" in values:
        values["no_rope_layers"] = [1, 0, 1, 1]
    return values


def family_seeds(count: int) -> list[tuple[str, int]]:
    """`count` architectures of every family."""
    return [(family, seed) for family in FAMILIES for seed in range(count)]


def _nothing(rng: random.Random, values: Values) -> Values:
    return {}


def _llama(rng: random.Random, values: Values) -> Values:
    return {
        "attention_bias": rng.random() < 0.5,
        "mlp_bias": rng.random() < 0.5,
        "head_dim": rng.choice([4, 10]),
    }


def _window(rng: random.Random, values: Values) -> Values:
    layers = values["num_hidden_layers"]
    return {
        "use_sliding_window": rng.random() < 0.7,
        "sliding_window": rng.choice([3, 7, LENGTH]),
        "max_window_layers": rng.randint(0, layers),
    }


def _qwen3(rng: random.Random, values: Values) -> Values:
    own = {"attention_bias": rng.random() < 0.5, "head_dim": rng.choice([4, 10])}
    return _window(rng, values) | own


def _mistral(rng: random.Random, values: Values) -> Values:
    return {"sliding_window": rng.choice([None, 5]), "head_dim": rng.choice([None, 10])}


def _ministral3(rng: random.Random, values: Values) -> Values:
    rope = {
        "rope_type": "yarn",
        "rope_theta": rng.choice([100.0, 1e6]),
        "factor": 4.0,
        "original_max_position_embeddings": rng.choice([8, 16]),
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": rng.choice([0.1, 0.5]),
    }
    return _mistral(rng, values) | {"rope_parameters": rope, "head_dim": rng.choice([8, 10])}


def _granite(rng: random.Random, values: Values) -> Values:
    return {
        "attention_bias": rng.random() < 0.5,
        "mlp_bias": rng.random() < 0.5,
        "embedding_multiplier": rng.choice([1.0, 12.0, 3.3]),
        "logits_scaling": rng.choice([1.0, 8.0, 6.0]),
        "residual_multiplier": rng.choice([1.0, 0.22]),
        "attention_multiplier": rng.choice([1.0, 0.0625, 0.3]),
    }


def _seed_oss(rng: random.Random, values: Values) -> Values:
    biases = rng.choice([(True, False, False), (True, True, False), (False, False, True)])
    keys = "attention_bias", "attention_out_bias", "mlp_bias"
    own = {"head_dim": rng.choice([4, 10]), "attention_dropout": 0.0, "residual_dropout": 0.0}
    return own | dict(zip(keys, biases, strict=True))


def _smollm3(rng: random.Random, values: Values) -> Values:
    own: Values = {
        "no_rope_layer_interval": rng.choice([2, 3, 4]),
        "attention_bias": rng.random() < 0.5,
        "mlp_bias": rng.random() < 0.5,
        "use_sliding_window": rng.random() < 0.5,
        "sliding_window": rng.choice([None, 5]),
    }
    if rng.random() < 0.5:
        layers = values["num_hidden_layers"]
        own["no_rope_layers"] = [rng.randint(0, 1) for _ in range(layers)]
    return own


def _olmo2(rng: random.Random, values: Values) -> Values:
    return {"attention_bias": rng.random() < 0.5}


def _pattern(rng: random.Random) -> Values:
    """More layers than a period has, and an irregular pattern."""
    layers = rng.randint(2, 8)
    own: Values = {"num_hidden_layers": layers, "sliding_window": rng.choice([3, 7])}
    if rng.random() < 0.5:
        kinds = ["full_attention", "sliding_attention"]
        own["layer_types"] = [rng.choice(kinds) for _ in range(layers)]
    return own


def _olmo3(rng: random.Random, values: Values) -> Values:
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 5e5,
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "attention_factor": 1.2,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }
    plain = {"rope_type": "default", "rope_theta": 5e5}
    rope = {
        "full_attention": rng.choice([plain, yarn]),
        "sliding_attention": plain,
    }
    return _olmo2(rng, values) | _pattern(rng) | {"rope_parameters": rope}


def _gemma(rng: random.Random, values: Values) -> Values:
    return {
        "attention_bias": rng.random() < 0.5,
        "head_dim": rng.choice([4, 10]),
        "hidden_act": rng.choice(["gelu", "gelu_pytorch_tanh"]),
    }


def _gemma2(rng: random.Random, values: Values) -> Values:
    return _pattern(rng) | {
        "attention_bias": rng.random() < 0.3,
        "head_dim": rng.choice([4, 10]),
        "query_pre_attn_scalar": rng.choice([4, 10, 24]),
        "attn_logit_softcapping": rng.choice([None, 2.0, 50.0]),
        "final_logit_softcapping": rng.choice([None, 2.0, 30.0]),
    }


def _gemma3(rng: random.Random, values: Values) -> Values:
    plain = {"rope_type": "default", "rope_theta": rng.choice([1e4, 1e6])}
    linear = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    rope = {
        "full_attention": rng.choice([plain, linear]),
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
    own = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    return _gemma2(rng, values) | own | {"rope_parameters": rope}


def _exaone4(rng: random.Random, values: Values) -> Values:
    own = _pattern(rng)
    if rng.random() < 0.3:
        layers = own["num_hidden_layers"]
        return own | {"sliding_window": None, "layer_types": ["full_attention"] * layers}
    return own | {"sliding_window_pattern": 4}


def _phi3(rng: random.Random, values: Values) -> Values:
    share = rng.choice([1.0, 0.5])
    values = {
        "hidden_size": values["num_attention_heads"] * 8,
        "sliding_window": rng.choice([None, 5]),
        "original_max_position_embeddings": rng.choice([16, 64]),
    }
    rope = {
        "rope_type": rng.choice(["default", "longrope"]),
        "rope_theta": rng.choice([100.0, 10000.0]),
        "partial_rotary_factor": share,
    }
    if rope["rope_type"] == "longrope":
        pairs = int(4 * share)
        rope["short_factor"] = [1.0 + 0.1 * rng.random() for _ in range(pairs)]
        rope["long_factor"] = [2.0 + 9 * rng.random() for _ in range(pairs)]
    return values | {"rope_parameters": rope}


def _apertus(rng: random.Random, values: Values) -> Values:
    scaled = {
        "rope_type": "llama3",
        "rope_theta": rng.choice([100.0, 10000.0]),
        "factor": 8.0,
        "original_max_position_embeddings": rng.choice([8, 32]),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    own = {"attention_bias": rng.random() < 0.5, "head_dim": rng.choice([4, 10])}
    return own | {"rope_parameters": rng.choice([scaled, values["rope_parameters"]])}


def _qwen3_moe(rng: random.Random, values: Values) -> Values:
    layers, experts = values["num_hidden_layers"], rng.choice([3, 8, 16])
    return {
        "attention_bias": rng.random() < 0.5,
        "head_dim": rng.choice([4, 10]),
        "use_sliding_window": rng.random() < 0.3,
        "sliding_window": 7,
        "num_experts": experts,
        "num_experts_per_tok": rng.randint(1, min(experts, 4)),
        "moe_intermediate_size": rng.choice([8, 21]),
        "norm_topk_prob": rng.random() < 0.5,
        "decoder_sparse_step": rng.choice([1, 1, 2]),
        "mlp_only_layers": [0] if layers > 1 and rng.random() < 0.5 else [],
    }


def _mixtral(rng: random.Random, values: Values) -> Values:
    experts = rng.choice([2, 5, 8])
    return {
        "sliding_window": rng.choice([None, 5]),
        "head_dim": rng.choice([None, 10]),
        "num_local_experts": experts,
        "num_experts_per_tok": rng.randint(1, min(experts, 3)),
    }


def _gpt_oss(rng: random.Random, values: Values) -> Values:
    layers, experts = values["num_hidden_layers"], rng.choice([3, 4, 8])
    own = _pattern(rng) | {"num_hidden_layers": layers}
    if "layer_types" in own:
        own["layer_types"] = own["layer_types"][:1] * layers
    yarn = {
        "rope_type": "yarn",
        "rope_theta": rng.choice([100.0, 150000.0]),
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": rng.random() < 0.5,
        "original_max_position_embeddings": rng.choice([8, 16]),
    }
    return own | {
        "attention_bias": rng.random() < 0.7,
        "head_dim": rng.choice([4, 10]),
        "rope_parameters": yarn,
        "num_local_experts": experts,
        "num_experts_per_tok": rng.randint(1, 3),
        "swiglu_limit": rng.choice([0.2, 7.0]),
        "swiglu_alpha": rng.choice([1.0, 1.702]),
    }


_OWN = {
    "llama": _llama,
    "qwen2": _window,
    "qwen3": _qwen3,
    "mistral": _mistral,
    "ministral3": _ministral3,
    "granite": _granite,
    "seed_oss": _seed_oss,
    "smollm3": _smollm3,
    "olmo2": _olmo2,
    "olmo3": _olmo3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "exaone4": _exaone4,
    "phi3": _phi3,
    "apertus": _apertus,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "gpt_oss": _gpt_oss,
}
