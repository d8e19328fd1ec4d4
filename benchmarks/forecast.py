"""Compare the forecasts of `fast-llm plan` with published and measured speeds.

    PYTHONPATH=. python benchmarks/forecast.py            (a second, on any machine)

Each row forecasts our step with the settings nearest to those of the published run. Other software
is not modelled. docs/forecasts.md has the tables.
"""

from typing import NamedTuple

from fast_llm.config.compat import REFUSED, RENAMED
from fast_llm.config.document import read
from fast_llm.config.train import TrainConfig
from fast_llm.config.validate import validate
from fast_llm.planning.devices import DEVICES
from fast_llm.planning.search import forecast_config

BASE, T = "model.base_model", "model.base_model.transformer"
COMPILED, SELECTIVE = (
    ("model.multi_stage.compile_all=yes",),
    (f"{T}.mlp_recompute_level=selective",),
)
ONE_DOCUMENT, FULL = ("batch.cross_document_attention=yes",), (f"{T}.mlp_recompute_level=block",)


def model(
    vocabulary: int, layers: int, hidden: int, heads: int, groups: int, ffn: int, tied: bool = False
) -> list[str]:
    return [
        f"{BASE}.vocab_size={vocabulary}",
        f"{BASE}.tie_word_embeddings={'yes' if tied else 'no'}",
        f"{T}.num_layers={layers}",
        f"{T}.hidden_size={hidden}",
        f"{T}.num_attention_heads={heads}",
        f"{T}.head_groups={groups}",
        f"{T}.ffn_hidden_size={ffn}",
    ]


LLAMA_8B = model(128256, 32, 4096, 32, 8, 14336)
MISTRAL_7B = model(32000, 32, 4096, 32, 8, 14336)
LLAMA_2_7B = model(32000, 32, 4096, 32, 32, 11008)
QWEN_7B = model(152064, 28, 3584, 28, 4, 18944)
MPT_7B = model(50432, 32, 4096, 32, 32, 10923, tied=True)  # two matrices of 16,384 in its MLP
LLAMA_1B = model(128256, 16, 2048, 32, 8, 8192, tied=True)
SMOL = model(49152, 30, 576, 9, 3, 1536, tied=True)
BLOCKS = model(128256, 8, 4096, 32, 8, 14336)


class Run(NamedTuple):
    """A measured or published run, and our settings for it."""

    name: str
    model: list[str]
    gpus: int
    sequence_length: int
    micro_batch_size: int
    batch_size: int
    settings: tuple[str, ...]
    rate: int  # tokens/s of each GPU


