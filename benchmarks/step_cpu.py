"""The training step on the CPU, compared with other implementations.

    PYTHONPATH=. python benchmarks/step_cpu.py [--families smollm2] [--lengths 512 1024]
                                               [--turns 12] [--contenders ours transformers ...]
                                               [--json file]

All train a model on the same random tokens, each in its own process: SmolLM2-135M's shape, or a
small model of another family (`FAMILY_SHAPES`; litgpt has `smollm2` alone). They take turns, one
step each, so that other load on the machine affects all of them alike. Ours is
`fast_llm.training.step.TrainStep` with fp32 master weights, gradients and moments. The others clip
gradients to norm 1 and use torch.optim.AdamW(fused=True), as ours does. On a busy machine,
`--cpu-time --threads 1` counts the processor's time instead.

ours                    bf16 compute
ours-plain              the same without the kernels of kernels/cpu.cpp
ours-fp32               fp32
transformers            pure bf16: weights, gradients and moments
transformers-kept       the same, keeping freed memory as `fast-llm train` does
transformers-compiled   the same with torch.compile, and keeping freed memory
transformers-autocast   fp32 weights, computing in bf16
transformers-fp32       its default
litgpt                  pure bf16, if `litgpt` is installed; keeping freed memory
litgpt-compiled         the same with torch.compile

The share of the matrix rate refers to 2,048³ matmuls in the same dtype, measured in turns with the
contenders. FLOP/s count the causal half of attention. Prints a table in Markdown and writes JSON.
"""

import argparse
import json
import math
import platform
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from fast_llm.config.model import BaseModelConfig
from fast_llm.config.optimizer import GradientScalerConfig, OptimizerConfig
from fast_llm.kernels import cpu as cpu_kernels
from fast_llm.model.batch import Batch
from fast_llm.model.decoder import CausalLM, init_weights
from fast_llm.models import family_of, family_of_json
from fast_llm.optim.loss_scale import LossScale
from fast_llm.optim.optimizer import Optimizer
from fast_llm.parallel.mesh import Mesh
from fast_llm.parallel.single import SingleWeights
from fast_llm.training.allocator import keep_freed_memory
from fast_llm.training.experts import RouterMonitor
from fast_llm.training.step import TrainStep

SHAPE: dict[str, Any] = {
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "transformer": {
        "num_layers": 30,
        "hidden_size": 576,
        "num_attention_heads": 9,
        "head_groups": 3,
        "ffn_hidden_size": 1536,
    },
}


# config.json of small models, without what all have in common.
FAMILY_SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 256},
    "gemma3_text": {"sliding_window": 256, "query_pre_attn_scalar": 64},
    "olmo2": {},
    "granite": {
        "embedding_multiplier": 12.0,
        "logits_scaling": 8.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.0156,
    },
    "mixtral": {"intermediate_size": 704, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {"moe_intermediate_size": 352, "num_experts": 16, "num_experts_per_tok": 4},
}


def config_json(family: str) -> dict[str, Any]:
    """The small model of a family."""
    return {
        "model_type": family,
        "vocab_size": 16384,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    } | FAMILY_SHAPES[family]


def settings(family: str) -> BaseModelConfig:
    """Ours of the model that is trained."""
    if family == "smollm2":
        return BaseModelConfig.model_validate(SHAPE)
    values = config_json(family)
    return BaseModelConfig.model_validate(family_of_json(values, "").architecture(values, ""))


def tokens(family: str, sequences: int, length: int) -> torch.Tensor:
    """[B, S + 1], the same for all."""
    return torch.randint(
        settings(family).vocab_size,
        (sequences, length + 1),
        generator=torch.Generator().manual_seed(0),
    )


FOR_LIFE = ExitStack()  # of a contender's process


def ours(
    family: str,
    sequences: int,
    length: int,
    dtype: torch.dtype = torch.bfloat16,
    plain: bool = False,
) -> Callable[[], float]:
    """A step that returns its loss."""
    keep_freed_memory()  # as `fast-llm train` does
    cpu_kernels.use_faster_exact_matmul()
    if plain:
        FOR_LIFE.enter_context(cpu_kernels.disabled())
    config = settings(family)
    with torch.device("meta"):
        model = CausalLM(config)
    weights = SingleWeights(model, dtype, torch.device("cpu"))
    init_weights(weights.tensors, config, seed=0)
    weights.sync_model_weights()
    optimizer_config, mesh = OptimizerConfig(), Mesh(60, 60)
    transformer = config.transformer
    step = TrainStep(
        model,
        weights,
        Optimizer(weights.local(), optimizer_config),
        LossScale(GradientScalerConfig(), "bf16" if dtype == torch.bfloat16 else "fp32"),
        mesh,
        optimizer_config,
        routers=RouterMonitor([model], transformer, mesh) if transformer.expert_layers() else None,
    )
    data = tokens(family, sequences, length)
    positions = torch.arange(length).expand(sequences, length)
    batch = Batch(data[:, :-1], data[:, 1:], positions, None, sequences * length)
    return lambda: step([batch]).loss


