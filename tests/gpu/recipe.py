"""The recipe on this machine's GPUs.

A Hugging Face folder with Llama-3.1-8B's shape, real tokens in many documents, and the guide's YAML
unchanged. Overrides set sizes, `data.split` (the data is small) and `checkpoint.keep`.
"""

import math
import os
import shutil
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F

from fast_llm.checkpoint import folder as checkpoints
from fast_llm.config.document import read
from fast_llm.data.loader import Loader
from fast_llm.model.attention import PackedSequences
from fast_llm.model.loss import IGNORE_INDEX
from fast_llm.planning.preflight import preflight
from tests.gpu.checks import Rows, report
from tests.gpu.files import BLOCK_PARAMETERS, HEAD_PARAMETERS, write_tutorial
from tests.gpu.runs import NO_CUDNN, Started, delete, difference, start, wait_for

DATA = Path(os.environ.get("FAST_LLM_GPU_DATA", "build/gpu-data")).absolute()
GPUS = torch.cuda.device_count()
COMPILED = {"model.multi_stage.compile_all": "yes"}
SIZES: dict[str, Any] = {
    "training.logs.interval": 1,
    "training.validation.iterations": 1,
    "data.split": "[70,18,12]",
}


def recipe() -> Rows:
    """All 32 layers, compiled, with cuDNN if installed: six steps, validation and test."""
    with TemporaryDirectory() as name:
        place = Path(name)
        config = write_tutorial(place, 32, DATA)
        settings = SIZES | COMPILED | {
            "training.train_iters": 6,
            "training.validation.interval": 3,
            "training.test_iters": 1,
            # One checkpoint is larger than the disk of a small machine: `kill_and_resume` saves.
            "training.checkpoint.interval": "null",
            "training.export.interval": "null",
            "batch.batch_size": 32,
        }  # fmt: skip
        run = start(place, place / "run", settings, GPUS, config=config).wait()
        training, validation, test = (
            run.records(phase) for phase in ("training", "validation", "test")
        )
    losses = [
        record["language_model_loss"]
        for one in (training, validation, test)
        for record in one.values()
    ]
    yield "recipe, 32 layers: steps missing", len({*range(1, 7)} - training.keys()), 0
    yield "recipe, 32 layers: validations missing", len({0, 3, 6} - validation.keys()), 0
    yield "recipe, 32 layers: tests missing", len({6} - test.keys()), 0
    yield (
        "recipe, 32 layers: losses that are not finite",
        sum(not math.isfinite(loss) for loss in losses),
        0,
    )
    for step, record in validation.items():
        loss = record["language_model_loss"]
        yield f"recipe, 32 layers: validation loss at step {step}", round(loss, 4), None
    rates = [training[step]["tokens_per_sec_per_gpu"] for step in (3, 5, 6)]
    peak = max(record["max_allocated"] for record in training.values()) / 1024
    yield (
        f"recipe, 32 layers, {GPUS} GPU{'s' * (GPUS > 1)}: tokens/s/GPU, median of three steps",
        round(statistics.median(rates)),
        None,
    )
    yield "recipe, 32 layers: peak of tensors, GiB", round(peak, 1), None
    yield "recipe, 32 layers: first step, s", round(training[1]["step_time_ms"] / 1e3, 1), None


def kill_and_resume() -> Rows:
    """As many full-width layers as the disk holds: checkpoint, SIGKILL, resume, export."""
    with TemporaryDirectory() as name:
        place = Path(name)
        # Two checkpoints at a time of 12 bytes a weight, the model and its export of 2; a tenth is
        # left free.
        weights = 0.9 * shutil.disk_usage(place).free / (2 * 12 + 2 * 2)
        layers = max(1, min(8, int((weights - HEAD_PARAMETERS) / BLOCK_PARAMETERS)))
        config = write_tutorial(place, layers, DATA)
        settings = SIZES | COMPILED | {
            "training.train_iters": 6,
            "training.validation.interval": 6,
            "training.checkpoint.interval": 3,
            "training.checkpoint.keep": 1,
            "training.export.interval": 6,
            "batch.batch_size": 16,
        }  # fmt: skip
        what = f"recipe, {layers} layers"
        killed = start(place, place / "run", settings, GPUS, config=config)

        def saved() -> bool:
            return bool(checkpoints.find(place / "run" / "checkpoint")) and 4 in killed.records()

        wait_for(saved, killed)
        killed.kill()
        before = killed.records()
        yield f"{what}: killed after the checkpoint of step 3, steps made", max(before), None
        resumed = start(place, place / "run", settings, GPUS, config=config).wait()
        after = resumed.records()
        yield f"{what}: steps missing after the resume", len({*range(1, 7)} - after.keys()), 0
        loss, again = (records[4]["language_model_loss"] for records in (before, after))
        yield f"{what}: loss of step 4 after the resume, difference", abs(again - loss), 0
        both = before.keys() & after.keys()
        far = difference({s: after[s] for s in both}, {s: before[s] for s in both})
        yield f"{what}: losses and gradient norms made twice, relative difference", far, 1e-3
        validation = resumed.records("validation")
        delete(place / "run" / "checkpoint")
        export = place / "run" / "export" / "llama" / "6"
        for step, folder in ((0, place / "fast-llm-tutorial" / "pretrained-model"), (6, export)):
            expected = loss_by_transformers(folder, place, config, settings)
            far = abs(validation[step]["language_model_loss"] - expected)
            # Both compute in bf16, by other kernels; rounding of 65,000 tokens' losses averages
            # out.
            yield f"{what}: validation loss at step {step} less that of transformers", far, 5e-3
        yield (
            f"{what}: characters that a pipeline adds with the export",
            len(generated(export)),
            None,
        )


