"""The decoder-only language model: embedding, blocks, norm and head, and their random
initialisation.

Blocks are pre-normalised: grouped-query attention with rotary positions, and a gated MLP (Touvron
et al. 2023; "The Llama 3 Herd of Models", 2024). The model is written for one device, and its
parameters carry Hugging Face's names, so that weights need no conversion. Parallelism is applied
from outside, by replacing `Attention.core` or any module's `forward`. Recomputation wraps
`Block.feed_forward`. A pipeline stage is this model with its absent parts replaced by identities
(`CausalLM.keep`).

Letters: B sequences, S tokens of a sequence, E hidden size, V vocabulary.
"""

import hashlib
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fast_llm.config.model import BaseModelConfig, TransformerConfig
from fast_llm.model.attention import DocumentBoundaries
from fast_llm.model.layers import Attention, Embedding, GatedMLP, Linear, RMSNorm
from fast_llm.model.linear import linear
from fast_llm.model.loss import cross_entropy
from fast_llm.model.rope import Angles, rotary_angles
from fast_llm.tensors import local_part, local_region


class CausalLM(nn.Module):
    """Embedding, blocks, norm and head."""

    def __init__(self, config: BaseModelConfig, cross_entropy_impl: str = "fused"):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Head(config, cross_entropy_impl)
        self.tie()

    # `parallel/` uses these four roles, and `keep`. Of blocks it uses `Block.feed_forward` and
    # `Attention.core`; of linear layers and `Head`, `main_grad`.

    @property
    def embedding(self) -> nn.Module:
        """From tokens [B, S] to hidden states [B, S, E]; an identity where it is absent."""
        return self.model.embed_tokens

    @property
    def blocks(self) -> nn.ModuleDict:
        """The blocks that are here, by layer number."""
        return self.model.layers

    @property
    def norm(self) -> nn.Module:
        """The norm before the head; an identity where it is absent."""
        return self.model.norm

    @property
    def head(self) -> nn.Module:
        """From hidden states to logits or the loss; an identity where it is absent."""
        return self.lm_head

    def keep(self, layers: range, embedding: bool, head: bool) -> None:
        """Drop blocks outside of `layers`; and the embedding, or norm and head, unless kept."""
        for number in list(self.model.layers):
            if int(number) not in layers:
                del self.model.layers[number]
        if not embedding:
            self.model.embed_tokens = nn.Identity()  # type: ignore[assignment]
        if not head:
            self.model.norm = nn.Identity()  # type: ignore[assignment]
            self.lm_head = nn.Identity()  # type: ignore[assignment]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CausalLM":
        """Tie weights again: PyTorch separates them when it moves them off the meta device."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.tie()
        return self

    def tie(self) -> None:
        """Make embedding and head one weight, if the config says so and both are here."""
        both = isinstance(self.model.embed_tokens, Embedding) and isinstance(self.lm_head, Head)
        if both and self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        documents: DocumentBoundaries | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, S, V] of tokens [B, S] at positions [B, S]; with labels [B, S] their summed
        loss.

        The loss is an fp32 scalar, -Σ log p over labels that are not -100. TrainStep divides by
        the number of target tokens, in the update. `documents` says where documents begin and end;
        None means that each sequence is one document.
        """
        hidden = self.model(tokens, positions, documents)
        out: Tensor = self.lm_head(hidden) if labels is None else self.lm_head(hidden, labels)
        return out


