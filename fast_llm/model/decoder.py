"""The decoder-only language model: embedding, blocks, norm and head, and their random
initialisation.

One decoder serves all dense families: grouped-query attention with rotary positions, and a gated
MLP (Touvron et al. 2023). `TransformerConfig` says where norms are, what positions and windows each
block has, and how scores and streams are scaled. The model is written for one device, and its
parameters carry Hugging Face's names, so that weights need no conversion. Parallelism is applied
from outside, by replacing `Attention.core` or any module's `forward`. Recomputation wraps
`Block.feed_forward`. A pipeline stage is this model with its absent parts replaced by identities
(`CausalLM.keep`).

Letters: B sequences, S tokens of a sequence, E hidden size, V vocabulary.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from fast_llm.config.model import BaseModelConfig, RotaryConfig, TransformerConfig
from fast_llm.model.attention import DocumentBoundaries
from fast_llm.model.experts import MixtureOfExperts
from fast_llm.model.layers import Attention, Embedding, GatedMLP, Linear, RMSNorm, UngatedMLP
from fast_llm.model.linear import linear
from fast_llm.model.loss import (
    SourceLosses,
    TokenScores,
    VocabShard,
    ZLoss,
    cap_logits,
    cross_entropy,
)
from fast_llm.model.rope import Angles, rotary_angles
from fast_llm.models.parameters import norm_names
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
            self.model.embedding_multiplier = 1.0
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

    def set_rotary(self, config: TransformerConfig) -> None:
        """Give the blocks the rotary positions of `config`, which differs in nothing else."""
        for number, block in self.model.layers.items():
            cast(Block, block).rotary = config.rotary_of(int(number))

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        documents: DocumentBoundaries | None = None,
        labels: Tensor | None = None,
        sources: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, S, V] of tokens [B, S] at positions [B, S]; with labels [B, S] their summed
        loss.

        The loss is an fp32 scalar, -Σ log p over labels that are not -100. TrainStep divides by
        the number of target tokens, in the update. `documents` says where documents begin and end;
        None means that each sequence is one document. `sources` [B]: see `Head.source_losses`.
        """
        hidden = self.model(tokens, positions, documents)
        given = (labels,) if sources is None else (labels, sources)
        out: Tensor = self.lm_head(hidden) if labels is None else self.lm_head(hidden, *given)
        return out


class Head(Linear):
    """Language-model head and its cross entropy.

    If `main_grad` is set, the weight's gradient is added to that tensor (model/loss.py). If
    `source_losses` is set, losses of labels whose sources are given are added there; if `z_loss` is
    set, its gradient is added. With `token_scores`, for evaluations, `sources` [B, S] are the slots
    of the labels in it.
    """

    source_losses: SourceLosses | None = None
    token_scores: TokenScores | None = None
    z_loss: ZLoss | None = None

    def __init__(self, config: BaseModelConfig, cross_entropy_impl: str):
        super().__init__(config.transformer.hidden_size, config.vocab_size)
        self.cross_entropy_impl = cross_entropy_impl
        self.cross_entropy_splits = config.cross_entropy_splits
        self.logits_divisor, self.softcap = config.logits_divisor, config.logits_softcap

    def forward(
        self, hidden: Tensor, labels: Tensor | None = None, sources: Tensor | None = None
    ) -> Tensor:
        """Logits [B, S, V] of hidden states [B, S, E]; with labels [B, S] their summed loss.

        The loss is an fp32 scalar. `sources` [B]: the number of each sequence's source.
        """
        hidden = self.scaled(hidden)
        if labels is None:
            return cap_logits(linear(hidden, self.weight), self.softcap)
        return self.loss(hidden, self.weight, labels, sources, main_grad=self.main_grad)

    def loss(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        sources: Tensor | None,
        shard: VocabShard | None = None,
        main_grad: Tensor | None = None,
    ) -> Tensor:
        """The summed loss of scaled hidden states under `weight`, this head's or a shard of it."""
        if self.token_scores is not None and sources is not None:
            flat = hidden.flatten(0, 1), weight, labels.flatten(), sources.flatten()
            return self.token_scores.add(*flat, shard, self.softcap)
        by_source = None if sources is None else self.source_losses
        token_losses = (
            None
            if by_source is None
            else torch.empty(labels.numel(), dtype=torch.float32, device=labels.device)
        )
        loss = cross_entropy(
            hidden.flatten(0, 1),
            weight,
            labels.flatten(),
            self.cross_entropy_impl,
            self.cross_entropy_splits,
            shard,
            main_grad,
            self.softcap,
            token_losses,
            self.z_loss,
        )
        if by_source is not None and token_losses is not None and sources is not None:
            by_source.add(token_losses, labels, sources)
        return loss

    def scaled(self, hidden: Tensor) -> Tensor:
        """Hidden states, divided instead of their logits."""
        return hidden if self.logits_divisor == 1 else hidden / self.logits_divisor