def loss_by_transformers(
    folder: Path, place: Path, config: Path, settings: dict[str, Any]
) -> float:
    """The validation loss of a Hugging Face folder in bf16, attention within documents."""
    from transformers import AutoModelForCausalLM

    here = Path.cwd()
    os.chdir(place)
    try:
        spec = preflight(
            read(str(config), [f"{name}={value}" for name, value in settings.items()]),
            1,
            weights=False,
        )
    finally:
        os.chdir(here)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to("cuda")
    total = targets = 0.0
    loader = Loader(
        spec.dataset,
        "validation",
        spec.batch,
        rank=0,
        processes=1,
        vocab_size=128256,
        first_sample=0,
        steps=1,
        isolate=True,
        workers=0,
        prefetch=1,
    )
    with torch.no_grad():
        for batch in loader.step(0):
            assert isinstance(batch.documents, PackedSequences)
            tokens, labels = batch.tokens.flatten().cuda(), batch.labels.flatten().cuda()
            for some, wanted in zip(
                tokens.split(batch.documents.lengths),
                labels.split(batch.documents.lengths),
                strict=True,
            ):
                logits = model(input_ids=some[None], use_cache=False).logits[0].float()
                total += F.cross_entropy(
                    logits, wanted, ignore_index=IGNORE_INDEX, reduction="sum"
                ).item()
                targets += int((wanted != IGNORE_INDEX).sum())
    return total / targets


def generated(folder: Path) -> str:
    """What the guide's pipeline says with an export."""
    from transformers import AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(folder)
    pipe = pipeline(
        "text-generation", model=str(folder), tokenizer=tokenizer, dtype=torch.bfloat16, device=0
    )
    prompt = "def main():"
    text: str = pipe(prompt, max_new_tokens=8, do_sample=False)[0]["generated_text"]
    assert text.startswith(prompt), text
    return text.removeprefix(prompt)


def variants() -> Rows:
    """Two full-width layers, with and without the compiler and the cuDNN package."""
    with TemporaryDirectory() as name:
        place = Path(name)
        config = write_tutorial(place, 2, DATA)
        settings = SIZES | {
            "training.train_iters": 3,
            "training.validation.interval": 2,
            "training.test_iters": 1,
            "training.checkpoint.interval": "null",
            "training.export.interval": "null",
            "batch.batch_size": 8 * GPUS,
        }  # fmt: skip
        kinds = [(compiled, cudnn) for compiled in (False, True) for cudnn in (False, True)]

        def run(kind: tuple[bool, bool]) -> Started:
            compiled, cudnn = kind
            further = COMPILED if compiled else {next(iter(COMPILED)): "no"}
            folder = (
                place / f"{'compiled' if compiled else 'plain'}-{'with' if cudnn else 'without'}"
            )
            return start(place, folder, settings | further, GPUS, cudnn, config)

        with ThreadPoolExecutor(2) as pool:
            runs = dict(zip(kinds, pool.map(lambda kind: finished(run(kind)), kinds), strict=True))
        reference = runs[False, False]
        for (compiled, cudnn), other in runs.items():
            how = (
                f"two layers, {'compiled' if compiled else 'not compiled'},"
                f" {'with' if cudnn else 'without'} cuDNN"
            )
            if isinstance(other, str):
                yield f"{how}: {other}", math.inf, 0
                continue
            yield (
                f"{how}: evaluations missing",
                4 - len(other.records("validation")) - len(other.records("test")),
                0,
            )
            if not isinstance(reference, str):
                far = max(difference(other.records(p), reference.records(p)) for p in ("training",))
                losses = [
                    abs(
                        record["language_model_loss"]
                        - reference.records(phase)[step]["language_model_loss"]
                    )
                    for phase in ("validation", "test")
                    for step, record in other.records(phase).items()
                ]
                # bf16: other kernels round otherwise; a gradient's norm differs by some 1e-3.
                yield f"{how}: losses and gradient norms, relative to neither", far, 1e-2
                yield f"{how}: losses of evaluations, nats from neither", max(losses), 5e-3


def finished(run: Started) -> Started | str:
    """A run that ended well, or why it did not, of which more goes to stderr."""
    try:
        return run.wait()
    except AssertionError as error:
        print(f"{run.folder}: {error}", file=sys.stderr, flush=True)
        telling = [
            line
            for line in run.printed().splitlines()
            if "Error" in line or line.startswith("fast-llm ")
        ]
        return telling[-1][:200] if telling else "failed"


def main() -> None:
    assert NO_CUDNN.is_dir()
    if not (DATA / "code.json").exists():
        raise SystemExit(f"{DATA}: no data; make it with `python -m tests.gpu.data {DATA}`")
    known = {"recipe": recipe, "resume": kill_and_resume, "variants": variants}
    report(*(known[name] for name in sys.argv[1:] or known))


if __name__ == "__main__":
    main()
