"""Several GPUs of one host: correctness of layouts, recovery from faults, and speed.

    PYTHONPATH=. python benchmarks/gpus.py [faults layouts speed]

Takes a quarter of an hour on two GPUs. Needs PyTorch for CUDA, Triton and pydantic.

faults   A process is killed, the launcher gets SIGTERM, or a process is stopped as if it hung.
         Each run is started again and must end with the bits (losses, gradient norms) of an
         undisturbed run.
layouts  A model of SmolLM2's widths and four layers takes eight steps on the same random tokens, in
         fp32 and bf16. The table has the largest relative difference of losses and gradient norms
         from one GPU, and its bound.
speed    Tokens/s of eight blocks of Llama-3.1-8B, on one GPU and on all.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

SMALL = {
    "training.train_iters": 8,
    "batch.sequence_length": 512,
    "batch.batch_size": 8,
    "batch.micro_batch_size": 2,
    "model.base_model.vocab_size": 49152,
    "model.base_model.tie_word_embeddings": "no",
    "model.base_model.transformer.num_layers": 4,
    "model.base_model.transformer.hidden_size": 512,
    "model.base_model.transformer.num_attention_heads": 8,
    "model.base_model.transformer.head_groups": 4,
    "model.base_model.transformer.ffn_hidden_size": 1536,
    "optimizer.learning_rate.base": 1e-3,
    "model.multi_stage.compile_all": "no",
}
BIG = {  # the blocks of Llama-3.1-8B, as many as one GPU of 80 GB trains
    "training.train_iters": 16,
    "batch.sequence_length": 4096,
    "batch.micro_batch_size": 1,
    "model.base_model.vocab_size": 128256,
    "model.base_model.tie_word_embeddings": "no",
    "model.base_model.transformer.num_layers": 8,
    "model.base_model.transformer.hidden_size": 4096,
    "model.base_model.transformer.num_attention_heads": 32,
    "model.base_model.transformer.head_groups": 8,
    "model.base_model.transformer.ffn_hidden_size": 14336,
    "model.distributed.training_dtype": "bf16",
    "model.multi_stage.compile_all": "yes",
}


def layouts(gpus: int) -> dict[str, dict[str, object]]:
    """Name → settings."""
    multi, axes = "model.multi_stage", "model.distributed"
    return {
        "zero_stage 1": {f"{multi}.zero_stage": 1},
        "zero_stage 2": {f"{multi}.zero_stage": 2},
        "zero_stage 3, compiled": {f"{multi}.zero_stage": 3, f"{multi}.compile_all": "yes"},
        "tensor_parallel": {f"{axes}.tensor_parallel": gpus},
        "tensor_parallel, sequence_tensor_parallel": {
            f"{axes}.tensor_parallel": gpus,
            f"{axes}.sequence_tensor_parallel": "yes",
        },
        "sequence_data_parallel": {f"{axes}.sequence_data_parallel": gpus},
        "pipeline_parallel": {f"{axes}.pipeline_parallel": gpus},
        "zero_stage 2, recomputing": {
            f"{multi}.zero_stage": 2,
            "model.base_model.transformer.mlp_recompute_level": "selective",
        },
    }


def start(folder: Path, processes: int, settings: dict[str, object]) -> subprocess.Popen[bytes]:
    """A run, in a session of its own."""
    words = [f"{key}={value}" for key, value in settings.items()]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
    ]
    command += [
        "-m",
        "fast_llm.cli",
        "train",
        "gpt",
        "data.format=random",
        "training.logs.interval=1",
    ]
    root = Path(__file__).parent.parent
    environment = os.environ | {
        "PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "4",
    }
    folder.mkdir(parents=True, exist_ok=True)
    with (folder.with_suffix(".said")).open("w") as said:
        return subprocess.Popen(
            [*command, *words, f"run.experiment_dir={folder}"],
            env=environment,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )


def records(folder: Path) -> list[dict[str, float]]:
    """The metrics of a run's steps, so far; of one that was made again the newer ones."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    newest = {
        record["iteration"]: record
        for record in map(json.loads, lines)
        if record["phase"] == "training"
    }
    return [newest[step] for step in sorted(newest)]


def train(folder: Path, processes: int, settings: dict[str, object]) -> list[dict[str, float]]:
    """The metrics of a run's steps; none if it failed, which is printed."""
    if start(folder, processes, settings).wait():
        print(f"failed: {folder.with_suffix('.said').read_text()[-4000:]}", flush=True)
        return []
    return records(folder)