def transformers_model(shape: dict[str, Any]) -> torch.nn.Module:
    """Theirs of our shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    blocks = shape["transformer"]
    model: torch.nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape["vocab_size"],
            hidden_size=blocks["hidden_size"],
            intermediate_size=blocks["ffn_hidden_size"],
            num_hidden_layers=blocks["num_layers"],
            num_attention_heads=blocks["num_attention_heads"],
            num_key_value_heads=blocks["head_groups"],
            tie_word_embeddings=shape["tie_word_embeddings"],
        )
    )
    return model


def family_model(family: str) -> torch.nn.Module:
    """Theirs of a small model, with the attention and experts that they choose."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = config_json(family)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config)
    return model.train()


def litgpt_model(shape: dict[str, Any], length: int) -> torch.nn.Module:
    """Theirs of our shape, for sequences up to `length`."""
    from litgpt.config import Config
    from litgpt.model import GPT

    blocks = shape["transformer"]
    model: torch.nn.Module = GPT(
        Config(
            block_size=length,
            n_layer=blocks["num_layers"],
            n_embd=blocks["hidden_size"],
            n_head=blocks["num_attention_heads"],
            n_query_groups=blocks["head_groups"],
            padded_vocab_size=shape["vocab_size"],
            intermediate_size=blocks["ffn_hidden_size"],
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
        )
    )
    if shape["tie_word_embeddings"]:
        model.lm_head.weight = model.transformer.wte.weight  # type: ignore[union-attr]
    return model


def transformers(
    family: str,
    sequences: int,
    length: int,
    dtype: str = "bf16",
    kept: bool = False,
    compiled: bool = False,
) -> Callable[[], float]:
    """A step that returns its loss; `dtype` is bf16, autocast or fp32."""
    if kept:
        keep_freed_memory()
    torch.manual_seed(0)
    model = transformers_model(SHAPE) if family == "smollm2" else family_model(family)
    if dtype == "bf16":
        model = model.to(torch.bfloat16)
    data = tokens(family, sequences, length)
    run = torch.compile(model) if compiled else model

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            found: torch.Tensor = run(
                input_ids=data[:, :-1],
                shift_labels=data[:, 1:],
                labels=data[:, 1:],
                use_cache=False,
            ).loss
        return found

    return trained(model, loss)


def litgpt(family: str, sequences: int, length: int, compiled: bool = False) -> Callable[[], float]:
    """A step that returns its loss, in pure bf16."""
    from litgpt.utils import chunked_cross_entropy

    keep_freed_memory()
    torch.manual_seed(0)
    assert family == "smollm2", "litgpt has no other shape here"
    model = litgpt_model(SHAPE, length).to(torch.bfloat16)
    data = tokens(family, sequences, length)
    run = torch.compile(model) if compiled else model
    # As litgpt pretrains: all logits at once.
    return trained(
        model, lambda: chunked_cross_entropy(run(data[:, :-1]), data[:, 1:], chunk_size=0)
    )


