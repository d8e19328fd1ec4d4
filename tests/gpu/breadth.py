"""Small models on packed documents: every setting that changes GPU code, and every layout.

Each is compared with one GPU in fp32, not compiled, by PyTorch's operations: losses and gradient
norms of six steps; norms of fp8 with fp8 as it is defined. Layouts need several GPUs.
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
    "model.multi_stage.compile_all": "no",  # but where a setting below says otherwise
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
# Frozen parameters, in part of a block too, and a z-loss.
RULES: dict[str, Any] = {
    "optimizer.learning_rate_scales": '[0.3, "*.mlp.*", 0, "model.embed_tokens.*", 0,'
    ' "*.layers.0.*", 0, "*.layers.1.self_attn.[qk]_proj.weight"]',
    "model.base_model.z_loss_coefficient": 1e-3,
}
# Sequences that end with padding, which is a document of its own.
PACKED: dict[str, Any] = {"data.packing": "best_fit"}
LOSS, NORM = KEYS
# fp32: sums in another order, six updates long. bf16 against fp32: 2^-9 a rounding; a gradient's
# norm differs by some 1e-3 and after six updates by more.
BOUNDS: dict[str, float] = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 1e-2}
# fp8 rounds by 2^-4. Its losses differ from fp32 by 3e-3 after six updates, and the norm of its
# first gradients by 1.2e-2. Later norms are those of other weights. Where norms fall by 40 % in a
# step, rounding only the operands of the forward pass to fp8 moves them by 4 to 12 %, without any
# of our kernels. So they are compared with a run that rounds to fp8 and multiplies in fp32.
FP8_LOSS, FP8_FIRST_NORM, FP8_NORM = 1e-2, 2e-2, 5e-2
FP8 = {DTYPE: "bf16", "model.distributed.fp8": "yes"}


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
    for compiled in ("no", "yes"):
        name = f"bf16, frozen parameters and z-loss{', compiled' * (compiled == 'yes')}"
        found[name] = "rules", RULES | {DTYPE: "bf16", COMPILE: compiled}
        name = f"bf16, best-fit packing{', compiled' * (compiled == 'yes')}"
        found[name] = "packed", PACKED | {DTYPE: "bf16", COMPILE: compiled}
    found["fp8"], found["fp8, compiled"] = ("fp8", FP8), ("fp8", FP8 | {COMPILE: "yes"})
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
    for name in ("zero_stage 2", "zero_stage 3", "tensor_parallel", "pipeline_parallel"):
        found[f"bf16, frozen parameters and z-loss, {name}"] = (
            "rules",
            kinds[name] | RULES | {DTYPE: "bf16"},
        )
    found["bf16, best-fit packing, sequence_data_parallel"] = (
        "packed",
        kinds["sequence_data_parallel"] | PACKED | {DTYPE: "bf16"},
    )
    found["fp8, compiled, zero_stage 2"] = "fp8", FP8 | {STAGE: 2, COMPILE: "yes"}
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
    """Train each way, several at a time, and compare with the references, on one GPU."""
    package, reference = "fast_llm.cli", "tests.gpu.fp8_reference"
    with TemporaryDirectory() as name:
        place = Path(name)

        def run(which: tuple[int, dict[str, Any], int, str]) -> Started | str:
            number, further, on, program = which
            folder = place / str(number)
            return finished(start(place, folder, SMALL | further, on, program=program))

        jobs = [
            (0, PLAIN, 1, package),
            (1, FP8, 1, reference),
            (2, PLAIN | RULES, 1, package),
            (3, PLAIN | PACKED, 1, package),
            *((number, each, gpus, package) for number, (_, each) in enumerate(kinds.values(), 4)),
        ]
        with ThreadPoolExecutor(4 if gpus == 1 else 6) as pool:
            exact, fp8, with_rules, packed, *others = pool.map(run, jobs)
        assert not isinstance(exact, str), exact
        assert not isinstance(fp8, str), fp8
        assert not isinstance(with_rules, str), with_rules
        assert not isinstance(packed, str), packed
        references = {"rules": with_rules, "packed": packed}
        for (what, (kind, _)), other in zip(kinds.items(), others, strict=True):
            what = f"{f'{gpus} GPUs' if gpus > 1 else 'one GPU'}, {what}"
            if isinstance(other, str):
                yield f"{what}: {other}", float("inf"), 0
            elif kind == "fp8":
                yield from compare_fp8(what, other, exact, fp8)
            else:
                of_kind = references.get(kind, exact)
                worst = difference(other.records(), of_kind.records(), KEYS)
                bound = BOUNDS["bf16" if kind in references else kind]
                yield what, max(worst, of_validation(other, of_kind)), bound


def compare_fp8(what: str, run: Started, exact: Started, fp8: Started) -> Rows:
    """`exact` computes in fp32, `fp8` rounds to fp8 and multiplies in fp32."""
    losses = difference(run.records(), exact.records(), [LOSS])
    yield f"{what}: losses", max(losses, of_validation(run, exact)), FP8_LOSS
    first = difference({1: run.records()[1]}, {1: exact.records()[1]}, [NORM])
    yield f"{what}: first gradient norm", first, FP8_FIRST_NORM
    norms = difference(run.records(), fp8.records(), [NORM])
    yield f"{what}: gradient norms, from fp8 by definition", norms, FP8_NORM


def of_validation(run: Started, exact: Started) -> float:
    """Largest relative difference of validation losses."""
    return difference(run.records("validation"), exact.records("validation"), [LOSS])


def main() -> None:
    known = {"settings": every_setting, "layouts": every_layout}
    report(*(known[name] for name in sys.argv[1:] or known))


if __name__ == "__main__":
    main()
