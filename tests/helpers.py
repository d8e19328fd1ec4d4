"""Shared by the tests: a tiny model, marks, and functions run in several gloo processes.

The processes are forked from a server that has loaded torch but not used it: a fork of a process
whose thread pools have started hangs. A start takes a tenth of a second instead of five.
"""

import multiprocessing
import os
import shutil
import tomllib
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None,
    reason="our kernels and PyTorch's compiler for the CPU need a C++ compiler",
)

slow = pytest.mark.slow  # of `make test-all`: tests/README.md


def some_fast(values: Iterable[Any], is_fast: Callable[[Any], bool]) -> list[Any]:
    """Parameters of a test; those that are not fast are marked slow."""
    rows = [(value, value if isinstance(value, tuple) else (value,)) for value in values]
    return [value if is_fast(value) else pytest.param(*row, marks=slow) for value, row in rows]


TINY: dict[str, Any] = {
    "vocab_size": 256,
    "tie_word_embeddings": False,
    "transformer": {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "head_groups": 2,
        "ffn_hidden_size": 128,
    },
}

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests._preload"])


def spawn(world: int, function: Callable[..., Any], *args: Any, timeout: float = 240) -> list[Any]:
    """Run `function(*args)` in `world` processes of one gloo group; the results, by rank.

    `function` must be importable (at the top of a test module). RANK, WORLD_SIZE, LOCAL_RANK and
    LOCAL_WORLD_SIZE are set as torchrun sets them. A process that fails ends the others and its
    traceback is raised here.
    """
    with TemporaryDirectory() as folder:
        results = _context.Queue()
        workers = [
            _context.Process(
                target=_worker,
                args=(function, args, rank, world, folder, results, dict(os.environ)),
                daemon=True,
            )
            for rank in range(world)
        ]
        for worker in workers:
            worker.start()
        collected: dict[int, Any] = {}
        try:
            while len(collected) < world:
                rank, error, value = results.get(timeout=timeout)
                if error is not None:
                    raise AssertionError(f"rank {rank} of {world} failed:\n{error}")
                collected[rank] = value
        finally:
            for worker in workers:
                worker.join(timeout=5 if len(collected) == world else 0)
                if worker.is_alive():
                    worker.kill()
                    worker.join()
    return [collected[rank] for rank in range(world)]


def _worker(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world: int,
    folder: str,
    results: Any,
    environment: dict[str, str],
) -> None:
    import torch
    import torch.distributed as dist

    # The server keeps the environment of the test that started it; this test may have changed it.
    os.environ.clear()
    os.environ |= environment | {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
    }
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(Path(folder) / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        results.put((rank, None, function(*args)))
        if dist.is_initialized():  # training has destroyed the group
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        results.put((rank, traceback.format_exc(), None))


def install(folder: Path) -> None:
    """Write pyproject.toml's entry points to `folder`, which PYTHONPATH then names."""
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    points = tomllib.loads(text)["project"]["entry-points"]
    metadata = folder / "fast_llm-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fast-llm\nVersion: 0\n")
    groups = (
        f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points[group].items())
        for group in points
    )
    (metadata / "entry_points.txt").write_text("\n".join(groups))
