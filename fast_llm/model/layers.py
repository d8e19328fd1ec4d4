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

from fast_llm.model.attention import DocumentBoundaries, attention
from fast_llm.model.embedding import embed
from fast_llm.model.fp8 import linear_fp8
from fast_llm.model.linear import linear
from fast_llm.model.norm import fused_add_rms_norm
from fast_llm.model.rope import Angles, rotate
from fast_llm.model.swiglu import swiglu


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
    """x / rms(x) · weight (Zhang & Sennrich 2019), computed in fp32."""

    def __init__(self, size: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] → [..., E]."""
        return self.with_residual(x)[0]

    def with_residual(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The normalised x, and x itself.

        x is returned too, so that the backward pass adds both gradients in one kernel.
        """
        return fused_add_rms_norm(x, self.weight, self.epsilon)


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie et al. 2023) with rotary positions."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool,
        flash: bool,
    ):
        """`flash`: false computes with plain matmuls, which hold all scores of a sequence."""
        super().__init__()
        self.head_dim = head_dim
        self.flash = flash
        self.q_proj = Linear(hidden_size, num_heads * head_dim, bias)
        self.k_proj = Linear(hidden_size, num_kv_heads * head_dim, bias)
        self.v_proj = Linear(hidden_size, num_kv_heads * head_dim, bias)
        self.o_proj = Linear(num_heads * head_dim, hidden_size, bias)
        self.core: Callable[..., Tensor] = attention

    def forward(self, x: Tensor, angles: Angles, documents: DocumentBoundaries | None) -> Tensor:
        """[B, S, E] → [B, S, E]."""
        q = rotate(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), *angles)  # B S H D
        k = rotate(self.k_proj(x).unflatten(-1, (-1, self.head_dim)), *angles)  # B S K D
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        out: Tensor = self.o_proj(self.core(q, k, v, documents, self.flash).flatten(-2))
        return out


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (Shazeer 2020)."""

    def __init__(self, hidden_size: int, ffn_size: int, bias: bool):
        super().__init__()
        self.gate_proj = Linear(hidden_size, ffn_size, bias)
        self.up_proj = Linear(hidden_size, ffn_size, bias)
        self.down_proj = Linear(ffn_size, hidden_size, bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, E] → [B, S, E]."""
        out: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return out