class Decoder(nn.Module):
    """Embedding, blocks and final norm: the model without its head."""

    def __init__(self, config: BaseModelConfig):
        super().__init__()
        transformer = config.transformer
        self.config = transformer
        self.embedding_multiplier = config.embedding_multiplier
        self.embed_tokens = Embedding(config.vocab_size, transformer.hidden_size)
        self.layers = nn.ModuleDict(
            {str(number): Block(transformer, number) for number in range(transformer.num_layers)}
        )
        self.norm = RMSNorm(transformer.hidden_size, transformer.normalization)

    def forward(
        self, tokens: Tensor, positions: Tensor, documents: DocumentBoundaries | None
    ) -> Tensor:
        """Hidden states [B, S, E]."""
        hidden = self.embed_tokens(tokens)
        if self.embedding_multiplier != 1:
            # Gemma was trained with this rounding.
            hidden = hidden * torch.tensor(self.embedding_multiplier, dtype=hidden.dtype)
        angles: dict[RotaryConfig | None, Angles | None] = {None: None}
        for layer in self.layers.values():
            rotary = cast(Block, layer).rotary
            if rotary is not None and rotary not in angles:
                angles[rotary] = self._angles(positions, rotary)
            hidden = layer(hidden, angles[rotary], documents)
        normed: Tensor = self.norm(hidden)
        return normed

    def _angles(self, positions: Tensor, rotary: RotaryConfig) -> Angles:
        """Cosines and sines of keys and, if attention has a temperature, those of queries."""
        keys = rotary_angles(positions, rotary, self.config.kv_channels)
        temperature = self.config.attention_temperature
        if temperature is None:
            return keys
        growth = torch.log1p(positions.div(temperature.length, rounding_mode="floor"))
        factor = (1 + temperature.beta * growth)[..., None, None]  # B S 1 1
        return (*keys, *(each * factor for each in keys))


class Block(nn.Module):
    """Attention and MLP, whose normalised results are added to the residual stream.

    `norm_placement` decides whether their inputs, their results or both are normalised; the names
    of the norms are Hugging Face's.
    """

    def __init__(self, config: TransformerConfig, layer: int):
        """Block number `layer`."""
        super().__init__()
        self.rotary = config.rotary_of(layer)
        self.residual_multiplier = config.residual_multiplier
        self.norms = norm_names(config)
        before_attention, after_attention, before_mlp, after_mlp = self.norms

        def add_norm(name: str | None) -> None:
            if name is not None:
                self.add_module(name, RMSNorm(config.hidden_size, config.normalization))

        add_norm(before_attention)
        self.self_attn = Attention(config, layer)
        add_norm(after_attention)
        add_norm(before_mlp)
        self.mlp: nn.Module
        if config.has_experts(layer):
            self.mlp = MixtureOfExperts(config)
        else:
            self.mlp = GatedMLP(config) if config.gated else UngatedMLP(config)
        add_norm(after_mlp)

    def forward(
        self, hidden: Tensor, angles: Angles | None, documents: DocumentBoundaries | None
    ) -> Tensor:
        """The residual stream [B, S, E] after this block."""
        before, after, _, _ = self.norms
        normed, hidden = self._with_residual(before, hidden)
        return self.feed_forward(
            self._add(hidden, self.self_attn(normed, angles, documents), after)
        )

    def feed_forward(self, hidden: Tensor) -> Tensor:
        """The residual stream after the MLP."""
        _, _, before, after = self.norms
        normed, hidden = self._with_residual(before, hidden)
        return self._add(hidden, self.mlp(normed), after)

    def _with_residual(self, norm: str | None, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The input of attention or MLP, and the residual stream itself."""
        if norm is None:
            return hidden, hidden
        both: tuple[Tensor, Tensor] = getattr(self, norm).with_residual(hidden)
        return both

    def _add(self, hidden: Tensor, result: Tensor, norm: str | None) -> Tensor:
        """Add a result of attention or MLP to the residual stream."""
        if norm is not None:
            result = getattr(self, norm)(result)
        if self.residual_multiplier != 1:
            result = result * self.residual_multiplier
        return hidden + result


@torch.no_grad()
def init_weights(weights: Mapping[str, Tensor], config: BaseModelConfig, seed: int) -> None:
    """Set weights, plain tensors or DTensors by name, to random values in place.

    Each weight is drawn in full, in fp32 on the CPU, from its own generator, seeded by `seed` and
    its name. So weights do not depend on the number of processes or the order. Matrices are normal,
    then clamped; biases are 0, norms 1 (or 0, if they are zero-centred).
    """
    for name, weight in weights.items():
        if weight.dim() == 1 or name.endswith(".bias"):
            full = torch.full(weight.shape, _first_value(name, config))
        else:
            std, low, high = _init_range(name, config)
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            full = torch.randn(weight.shape, generator=generator).mul_(std)
            if low is not None or high is not None:
                full.clamp_(low, high)
        local_part(weight).copy_(full[local_region(weight)])


def _first_value(name: str, config: BaseModelConfig) -> float:
    """The initial value of all numbers of a vector."""
    match name.rpartition(".")[2]:
        case "bias" | "sinks":
            return 0.0
        case "alpha_p" | "alpha_n" as part:  # of xIELU
            return math.log(math.expm1(0.8 if part == "alpha_p" else 0.3))
    return 0.0 if config.transformer.normalization.zero_centered else 1.0


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
        case "gate":  # of a router
            own = None, None, None
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