class Head(Linear):
    """Language-model head and its cross entropy.

    If `main_grad` is set, the weight's gradient is added to that tensor (model/loss.py).
    """

    def __init__(self, config: BaseModelConfig, cross_entropy_impl: str):
        super().__init__(config.transformer.hidden_size, config.vocab_size)
        self.cross_entropy_impl = cross_entropy_impl
        self.cross_entropy_splits = config.cross_entropy_splits

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits [B, S, V] of hidden states [B, S, E]; with labels [B, S] their summed loss.

        The loss is an fp32 scalar.
        """
        if labels is None:
            return linear(hidden, self.weight)
        return cross_entropy(
            hidden.flatten(0, 1),
            self.weight,
            labels.flatten(),
            self.cross_entropy_impl,
            self.cross_entropy_splits,
            main_grad=self.main_grad,
        )


class Decoder(nn.Module):
    """Embedding, blocks and final norm: the model without its head."""

    def __init__(self, config: BaseModelConfig):
        super().__init__()
        transformer = config.transformer
        self.config = transformer
        self.embed_tokens = Embedding(config.vocab_size, transformer.hidden_size)
        self.layers = nn.ModuleDict(
            {str(number): Block(transformer) for number in range(transformer.num_layers)}
        )
        self.norm = RMSNorm(transformer.hidden_size, transformer.normalization.epsilon)

    def forward(
        self, tokens: Tensor, positions: Tensor, documents: DocumentBoundaries | None
    ) -> Tensor:
        """Hidden states [B, S, E]."""
        hidden = self.embed_tokens(tokens)
        angles = rotary_angles(positions, self.config.rotary, self.config.kv_channels)
        for layer in self.layers.values():
            hidden = layer(hidden, angles, documents)
        normed: Tensor = self.norm(hidden)
        return normed


class Block(nn.Module):
    """Attention and MLP, each on a normalised copy of the residual stream."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        hidden, epsilon, biases = (
            config.hidden_size,
            config.normalization.epsilon,
            config.add_linear_biases,
        )
        self.input_layernorm = RMSNorm(hidden, epsilon)
        self.self_attn = Attention(
            hidden,
            config.num_attention_heads,
            config.head_groups,
            config.kv_channels,
            bias=biases in ("everywhere", "only_attention"),
            flash=config.use_flash_attention,
        )
        self.post_attention_layernorm = RMSNorm(hidden, epsilon)
        self.mlp = GatedMLP(
            hidden, config.ffn_hidden_size, bias=biases in ("everywhere", "only_mlp")
        )

    def forward(
        self, hidden: Tensor, angles: Angles, documents: DocumentBoundaries | None
    ) -> Tensor:
        """The residual stream [B, S, E] after this block."""
        normed, hidden = self.input_layernorm.with_residual(hidden)
        return self.feed_forward(hidden + self.self_attn(normed, angles, documents))

    def feed_forward(self, hidden: Tensor) -> Tensor:
        """The residual stream after the MLP."""
        normed, hidden = self.post_attention_layernorm.with_residual(hidden)
        out: Tensor = hidden + self.mlp(normed)
        return out


@torch.no_grad()
def init_weights(weights: Mapping[str, Tensor], config: BaseModelConfig, seed: int) -> None:
    """Set weights, plain tensors or DTensors by name, to random values in place.

    Each weight is drawn in full, in fp32 on the CPU, from its own generator, seeded by `seed` and
    its name. So weights do not depend on the number of processes or the order. Matrices are normal,
    then clamped; biases are 0, norms 1.
    """
    for name, weight in weights.items():
        if weight.dim() == 1:
            full = torch.full(weight.shape, 0.0 if name.endswith(".bias") else 1.0)
        else:
            std, low, high = _init_range(name, config)
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            full = torch.randn(weight.shape, generator=generator).mul_(std)
            if low is not None or high is not None:
                full.clamp_(low, high)
        local_part(weight).copy_(full[local_region(weight)])


def _init_range(name: str, config: BaseModelConfig) -> tuple[float, float | None, float | None]:
    """Standard deviation, minimum and maximum of a matrix's initial values.

    Output projections of attention and MLP start smaller, so that the residual stream keeps its
    scale however many blocks add to it (Radford et al. 2019).
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
    of_model = std, t.init_method_min, t.init_method_max
    own_std, low, high = (
        general if value is None else value for value, general in zip(own, of_model, strict=True)
    )
    assert own_std is not None
    return own_std, low, high
