"""AdamW (Loshchilov & Hutter 2019) over fp32 weights, full or sharded.

The optimizer works on local tensors: full weights on one process, shards under ZeRO. AdamW is
elementwise, so the code is the same. The update is a fused kernel: one pass over weight, gradient
and both moments, which also applies clipping and the loss scale. It is PyTorch's for fp32 moments,
ours (kernels/triton.py) for others and for split masters on a GPU.

    m = β1 m + (1-β1) g;  v = β2 v + (1-β2) g²
    w -= lr · ( (m / (1-β1^t)) / (sqrt(v / (1-β2^t)) + ε) + λ w )

λ is `weight_decay` for matrices, including embedding and head, and 0 for norms and biases. Patterns
of names change λ and lr of single parameters, or freeze them (config/parameter_rules.py). Frozen
parameters have no moments here.

Bytes per weight: 8 for fp32 moments, 4 for bf16, 2.03 for 8-bit ones. The second moment in bf16 and
both 8-bit moments use stochastic rounding (kernels/rounding.py).
"""

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fast_llm.config.optimizer import OptimizerConfig
from fast_llm.config.parameter_rules import rule_of
from fast_llm.kernels import triton as triton_kernels
from fast_llm.kernels.rounding import (
    dequantize,
    join_master,
    quantize_,
    split_master_,
    stochastic_round_,
    zero_block_absmax,
)
from fast_llm.tensors import Stored


def squared_norm(gradients: Mapping[str, Tensor], replication_factor: Mapping[str, int]) -> Tensor:
    """The sum of the squares of all elements: a float64 scalar on the gradients' device.

    Each square is divided by `replication_factor`, the number of processes that hold the same
    elements, so that a sum over all processes counts each element once.
    """
    names = [name for name, gradient in gradients.items() if gradient.numel()]
    if not names:
        return torch.zeros((), dtype=torch.float64)
    squares = (
        torch.stack(torch._foreach_norm([gradients[name] for name in names])).double().square()
    )
    counts = [replication_factor[name] for name in names]
    if max(counts) == 1:
        return squares.sum()
    return squares.div_(torch.tensor(counts, dtype=torch.float64, device=squares.device)).sum()


def clip_factor(norm: float, limit: float | None) -> float:
    """The factor that clips gradients of global `norm` to at most `limit`; 1 without a limit."""
    return 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))


_DTYPES = {"bf16": (torch.bfloat16, torch.bfloat16), "int8": (torch.int8, torch.uint8)}


def _dequantize_to_bf16(quantized: Tensor, block_absmax: Tensor) -> Tensor:
    return dequantize(quantized, block_absmax, torch.bfloat16)


