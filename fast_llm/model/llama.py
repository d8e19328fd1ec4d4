"""Llama 1 to 3.2, as if there were one device.

A decoder of pre-normalised blocks: grouped-query attention with rotary positions, and a gated MLP (Touvron
et al. 2023; "The Llama 3 Herd of Models", 2024). Parameters carry Hugging Face's names, so that there is
nothing to convert. Everything parallel is applied from outside, by replacing what a part does: `Attention.core`
(what mixes tokens), `Block.feed_forward` (what recomputation wraps), and the `forward` of any module. A
pipeline stage is this model with its absent parts replaced by identities.

Letters: B sequences, S tokens of a sequence, E hidden size, H query heads, K key and value heads, D head
dimensions, F MLP size, V vocabulary.
"""

import hashlib
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fast_llm.config.train import BaseModelConfig, TransformerConfig
from fast_llm.model.attention import PackedSequences, VarlenQKV, attention
from fast_llm.model.embedding import embed
from fast_llm.model.linear import Linear
from fast_llm.model.loss import cross_entropy
from fast_llm.model.norm import fused_add_rms_norm
from fast_llm.model.rope import Angles, rotary_angles, rotate
from fast_llm.model.swiglu import swiglu


class Llama(nn.Module):
    """Embedding, blocks, norm and head."""

    def __init__(self, config: BaseModelConfig, cross_entropy_impl: str = "fused"):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Head(config, cross_entropy_impl)
        self.tie()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Llama":
        """PyTorch would part tied weights when it moves them off the meta device."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.tie()
        return self

    def tie(self) -> None:
        """Make embedding and head one weight, if they are to be and both are here."""
        both = isinstance(self.model.embed_tokens, Embedding) and isinstance(
            self.lm_head, nn.Linear
        )
        if both and self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        documents: PackedSequences | VarlenQKV | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, S, V] of tokens [B, S] at positions [B, S]; with labels [B, S] their summed loss.

        The loss is an fp32 scalar, -Σ log p over labels that are not -100. Without `documents` each sequence is one.
        """
        hidden = self.model(tokens, positions, documents)
        out: Tensor = self.lm_head(hidden) if labels is None else self.lm_head(hidden, labels)
        return out


class Head(Linear):
    """Of each token, how likely every token is to follow. With `main_grad` its weight's gradient goes there (model/loss.py)."""

    main_grad: Tensor | None

    def __init__(self, config: BaseModelConfig, cross_entropy_impl: str):
        super().__init__(config.transformer.hidden_size, config.vocab_size, bias=False)
        self.cross_entropy_impl = cross_entropy_impl
        self.cross_entropy_splits = config.cross_entropy_splits

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits [B, S, V] of hidden states [B, S, E]; with labels [B, S] their summed loss, an fp32 scalar."""
        if labels is None:
            return super().forward(hidden)
        implementation, splits = self.cross_entropy_impl, self.cross_entropy_splits
        main_grad = getattr(self, "main_grad", None)
        return cross_entropy(
            hidden.flatten(0, 1),
            self.weight,
            labels.flatten(),
            implementation,
            splits,
            main_grad=main_grad,
        )


class Decoder(nn.Module):
    """Everything but the head."""

    def __init__(self, config: BaseModelConfig):
        super().__init__()
        transformer = config.transformer
        self.config = transformer
        self.embed_tokens = Embedding(config.vocab_size, transformer.hidden_size)
        self.layers = nn.ModuleDict(
            {str(number): Block(transformer) for number in range(transformer.num_layers)}
        )
        self.norm = RMSNorm(transformer)

    def forward(
        self, tokens: Tensor, positions: Tensor, documents: PackedSequences | VarlenQKV | None
    ) -> Tensor:
        """Hidden states [B, S, E]."""
        hidden = self.embed_tokens(tokens)
        angles = rotary_angles(positions, self.config.rotary, self.config.kv_channels)
        for layer in self.layers.values():
            hidden = layer(hidden, angles, documents)
        normed: Tensor = self.norm(hidden)
        return normed


class Embedding(nn.Embedding):
    """A row for each token."""

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, S] → [B, S, E]."""
        return embed(tokens, self.weight)


