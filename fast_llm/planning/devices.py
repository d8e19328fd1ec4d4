"""Rates that GPUs sustain, and their memory.

An H200 was measured (docs/performance.md); the other GPUs reach the same share of their
published rates.
"""

from dataclasses import dataclass

GPUS_PER_NODE = 8
# Seconds from one process to the next in a ring, within a node and between nodes (NCCL's own
# tables, tuning.cc).
HOP_SECONDS, NODE_HOP_SECONDS = 3.4e-6, 14e-6


@dataclass(frozen=True)
class DeviceSpec:
    """Rates that a GPU sustains for hours, and its memory."""

    name: str
    memory: float  # bytes
    matmul_flops: float  # FLOP/s of large bf16 matmuls
    # FLOP/s of causal attention over a sequence, forward and backward.
    attention_flops: tuple[float, float]
    varlen_attention_flops: tuple[float, float]  # the same within documents
    fp32_flops: float  # FLOP/s of fp32 matmuls
    memory_bandwidth: float  # bytes/s, reading and writing
    link_bandwidth: float  # bytes/s to the other GPUs of a node, each way
    network_bandwidth: float  # bytes/s to other nodes, each way
    peak_flops: float  # bf16 FLOP/s of the data sheet, the denominator of MFU


def _scaled_from_h200(
    name: str,
    *,
    memory_gib: float,
    best_matmul_flops: float,
    peak_bandwidth: float,
    link: float,
    network: float,
    fp32_flops: float,
    peak_flops: float,
    attention: float = 1.0,
) -> DeviceSpec:
    """From published numbers: best bf16 matmuls (ml-engineering's MAMF table), and data sheets.

    Of these an H200 sustains 660 of 794.5 TFLOP/s and 4.25 of 4.8 TB/s; its attention reaches 591
    and 475 TFLOP/s in sequences, 264 and 263 in documents. NCCL reaches 0.8 of NVLink's rate, and
    between nodes half of the adapters' (all-gather over 256 GPUs, NVIDIA/nccl issue 1218).
    `attention`: rate in sequences relative to an H200's.
    """
    share = best_matmul_flops / 794.5e12
    return DeviceSpec(
        name,
        memory=memory_gib * 2**30,
        matmul_flops=660e12 * share,
        attention_flops=(591e12 * share * attention, 475e12 * share * attention),
        varlen_attention_flops=(264e12 * share, 263e12 * share),
        fp32_flops=fp32_flops,
        memory_bandwidth=peak_bandwidth * 4.25 / 4.8,
        link_bandwidth=0.8 * link,
        network_bandwidth=0.5 * network,
        peak_flops=peak_flops,
    )


DEVICES = {
    device.name: device
    for device in (
        # Memory as nvidia-smi shows it. GPUs before Hopper have only the flash kernel, at its rate
        # within documents.
        _scaled_from_h200(
            "a100",
            memory_gib=79.3,
            best_matmul_flops=271.2e12,
            peak_bandwidth=2.039e12,
            link=300e9,
            network=25e9,
            fp32_flops=19.5e12,
            peak_flops=312e12,
            attention=0.5,
        ),
        _scaled_from_h200(
            "h100",
            memory_gib=79.6,
            best_matmul_flops=794.5e12,
            peak_bandwidth=3.35e12,
            link=450e9,
            network=50e9,
            fp32_flops=67e12,
            peak_flops=989e12,
        ),
        _scaled_from_h200(
            "h200",
            memory_gib=140.4,
            best_matmul_flops=794.5e12,
            peak_bandwidth=4.8e12,
            link=450e9,
            network=50e9,
            fp32_flops=67e12,
            peak_flops=989e12,
        ),
        _scaled_from_h200(
            "b200",
            memory_gib=178.4,
            best_matmul_flops=1745e12,
            peak_bandwidth=8e12,
            link=900e9,
            network=50e9,
            fp32_flops=75e12,
            peak_flops=2250e12,
        ),
    )
}
