"""Blocks of other families than Llama, on a GPU: losses and gradients against the CPU in fp32.

The CPU's are compared with transformers by the ordinary tests. Documents are packed. Models are
random, and small but for the size of heads, which decides which kernels run.

Bounds: fp32 sums in another order; gradients of query and key norms nearly cancel. bf16 rounds by
2^-9, and its gradients are compared as one vector. A router near a tie chooses another expert in
bf16, so of experts only losses are compared there. The slope of xIELU jumps by 0.8 at 0 and at
-1e-6, as that of transformers does: one of 524,288 activations within rounding of them moves
gradients by a thousandth (seen at -1.16e-6).
"""

from typing import Any

import torch
from torch import Tensor

from fast_llm.config.document import Document
from fast_llm.config.model import BaseModelConfig
from fast_llm.config.validate import validate
from fast_llm.model.attention import PackedSequences
from fast_llm.model.decoder import CausalLM, init_weights
from fast_llm.parallel.single import SingleWeights
from tests.gpu.checks import Rows, distance, report

LENGTHS = (100, 412, 500, 12)  # of documents in two sequences of 512 tokens
WINDOWS = {"window_size": 64, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA = {
    "normalization": {"zero_centered": True},
    "norm_placement": "both",
    "activation_type": "gelu_pytorch_tanh",
    "softmax_scale": 0.1,
}
EXPERTS = {"num_experts": 8, "num_experts_per_token": 2, "expert_hidden_size": 128}
# Like which family → settings of `transformer`, and of the model.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Qwen2": ({"add_linear_biases": "only_attn_qkv"}, {"tie_word_embeddings": True}),
    "Qwen3": ({"qk_norm": "head"}, {}),
    "Mistral": ({"window_size": 64}, {}),
    "OLMo 2": ({"norm_placement": "post", "qk_norm": "projection"}, {}),
    "OLMo 3": ({"norm_placement": "post", "qk_norm": "projection", **WINDOWS}, {}),
    "Gemma 2": (GEMMA | WINDOWS | {"attention_softcap": 50.0}, {"embedding_multiplier": 16.0}),
    "Gemma 3": (
        GEMMA | WINDOWS | {"qk_norm": "head", "sliding_rotary": {"theta": 1e4}},
        {"embedding_multiplier": 16.0, "tie_word_embeddings": True},
    ),
    "SmolLM3": ({"layers_without_rotary": [1]}, {"tie_word_embeddings": True}),
    "Granite": (
        {"softmax_scale": 0.05, "residual_multiplier": 0.22},
        {"embedding_multiplier": 12.0, "logits_divisor": 8.0},
    ),
    "Phi-3": ({"rotary": {"partial_rotary_factor": 0.75}}, {}),
    "Apertus": ({"qk_norm": "head", "gated": False, "activation_type": "xielu"}, {}),
    "gpt-oss": (
        {
            "attention_sinks": True,
            "activation_type": "clamped_swiglu",
            "add_linear_biases": "everywhere",
            **WINDOWS,
            **EXPERTS,
        },
        {},
    ),
    "Qwen3-MoE": ({"qk_norm": "head", **EXPERTS}, {}),
}


def model_config(transformer: dict[str, Any], base: dict[str, Any]) -> BaseModelConfig:
    """Two blocks of 256 dimensions, heads of 64."""
    sizes = {
        "num_layers": 2,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "head_groups": 2,
        "kv_channels": 64,
        "ffn_hidden_size": 512,
    }
    sections = {"vocab_size": 1024, "tie_word_embeddings": False, **base}
    return validate(
        BaseModelConfig, Document({**sections, "transformer": {**sizes, **transformer}}, {}, "")
    )


def losses_and_gradients(
    config: BaseModelConfig, device: str, dtype: torch.dtype, compiled: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of one micro-batch."""
    torch._dynamo.reset()
    with torch.device("meta"):
        model = CausalLM(config, "fused")
    if compiled:
        for block in model.blocks.values():
            block.compile()
    weights = SingleWeights(model, dtype, torch.device(device), device == "cuda")
    with weights.masters(changed=True) as tensors:
        init_weights(tensors, config, 0)
    weights.sync_model_weights()
    tokens = torch.randint(1024, (2, 513), generator=torch.Generator().manual_seed(0)).to(device)
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).view(2, 512).to(device)
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int().to(device)
    documents = PackedSequences(LENGTHS, ends, max(LENGTHS))
    weights.before_micro_batch(True, True)
    loss = model(tokens[:, :-1].contiguous(), positions, documents, tokens[:, 1:].contiguous())
    loss.backward()
    return loss.detach().cpu(), {n: g.cpu() for n, g in weights.local_gradients().items()}


def families() -> Rows:
    for name, (transformer, base) in KINDS.items():
        config = model_config(transformer, base)
        loss, gradients = losses_and_gradients(config, "cpu", torch.float32, False)
        for dtype, compiled in (
            (torch.float32, False),
            (torch.float32, True),
            (torch.bfloat16, False),
            (torch.bfloat16, True),
        ):
            what = f"{name}, {str(dtype).removeprefix('torch.')}{', compiled' * compiled}"
            exact = dtype == torch.float32
            try:
                found, others = losses_and_gradients(config, "cuda", dtype, compiled)
            except Exception as error:
                reason = (str(error).strip() or repr(error)).splitlines()[0][:200]
                yield f"{what}: {reason}", float("inf"), 0
                continue
            assert others.keys() == gradients.keys()
            yield f"{what}: loss", distance(found, loss), 1e-5 if exact else 1e-3
            if exact:
                far = {key: distance(others[key], each) for key, each in gradients.items()}
                worst = max(far, key=lambda key: far[key])
                jumps = transformer.get("activation_type") == "xielu"
                yield f"{what}: gradient of {worst}", far[worst], 3e-3 if jumps else 1e-5
            elif "num_experts" not in transformer:
                one, other = (
                    torch.cat([each[key].flatten().float() for key in gradients])
                    for each in (others, gradients)
                )
                yield f"{what}: gradients", distance(one, other), 3e-2


def main() -> None:
    report(families)


if __name__ == "__main__":
    main()
