"""Loss curves of 200 steps: fast paths and low-precision moments follow the plain path."""

from pathlib import Path

import torch

from fast_llm.kernels import cpu as cpu_kernels
from tests.helpers import needs_compiler, spawn
from tests.training.runs import losses, run_all, settings, write_tokens

BF16 = "model.distributed.training_dtype=bf16"
PLAIN = (
    "model.base_model.transformer.use_flash_attention=no",
    "model.base_model.cross_entropy_impl=torch",
)
SMALLER = "batch.micro_batch_size=4"  # sums in another order, for the size of chance
WITHOUT_KERNELS = {
    "plain": PLAIN,
    "bf16, plain": (BF16, *PLAIN),
    "bf16, plain, other sums": (BF16, *PLAIN, SMALLER),
}
WITH_KERNELS = {
    "fast": (),
    "bf16, fast": (BF16,),
    "bf16, compiled": (BF16, "model.multi_stage.compile_all=yes"),
    "other sums": (SMALLER,),
    "bf16 moments": ("optimizer.moments_dtype=bf16",),
    "int8 moments": ("optimizer.moments_dtype=int8",),
}


def without_kernels(every: list[list[str]]) -> list[int]:
    """Runs without those of kernels/cpu.cpp."""
    with cpu_kernels.disabled():
        return run_all(every)


@needs_compiler
def test_two_hundred_steps(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", 400)
    for function, runs in ((without_kernels, WITHOUT_KERNELS), (run_all, WITH_KERNELS)):
        every = [
            settings(
                tmp_path,
                "training.train_iters=200",
                "training.checkpoint.interval=1000",
                "optimizer.learning_rate.base=3e-3",
                "batch.micro_batch_size=8",
                f"run.experiment_dir={tmp_path}/{name}",
                *further,
            )
            for name, further in runs.items()
        ]
        assert spawn(1, function, every, timeout=600) == [[0] * len(every)]
    names = [*WITHOUT_KERNELS, *WITH_KERNELS]
    curves = {
        name: torch.tensor(list(losses(tmp_path / name).values()), dtype=torch.float64)
        for name in names
    }
    for name in ("plain", "bf16, plain"):
        assert curves[name][-20:].mean() < 0.6 * curves[name][:5].mean()  # it does learn
    # Means of 20 steps, of 1.3 nats at the end; measured along with the bounds.
    for name, other, bound in (
        ("fast", "plain", 1e-5),  # 8e-7
        ("bf16, plain, other sums", "bf16, plain", 3e-3),  # 7e-4
        ("bf16, fast", "bf16, plain", 3e-3),  # 8e-4
        ("bf16, compiled", "bf16, plain", 3e-3),  # 8e-4
        ("bf16, plain", "plain", 6e-3),  # 2e-3
        ("other sums", "fast", 3e-4),  # 2e-6 to 5e-5
        ("bf16 moments", "fast", 1e-3),  # 1e-4
        # Stochastic rounding moves an 8-bit update by 12 %, differently at each step, which moves
        # the curve as other data would.
        ("int8 moments", "fast", 1e-2),  # 3e-3
    ):
        differences = (curves[name] - curves[other]).view(10, 20).mean(1).abs().max()
        assert 0 < differences < bound, (name, differences)
    assert not torch.equal(curves["int8 moments"], curves["bf16 moments"])
