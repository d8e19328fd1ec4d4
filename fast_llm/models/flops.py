"""The cost of a model of any family: parameters, and floating-point operations (FLOPs) per token.

Counted as "model FLOPs": matmuls alone, a multiplication and an addition each; the backward pass
costs twice the forward pass; of attention the causal half counts. "Hardware" FLOPs add the
recomputation of flash attention.

Gradients that no trained parameter needs are not computed and not counted: those of frozen weights,
and those of inputs below which nothing is trained. An adapter's or a frozen embedding's run has
fewer FLOPs a token than full training, so its MFU is not flattered.
"""

import re
from dataclasses import dataclass

# Dense bf16 FLOP/s (fp16 for V100) from the vendors' data sheets, without sparsity. The first line
# whose words all occur in the device's name counts.
_PEAKS = (
    ("B300", 2.25e15),
    ("GB200", 2.5e15),
    ("B200", 2.25e15),
    ("B100", 1.75e15),
    ("GH200", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 PCIE", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("A40", 150e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("V100", 125e12),
)


@dataclass(frozen=True)
class Cost:
    """The cost of one model at one sequence length."""

    parameters: int
    active_parameters: int  # that compute one token: of a router's experts, those it chooses
    model_flops_per_token: float  # forward and backward
    hardware_flops_per_token: float


@dataclass(frozen=True)
class BlockBackward:
    """What the backward pass of a block computes; all of it, if nothing is frozen."""

    weights: float = 1.0  # share of the matmuls for gradients of weights
    inputs: float = 1.0  # share of the matmuls for gradients of inputs
    attention: bool = True  # whether attention is differentiated

    @property
    def is_any(self) -> bool:
        """Whether the block has a backward pass."""
        return self.attention or self.weights > 0 or self.inputs > 0


def peak_flops(device: str) -> float | None:
    """The dense bf16 peak of a device in FLOP/s, if its name (`NVIDIA H100 80GB HBM3`) is known."""
    words = set(re.split(r"[^A-Z0-9]+", device.upper()))
    return next((peak for names, peak in _PEAKS if words.issuperset(names.split())), None)
