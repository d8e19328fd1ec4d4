"""What is forecast of a layout is what is measured; the laws of the model of time; the command."""

import os
import re
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fast_llm import cli
from fast_llm.config.section import read, validate
from fast_llm.config.train import REFUSED, RENAMED, TrainConfig
from fast_llm.demo import RECIPE
from fast_llm.model import fp8, linear
from fast_llm.planning.memory import UPCASTING_CPU, Memory, ParallelLayout, Workload, required_bytes
from fast_llm.planning.time import DEVICES, fastest_layouts, forecast, resolve_auto
from fast_llm.training import build
from fast_llm.training.trainer import Trainer
from tests.helpers import slow, spawn
from tests.training.runs import run

ROOT = Path(__file__).parent.parent.parent
MODEL = [
    "model.base_model.vocab_size=4096",
    "model.base_model.tie_word_embeddings=no",
    "model.base_model.transformer.num_layers=4",
    "model.base_model.transformer.hidden_size=128",
    "model.base_model.transformer.num_attention_heads=4",
    "model.base_model.transformer.head_groups=2",
    "model.base_model.transformer.ffn_hidden_size=384",
    "data.format=random",
    "batch.sequence_length=512",
    "batch.batch_size=4",
    "batch.micro_batch_size=1",
    "batch.cross_document_attention=yes",
    "training.train_iters=2",
    "training.num_workers=0",
    "training.logs.interval=10",
    "run.experiment_dir=null",
]
LLAMA = [
    "model.base_model.vocab_size=128256",
    "model.base_model.tie_word_embeddings=no",
    "model.base_model.transformer.num_layers=32",
    "model.base_model.transformer.hidden_size=4096",
    "model.base_model.transformer.num_attention_heads=32",
    "model.base_model.transformer.head_groups=8",
    "model.base_model.transformer.ffn_hidden_size=14336",
    "batch.sequence_length=4096",
    "batch.micro_batch_size=2",
    "batch.batch_size=256",
    "data.format=random",
    "training.train_iters=10",
    "model.distributed.training_dtype=bf16",
    "model.multi_stage.zero_stage=2",
]
FP32, BF16 = "model.distributed.training_dtype=fp32", "model.distributed.training_dtype=bf16"
LEVEL = "model.base_model.transformer.mlp_recompute_level"
WIDENS = linear.upcast_to_fp32(
    torch.empty(0, dtype=torch.bfloat16)
)  # this processor has no products in bf16
# What is made of other operations, in Python: these are counted, too.
COMPOSED: dict[Any, Any] = {
    torch.ops.fast_llm.matmul.default: linear.matmul,
    torch.ops.fast_llm.quantize_fp8.default: fp8.quantize_fp8,
    torch.ops.fast_llm.amax.default: fp8.absmax,
}


def config(settings: list[str]) -> TrainConfig:
    return validate(TrainConfig, read(None, settings), REFUSED, RENAMED)


class Meter(TorchDispatchMode):
    """The most bytes that tensors had at any operation. (PyTorch's profiler does not see what gloo's threads free.)"""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in COMPOSED:
            with self:
                return COMPOSED[func](*args)
        out = func(*args, **(kwargs or {}))
        found = [
            x.to_local() if isinstance(x, DTensor) else x
            for x in tree_leaves(out)
            if isinstance(x, torch.Tensor)
        ]
        before = len(self.storages)
        self.storages.update(x.untyped_storage() for x in found if x.device.type == "cpu")
        if len(self.storages) > before:
            # Storages shrink, too: FSDP2 frees gathered weights in place.
            self.peak = max(self.peak, sum(storage.nbytes() for storage in self.storages))
        return out


def measured(settings: list[str]) -> int:
    """The peak of the second step."""
    meter, before = Meter(), Trainer.check_finite

    def first_is_over(trainer: Trainer, step: int) -> None:
        before(trainer, step)
        if step == 1:
            meter.peak = 0

    Trainer.check_finite = first_is_over  # type: ignore[method-assign, assignment]
    with meter:
        assert run(settings) == 0
    return meter.peak


