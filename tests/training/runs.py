"""Small runs for the tests: text, tokenizer, model, and a training run inside a test's process."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fast_llm.config.document import read
from fast_llm.data.tokenfile import TokenFileWriter
from fast_llm.parallel.mesh import Mesh
from fast_llm.planning.preflight import preflight
from fast_llm.training.job import train
from fast_llm.training.trainer import Trainer

MODEL = [
    "model.base_model.vocab_size=128",
    "model.base_model.transformer.num_layers=2",
    "model.base_model.transformer.hidden_size=40",
    "model.base_model.transformer.num_attention_heads=4",
    "model.base_model.transformer.head_groups=2",
    "model.base_model.transformer.kv_channels=10",
    "model.base_model.transformer.ffn_hidden_size=52",
]


def write_tokens(prefix: Path, documents: int = 60, vocabulary: int = 128) -> list[np.ndarray]:
    """A token file of documents of 1 to 60 tokens, with a pattern that can be learned."""
    random = np.random.default_rng(0)
    made = []
    writer = TokenFileWriter(prefix, np.dtype("uint16"))
    for _ in range(documents):
        length = int(random.integers(1, 60))
        made.append(
            (np.cumsum(random.integers(0, 3, length)) + random.integers(vocabulary)) % vocabulary
        )
        writer.append(made[-1])
    writer.close()
    return made


def settings(folder: Path, *further: str) -> list[str]:
    """A training run on such a token file, written to `folder/run`."""
    return [
        *MODEL,
        f"data.path={folder}/tokens",
        "data.split=[8,1,1]",
        "batch.batch_size=8",
        "batch.micro_batch_size=2",
        "batch.sequence_length=24",
        "training.logs.interval=1",
        "optimizer.learning_rate.base=1e-2",
        f"run.experiment_dir={folder}/run",
        *further,
    ]


def run(arguments: list[str]) -> int:
    """Train in this process, as one of the processes that torchrun would start."""
    torch.set_num_threads(1)
    return train(
        preflight(read(None, arguments), int(os.environ.get("WORLD_SIZE", "1")), weights=True)
    )


def tell(trainer: Trainer, number: signal.Signals) -> None:
    """Send a signal to this process. Returns when the process has noticed it."""
    os.kill(os.getpid(), number)
    while not trainer.interrupt.signal:
        time.sleep(0.001)


def run_all(every: list[list[str]]) -> list[int]:
    """Train several times, one after the other, in these processes: starting them costs more than a
    tiny run.
    """
    # All runs use the first process group: DTensor caches meshes, which keep their groups.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mesh, "close", lambda _: None)
        return [run(arguments) for arguments in every]


def records(folder: Path, phase: str = "training") -> dict[int, dict[str, Any]]:
    """The records of metrics.jsonl by step; the last one of a step counts."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r for r in map(json.loads, lines) if r["phase"] == phase}


def losses(folder: Path, phase: str = "training") -> dict[int, float]:
    """The loss of each step."""
    return {step: record["language_model_loss"] for step, record in records(folder, phase).items()}


def weights(checkpoint: Path) -> dict[str, bytes]:
    """The bytes of every tensor of a checkpoint, by file and name."""
    from safetensors.torch import load_file

    return {
        f"{file.name} {name}": tensor.view(torch.uint8).numpy().tobytes()
        for file in sorted(checkpoint.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
        if tensor.numel()
    }


def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds; AssertionError after 30 s."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)