ZERO_3 = ("model.multi_stage.zero_stage=3",)
SHARDS_OF_8 = ("model.multi_stage.shard_size=8",)
BOTH = SELECTIVE + COMPILED
PUBLISHED = [
    Run("Fast-LLM 0.2, Llama-3.1-8B, ZeRO 2", LLAMA_8B, 32, 4096, 2, 64, COMPILED, 10_100),
    Run("Fast-LLM 0.2, Mistral-7B, ZeRO 2", MISTRAL_7B, 32, 4096, 2, 64, COMPILED, 10_350),
    Run("Fast-LLM 0.2, SmolLM2-135M", SMOL, 8, 1024, 60, 480, COMPILED, 294_000),
    Run("torchtitan, Llama-3.1-8B (500 W)", LLAMA_8B, 8, 8192, 2, 16, SELECTIVE, 5_762),
    Run("torchtitan, compiled (500 W)", LLAMA_8B, 8, 8192, 2, 16, BOTH, 6_667),
    Run("torchtitan, compiled (500 W)", LLAMA_8B, 128, 8192, 2, 256, BOTH, 6_514),
    Run("torchao + torchtitan, Llama-3-8B, compiled", LLAMA_8B, 8, 8192, 1, 8, BOTH, 6_150),
    Run("torchtitan #996, Llama-3-8B, chunked loss", LLAMA_8B, 8, 8192, 1, 8, SELECTIVE, 5_966),
    Run(
        "llm.q, Qwen2.5-7B, bf16 weights and states",
        QWEN_7B,
        1,
        1024,
        4,
        512,
        COMPILED + ONE_DOCUMENT,
        13_850,
    ),
    Run(
        "llm.q, Qwen2.5-7B, bf16 weights and states",
        QWEN_7B,
        8,
        1024,
        8,
        512,
        COMPILED + ONE_DOCUMENT,
        14_000,
    ),
    Run(
        "fms-fsdp, Llama-2-7B, compiled, shards of 8",
        LLAMA_2_7B,
        96,
        4096,
        2,
        192,
        COMPILED + SHARDS_OF_8,
        9_600,
    ),
    Run("llm-foundry, MPT-7B", MPT_7B, 8, 2048, 6, 48, ZERO_3, 10_643),
    Run("llm-foundry, MPT-7B, full recomputation", MPT_7B, 8, 4096, 16, 128, ZERO_3 + FULL, 8_611),
    Run("llm-foundry, MPT-7B, full recomputation", MPT_7B, 8, 8192, 8, 64, ZERO_3 + FULL, 6_935),
    Run("nanotron, Llama-3.2-1B", LLAMA_1B, 8, 4096, 4, 32, (), 42_000),
]
MEASURED = [  # docs/performance.md
    Run("8 blocks of Llama 3.1 8B", BLOCKS, 1, 4096, 2, 8, ONE_DOCUMENT, 35_703),
    Run("compiled", BLOCKS, 1, 4096, 2, 8, ONE_DOCUMENT + COMPILED, 37_895),
    Run(
        "`mlp_recompute_level: selective`",
        BLOCKS,
        1,
        4096,
        2,
        8,
        ONE_DOCUMENT + SELECTIVE,
        34_655,
    ),
    Run("`mlp_recompute_level: block`", BLOCKS, 1, 4096, 2, 8, ONE_DOCUMENT + FULL, 30_286),
    Run(
        "all of Llama 3.1 8B, compiled",
        LLAMA_8B,
        1,
        4096,
        2,
        16,
        ONE_DOCUMENT + COMPILED,
        12_125,
    ),
    Run(
        "all of Llama 3.1 8B, compiled",
        LLAMA_8B,
        1,
        8192,
        1,
        8,
        ONE_DOCUMENT + COMPILED,
        11_162,
    ),
    Run("SmolLM2-135M", SMOL, 1, 1024, 32, 64, ONE_DOCUMENT, 262_573),
    Run("SmolLM2-135M, compiled", SMOL, 1, 1024, 32, 64, ONE_DOCUMENT + COMPILED, 364_780),
]


def forecast_rate(run: Run, device: str) -> float:
    settings = [
        *run.model,
        "data.format=random",
        "training.train_iters=10",
        "model.distributed.training_dtype=bf16",
        "model.multi_stage.zero_stage=2",
        "model.multi_stage.compile_all=no",
        f"batch.sequence_length={run.sequence_length}",
        f"batch.micro_batch_size={run.micro_batch_size}",
        f"batch.batch_size={run.batch_size}",
        *run.settings,
    ]
    config = validate(TrainConfig, read(None, settings), REFUSED, RENAMED)
    return forecast_config(config, run.gpus, DEVICES[device]).gpu_tokens_per_second


def measured_table() -> list[str]:
    lines = [
        "| Run on one H200 | Sequence | tokens/s | Forecast | Ratio |",
        "|---|---|---|---|---|",
    ]
    return lines + [
        f"| {run.name} | {run.sequence_length:,} | {speeds(run, 'h200')} |" for run in MEASURED
    ]


def published_table() -> list[str]:
    lines = [
        "| Published run | GPUs (H100) | Sequence | Published | Forecast | Ratio |",
        "|---|---|---|---|---|---|",
    ]
    return lines + [
        f"| {run.name} | {run.gpus} | {run.sequence_length:,} | {speeds(run, 'h100')} |"
        for run in PUBLISHED
    ]


def speeds(run: Run, device: str) -> str:
    """The cells with the rate, its forecast and their ratio."""
    rate = forecast_rate(run, device)
    return f"{run.rate:,} | {rate:,.0f} | {rate / run.rate:.2f}"


if __name__ == "__main__":
    print("\n".join(["Measured", "", *measured_table(), "", "Published", "", *published_table()]))