class Optimizer:
    """AdamW's moments for a set of named weights, and the update."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        config: OptimizerConfig,
        master_low_bits: Mapping[str, Tensor] | None = None,
        use_kernel: bool = False,
    ):
        """Moments of `weights`, which `step` updates in place; frozen ones are left out.

        Weights with two or more dimensions decay; a shard has as many as its weight. They are fp32,
        or bf16 with the low bits of their fp32 masters in `master_low_bits` (kernels/rounding.py).
        `use_kernel`: use the project's kernel, which needs Triton.
        """
        self.config = config
        rules = {name: rule_of(config, name, weight.dim()) for name, weight in weights.items()}
        self.weights = {name: w for name, w in weights.items() if not rules[name].frozen}
        self.master_low_bits = dict(master_low_bits or {})
        self.use_kernel = use_kernel
        self.updates = 0
        first, second = _DTYPES.get(config.moments_dtype, (torch.float32, torch.float32))
        self.exp_avg = {name: torch.zeros_like(w, dtype=first) for name, w in self.weights.items()}
        self.exp_avg_sq = {
            name: torch.zeros_like(w, dtype=second) for name, w in self.weights.items()
        }
        # 8-bit moments are scaled by block: here for the first and the second moment.
        self.block_absmax = {
            name: (zero_block_absmax(w), zero_block_absmax(w))
            for name, w in self.weights.items()
            if config.moments_dtype == "int8"
        }
        # (weight decay, learning rate scale) → names
        self.groups: dict[tuple[float, float], list[str]] = {}
        for name, weight in self.weights.items():
            if weight.numel():
                group = rules[name].weight_decay, rules[name].learning_rate_scale
                self.groups.setdefault(group, []).append(name)

    @contextmanager
    def moments(
        self, changed: bool = False
    ) -> Iterator[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]:
        """First and second moments as checkpoints hold them, by name.

        `changed`: what is written into them becomes the moments' values. 8-bit moments are given in
        bf16, which represents them exactly: blocks depend on the layout, checkpoints do not. With
        split masters they are given in host memory, which takes 4 bytes per weight.
        """
        if not self.block_absmax:
            yield self.exp_avg, self.exp_avg_sq
            return
        both = self.exp_avg, self.exp_avg_sq
        values: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        for which, (moment, into) in enumerate(zip(both, values, strict=True)):
            for name, quantized in moment.items():
                value = dequantize(quantized, self.block_absmax[name][which], torch.bfloat16)
                into[name] = value.cpu() if self.master_low_bits else value
        yield values
        if changed:
            for which, (moment, given) in enumerate(zip(both, values, strict=True)):
                for name, quantized in moment.items():
                    value = given.pop(name).to(quantized.device).float()
                    quantize_(value, quantized, self.block_absmax[name][which])

    def stored(self, weights: Mapping[str, Stored]) -> dict[str, dict[str, Stored]]:
        """Both moments as checkpoints hold them, by moment and weight, without computing them.

        `weights`: as checkpoints hold them. 8-bit moments are stored as `moments` gives them.
        """
        found: dict[str, dict[str, Stored]] = {}
        for which, name in enumerate(("exp_avg", "exp_avg_sq")):
            moment: dict[str, Tensor] = getattr(self, name)
            found[name] = {
                weight: Stored.of(
                    weights[weight].like,
                    (value, self.block_absmax[weight][which]),
                    _dequantize_to_bf16,
                    torch.bfloat16,
                )
                if self.block_absmax
                else Stored.of(weights[weight].like, (value,), dtype=value.dtype)
                for weight, value in moment.items()
            }
        return found

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], learning_rate: float, factor: float) -> None:
        """Update the weights with `factor` times the gradients, which are fp32.

        `learning_rate`: before the factors of the settings.
        """
        self.updates += 1
        plain = self.config.moments_dtype not in _DTYPES and not self.master_low_bits
        for (decay, scale), names in self.groups.items():
            rate = learning_rate * scale
            if plain:
                self._update(
                    names,
                    self.weights,
                    gradients,
                    self.exp_avg,
                    self.exp_avg_sq,
                    rate,
                    decay,
                    factor,
                )
                continue
            for name in names:  # one weight at a time, to hold few fp32 copies
                # Stochastic rounding differs in each step and weight, and repeats on resumption.
                seed = zlib.crc32(f"{self.updates} {name}".encode())
                if self.use_kernel:
                    self._update_with_kernel(name, gradients[name], rate, decay, factor, seed)
                else:
                    self._update_with_fp32_copies(name, gradients, rate, decay, factor, seed)

    def _update_with_kernel(
        self,
        name: str,
        gradient: Tensor,
        learning_rate: float,
        decay: float,
        factor: float,
        seed: int,
    ) -> None:
        triton_kernels.adamw_(
            self.weights[name],
            self.master_low_bits.get(name),
            gradient,
            self.exp_avg[name],
            self.exp_avg_sq[name],
            self.block_absmax.get(name),
            step=self.updates,
            learning_rate=learning_rate,
            weight_decay=decay,
            betas=(self.config.beta_1, self.config.beta_2),
            epsilon=self.config.epsilon,
            factor=factor,
            seed=seed,
        )

    def _update_with_fp32_copies(
        self,
        name: str,
        gradients: Mapping[str, Tensor],
        learning_rate: float,
        decay: float,
        factor: float,
        seed: int,
    ) -> None:
        weight, low = self.weights[name], self.master_low_bits.get(name)
        master = weight if low is None else join_master(weight, low)
        first, second = self.exp_avg[name], self.exp_avg_sq[name]
        if self.block_absmax:
            m, v = (
                dequantize(quantized, absmax)
                for quantized, absmax in zip((first, second), self.block_absmax[name], strict=True)
            )
        else:
            m, v = first.float(), second.float()
        self._update(
            [name], {name: master}, gradients, {name: m}, {name: v}, learning_rate, decay, factor
        )
        if low is not None:
            split_master_(master, weight, low)
        if self.block_absmax:
            for value, quantized, absmax in zip(
                (m, v), (first, second), self.block_absmax[name], strict=True
            ):
                quantize_(value, quantized, absmax, seed)
            return
        first.copy_(m)
        if second.dtype == torch.bfloat16:
            stochastic_round_(v, second, seed)
        else:
            second.copy_(v)

    def _update(
        self,
        names: list[str],
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        exp_avg: Mapping[str, Tensor],
        exp_avg_sq: Mapping[str, Tensor],
        learning_rate: float,
        decay: float,
        factor: float,
    ) -> None:
        if not names:
            return
        device = weights[names[0]].device
        adamw(
            [weights[name] for name in names],
            [gradients[name] for name in names],
            [exp_avg[name] for name in names],
            [exp_avg_sq[name] for name in names],
            [],
            # Steps, one tensor per weight, which the kernel increments.
            [torch.full((), self.updates - 1.0, device=device) for _ in names],
            fused=True,
            # The kernel divides the gradients by this.
            grad_scale=None if factor == 1 else torch.full((), 1 / factor, device=device),
            amsgrad=False,
            beta1=self.config.beta_1,
            beta2=self.config.beta_2,
            lr=learning_rate,
            weight_decay=decay,
            eps=self.config.epsilon,
            maximize=False,
        )
