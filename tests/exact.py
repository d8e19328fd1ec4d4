"""A plain float64 implementation of Llama: the reference for two computations in fp32.

Two fp32 results with sums in different orders differ by the rounding of both. How much depends on
the processor, whose vector width and blocking decide the order. So tests compare each of the two
with float64: our error may be that of the other, times a small factor.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fast_llm.config.model import BaseModelConfig
from fast_llm.model.rope import frequencies

IGNORE_INDEX = -100


def logits(
    weights: Mapping[str, Tensor],
    config: BaseModelConfig,
    tokens: Tensor,
    positions: Tensor,
    lengths: tuple[int, ...],
) -> Tensor:
    """Logits [T, V], float64, of tokens [T] at positions [T] in documents of these lengths.

    `weights` have Hugging Face's names. Rotary angles are fp32 by definition (as in transformers);
    all else is float64.
    """
    transformer = config.transformer
    width, epsilon = transformer.kv_channels, transformer.normalization.epsilon
    angles = (positions[:, None].float() * frequencies(transformer.rotary, width)).double()  # T D/2
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    hidden_from = (number[:, None] != number[None]) | torch.ones(
        len(tokens), len(tokens), dtype=torch.bool
    ).triu(1)

    def linear(x: Tensor, name: str) -> Tensor:
        out = x @ weights[f"{name}.weight"].double().T
        return out + weights[f"{name}.bias"].double() if f"{name}.bias" in weights else out

    def norm(x: Tensor, name: str) -> Tensor:
        return (
            x
            * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()
            * weights[f"{name}.weight"].double()
        )

    def heads(x: Tensor, rotate: bool) -> Tensor:
        x = x.unflatten(-1, (-1, width))  # T H D
        if rotate:
            first, second = x.chunk(2, dim=-1)
            cos, sin = angles.cos()[:, None], angles.sin()[:, None]
            x = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return x.repeat_interleave(transformer.num_attention_heads // x.shape[1], dim=1)

    hidden = weights["model.embed_tokens.weight"].double()[tokens]
    for number_ in range(transformer.num_layers):
        block = f"model.layers.{number_}"
        x = norm(hidden, f"{block}.input_layernorm")
        q, k = (heads(linear(x, f"{block}.self_attn.{name}_proj"), True) for name in "qk")
        v = heads(linear(x, f"{block}.self_attn.v_proj"), False)
        scores = torch.einsum("shd,thd->hst", q, k) / width**0.5
        attended = torch.einsum(
            "hst,thd->shd", scores.masked_fill(hidden_from, -torch.inf).softmax(-1), v
        )
        hidden = hidden + linear(attended.flatten(1), f"{block}.self_attn.o_proj")
        x = norm(hidden, f"{block}.post_attention_layernorm")
        gate, up = (linear(x, f"{block}.mlp.{name}_proj") for name in ("gate", "up"))
        hidden = hidden + linear(gate * gate.sigmoid() * up, f"{block}.mlp.down_proj")
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    return linear(norm(hidden, "model.norm"), head)
