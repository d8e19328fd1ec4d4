"""Models that cannot be trained here: `model_type` of a config.json → what is different in them."""

_NESTED = (
    "{} models read images too, and nest their text model: save it alone, with"
    " AutoModelForCausalLM.from_pretrained(…) and save_pretrained(…), as {}"
)
_MAMBA = "it has state-space layers, and only attention is computed here"
_LINEAR = "it has layers with linear attention"
_LAYER_NORM = "it has LayerNorm and an MLP without gate"

OTHERS: dict[str, str] = {
    "gemma3": _NESTED.format("gemma3", "gemma3_text"),
    "mistral3": _NESTED.format("mistral3", "ministral3 or mistral"),
    "gemma3n": "it has embeddings in every layer, and layers that share keys and values",
    "gemma4": "it has embeddings in every layer, and layers that share keys and values",
    "gemma4_text": "it has embeddings in every layer, and layers that share keys and values",
    "llama4": "it reads images too, and has experts and chunked attention",
    "llama4_text": "it has experts and chunked attention",
    "mllama": "Llama 3.2 with images has cross attention; its text sizes of 1B and 3B are llama",
    "qwen2_vl": "it reads images too",
    "qwen2_5_vl": "it reads images too",
    "qwen3_vl": "it reads images too",
    "qwen3_next": _LINEAR,
    "qwen3_5": _LINEAR,
    "deepseek_v2": "it has multi-head latent attention",
    "deepseek_v3": "it has multi-head latent attention",
    "kimi_k2": "it has multi-head latent attention",
    "minicpm3": "it has multi-head latent attention",
    "glm4": "it rotates pairs of neighbouring dimensions",
    "glm4_moe": "it has shared experts",
    "cohere": "it computes attention and MLP in parallel, with LayerNorm",
    "cohere2": "it computes attention and MLP in parallel, with LayerNorm",
    "olmo": "OLMo 1 has LayerNorm without weights",
    "olmoe": "it has experts with norms of all queries and keys",
    "phi": _LAYER_NORM,
    "starcoder2": _LAYER_NORM,
    "gpt2": _LAYER_NORM,
    "gpt_neox": _LAYER_NORM,
    "opt": _LAYER_NORM,
    "falcon": _LAYER_NORM,
    "bloom": _LAYER_NORM,
    "nemotron": "it has LayerNorm and squared ReLU",
    "mamba": _MAMBA,
    "mamba2": _MAMBA,
    "jamba": _MAMBA,
    "bamba": _MAMBA,
    "falcon_h1": _MAMBA,
    "nemotron_h": _MAMBA,
    "granitemoehybrid": _MAMBA,
    "granitemoe": "it has experts, with factors of their own",
    "ministral": "its layers alternate between windows and full attention",
    "bert": "it is an encoder",
    "t5": "it has an encoder",
}