def trained(
    model: torch.nn.Module, loss: Callable[[], torch.Tensor], micro_batches: int = 1
) -> Callable[[], float]:
    """A step that returns its last micro-batch's loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        for _ in range(micro_batches):
            made = loss()
            (made / micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return made.item()

    return step


def products(family: str, sequences: int, length: int, dtype: torch.dtype) -> Callable[[], float]:
    """One product of 2,048³, by oneDNN in fp32 as well."""
    cpu_kernels.use_faster_exact_matmul()
    # Transposed, as a layer's weights are: the other way PyTorch takes half a minute for it in bf16
    # where a processor has none.
    left, right = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype).t()
    out = torch.empty_like(left)

    def step() -> float:
        times = []
        for _ in range(3):  # the first one warms the caches and wakes the threads
            started = time.perf_counter()
            torch.mm(left, right, out=out)
            times.append(time.perf_counter() - started)
        return min(times)

    return step


CONTENDERS: dict[str, Callable[[str, int, int], Callable[[], float]]] = {
    "ours": ours,
    "ours-plain": partial(ours, plain=True),
    "ours-fp32": partial(ours, dtype=torch.float32),
    "transformers": transformers,
    "transformers-kept": partial(transformers, kept=True),
    "transformers-compiled": partial(transformers, kept=True, compiled=True),
    "transformers-autocast": partial(transformers, dtype="autocast"),
    "transformers-fp32": partial(transformers, dtype="fp32"),
    "litgpt": litgpt,
    "litgpt-compiled": partial(litgpt, compiled=True),
    "products-bf16": partial(products, dtype=torch.bfloat16),
    "products-fp32": partial(products, dtype=torch.float32),
}


def contender(
    name: str, pipe: Connection, family: str, threads: int, cpu_time: bool, *size: int
) -> None:
    """At each message take a step; send its seconds, loss and peak memory in MiB. None ends it.

    `cpu_time`: seconds of the processor, of all threads.
    """
    clock = time.process_time if cpu_time else time.perf_counter
    torch.set_num_threads(threads)
    step = CONTENDERS[name](family, *size)
    pipe.send("ready")
    while pipe.recv() is not None:
        started = clock()
        loss = step()
        seconds = clock() - started
        pipe.send((seconds, loss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def compare(
    names: list[str], family: str, options: argparse.Namespace, *size: int
) -> dict[str, list[list[float]]]:
    """Seconds, losses and peaks of each turn, of each contender."""
    context = get_context("spawn")
    pipes = {}
    for name in names:
        pipe, other = context.Pipe()
        arguments = name, other, family, options.threads, options.cpu_time, *size
        context.Process(target=contender, args=arguments, daemon=True).start()
        other.close()
        pipe.recv()
        pipes[name] = pipe
    found: dict[str, list[list[float]]] = {name: [] for name in names}
    for turn in range(options.warm_up + options.turns):
        for name, pipe in pipes.items():
            pipe.send(turn)
            found[name].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(None)
    return {
        name: [list(column) for column in zip(*rows[options.warm_up :], strict=True)]
        for name, rows in found.items()
    }


def main() -> None:
    """Measure and print."""
    options = _options()
    print(
        f"{_processor()}, {options.threads} threads, torch {torch.__version__}; {options.turns}"
        " turns\n"
    )
    rows = [
        row
        for family in options.families
        for length in options.lengths
        for row in measure(family, length, options)
    ]
    if options.json:
        Path(options.json).write_text(
            json.dumps({"machine": _processor(), "torch": torch.__version__, "rows": rows})
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--families", nargs="+", choices=["smollm2", *FAMILY_SHAPES], default=["smollm2"]
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, default=["ours", "transformers"]
    )
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--json")
    return parser.parse_args()


def measure(family: str, length: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Let the contenders take turns at a family and length. Prints a table; returns its rows."""
    first = options.contenders[0]
    names = [*dict.fromkeys(options.contenders), "products-bf16", "products-fp32"]
    sizes = options.sequences, length
    found = compare(names, family, options, *sizes)
    config = settings(family)
    flops = family_of(config).cost(config, length).model_flops_per_token * math.prod(sizes)
    peaks = {
        dtype: 2 * 2048**3 / statistics.median(found[f"products-{dtype}"][1])
        for dtype in ("bf16", "fp32")
    }
    print(
        f"| {family} | | median s (quartiles) | tokens/s | GFLOP/s | of the matrix rate | peak MiB"
        f" | its time / {first}'s |\n|---|---|---|---|---|---|---|---|"
    )
    rows = []
    for name in names[:-2]:
        seconds, losses, memory = found[name]
        # Numbers in bf16 can be multiplied in fp32, and are where that is faster.
        peak = peaks["fp32"] if name.endswith("fp32") else max(peaks.values())
        _print_row(name, sizes, found[first][0], seconds, flops, peak, max(memory))
        rows.append(
            {
                "family": family,
                "tokens": math.prod(sizes),
                "name": name,
                "seconds": seconds,
                "losses": losses,
                "peak": max(memory),
            }
        )
    print(
        f"\nProducts: {peaks['bf16'] / 1e9:.0f} GFLOP/s in bf16, {peaks['fp32'] / 1e9:.0f} in"
        " fp32\n",
        flush=True,
    )
    return rows


def _print_row(
    name: str,
    sizes: tuple[int, int],
    of_first: list[float],
    seconds: list[float],
    flops: float,
    peak: float,
    memory: float,
) -> None:
    """`of_first`: seconds of the first contender, turn by turn; `peak`: FLOP/s of matmuls."""
    low, middle, high = statistics.quantiles(seconds, n=4)
    times = statistics.quantiles([b / a for a, b in zip(of_first, seconds, strict=True)], n=4)
    rate = flops / middle
    print(
        f"| {sizes[0]} × {sizes[1]} | {name} | {middle:.3f} ({low:.3f}–{high:.3f})"
        f" | {math.prod(sizes) / middle:.0f}"
        f" | {rate / 1e9:.0f} | {rate / peak:.0%} | {memory:.0f}"
        f" | {times[1]:.2f} ({times[0]:.2f}–{times[2]:.2f}) |",
        flush=True,
    )


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            found = {
                key.strip(): value.strip()
                for key, _, value in (line.partition(":") for line in file)
            }
        amx = " with AMX" if "amx_bf16" in found.get("flags", "") else ""
        return f"{found.get('model name', platform.processor())}{amx}"
    except OSError:
        return platform.processor()


if __name__ == "__main__":
    main()
