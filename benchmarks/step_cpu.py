"""The training step on the CPU, compared with other implementations.

    PYTHONPATH=. python benchmarks/step_cpu.py [--lengths 512 1024] [--turns 12]
                                               [--contenders ours transformers ...] [--json file]

All train a model of SmolLM2-135M's shape on the same random tokens, each in its own process. They
take turns, one step each, so that other load on the machine affects all of them alike. Ours is
`fast_llm.training.step.TrainStep` with fp32 master weights, gradients and moments. The others clip
gradients to norm 1 and use torch.optim.AdamW(fused=True), as ours does.

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
from fast_llm.models.parameters import cost
from fast_llm.optim.loss_scale import LossScale
from fast_llm.optim.optimizer import Optimizer
from fast_llm.parallel.mesh import Mesh
from fast_llm.parallel.single import SingleWeights
from fast_llm.training.allocator import keep_freed_memory
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


def tokens(sequences: int, length: int) -> torch.Tensor:
    """[B, S + 1], the same for both."""
    return torch.randint(
        SHAPE["vocab_size"], (sequences, length + 1), generator=torch.Generator().manual_seed(0)
    )


FOR_LIFE = ExitStack()  # of a contender's process


def ours(
    sequences: int, length: int, dtype: torch.dtype = torch.bfloat16, plain: bool = False
) -> Callable[[], float]:
    """A step that returns its loss."""
    keep_freed_memory()  # as `fast-llm train` does
    cpu_kernels.use_faster_exact_matmul()
    if plain:
        FOR_LIFE.enter_context(cpu_kernels.disabled())
    config = BaseModelConfig.model_validate(SHAPE)
    with torch.device("meta"):
        model = CausalLM(config)
    weights = SingleWeights(model, dtype, torch.device("cpu"))
    init_weights(weights.tensors, config, seed=0)
    weights.sync_model_weights()
    optimizer_config = OptimizerConfig()
    step = TrainStep(
        model,
        weights,
        Optimizer(weights.local(), optimizer_config),
        LossScale(GradientScalerConfig(), "bf16" if dtype == torch.bfloat16 else "fp32"),
        Mesh(60, 60),
        optimizer_config,
    )
    data = tokens(sequences, length)
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
    sequences: int, length: int, dtype: str = "bf16", kept: bool = False, compiled: bool = False
) -> Callable[[], float]:
    """A step that returns its loss; `dtype` is bf16, autocast or fp32."""
    if kept:
        keep_freed_memory()
    torch.manual_seed(0)
    model = transformers_model(SHAPE)
    if dtype == "bf16":
        model = model.to(torch.bfloat16)
    data = tokens(sequences, length)
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


def litgpt(sequences: int, length: int, compiled: bool = False) -> Callable[[], float]:
    """A step that returns its loss, in pure bf16."""
    from litgpt.utils import chunked_cross_entropy

    keep_freed_memory()
    torch.manual_seed(0)
    model = litgpt_model(SHAPE, length).to(torch.bfloat16)
    data = tokens(sequences, length)
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


def products(sequences: int, length: int, dtype: torch.dtype) -> Callable[[], float]:
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


CONTENDERS: dict[str, Callable[[int, int], Callable[[], float]]] = {
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


def contender(name: str, pipe: Connection, threads: int, *size: int) -> None:
    """At each message take a step; send its seconds, loss and peak memory in MiB. None ends it."""
    torch.set_num_threads(threads)
    step = CONTENDERS[name](*size)
    pipe.send("ready")
    while pipe.recv() is not None:
        started = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - started
        pipe.send((seconds, loss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def compare(
    names: list[str], turns: int, warm_up: int, threads: int, *size: int
) -> dict[str, list[list[float]]]:
    """Seconds, losses and peaks of each turn, of each contender."""
    context = get_context("spawn")
    pipes = {}
    for name in names:
        pipe, other = context.Pipe()
        context.Process(target=contender, args=(name, other, threads, *size), daemon=True).start()
        other.close()
        pipe.recv()
        pipes[name] = pipe
    found: dict[str, list[list[float]]] = {name: [] for name in names}
    for turn in range(warm_up + turns):
        for name, pipe in pipes.items():
            pipe.send(turn)
            found[name].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(None)
    return {
        name: [list(column) for column in zip(*rows[warm_up:], strict=True)]
        for name, rows in found.items()
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, default=["ours", "transformers"]
    )
    parser.add_argument("--json")
    options = parser.parse_args()

    first = options.contenders[0]
    names = [*dict.fromkeys(options.contenders), "products-bf16", "products-fp32"]
    print(
        f"{_processor()}, {options.threads} threads, torch {torch.__version__}; {options.turns}"
        " turns\n"
    )
    print(
        "| tokens | | median s (quartiles) | tokens/s | GFLOP/s | of the matrix rate | peak MiB |"
        f" its time / {first}'s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for length in options.lengths:
        count = options.sequences * length
        found = compare(
            names, options.turns, options.warm_up, options.threads, options.sequences, length
        )
        flops = cost(BaseModelConfig.model_validate(SHAPE), length).model_flops_per_token * count
        peaks = {
            dtype: 2 * 2048**3 / statistics.median(found[f"products-{dtype}"][1])
            for dtype in ("bf16", "fp32")
        }
        for name in names[:-2]:
            seconds, losses, memory = found[name]
            low, middle, high = statistics.quantiles(seconds, n=4)
            times = statistics.quantiles(
                [b / a for a, b in zip(found[first][0], seconds, strict=True)], n=4
            )
            # Numbers in bf16 can be multiplied in fp32, and are where that is faster.
            peak = peaks["fp32"] if name.endswith("fp32") else max(peaks.values())
            rate = flops / middle
            print(
                f"| {options.sequences} × {length} | {name} | {middle:.3f} ({low:.3f}–{high:.3f})"
                f" | {count / middle:.0f}"
                f" | {rate / 1e9:.0f} | {rate / peak:.0%} | {max(memory):.0f}"
                f" | {times[1]:.2f} ({times[0]:.2f}–{times[2]:.2f}) |",
                flush=True,
            )
            rows.append(
                {
                    "tokens": count,
                    "name": name,
                    "seconds": seconds,
                    "losses": losses,
                    "peak": max(memory),
                }
            )
        print(
            f"\nProducts: {peaks['bf16'] / 1e9:.0f} GFLOP/s in bf16, {peaks['fp32'] / 1e9:.0f} in"
            " fp32\n"
        )
    if options.json:
        Path(options.json).write_text(
            json.dumps({"machine": _processor(), "torch": torch.__version__, "rows": rows})
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
