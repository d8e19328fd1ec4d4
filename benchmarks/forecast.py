"""What `fast-llm plan` forecasts beside what others have published and what was measured here.

    PYTHONPATH=. python benchmarks/forecast.py            (a second, on any machine)

Each line is our own step with the settings nearest to the published run's; the others' kernels are not modelled.
docs/planning.md has the table.
"""

from fast_llm.config.section import read, validate
from fast_llm.config.train import REFUSED, RENAMED, TrainConfig
from fast_llm.planning.devices import DEVICES
from fast_llm.planning.search import forecast_config

BASE, T = "model.base_model", "model.base_model.transformer"
COMPILED, SELECTIVE = (
    ("model.multi_stage.compile_all=yes",),
    (f"{T}.mlp_recompute_level=selective",),
)
WHOLE, EVERYTHING = ("batch.cross_document_attention=yes",), (f"{T}.mlp_recompute_level=block",)


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

# Who, model, device, GPUs, sequence, micro-batch, batch, further settings, tokens/s of each GPU
PUBLISHED = [
    ("Fast-LLM 0.2, Llama-3.1-8B, ZeRO 2", LLAMA_8B, "h100", 32, 4096, 2, 64, COMPILED, 10_100),
    ("Fast-LLM 0.2, Mistral-7B, ZeRO 2", MISTRAL_7B, "h100", 32, 4096, 2, 64, COMPILED, 10_350),
    ("torchtitan, Llama-3.1-8B, H100 of 500 W", LLAMA_8B, "h100", 8, 8192, 2, 16, SELECTIVE, 5_762),
    ("the same, compiled", LLAMA_8B, "h100", 8, 8192, 2, 16, SELECTIVE + COMPILED, 6_667),
    ("the same, compiled", LLAMA_8B, "h100", 128, 8192, 2, 256, SELECTIVE + COMPILED, 6_514),
    (
        "torchao with torchtitan, Llama-3-8B, compiled",
        LLAMA_8B,
        "h100",
        8,
        8192,
        1,
        8,
        SELECTIVE + COMPILED,
        6_150,
    ),
    (
        "torchtitan #996, Llama-3-8B, cross entropy in pieces",
        LLAMA_8B,
        "h100",
        8,
        8192,
        1,
        8,
        SELECTIVE,
        5_966,
    ),
    (
        "llm.q, Qwen2.5-7B, weights and states in bf16",
        QWEN_7B,
        "h100",
        1,
        1024,
        4,
        512,
        COMPILED + WHOLE,
        13_850,
    ),
    ("the same", QWEN_7B, "h100", 8, 1024, 8, 512, COMPILED + WHOLE, 14_000),
    (
        "IBM fms-fsdp, Llama-2-7B, compiled, shards of 8",
        LLAMA_2_7B,
        "h100",
        96,
        4096,
        2,
        192,
        (*COMPILED, "model.multi_stage.shard_size=8"),
        9_600,
    ),
    (
        "llm-foundry, MPT-7B",
        MPT_7B,
        "h100",
        8,
        2048,
        6,
        48,
        ("model.multi_stage.zero_stage=3",),
        10_643,
    ),
    (
        "the same, everything recomputed",
        MPT_7B,
        "h100",
        8,
        4096,
        16,
        128,
        ("model.multi_stage.zero_stage=3", *EVERYTHING),
        8_611,
    ),
    (
        "the same, everything recomputed",
        MPT_7B,
        "h100",
        8,
        8192,
        8,
        64,
        ("model.multi_stage.zero_stage=3", *EVERYTHING),
        6_935,
    ),
    ("nanotron, Llama-3.2-1B", LLAMA_1B, "h100", 8, 4096, 4, 32, (), 42_000),
    ("Fast-LLM 0.2, SmolLM2-135M", SMOL, "h100", 8, 1024, 60, 480, COMPILED, 294_000),
]
MEASURED = [  # docs/performance.md
    ("8 blocks of Llama-3.1-8B", BLOCKS, "h200", 1, 4096, 2, 8, WHOLE, 35_703),
    ("the same, compiled", BLOCKS, "h200", 1, 4096, 2, 8, WHOLE + COMPILED, 37_895),
    (
        "the same, mlp_recompute_level: selective",
        BLOCKS,
        "h200",
        1,
        4096,
        2,
        8,
        WHOLE + SELECTIVE,
        34_655,
    ),
    (
        "the same, mlp_recompute_level: block",
        BLOCKS,
        "h200",
        1,
        4096,
        2,
        8,
        WHOLE + EVERYTHING,
        30_286,
    ),
    (
        "the whole of Llama-3.1-8B, compiled",
        LLAMA_8B,
        "h200",
        1,
        4096,
        2,
        16,
        WHOLE + COMPILED,
        12_125,
    ),
    ("the same", LLAMA_8B, "h200", 1, 8192, 1, 8, WHOLE + COMPILED, 11_162),
    ("SmolLM2-135M", SMOL, "h200", 1, 1024, 32, 64, WHOLE, 262_573),
    ("the same, compiled", SMOL, "h200", 1, 1024, 32, 64, WHOLE + COMPILED, 364_780),
]


def table(points: list[tuple]) -> list[str]:  # type: ignore[type-arg]
    lines = [
        "| | GPUs | sequence | tokens/s a GPU | forecast | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for who, shape, device, gpus, sequence, rows, batch, further, given in points:
        settings = [
            *shape,
            "data.format=random",
            "training.train_iters=10",
            "model.distributed.training_dtype=bf16",
            "model.multi_stage.zero_stage=2",
            f"batch.sequence_length={sequence}",
            f"batch.micro_batch_size={rows}",
            f"batch.batch_size={batch}",
            *further,
        ]
        config = validate(TrainConfig, read(None, settings), REFUSED, RENAMED)
        rate = forecast_config(config, gpus, DEVICES[device]).gpu_tokens_per_second
        lines.append(
            f"| {who} | {gpus} {device.upper()} | {sequence:,} | {given:,} | {rate:,.0f} | {rate / given:.2f} |"
        )
    return lines


if __name__ == "__main__":
    print("\n".join(["Published", "", *table(PUBLISHED), "", "Measured", "", *table(MEASURED)]))