ALONE = [
    *(
        [dtype, f"{LEVEL}={level}"]
        for dtype, level in ((FP32, "none"), (BF16, "none"), (BF16, "selective"))
    ),
    *(
        [BF16, f"{LEVEL}={level}"]
        for level in ("activation", "activation_and_input", "full", "block")
    ),
    [BF16, "model.base_model.cross_entropy_impl=torch"],
    [BF16, "optimizer.moments_dtype=bf16"],
    [BF16, "optimizer.moments_dtype=int8"],
    [FP32, "optimizer.moments_dtype=int8", f"{LEVEL}=block"],
    *(
        [BF16, "model.distributed.fp8=yes", f"{LEVEL}={level}"]
        for level in ("none", "selective", "activation", "full")
    ),
]
SMALL = "model.base_model.vocab_size=256"
E5M2 = [
    f"model.base_model.transformer.{size}"
    for size in ("num_layers=1", "hidden_size=256", "ffn_hidden_size=4096")
]
# Without products in bf16 these have their peak where a gradient is made: that of down's weight, the same, that of gate's weight, of
# down's input, of the head.
IN_PRODUCTS = [
    [BF16, SMALL],
    [BF16, SMALL, f"{LEVEL}=selective"],
    [BF16, SMALL, *E5M2, "batch.sequence_length=128"],
    [BF16, SMALL, f"{LEVEL}=block", "batch.sequence_length=1536"],
    [BF16, "model.base_model.cross_entropy_impl=torch", "batch.sequence_length=64"],
]


def peaks(settings: list[str], processes: int, widens: bool = WIDENS) -> list[float]:
    wanted = config(MODEL + settings)
    layout, shape = (
        ParallelLayout.of(wanted, processes),
        Workload.of(wanted, wanted.batch.batch_size or 0),
    )
    kind = UPCASTING_CPU if widens else "cpu"
    return [Memory(shape, layout, kind, place).peak().bytes for place in range(layout.pipeline)]


def every(several: list[list[str]], widens: bool) -> list[int]:
    linear._UPCAST_DTYPES = (torch.bfloat16, torch.float16) if widens else ()
    return [measured(MODEL + settings) for settings in several]


@slow
@pytest.mark.parametrize("widens", sorted({WIDENS, True}))
def test_memory_of_one_process(widens: bool) -> None:
    """Every tensor is known: what is left are scalars. As this processor makes products, and as one without bf16 does."""
    several = ALONE + IN_PRODUCTS if widens else ALONE
    (found,) = spawn(1, every, several, widens)
    for settings, peak in zip(several, found, strict=True):
        # Found: 0.0002 % in bf16, 0.016 % in fp32 (4 kB, numbers for each token of a stretch), with any seed and number of threads.
        assert peaks(settings, 1, widens)[0] == pytest.approx(peak, rel=0.002), settings


@slow
def test_memory_of_fp8_within_a_block() -> None:
    """Where the peak is where a gradient is made: a little too much (found: 1 to 6 %), never too little."""
    small = [BF16, "model.distributed.fp8=yes", SMALL]
    several = [
        small,
        [*small, *E5M2],
        [*small, f"{LEVEL}=full"],
        [*small, f"{LEVEL}=block", "batch.sequence_length=1536"],
    ]
    (found,) = spawn(1, every, several, WIDENS)
    for settings, peak in zip(several, found, strict=True):
        assert 0.998 * peak < peaks(settings, 1)[0] < 1.07 * peak, settings


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        *(([BF16, f"model.multi_stage.zero_stage={stage}"], 0.02) for stage in (1, 2, 3)),
        ([FP32, "model.multi_stage.zero_stage=2", "batch.batch_size=2"], 0.02),
        ([BF16, "model.multi_stage.zero_stage=3", "optimizer.moments_dtype=int8"], 0.02),
        ([BF16, "model.distributed.tensor_parallel=2"], 0.05),
        (
            [
                FP32,
                "model.distributed.tensor_parallel=2",
                "model.distributed.sequence_tensor_parallel=yes",
            ],
            0.05,
        ),
        ([FP32, "model.distributed.sequence_data_parallel=2"], 0.05),
        ([FP32, "model.distributed.pipeline_parallel=2"], 0.05),
    ],
    ids=str,
)
def test_memory_of_two_processes(settings: list[str], bound: float) -> None:
    expected = peaks(settings, 2)
    for rank, found in enumerate(spawn(2, measured, MODEL + settings)):
        assert expected[rank % len(expected)] == pytest.approx(found, rel=bound), rank


