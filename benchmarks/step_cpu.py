"""The bf16 training step on the CPU, side by side with transformers.

    python benchmarks/step_cpu.py [--lengths 512 1024] [--sequences 1] [--turns 20] [--threads 2]

Both train a model of SmolLM2-135M's shape on the same random tokens, each in a process of its own; they take
turns, one step each, so that whatever else the machine does falls on both. Ours is the product's own step
(`fast_llm.training.step.Step`): bf16 compute, fp32 master weights, gradients and moments. transformers
trains in pure bf16: weights, gradients and moments, torch.optim.AdamW(fused=True). Both clip gradients to
norm 1. `fast-llm train` keeps freed memory on the CPU; since any program could, transformers is measured with that
setting too. Writes a table in Markdown.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch

from fast_llm.config.train import BaseModelConfig, GradientScalerConfig, OptimizerConfig
from fast_llm.data.loader import Batch
from fast_llm.model.llama import Llama, init_weights
from fast_llm.optim.loss_scale import LossScale
from fast_llm.optim.optimizer import Optimizer
from fast_llm.parallel.mesh import Mesh
from fast_llm.parallel.single import SingleWeights
from fast_llm.training.memory import keep_freed_memory
from fast_llm.training.step import Step

VOCABULARY, HIDDEN, LAYERS, HEADS, GROUPS, FFN = 49152, 576, 30, 9, 3, 1536


def tokens(sequences: int, length: int) -> torch.Tensor:
    """[B, S + 1], the same for both."""
    return torch.randint(VOCABULARY, (sequences, length + 1), generator=torch.Generator().manual_seed(0))


def ours(sequences: int, length: int) -> Callable[[], float]:
    """A step that returns its loss."""
    keep_freed_memory()  # as `fast-llm train` does
    config = BaseModelConfig.model_validate(
        {
            "vocab_size": VOCABULARY,
            "tie_word_embeddings": True,
            "transformer": {
                "num_layers": LAYERS,
                "hidden_size": HIDDEN,
                "num_attention_heads": HEADS,
                "head_groups": GROUPS,
                "ffn_hidden_size": FFN,
            },
        }
    )
    with torch.device("meta"):
        model = Llama(config)
    weights = SingleWeights(model, torch.bfloat16, torch.device("cpu"))
    init_weights(weights.tensors, config, seed=0)
    weights.publish()
    optimizer_config = OptimizerConfig()
    step = Step(
        model,
        weights,
        Optimizer(weights.local(), optimizer_config),
        LossScale(GradientScalerConfig(), "bf16"),
        Mesh(60, 60),
        optimizer_config,
    )
    data = tokens(sequences, length)
    positions = torch.arange(length).expand(sequences, length)
    batch = Batch(data[:, :-1], data[:, 1:], positions, None, sequences * length)
    return lambda: step([batch]).loss


def theirs_kept(sequences: int, length: int) -> Callable[[], float]:
    """transformers with our setting of the C library's allocator, which is not its default."""
    keep_freed_memory()
    return theirs(sequences, length)


def theirs(sequences: int, length: int) -> Callable[[], float]:
    """A step that returns its loss."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=GROUPS,
            tie_word_embeddings=True,
        )
    ).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    data = tokens(sequences, length)

    def step() -> float:
        loss = model(input_ids=data[:, :-1], shift_labels=data[:, 1:], labels=data[:, 1:], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


CONTENDERS = {
    "ours, fp32 masters": ours,
    "transformers, pure bf16": theirs,
    "transformers, pure bf16, with our allocator setting": theirs_kept,
}


def contender(build: Callable[[int, int], Callable[[], float]], pipe: Connection, threads: int, *size: int) -> None:
    """Take a step and send its seconds and loss whenever something is received; None ends."""
    torch.set_num_threads(threads)
    step = build(*size)
    pipe.send("ready")
    while pipe.recv() is not None:
        started = time.perf_counter()
        loss = step()
        pipe.send((time.perf_counter() - started, loss))


def compare(sequences: int, length: int, turns: int, warm_up: int, threads: int) -> list[list[float]]:
    """Seconds of each turn, of each contender."""
    context = get_context("spawn")
    pipes = []
    for build in CONTENDERS.values():
        pipe, other = context.Pipe()
        context.Process(target=contender, args=(build, other, threads, sequences, length), daemon=True).start()
        pipe.recv()
        pipes.append(pipe)
    seconds: list[list[float]] = [[] for _ in pipes]
    for turn in range(warm_up + turns):
        for pipe, times in zip(pipes, seconds, strict=True):
            pipe.send(turn)
            times.append(pipe.recv()[0])
    for pipe in pipes:
        pipe.send(None)
    return [times[warm_up:] for times in seconds]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    import transformers

    print(f"Machine: {_processor()}, {options.threads} threads; {platform.platform()}")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(
        f"Shape: {LAYERS} layers, {HIDDEN} hidden, {HEADS} heads, {GROUPS} of keys, {FFN} MLP, {VOCABULARY} tokens, tied"
    )
    print(f"Each: {options.warm_up} warm-up steps, then {options.turns}, in turns\n")
    print("| tokens | | median s | quartiles s | tokens/s |")
    print("|---|---|---|---|---|")
    for length in options.lengths:
        sizes = (options.sequences, length)
        seconds = compare(*sizes, options.turns, options.warm_up, options.threads)
        size = f"{options.sequences} × {length}"
        for name, times in zip(CONTENDERS, seconds, strict=True):
            low, middle, high = statistics.quantiles(times, n=4)
            rate = options.sequences * length / middle
            print(f"| {size} | {name} | {middle:.3f} | {low:.3f}–{high:.3f} | {rate:.0f} |")
        for name, times in list(zip(CONTENDERS, seconds, strict=True))[1:]:
            low, middle, high = statistics.quantiles([b / a for a, b in zip(seconds[0], times, strict=True)], n=4)
            print(f"| {size} | **{name} / ours, by turns** | **{middle:.2f}** | {low:.2f}–{high:.2f} | |", flush=True)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in file)}
        amx = " with AMX" if "amx_bf16" in found.get("flags", "") else ""
        return f"{found.get('model name', platform.processor())}{amx}"
    except OSError:
        return platform.processor()


if __name__ == "__main__":
    main()
