"""The training step on one GPU, compared with other implementations.

    PYTHONPATH=. python benchmarks/step_gpu.py [--shape llama-8b-blocks smollm2]
                                               [--contenders ours ...] [--json FILE]

The models are eight blocks of Llama-3.1-8B with embedding and head, the most that every contender
can train on one card; SmolLM2-135M; and twelve blocks of a narrower Qwen3-MoE, which only ours and
transformers train, both with a load-balancing loss:

    --shape qwen3-moe --contenders ours ours-eager transformers-autocast transformers-bf16-compiled

Each contender runs in its own process, one after the
other: three warm-up steps of several micro-batches, then nine that count. All clip gradients to
norm 1 and use fused AdamW. A contender that fails is reported and skipped. Needs PyTorch for CUDA,
Triton and pydantic; transformers, liger-kernel, litgpt and torchtitan for their contenders.

ours                            `fast-llm train gpt`: bf16, compiled; fp32 master weights, gradients
                                and moments
ours-eager                      the same, not compiled
ours-fp8                        compiled, the blocks' matmuls in fp8
transformers-autocast           fp32 weights and moments, computing in bf16: the precision of ours
transformers-autocast-compiled  the same with torch.compile
liger-autocast                  the same with Liger's kernels (fused linear cross entropy, SwiGLU,
                                RMSNorm, RoPE)
torchtitan                      its model and loss, compiled block by block as it does, under
                                autocast as it trains on one device
litgpt-mixed-compiled           its bf16-mixed
transformers-bf16-compiled, liger-bf16, litgpt-bf16-compiled
                                all in bf16, including master weights: less precise than ours

FLOP/s count the causal half of attention; the share refers to 989 TFLOP/s.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import step_cpu

WARM, STEPS = 3, 9
SHAPES: dict[
    str, tuple[dict[str, Any], int, int, int]
] = {  # shape, tokens, sequences and micro-batches of a step
    "llama-8b-blocks": (
        {
            "vocab_size": 128256,
            "tie_word_embeddings": False,
            "transformer": {
                "num_layers": 8,
                "hidden_size": 4096,
                "num_attention_heads": 32,
                "head_groups": 8,
                "ffn_hidden_size": 14336,
            },
        },
        4096,
        2,
        4,
    ),
    "smollm2": (step_cpu.SHAPE, 1024, 32, 4),
    "qwen3-moe": (  # 3.3 billion parameters, 1.0 billion active
        {
            "family": "qwen3_moe",
            "vocab_size": 151936,
            "tie_word_embeddings": False,
            "transformer": {
                "num_layers": 12,
                "hidden_size": 2048,
                "num_attention_heads": 32,
                "head_groups": 4,
                "kv_channels": 128,
                "ffn_hidden_size": 6144,
                "qk_norm": "head",
                "num_experts": 128,
                "num_experts_per_token": 8,
                "expert_hidden_size": 256,
            },
        },
        4096,
        2,
        4,
    ),
}
DEVICE = torch.device("cuda")


def _batch(shape: dict[str, Any], length: int, sequences: int) -> torch.Tensor:
    return torch.randint(shape["vocab_size"], (sequences, length), device=DEVICE)


def transformers_model(shape: dict[str, Any]) -> torch.nn.Module:
    """Theirs of our shape, of any family. Experts are computed by its default, grouped matmuls."""
    if "family" not in shape:
        return step_cpu.transformers_model(shape)
    from transformers import AutoConfig, AutoModelForCausalLM

    from fast_llm.config.model import BaseModelConfig
    from fast_llm.models import family_of

    ours = BaseModelConfig.model_validate(shape)
    values = family_of(ours).export_config(None, ours, "fp32", {})
    # With its load-balancing loss, as ours.
    config = AutoConfig.for_model(**values | {"output_router_logits": True})
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def transformers(
    size: tuple[Any, ...], dtype: str, compiled: bool = False, liger: bool = False
) -> Callable[[], float]:
    """A step that returns its loss."""
    shape, length, sequences, micro_batches = size
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    with DEVICE:
        model = transformers_model(shape)
    if dtype == "bf16":
        model = model.to(torch.bfloat16)
    run = torch.compile(model) if compiled else model

    def loss() -> torch.Tensor:
        data = _batch(shape, length, sequences)
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == "autocast"):
            found: torch.Tensor = run(input_ids=data, labels=data, use_cache=False).loss
        return found

    return step_cpu.trained(model, loss, micro_batches)


def litgpt(size: tuple[Any, ...], dtype: str) -> Callable[[], float]:
    """A step that returns its loss."""
    from litgpt.utils import chunked_cross_entropy

    shape, length, sequences, micro_batches = size
    with DEVICE:
        model = step_cpu.litgpt_model(shape, length)
    if dtype == "bf16":
        model = model.to(torch.bfloat16)
    run = torch.compile(model)

    def loss() -> torch.Tensor:
        data = _batch(shape, length + 1, sequences)
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == "mixed"):
            logits, labels = run(data[:, :-1]), data[:, 1:].contiguous()
            found: torch.Tensor = chunked_cross_entropy(logits, labels, chunk_size=0)
        return found

    return step_cpu.trained(model, loss, micro_batches)


def torchtitan(size: tuple[Any, ...]) -> Callable[[], float]:
    """A step that returns its loss."""
    from torchtitan.components.loss import cross_entropy_loss
    from torchtitan.models.llama3.model.args import TransformerModelArgs
    from torchtitan.models.llama3.model.model import Transformer

    shape, length, sequences, micro_batches = size
    blocks = shape["transformer"]
    widths = blocks["hidden_size"], blocks["ffn_hidden_size"]
    arguments = TransformerModelArgs(
        dim=widths[0],
        n_layers=blocks["num_layers"],
        n_heads=blocks["num_attention_heads"],
        n_kv_heads=blocks["head_groups"],
        vocab_size=shape["vocab_size"],
        # It makes 8/3 of the width, times a factor, a multiple of this.
        ffn_dim_multiplier=widths[1] / (8 * widths[0] / 3),
        multiple_of=64,
        max_seq_len=length,
    )
    with DEVICE, torch.no_grad():
        model = Transformer(arguments)
        model.init_weights(DEVICE)
    assert model.layers["0"].feed_forward.w1.weight.shape[0] == widths[1]
    if shape["tie_word_embeddings"]:
        torch.nn.init.normal_(
            model.tok_embeddings.weight, std=0.02
        )  # it does not tie, and begins embeddings with 1
        model.output.weight = model.tok_embeddings.weight
    for name, block in model.layers.named_children():
        model.layers.register_module(name, torch.compile(block, fullgraph=True))
    compute = torch.compile(cross_entropy_loss)

    def loss() -> torch.Tensor:
        data = _batch(shape, length + 1, sequences)
        with torch.autocast("cuda", torch.bfloat16):
            found: torch.Tensor = compute(model(data[:, :-1]), data[:, 1:])  # type: ignore[no-untyped-call]
        return found / data[:, 1:].numel()  # it sums

    return step_cpu.trained(model, loss, micro_batches)


CONTENDERS: dict[str, Callable[[tuple[Any, ...]], Callable[[], float]] | list[str]] = {
    "ours": ["model.multi_stage.compile_all=yes"],
    "ours-eager": ["model.multi_stage.compile_all=no"],
    "ours-fp8": ["model.multi_stage.compile_all=yes", "model.distributed.fp8=yes"],
    "transformers-autocast": lambda size: transformers(size, "autocast"),
    "transformers-autocast-compiled": lambda size: transformers(size, "autocast", compiled=True),
    "liger-autocast": lambda size: transformers(size, "autocast", liger=True),
    "torchtitan": torchtitan,
    "litgpt-mixed-compiled": lambda size: litgpt(size, "mixed"),
    "transformers-bf16-compiled": lambda size: transformers(size, "bf16", compiled=True),
    "liger-bf16": lambda size: transformers(size, "bf16", liger=True),
    "litgpt-bf16-compiled": lambda size: litgpt(size, "bf16"),
}


def ours(size: tuple[Any, ...], settings: list[str]) -> tuple[list[float], float, float]:
    """Seconds of the steps, the last loss, peak of tensors in GiB."""
    shape, length, sequences, micro_batches = size
    root = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory() as folder:
        words = [
            f"model.base_model.transformer.{key}={value}"
            for key, value in shape["transformer"].items()
        ]
        words += [
            f"model.base_model.{key}={value}"
            for key, value in shape.items()
            if key != "transformer"
        ]
        words += [
            f"batch.sequence_length={length}",
            f"batch.micro_batch_size={sequences}",
            "data.format=random",
        ]
        words += [
            f"batch.batch_size={sequences * micro_batches}",
            f"training.train_iters={WARM + STEPS}",
        ]
        words += [
            "training.logs.interval=1",
            "model.distributed.training_dtype=bf16",
            f"run.experiment_dir={folder}/run",
        ]
        done = subprocess.run(
            [sys.executable, "-m", "fast_llm.cli", "train", "gpt", *words, *settings],
            env=os.environ | {"PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    records = [r for r in map(json.loads, lines) if r["phase"] == "training"][WARM:]
    tokens = length * sequences * micro_batches
    seconds = [tokens / r["tokens_per_sec_per_gpu"] for r in records]
    return seconds, records[-1]["language_model_loss"], records[0]["max_allocated"] / 1024


def one(name: str, shape: str) -> None:
    """Print what a contender takes, as JSON."""
    size, contender = SHAPES[shape], CONTENDERS[name]
    if isinstance(contender, list):
        seconds, loss, peak = ours(size, contender)
    else:
        torch.manual_seed(0)
        step, seconds = contender(size), []
        for number in range(WARM + STEPS):
            torch.cuda.synchronize()
            started = time.perf_counter()
            loss = step()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
            if number == WARM:
                torch.cuda.reset_peak_memory_stats()
        seconds, peak = seconds[WARM:], torch.cuda.max_memory_allocated() / 2**30
    print(json.dumps({"seconds": seconds, "loss": loss, "peak": peak}))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options.one, options.shape[0])
        return

    from fast_llm.config.model import BaseModelConfig
    from fast_llm.models.parameters import cost

    versions = {"torch": str(torch.__version__)}
    for package in ("transformers", "liger_kernel", "litgpt", "torchtitan", "triton"):
        try:
            versions[package] = version(package)
        except ImportError:
            versions[package] = "not there"
    print(f"{torch.cuda.get_device_name()}, {versions}", flush=True)
    rows = []
    for shape in options.shape:
        layers, length, sequences, micro_batches = SHAPES[shape]
        tokens = length * sequences * micro_batches
        flops = cost(BaseModelConfig.model_validate(layers), length).model_flops_per_token * tokens
        print(
            f"\n| {shape}: {micro_batches} × {sequences} × {length} tokens | tokens/s, median"
            " (range) | MFU",
            end="",
        )
        print(" | its time / the first's | GiB | loss |\n|---|---|---|---|---|---|", flush=True)
        first = 0.0
        for name in options.contenders:
            command = [sys.executable, __file__, "--one", name, "--shape", shape]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                reason = " ".join(done.stderr.splitlines()[-1:])[-400:]
                print(f"| {name} | failed: {reason} | | | | |", flush=True)
                continue
            run = json.loads(done.stdout.splitlines()[-1])
            middle = statistics.median(run["seconds"])
            first = first or middle
            slow, fast = tokens / max(run["seconds"]), tokens / min(run["seconds"])
            print(
                f"| {name} | {tokens / middle:,.0f} ({slow:,.0f} to {fast:,.0f}) |"
                f" {flops / middle / 989e12:.1%}"
                f" | {middle / first:.2f} | {run['peak']:.1f} | {run['loss']:.3f} |",
                flush=True,
            )
            rows.append({"shape": shape, "name": name, **run})
            if options.json:
                machine = {"machine": torch.cuda.get_device_name(), **versions}
                Path(options.json).write_text(json.dumps(machine | {"rows": rows}))


if __name__ == "__main__":
    main()
