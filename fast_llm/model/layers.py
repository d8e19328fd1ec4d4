"""The layers that decoders are made of: linear layers, embedding, RMSNorm, attention and the gated
MLP.

Written for one device. Parallelism is applied from outside, by replacing a module's `forward`,
`Attention.core` (which mixes tokens) or `RMSNorm.with_residual`. Parameters carry Hugging Face's
names.

Letters: B sequences, S tokens of a sequence, E hidden size, H query heads, K key and value heads, D
head dimensions, F MLP size, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fast_llm.config.model import NormalizationConfig, TransformerConfig
from fast_llm.model.attention import DocumentBoundaries, attention
from fast_llm.model.embedding import embed
from fast_llm.model.fp8 import linear_fp8
from fast_llm.model.linear import linear
from fast_llm.model.norm import fused_add_rms_norm
from fast_llm.model.rope import Angles, rotate
from fast_llm.model.swiglu import gate_function, xielu


class Linear(nn.Linear):
    """PyTorch's linear layer, with an fp32 gradient that may be accumulated within the matmul, and
    fp8.

    `SingleWeights` may set `main_grad` (Megatron-LM's name) to an fp32 tensor of the weight's
    shape. The weight's gradient is then added to it, and `weight.grad` stays None. It must be None
    for layers with a bias.
    """

    main_grad: Tensor | None
    fp8: bool  # set by `enable_fp8`

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias=bias)
        self.register_buffer("main_grad", None, persistent=False)
        self.fp8 = False

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] → [..., F]."""
        if self.fp8:
            return linear_fp8(x, self.weight, self.main_grad)
        return linear(x, self.weight, self.bias, self.main_grad)


def enable_fp8(block: nn.Module) -> None:
    """Run the matmuls of a block in fp8, but for layers with a bias. Weights keep their dtype."""
    for module in block.modules():
        if isinstance(module, Linear) and module.bias is None:
            module.fp8 = True


class Embedding(nn.Embedding):
    """A vector for each token of the vocabulary."""

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, S] → [B, S, E]."""
        return embed(tokens, self.weight)


class RMSNorm(nn.Module):
    """x / rms(x) · weight (Zhang & Sennrich 2019), computed in fp32.

    `zero_centered`: times 1 + weight, as in Gemma.
    """

    def __init__(self, size: int, config: NormalizationConfig):
        super().__init__()
        self.epsilon, self.zero_centered = config.epsilon, config.zero_centered
        self.weight = nn.Parameter(torch.full((size,), 0.0 if self.zero_centered else 1.0))

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] → [..., E]."""
        return self.with_residual(x)[0]

    def with_residual(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The normalised x, and x itself.

        x is returned too, so that the backward pass adds both gradients in one kernel.
        """
        return fused_add_rms_norm(x, self.scale(self.weight), self.epsilon)

    def scale(self, weight: Tensor) -> Tensor:
        """The factor of the normalised x [E]. 1 + weight is fp32: bf16 would round it to 1/128."""
        return 1 + weight.float() if self.zero_centered else weight


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie et al. 2023) with rotary positions.

    Queries and keys may be normalised before their rotation (Henry et al. 2020).
    """

    def __init__(self, config: TransformerConfig, layer: int):
        """The attention of block `layer`."""
        super().__init__()
        hidden, size, biases = config.hidden_size, config.kv_channels, config.add_linear_biases
        queries, keys = config.num_attention_heads * size, config.head_groups * size
        bias = biases in ("everywhere", "only_attention", "only_attn_qkv")
        self.head_dim, self.qk_norm = size, config.qk_norm
        # Without flash attention, plain matmuls hold all scores of a document.
        self.flash = config.use_flash_attention
        self.window, self.scale = config.window(layer), config.softmax_scale
        self.softcap = config.attention_softcap
        self.q_proj = Linear(hidden, queries, bias)
        self.k_proj = Linear(hidden, keys, bias)
        self.v_proj = Linear(hidden, keys, bias)
        self.o_proj = Linear(queries, hidden, bias and biases != "only_attn_qkv")
        if self.qk_norm != "none":
            sizes = (queries, keys) if self.qk_norm == "projection" else (size, size)
            self.q_norm, self.k_norm = (RMSNorm(each, config.normalization) for each in sizes)
        self.sinks: nn.Parameter | None = None
        if config.attention_sinks:
            self.sinks = nn.Parameter(torch.empty(config.num_attention_heads))
        self.core: Callable[..., Tensor] = attention

    def forward(
        self, x: Tensor, angles: Angles | None, documents: DocumentBoundaries | None
    ) -> Tensor:
        """[B, S, E] → [B, S, E]. `angles`: of keys and, if others, of queries; None: none."""
        q = self._heads(self.q_proj(x), "q_norm")  # B S H D
        q = q if angles is None else rotate(q, *angles[-2:])
        k = self._heads(self.k_proj(x), "k_norm")  # B S K D
        k = k if angles is None else rotate(k, *angles[:2])
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        scoring = self.window, self.scale, self.softcap, self.sinks
        attended = self.core(q, k, v, documents, self.flash, *scoring).flatten(-2)
        out: Tensor = self.o_proj(attended)
        return out

    def _heads(self, x: Tensor, norm: str) -> Tensor:
        """[B, S, H·D] → [B, S, H, D], normalised as `qk_norm` says."""
        if self.qk_norm == "projection":
            x = getattr(self, norm)(x)
        x = x.unflatten(-1, (-1, self.head_dim))
        if self.qk_norm == "head":
            x = getattr(self, norm)(x)
        return x


class GatedMLP(nn.Module):
    """A gated MLP (Shazeer 2020): down(act(gate(x)) · up(x)), SwiGLU if act is SiLU."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        hidden, size = config.hidden_size, config.ffn_hidden_size
        bias = config.add_linear_biases in ("everywhere", "only_mlp")
        self.gated = gate_function(config)
        self.gate_proj = Linear(hidden, size, bias)
        self.up_proj = Linear(hidden, size, bias)
        self.down_proj = Linear(size, hidden, bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, E] → [B, S, E]."""
        out: Tensor = self.down_proj(self.gated(self.gate_proj(x), self.up_proj(x)))
        return out


class XIELU(nn.Module):
    """The activation xIELU and its parameters, which start at softplus⁻¹(0.8) and (0.3)."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha_p = nn.Parameter(torch.empty(1))
        self.alpha_n = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor) -> Tensor:
        """[..., F] → [..., F]."""
        return xielu(x, self.alpha_p, self.alpha_n)


class UngatedMLP(nn.Module):
    """down(xIELU(up(x))), as in Apertus."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.up_proj = Linear(config.hidden_size, config.ffn_hidden_size)
        self.act_fn = XIELU()
        self.down_proj = Linear(config.ffn_hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, E] → [B, S, E]."""
        out: Tensor = self.down_proj(self.act_fn(self.up_proj(x)))
        return out