def ranks(launcher: int) -> list[int]:
    """The processes that a launcher started, in order."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [
        int(child)
        for child in children
        if b"fast_llm.cli" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def faults(folder: Path, gpus: int) -> list[str]:
    """What did not hold."""
    keys = "language_model_loss", "grad_norm"
    settings = SMALL | {
        "training.train_iters": 300,
        "training.checkpoint.interval": 20,
        "model.distributed.training_dtype": "bf16",
        "model.distributed.timeout": 20,
        "model.multi_stage.zero_stage": 2,
    }
    whole = [[record[key] for key in keys] for record in train(folder / "whole", gpus, settings)]
    wrong = [] if len(whole) == 300 else ["the run that nothing happens to"]

    def kill(launcher: int) -> None:
        os.kill(ranks(launcher)[-1], signal.SIGKILL)

    def tell(launcher: int) -> None:
        os.kill(launcher, signal.SIGTERM)

    def hang(launcher: int) -> None:
        os.kill(ranks(launcher)[-1], signal.SIGSTOP)

    for name, what in (
        ("one process killed", kill),
        ("SIGTERM", tell),
        ("one process hangs", hang),
    ):
        where = folder / name.replace(" ", "-")
        run = start(where, gpus, settings)
        while len(records(where)) < 130 and run.poll() is None:
            time.sleep(0.01)
        at = time.monotonic()
        what(run.pid)
        try:
            run.wait(120)
        except subprocess.TimeoutExpired:
            wrong.append(f"{name}: stuck")
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
        seconds = time.monotonic() - at
        said = where.with_suffix(".said").read_text()
        done = len(records(where))
        found = [[record[key] for key in keys] for record in train(where, gpus, settings)]
        same = found == whole
        if not same:
            wrong.append(f"{name}: ends otherwise")
        reported = [
            line for line in said.splitlines() if "This run hung" in line or "stopped by" in line
        ]
        print(
            f"{name}: exit code {run.returncode} after {seconds:.1f} s and {done} of 300 steps;"
            f" {'; '.join(reported[:2])};"
            f" started again it ends {'with the same bits' if same else 'OTHERWISE'}",
            flush=True,
        )
        if not same:
            print(said[-3000:], flush=True)
    return wrong


def main() -> None:
    """Compare, then measure."""
    gpus = torch.cuda.device_count()
    print(
        f"{gpus} x {torch.cuda.get_device_name()}, PyTorch {torch.__version__}, NCCL"
        f" {torch.cuda.nccl.version()}",
        flush=True,
    )
    wanted = sys.argv[1:] or ["faults", "layouts", "speed"]
    folder = Path(tempfile.mkdtemp())
    wrong = faults(folder / "faults", gpus) if "faults" in wanted else []
    if "layouts" in wanted:
        wrong += compare(folder, gpus)
    if "speed" in wanted:
        speed(folder, gpus)
    if wrong:
        raise SystemExit(f"not as it should be: {'; '.join(wrong)}")


def compare(folder: Path, gpus: int) -> list[str]:
    """Layouts that do not train what one GPU trains."""
    wrong = []
    # fp32: sums in another order, eight updates long. bf16: sums between processes are rounded to
    # it.
    for dtype, bound in (("fp32", 1e-4), ("bf16", 2e-2)):
        settings = SMALL | {"model.distributed.training_dtype": dtype}
        one = train(folder / f"{dtype}-one", 1, settings)
        for name, layout in layouts(gpus).items():
            if dtype == "fp32" and "recomputing" in name:
                continue
            found = train(
                folder / f"{dtype}-{name.replace(' ', '-').replace(',', '')}",
                gpus,
                settings | layout,
            )
            keys = "language_model_loss", "grad_norm"
            worst = max(
                (abs(a[k] / b[k] - 1) for a, b in zip(found, one, strict=False) for k in keys),
                default=float("nan"),
            )
            if not worst < bound:
                wrong.append(f"{dtype}, {name}")
            print(
                f"{dtype}, {name}: differs from one GPU by {worst:.1e} (bound {bound:.0e})",
                flush=True,
            )
    return wrong


def speed(folder: Path, gpus: int) -> None:
    """Tokens/s of the blocks of Llama-3.1-8B."""
    for name, processes, layout in (
        ("one GPU", 1, {}),
        (f"{gpus} GPUs, zero_stage 2", gpus, {"model.multi_stage.zero_stage": 2}),
        (f"{gpus} GPUs, zero_stage 3", gpus, {"model.multi_stage.zero_stage": 3}),
        (
            f"{gpus} GPUs, tensor_parallel",
            gpus,
            {
                "model.distributed.tensor_parallel": gpus,
                "model.distributed.sequence_tensor_parallel": "yes",
            },
        ),
        (
            f"{gpus} GPUs, sequence_data_parallel, 16,384 tokens",
            gpus,
            {"model.distributed.sequence_data_parallel": gpus, "batch.sequence_length": 16384},
        ),
    ):
        batch = {"batch.batch_size": 8 if "16,384" not in name else 2}
        found = train(
            folder / name.replace(" ", "-").replace(",", ""), processes, BIG | batch | layout
        )[5:]
        if found:
            rates = [record["tokens_per_sec_per_gpu"] for record in found]
            print(
                f"8 blocks of Llama-3.1-8B, {name}: {statistics.median(rates):,.0f} tokens/s a GPU"
                f" ({min(rates):,.0f} to {max(rates):,.0f}),"
                f" MFU {100 * (found[-1]['mfu'] or 0):.1f} %, peak"
                f" {found[-1]['global_max_reserved'] / 1024:.1f} GiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