class Block(nn.Module):
    """Attention and GatedMLP, each on a normalised copy of the residual stream."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = GatedMLP(config)

    def forward(
        self, hidden: Tensor, angles: Angles, documents: PackedSequences | VarlenQKV | None
    ) -> Tensor:
        """The residual stream [B, S, E] after this block."""
        normed, hidden = self.input_layernorm.with_residual(hidden)
        return self.feed_forward(hidden + self.self_attn(normed, angles, documents))

    def feed_forward(self, hidden: Tensor) -> Tensor:
        """The residual stream after the MLP."""
        normed, hidden = self.post_attention_layernorm.with_residual(hidden)
        out: Tensor = hidden + self.mlp(normed)
        return out


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.head_dim = config.kv_channels
        self.flash = config.use_flash_attention
        bias = config.add_linear_biases in ("everywhere", "only_attention")
        queries = config.num_attention_heads * self.head_dim
        keys = config.head_groups * self.head_dim
        self.q_proj = Linear(config.hidden_size, queries, bias=bias)
        self.k_proj = Linear(config.hidden_size, keys, bias=bias)
        self.v_proj = Linear(config.hidden_size, keys, bias=bias)
        self.o_proj = Linear(queries, config.hidden_size, bias=bias)
        self.core: Callable[..., Tensor] = attention

    def forward(
        self, x: Tensor, angles: Angles, documents: PackedSequences | VarlenQKV | None
    ) -> Tensor:
        """[B, S, E] → [B, S, E]."""
        q = rotate(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), *angles)  # B S H D
        k = rotate(self.k_proj(x).unflatten(-1, (-1, self.head_dim)), *angles)  # B S K D
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        out: Tensor = self.o_proj(self.core(q, k, v, documents, self.flash).flatten(-2))
        return out


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        bias = config.add_linear_biases in ("everywhere", "only_mlp")
        self.gate_proj = Linear(config.hidden_size, config.ffn_hidden_size, bias=bias)
        self.up_proj = Linear(config.hidden_size, config.ffn_hidden_size, bias=bias)
        self.down_proj = Linear(config.ffn_hidden_size, config.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, E] → [B, S, E]."""
        out: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return out


class RMSNorm(nn.Module):
    """x / rms(x) · weight (Zhang & Sennrich 2019), the statistics in fp32."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.epsilon = config.normalization.epsilon

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] → [..., E]."""
        return self.with_residual(x)[0]

    def with_residual(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and x: for a residual stream, whose two gradients are then added where they are made."""
        return fused_add_rms_norm(x, self.weight, self.epsilon)


@torch.no_grad()
def init_weights(weights: Mapping[str, Tensor], config: BaseModelConfig, seed: int) -> None:
    """Random weights, in place; plain tensors or DTensors by name.

    Each weight is drawn as a whole, in fp32 on the CPU, from a generator of its own, seeded by `seed` and its name: so
    they are the same whatever the number of processes and the order. Matrices are normal, then clamped; biases
    are 0 and norms 1.
    """
    for name, weight in weights.items():
        if weight.dim() == 1:
            whole = torch.full(weight.shape, 0.0 if name.endswith(".bias") else 1.0)
        else:
            std, low, high = _spread(name, config)
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            whole = torch.randn(weight.shape, generator=generator).mul_(std)
            if low is not None or high is not None:
                whole.clamp_(low, high)
        if isinstance(weight, DTensor):
            local, mesh = weight.to_local(), weight.device_mesh
            shape, begin = compute_local_shape_and_global_offset(
                weight.shape, mesh, weight.placements
            )
            local.copy_(
                whole[tuple(slice(b, b + length) for b, length in zip(begin, shape, strict=True))]
            )
        else:
            weight.copy_(whole)


def _spread(name: str, config: BaseModelConfig) -> tuple[float, float | None, float | None]:
    """Standard deviation, least and greatest value of a matrix.

    The output projections of attention and MLP are smaller, so that the residual stream keeps its size however
    many blocks add to it (Radford et al. 2019).
    """
    t = config.transformer
    std = t.hidden_size**-0.5 if t.init_method_std is None else t.init_method_std
    output_std = std / math.sqrt(2 * t.num_layers) if t.num_layers else std
    own: tuple[float | None, float | None, float | None]
    match name.split(".")[-2]:
        case "embed_tokens" | "lm_head":
            own = (
                config.init_method_std_embed,
                config.init_method_min_embed,
                config.init_method_max_embed,
            )
        case "q_proj" | "k_proj" | "v_proj":
            own = t.init_method_std_qkv, t.init_method_min_qkv, t.init_method_max_qkv
        case "gate_proj" | "up_proj":
            own = t.init_method_std_mlp_1, t.init_method_min_mlp_1, t.init_method_max_mlp_1
        case "o_proj":
            std = output_std
            own = (
                t.init_method_std_attn_proj,
                t.init_method_min_attn_proj,
                t.init_method_max_attn_proj,
            )
        case _:  # down_proj
            std = output_std
            own = t.init_method_std_mlp_2, t.init_method_min_mlp_2, t.init_method_max_mlp_2
    whole_model = std, t.init_method_min, t.init_method_max
    own_std, low, high = (
        general if value is None else value for value, general in zip(own, whole_model, strict=True)
    )
    assert own_std is not None
    return own_std, low, high
