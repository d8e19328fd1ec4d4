"""Llama-3.1-8B on one GPU without offloading: tokens/s, peak memory, time of each part.

    PYTHONPATH=. python benchmarks/whole.py [OUT [NAME ...]]

Takes half an hour on an H200; needs PyTorch for CUDA, Triton and pydantic. Tokens are random, and
so are the weights, which are made on the GPU. Each setting runs in its own process. Two steps warm
up and compile; the median and range of the next three count. Peak memory is compared with the
forecast. OUT receives the kernels of one step of each setting, sorted by time. With NAMEs only
these settings run.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WARM, STEPS = 2, 5
SHAPE = {
    "training.train_iters": STEPS,
    "training.logs.interval": 1,
    "data.format": "random",
    "model.distributed.training_dtype": "bf16",
    "model.base_model.vocab_size": 128256,
    "model.base_model.tie_word_embeddings": "no",
    "model.base_model.transformer.num_layers": 32,
    "model.base_model.transformer.hidden_size": 4096,
    "model.base_model.transformer.num_attention_heads": 32,
    "model.base_model.transformer.head_groups": 8,
    "model.base_model.transformer.ffn_hidden_size": 14336,
    "model.base_model.transformer.rotary.theta": 500000,
}
COMPILED = {"model.multi_stage.compile_all": "yes"}
INT8, FP8 = {"optimizer.moments_dtype": "int8"}, {"model.distributed.fp8": "yes"}
# A quarter of a million tokens a step.
SHORT = {"batch.sequence_length": 4096, "batch.micro_batch_size": 2, "batch.batch_size": 64}
LONG = {"batch.sequence_length": 8192, "batch.micro_batch_size": 1, "batch.batch_size": 32}
LEVEL = "model.base_model.transformer.mlp_recompute_level"
RUNS: dict[str, dict[str, Any]] = {
    "sequence 4096, compiled": SHORT | COMPILED,
    "sequence 4096, compiled, 8-bit moments": SHORT | COMPILED | INT8,
    "sequence 4096 by 3, compiled, 8-bit moments": SHORT
    | COMPILED
    | INT8
    | {"batch.micro_batch_size": 3, "batch.batch_size": 63},
    "sequence 4096, mlp_recompute_level activation": SHORT | {LEVEL: "activation"},
    "sequence 4096, compiled, fp8": SHORT | COMPILED | FP8,
    "sequence 8192, compiled": LONG | COMPILED,
    "sequence 8192 by 2, compiled, mlp_recompute_level activation_and_input, 8-bit moments": LONG
    | COMPILED
    | INT8
    | {"batch.micro_batch_size": 2, LEVEL: "activation_and_input"},
    "sequence 8192, compiled, fp8": LONG | COMPILED | FP8,
    "sequence 8192, compiled, fp8, 8-bit moments": LONG | COMPILED | FP8 | INT8,
    "sequence 8192 by 2, compiled, fp8, 8-bit moments": LONG
    | COMPILED
    | FP8
    | INT8
    | {"batch.micro_batch_size": 2},
    "sequence 122880, mlp_recompute_level block, 8-bit moments": {
        "training.train_iters": WARM + 1,
        "batch.sequence_length": 122880,
        "batch.micro_batch_size": 1,
        "batch.batch_size": 1,
        LEVEL: "block",
        **INT8,
    },
}


def main() -> None:
    import torch

    out = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    print(
        f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}",
        flush=True,
    )
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"}
    for name, run in RUNS.items():
        if sys.argv[2:] and name not in sys.argv[2:]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            settings = SHAPE | run | {"run.experiment_dir": f"{folder}/run"}
            table = str(out / f"{name.replace(' ', '-').replace(',', '')}.txt") if out else ""
            words = [f"{key}={value}" for key, value in settings.items()]
            command = [sys.executable, __file__, "--one", table, *words]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode:
                print(f"{name}: failed\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}", flush=True)
                continue
            lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
        records = [r for r in map(json.loads, lines) if r["phase"] == "training"]
        records = records[WARM:]
        rates = [r["tokens_per_sec_per_gpu"] for r in records]
        print(
            f"{name}: {statistics.median(rates):,.0f} tokens/s ({min(rates):,.0f} to"
            f" {max(rates):,.0f}),"
            f" MFU {100 * records[-1]['mfu']:.1f} %, loss {records[-1]['language_model_loss']:.3f};"
            f" peak {records[0]['max_allocated'] / 1024:.1f} GiB of tensors,"
            f" {records[0]['max_reserved'] / 1024:.1f} reserved;"
            f" {done.stdout.splitlines()[-1]}",
            flush=True,
        )


def one(table: str, settings: list[str]) -> None:
    """A run whose weights are made on the GPU, and whose last step but one is looked at."""
    import torch

    from fast_llm.cli import main as command
    from fast_llm.training.checkpointing import CheckpointManager
    from fast_llm.training.step import TrainStep

    def restore(self: CheckpointManager) -> None:
        torch.manual_seed(0)
        for weight in self.weights.local().values():
            weight.normal_(std=0.01) if weight.dim() > 1 else weight.fill_(1)
        self.weights.sync_model_weights()

    step, count = TrainStep.__call__, 0

    def watched(self: TrainStep, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count != STEPS - 1 or not table:
            return step(self, *args, **kwargs)
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            result = step(self, *args, **kwargs)
        averages = profile.key_averages()
        Path(table).write_text(
            averages.table(
                sort_by="self_device_time_total", row_limit=60, max_name_column_width=110
            )
        )
        return result

    CheckpointManager.restore = restore  # type: ignore[method-assign]
    TrainStep.__call__ = watched  # type: ignore[method-assign]
    code = command(["train", "gpt", *settings])
    if code:
        raise SystemExit(code)

    from fast_llm.config.document import read
    from fast_llm.planning.devices import DEVICES
    from fast_llm.planning.preflight import read_config
    from fast_llm.planning.search import forecast_config

    expected = forecast_config(read_config(read(None, settings), 1), 1, DEVICES["h200"])
    print(
        f"forecast {expected.peak.bytes / 2**30:.1f} GiB ({expected.peak.name}),"
        f" {expected.gpu_tokens_per_second:,.0f} tokens/s"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2], sys.argv[3:])
    else:
        main()