def test_the_kind_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a CPU without products in what is computed in holds them in fp32: not in fp32, and not a GPU beside it."""
    bf16, fp32 = config([BF16]), config([FP32])
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(linear, "_UPCAST_DTYPES", (torch.bfloat16, torch.float16))
    assert [build._kind(*on) for on in ((bf16, cpu), (fp32, cpu), (bf16, gpu))] == [
        UPCASTING_CPU,
        "cpu",
        "cuda",
    ]
    monkeypatch.setattr(linear, "_UPCAST_DTYPES", ())
    assert build._kind(bf16, cpu) == "cpu"


def rate(*settings: str, processes: int = 8, device: str = "h100") -> float:
    return forecast(config([*LLAMA, *settings]), processes, DEVICES[device]).rate


def test_time() -> None:
    """No number is right by itself; these have to stand in the right order."""
    assert rate(device="a100") < rate(device="h100") < rate(device="h200") < rate(device="b200")
    assert rate("model.multi_stage.compile_all=yes") > rate()
    levels = [
        rate(f"{LEVEL}={level}") for level in ("none", "activation", "selective", "full", "block")
    ]
    assert levels == sorted(levels, reverse=True) and levels[0] < 1.35 * levels[-1]
    assert (
        rate("model.multi_stage.zero_stage=1") >= rate() >= rate("model.multi_stage.zero_stage=3")
    )
    assert rate("model.distributed.tensor_parallel=4") > rate("model.distributed.tensor_parallel=8")
    assert rate(processes=16) > rate("model.multi_stage.zero_stage=3", processes=128)
    pipeline = "model.distributed.pipeline_parallel=4"
    few, many = (rate(pipeline, f"batch.batch_size={size}", processes=8) for size in (32, 256))
    assert few < many  # a filling that is longer is idle less
    interleaved = [pipeline, "model.multi_stage.layers_per_stage=4", "batch.batch_size=32"]
    assert few < rate(*interleaved, processes=8)
    zero_bubble = "model.multi_stage.pipeline_schedule=interleaved_zero_bubble"
    assert rate(*interleaved, processes=8) < rate(*interleaved, zero_bubble, processes=8)
    moments = [rate(f"optimizer.moments_dtype={dtype}") for dtype in ("fp32", "bf16", "int8")]
    assert moments == sorted(moments)  # fewer bytes to read and to write
    parts = forecast(config(LLAMA), 8, DEVICES["h100"]).parts
    assert max(parts, key=lambda part: parts[part]) == "matrix products"


def test_measured_on_an_h200() -> None:
    """docs/performance.md: eight blocks of Llama-3.1-8B on one H200, and their memory before the head's gradients were freed."""
    blocks = [
        "model.base_model.transformer.num_layers=8",
        "batch.batch_size=8",
        "batch.cross_document_attention=yes",
    ]
    for level, tokens in (("none", 35_703), ("selective", 34_655), ("block", 30_286)):
        assert rate(*blocks, f"{LEVEL}={level}", processes=1, device="h200") == pytest.approx(
            tokens, rel=0.07
        )
    # All of it, compiled, with 8-bit moments: GiB of tensors and tokens/s.
    whole = ["model.multi_stage.compile_all=yes", "optimizer.moments_dtype=int8"]
    long = ["batch.sequence_length=8192", "batch.batch_size=32"]
    for settings, gib, tokens, bound in (
        (["batch.micro_batch_size=3", "batch.batch_size=63"], 129.4, 12_432, 0.002),
        ([*long, "model.distributed.fp8=yes"], 137.5, 15_694, 0.002),
        (
            [*long, f"{LEVEL}=activation_and_input"],
            128.5,
            11_392,
            0.04,
        ),  # what the compiler keeps by itself is less
    ):
        found = forecast(config([*LLAMA, *whole, *settings]), 1, DEVICES["h200"])
        assert found.peak.bytes / 2**30 == pytest.approx(gib, rel=bound)
        assert found.rate == pytest.approx(tokens, rel=0.07)


