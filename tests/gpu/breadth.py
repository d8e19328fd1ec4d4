"""Small models on packed documents: every setting that changes GPU code, and every layout.

Each is compared with one GPU in fp32, not compiled, by PyTorch's operations: losses and gradient
norms of six steps. Layouts need several GPUs.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tests.gpu.checks import Rows, report
from tests.gpu.recipe import DATA, finished
from tests.gpu.runs import KEYS, Started, difference, start

GPUS = torch.cuda.device_count()
SMALL: dict[str, Any] = {
    "training.train_iters": 6,
    "training.logs.interval": 1,
    "training.validation.iterations": 1,
    "training.validation.interval": 3,
    "batch.sequence_length": 1024,
    "batch.batch_size": 8,
    "batch.micro_batch_size": 2,
    "data.path": DATA / "code.json",
    "data.split": "[90,10,0]",
    "model.base_model.vocab_size": 128256,
    "model.base_model.tie_word_embeddings": "no",
    "model.base_model.transformer.num_layers": 4,
    "model.base_model.transformer.hidden_size": 512,
    "model.base_model.transformer.num_attention_heads": 8,
    "model.base_model.transformer.head_groups": 4,
    "model.base_model.transformer.ffn_hidden_size": 1536,
    "optimizer.learning_rate.base": 1e-3,
    "optimizer.learning_rate.warmup_iterations": 4,
}
DTYPE, COMPILE = "model.distributed.training_dtype", "model.multi_stage.compile_all"
STAGE, LEVEL = "model.multi_stage.zero_stage", "model.base_model.transformer.mlp_recompute_level"
HEAD, MOMENTS = "model.base_model.cross_entropy_impl", "optimizer.moments_dtype"
TIED = "model.base_model.tie_word_embeddings"
PLAIN = {
    DTYPE: "fp32",
    HEAD: "torch",
    "run.enable_triton_kernels": "no",
    "model.base_model.transformer.use_flash_attention": "no",
}
LOSS, NORM = KEYS
# fp32: sums in another order, six updates long. bf16 against fp32: 2^-9 a rounding; a gradient's
# norm differs by some 1e-3 and after six updates by more. fp8 rounds by 2^-4: its losses differ by
# 3e-3 after six updates, and the norms by 2 to 7 %, most at the step at which they fall fastest.
BOUNDS: dict[str, dict[tuple[str, ...], float]] = {
    "fp32": {KEYS: 1e-4},
    "bf16": {KEYS: 2e-2},
    "fp16": {KEYS: 1e-2},
    "fp8": {(LOSS,): 1e-2, (NORM,): 5e-2},
}


def settings() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name → which bound, and settings; all on one GPU."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for dtype in ("fp32", "bf16", "fp16"):
        for compiled in ("no", "yes"):
            name = f"{dtype}{', compiled' * (compiled == 'yes')}"
            found[name] = dtype, {DTYPE: dtype, COMPILE: compiled}
    for level in ("activation", "activation_and_input", "full", "selective", "block"):
        found[f"bf16, compiled, recompute {level}"] = (
            "bf16",
            {DTYPE: "bf16", COMPILE: "yes", LEVEL: level},
        )
    found["bf16, recompute selective"] = "bf16", {DTYPE: "bf16", LEVEL: "selective"}
    for head in ("torch", "fused", "triton"):
        found[f"bf16, compiled, cross entropy {head}"] = (
            "bf16",
            {DTYPE: "bf16", COMPILE: "yes", HEAD: head},
        )
    for moments in ("fp32", "bf16", "int8"):
        found[f"bf16, moments {moments}"] = "bf16", {DTYPE: "bf16", MOMENTS: moments}
    fp8 = {DTYPE: "bf16", "model.distributed.fp8": "yes"}
    found["fp8"], found["fp8, compiled"] = ("fp8", fp8), ("fp8", fp8 | {COMPILE: "yes"})
    found["bf16, without Triton"] = "bf16", {DTYPE: "bf16", "run.enable_triton_kernels": "no"}
    found["bf16, compiled, micro-batch 4"] = (
        "bf16",
        {DTYPE: "bf16", COMPILE: "yes", "batch.micro_batch_size": 4},
    )
    return found


def layouts() -> dict[str, tuple[str, dict[str, Any]]]:
    """The same for several GPUs."""
    axes = "model.distributed"
    tensor = {f"{axes}.tensor_parallel": 2}
    kinds: dict[str, dict[str, Any]] = {
        "zero_stage 1": {STAGE: 1},
        "zero_stage 2": {STAGE: 2},
        "zero_stage 3": {STAGE: 3},
        "tensor_parallel": tensor,
        "tensor_parallel, sequence_tensor_parallel": tensor
        | {f"{axes}.sequence_tensor_parallel": "yes"},
        "sequence_data_parallel": {f"{axes}.sequence_data_parallel": 2},
        "pipeline_parallel": {f"{axes}.pipeline_parallel": 2},
    }
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, layout in kinds.items():
        for dtype in ("fp32", "bf16"):
            found[f"{dtype}, {name}"] = dtype, layout | {DTYPE: dtype}
        found[f"bf16, compiled, {name}"] = "bf16", layout | {DTYPE: "bf16", COMPILE: "yes"}
    found["fp8, compiled, zero_stage 2"] = (
        "fp8",
        {STAGE: 2, DTYPE: "bf16", "model.distributed.fp8": "yes", COMPILE: "yes"},
    )
    found["bf16, zero_stage 2, recompute selective"] = (
        "bf16",
        {STAGE: 2, DTYPE: "bf16", LEVEL: "selective"},
    )
    found["fp32, zero_stage 3, recompute block"] = "fp32", {STAGE: 3, DTYPE: "fp32", LEVEL: "block"}
    return found


def every_setting() -> Rows:
    """One GPU."""
    yield from compare(settings(), 1)


def every_layout() -> Rows:
    """All that two GPUs allow; more GPUs share them as data parallelism."""
    if GPUS < 2:
        yield "layouts of several GPUs: not run, there is one", "-", None
        return
    yield from compare(layouts(), GPUS)


def compare(kinds: dict[str, tuple[str, dict[str, Any]]], gpus: int) -> Rows:
    """Train each way, several at a time, and compare with the plain one."""
    with TemporaryDirectory() as name:
        place = Path(name)

        def run(which: tuple[int, dict[str, Any], int]) -> Started | str:
            number, further, on = which
            return finished(start(place, place / str(number), SMALL | further, on))

        jobs = [
            (0, PLAIN, 1),
            *((number, further, gpus) for number, (_, further) in enumerate(kinds.values(), 1)),
        ]
        with ThreadPoolExecutor(4 if gpus == 1 else 6) as pool:
            runs = list(pool.map(run, jobs))
        reference, *others = runs
        assert not isinstance(reference, str), reference
        exact = reference.records(), reference.records("validation")
        for (what, (kind, _)), other in zip(kinds.items(), others, strict=True):
            what = f"{f'{gpus} GPUs' if gpus > 1 else 'one GPU'}, {what}"
            if isinstance(other, str):
                yield f"{what}: {other}", float("inf"), 0
                continue
            for keys, bound in BOUNDS[kind].items():
                worst = difference(other.records(), exact[0], keys)
                if LOSS in keys:
                    evaluated = difference(other.records("validation"), exact[1], [LOSS])
                    worst = max(worst, evaluated)
                yield what if keys == KEYS else f"{what}: {keys[0]}", worst, bound


def main() -> None:
    known = {"settings": every_setting, "layouts": every_layout}
    report(*(known[name] for name in sys.argv[1:] or known))


if __name__ == "__main__":
    main()