def test_the_tables_of_the_guide() -> None:
    """They are what the benchmark prints."""
    said = subprocess.run(
        [sys.executable, "benchmarks/forecast.py"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": "."},
        capture_output=True,
        text=True,
    ).stdout
    rows = [line for line in said.splitlines() if line.startswith("| ")]
    guide = (ROOT / "docs" / "planning.md").read_text()
    assert len(rows) > 20 and all(row in guide for row in rows)


def test_the_best_fit_and_keep_the_laws() -> None:
    for processes in (1, 8, 48, 1024):
        for choice, one in fastest_layouts(config(LLAMA), processes, DEVICES["h100"]):
            settings = [
                f"{path}={'null' if value is None else value}" for path, value in choice.items()
            ]
            again = forecast(config([*LLAMA, *settings]), processes, DEVICES["h100"])
            assert again.fits and again.rate == one.rate
    assert not fastest_layouts(config(LLAMA), 1, DEVICES["h100"])  # 18 bytes a weight
    fastest = fastest_layouts(config(LLAMA), 8, DEVICES["h100"])[0][1]
    assert fastest.rate >= rate(f"{LEVEL}=activation")


def test_plan_needs_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "fast-llm-tutorial" / "pretrained-model"
    model.mkdir(parents=True)
    (model / "config.json").write_text(
        """{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5,
        "rope_theta": 5e5, "tie_word_embeddings": false, "hidden_act": "silu", "max_position_embeddings": 131072}"""
    )
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", "--config", str(RECIPE), "--gpus", "16", "--device", "h200"]) == 0
    said = capsys.readouterr().out
    assert (
        "16 × H200" in said
        and ": fits" in said
        and "tokens/s a GPU" in said
        and "fp32 moments" in said
    )
    assert re.search(r"^ 1024  .*tensor", said, flags=re.M)
    assert (
        cli.main(["plan", "--config", str(RECIPE), "--gpus", "1", "optimizer.moments_dtype=int8"])
        == 0
    )
    assert "recompute none, 8-bit moments" in capsys.readouterr().out
    assert cli.main(["plan", "--config", str(RECIPE), "--gpus", "1"]) == 0
    said = capsys.readouterr().out
    assert "DOES NOT FIT" in said and "None: " in said


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *LLAMA, "--gpus", "6", "model.distributed.tensor_parallel=4"]) == 2
    assert "tensor_parallel" in capsys.readouterr().err
    assert cli.main(["plan", *LLAMA, "batch.batch_size=null"]) == 2
    assert "batch.batch_size: missing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["plan", *LLAMA, "--gpus", "0"])
    assert "given 0, must be an integer above 0" in capsys.readouterr().err


def settled(
    memory: float, *settings: str, processes: int = 1, kind: str = "cuda"
) -> tuple[object, str, str]:
    """What is decided, which fits."""
    auto = ["batch.micro_batch_size=auto", "optimizer.moments_dtype=auto"]
    found = resolve_auto(config([*LLAMA, *auto, *settings]), processes, memory, kind)
    shape = Workload.of(found, 256)
    fits = required_bytes(shape, ParallelLayout.of(found, processes), kind) <= memory
    level = found.model.base_model.transformer.mlp_recompute_level
    return (found.batch.micro_batch_size if fits else None), level, found.optimizer.moments_dtype


def test_what_is_auto() -> None:
    """Llama-3.1-8B: 12 bytes a weight do not fit 80 GB; on 8 GPUs there is room for fp32 moments and larger micro-batches."""
    h100, h200, b200 = (DEVICES[name].memory for name in ("h100", "h200", "b200"))
    assert settled(h100)[::2] == (None, "bf16")
    rows, level, moments = settled(h200)
    assert rows in (1, 2) and level in ("none", "activation", "selective") and moments == "bf16"
    rows, level, moments = settled(h200, "optimizer.moments_dtype=fp32")
    assert (
        rows and level in ("full", "block") and moments == "fp32"
    )  # as asked for: blocks are computed again instead
    assert settled(h200, "batch.micro_batch_size=2", f"{LEVEL}=activation") == (
        2,
        "activation",
        "bf16",
    )
    # Nobody gets 8 bits who did not ask for them; who does has room for twice the tokens, or for fp8's and long sequences' needs.
    rows, level, moments = settled(h200, "optimizer.moments_dtype=int8")
    assert rows and level not in ("full", "block") and moments == "int8"
    eight = config([*LLAMA, "optimizer.moments_dtype=int8"])
    state = Memory(Workload.of(eight, 256), ParallelLayout.of(eight, 1), "cuda").state
    assert sum(state.values()) == pytest.approx(10.03 * 8.03e9, rel=1e-3)
    assert settled(b200)[::2] == (2, "fp32")
    rows, level, moments = settled(h100, processes=8)
    assert rows in (2, 4) and moments == "fp32" and level not in ("full", "block")
    assert settled(h200, "batch.micro_batch_size=2", "batch.batch_size=255", processes=8)[::2] == (
        2,
        "fp32",
    )  # padded
    # More memory is never slower.
    rates = []
    for memory in (60e9, h100, h200, b200):
        found = resolve_auto(config([*LLAMA, "batch.micro_batch_size=auto"]), 8, memory, "cuda")
        rates.append(forecast(found, 8, DEVICES["h100"]).rate)
    assert rates == sorted(rates) and rates[0] < rates[-1]
    small = "model.base_model.transformer.num_layers=1"
    assert settled(40e9, small, kind="cpu")[2] == "fp32" and settled(40e9, small, kind="cpu")[
        0
    ] in (1, 2, 4, 8, 16)
