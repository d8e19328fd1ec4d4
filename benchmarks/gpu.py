"""One GPU: that its fast paths compute what the slow ones do, that a run resumes, and how fast training is.

    PYTHONPATH=. python benchmarks/gpu.py            (five minutes; needs PyTorch for CUDA, Triton, pydantic)

Prints the machine, then a line for each comparison (bound beside it), then tokens/s from the runs' own metrics.
Random tokens and weights: no network, no data. Each run warms up over its first log intervals; the median of the rest counts.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from fast_llm.model import cudnn

SMOL = [
    "model.base_model.vocab_size=49152",
    "model.base_model.transformer.num_layers=30",
    "model.base_model.transformer.hidden_size=576",
    "model.base_model.transformer.num_attention_heads=9",
    "model.base_model.transformer.head_groups=3",
    "model.base_model.transformer.ffn_hidden_size=1536",
]
BIG = [  # the blocks of Llama-3.1-8B, as many as fit with fp32 masters and moments
    "model.base_model.vocab_size=128256",
    "model.base_model.tie_word_embeddings=no",
    "model.base_model.transformer.num_layers=8",
    "model.base_model.transformer.hidden_size=4096",
    "model.base_model.transformer.num_attention_heads=32",
    "model.base_model.transformer.head_groups=8",
    "model.base_model.transformer.ffn_hidden_size=14336",
]


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}")
    attention()
    stretches()
    problem = cudnn.load(torch.device("cuda", 0))
    print(f"cuDNN for packed documents: {problem or 'ready'}")
    if not problem:
        attention()
        stretches()
    norms()
    factors()
    compiled()
    cross_entropy()
    vocabulary_parts()
    long_context()
    products()
    adamw()
    folder = Path(tempfile.mkdtemp())
    resume(folder)
    packed(folder)
    speed(folder)


def library(prefix: Path) -> None:
    """Python's own library as a token file: a document for each module, a token for each byte."""
    import sysconfig

    import numpy as np

    from fast_llm.data.tokenfile import TokenFileWriter

    writer = TokenFileWriter(prefix, np.dtype("uint16"))
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))[:4000]:
        writer.append(np.frombuffer(path.read_bytes(), np.uint8))
    writer.close()


def packed(folder: Path) -> None:
    """Documents that change with every micro-batch, compiled and not: the blocks are compiled for all of them at once."""
    library(folder / "library")
    shape = [*SMOL, "model.base_model.transformer.num_layers=12", "batch.sequence_length=16384", "batch.batch_size=4"]
    data = ["data.format=list", f"data.path={folder}/library", "batch.micro_batch_size=1"]
    found = {}
    for compiled in ("no", "yes"):
        records = train(folder / compiled, [*shape, *data, f"model.multi_stage.compile_all={compiled}"], 25)
        found[compiled] = statistics.median(r["tokens_per_sec_per_gpu"] for r in records[5:])
        print(
            f"packed documents, compile_all {compiled}: {found[compiled]:,.0f} tokens/s, loss {records[-1]['language_model_loss']:.4f}"
        )
    assert found["yes"] > 1.1 * found["no"]


def speed(folder: Path) -> None:
    for name, shape, batch, further in (
        (
            "SmolLM2-135M, sequence 1024",
            SMOL,
            ["batch.sequence_length=1024", "batch.micro_batch_size=32", "batch.batch_size=64"],
            [],
        ),
        (
            "the same, compiled",
            SMOL,
            ["batch.sequence_length=1024", "batch.micro_batch_size=32", "batch.batch_size=64"],
            ["model.multi_stage.compile_all=yes"],
        ),
        (
            "8 blocks of Llama-3.1-8B, sequence 4096",
            BIG,
            ["batch.sequence_length=4096", "batch.micro_batch_size=2", "batch.batch_size=8"],
            [],
        ),
        (
            "the same, compiled",
            BIG,
            ["batch.sequence_length=4096", "batch.micro_batch_size=2", "batch.batch_size=8"],
            ["model.multi_stage.compile_all=yes"],
        ),
        (
            "the same, not compiled, mlp_recompute_level: selective",
            BIG,
            ["batch.sequence_length=4096", "batch.micro_batch_size=2", "batch.batch_size=8"],
            ["model.base_model.transformer.mlp_recompute_level=selective"],
        ),
        (
            "the same, block",
            BIG,
            ["batch.sequence_length=4096", "batch.micro_batch_size=2", "batch.batch_size=8"],
            ["model.base_model.transformer.mlp_recompute_level=block"],
        ),
    ):
        records = train(folder / "speed", [*shape, *batch, *further], 30)
        shutil.rmtree(folder / "speed")
        rates = [r["tokens_per_sec_per_gpu"] for r in records[4:]]
        last = records[-1]
        print(
            f"{name}: {statistics.median(rates):,.0f} tokens/s ({min(rates):,.0f} to {max(rates):,.0f}),"
            f" {last['model_tflops']:.0f} TFLOP/s, MFU {100 * (last['mfu'] or 0):.1f} %, peak {last['global_max_reserved'] / 1024:.1f} GiB"
        )


def attention() -> None:
    from fast_llm.model.attention import Documents
    from fast_llm.model.attention import attention as attend

    lengths = (1, 700, 323, 1000, 24)
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device="cuda")
    documents = Documents(lengths, ends, max(lengths))
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        q, k, v = (
            torch.randn(2, 1024, heads, 64, device="cuda", dtype=dtype, requires_grad=True) for heads in (8, 2, 2)
        )
        out = attend(q, k, v, documents, True)
        found = torch.autograd.grad(out.float().square().sum(), (q, k, v))
        exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
        flat = [x.flatten(0, 1) for x in exact]
        parts = [x.split(lengths) for x in flat]
        outs = [
            F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in part), is_causal=True, enable_gqa=True)[
                0
            ].transpose(0, 1)
            for part in zip(*parts, strict=True)
        ]
        expected = torch.cat(outs)
        wanted = torch.autograd.grad(expected.square().sum(), exact)
        worst = max(distance(a, b) for a, b in zip((out.flatten(0, 1), *found), (expected, *wanted), strict=True))
        print(f"attention in {dtype}: differs from float64 by {worst:.1e} (bound {bound:.0e})")
        assert worst < bound


def stretches() -> None:
    """Context parallelism's attention: each process's share, one after the other, against all at once."""
    from fast_llm.model.attention import Documents, attend
    from fast_llm.parallel.context import _places, _stretches

    lengths, rows, length, size = (1, 700, 323, 1000, 24), 2, 1024, 4
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    documents = Documents(lengths, ends, max(lengths))
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        q, k, v = (torch.randn(rows * length, heads, 64, device="cuda", dtype=dtype) for heads in (8, 2, 2))
        exact = [x.double().requires_grad_() for x in (q, k, v)]
        parts = zip(*(x.split(lengths) for x in exact), strict=True)
        expected = torch.cat(
            [
                F.scaled_dot_product_attention(
                    *(x.transpose(0, 1)[None] for x in part), is_causal=True, enable_gqa=True
                )[0].transpose(0, 1)
                for part in parts
            ]
        )
        wanted = torch.autograd.grad(expected.square().sum(), exact)
        # Where each token lies among those gathered, process by process.
        places = torch.from_numpy(_places(torch.arange(rows * length).numpy(), rows, length, size)).cuda()
        gathered = [torch.empty_like(x).index_copy_(0, places, x).requires_grad_() for x in (q, k, v)]
        out = []
        for rank in range(size):
            own = _stretches(documents, rows, length, (rank, 2 * size - 1 - rank), size).to(torch.device("cuda"))
            part = gathered[0].chunk(size)[rank]
            keys, values = (x.index_select(0, own.index) for x in gathered[1:])
            out.append(attend(part, keys, values, own, True))
        every = torch.cat(out)
        found = torch.autograd.grad(every.float().square().sum(), gathered)
        worst = max(distance(a[places], b) for a, b in zip((every, *found), (expected, *wanted), strict=True))
        print(f"attention in stretches in {dtype}: differs from float64 by {worst:.1e} (bound {bound:.0e})")
        assert worst < bound


def long_context() -> None:
    """131,072 tokens over 8 processes, one document, the heads of Llama-3.1-8B: what the first and the last have to do."""
    from fast_llm.model.attention import attend
    from fast_llm.parallel.context import _stretches

    length, size = 131072, 8
    for rank in (0, size - 1):
        own = _stretches(None, 1, length, (rank, 2 * size - 1 - rank), size).to(torch.device("cuda"))
        q = torch.randn(length // size, 32, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        both = torch.randn(length, 2, 8, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        times: dict[str, list[float]] = {"select": [], "forward": [], "backward": [], "select backward": []}
        for _ in range(5):
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(5)]
            marks[0].record()
            selected = both.index_select(0, own.index)
            marks[1].record()
            keys, values = selected.unbind(1)
            out = attend(q, keys, values, own, True)
            marks[2].record()
            (gradient,) = torch.autograd.grad(out, selected, torch.ones_like(out), retain_graph=True)
            marks[3].record()
            torch.autograd.grad(selected, both, gradient)
            marks[4].record()
            torch.cuda.synchronize()
            for name, one, other in zip(times, marks[:-1], marks[1:], strict=True):
                times[name].append(one.elapsed_time(other))
        shown = ", ".join(f"{name} {statistics.median(found[1:]):.1f} ms" for name, found in times.items())
        print(f"131,072 tokens over 8, process {rank}: {shown}; keys and values gathered: {both.nbytes / 1e6:.0f} MB")


def vocabulary_parts() -> None:
    """A head cut in two by vocabulary: both halves on this GPU, told of one another's sums by a first pass."""
    from fast_llm.model.loss import VocabularyPart
    from fast_llm.model.loss import cross_entropy as loss_of

    hidden = torch.randn(1000, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (0.05 * torch.randn(128256, 512, device="cuda", dtype=torch.bfloat16)).requires_grad_()
    labels = torch.randint(128256, (1000,), device="cuda")
    labels[5:50] = -100
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logits = exact[0] @ exact[1].T
    expected = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    wanted = torch.autograd.grad(expected, exact, retain_graph=True)
    sums = logits.detach().logsumexp(-1).float()
    chosen = logits.detach().gather(1, labels.clamp_min(0)[:, None])[:, 0].float()
    for implementation in ("torch", "fused", "triton"):
        found = [torch.zeros_like(hidden), torch.zeros_like(weight)]
        losses = []
        for half in (0, 1):
            first, last = half * 64128, (half + 1) * 64128

            def combine(*mine: torch.Tensor, seen: list[int] = [0]) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: B006
                begin = seen[0] % 1000
                seen[0] += len(mine[0])
                return sums[begin : begin + len(mine[0])], chosen[begin : begin + len(mine[0])]

            part = VocabularyPart(first, combine)
            loss = loss_of(hidden, weight[first:last], labels, implementation, None, part)
            losses.append(loss)
            for total, gradient in zip(found, torch.autograd.grad(loss, (hidden, weight)), strict=True):
                total += gradient
        pairs = zip((losses[0], *found), (expected, *wanted), strict=True)
        worst = max(distance(a, b) for a, b in pairs)
        print(f"cross entropy {implementation} cut in two: differs from float64 by {worst:.1e} (bound 1e-02)")
        assert worst < 1e-2


def cross_entropy() -> None:
    from fast_llm.model.loss import cross_entropy as loss_of

    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        hidden = torch.randn(1000, 512, device="cuda", dtype=dtype, requires_grad=True)
        weight = (0.05 * torch.randn(128256, 512, device="cuda", dtype=dtype)).requires_grad_()
        labels = torch.randint(128256, (1000,), device="cuda")
        labels[5:50] = -100
        exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
        expected = F.cross_entropy(exact[0] @ exact[1].T, labels, ignore_index=-100, reduction="sum")
        wanted = torch.autograd.grad(expected, exact)
        for implementation in ("torch", "fused", "triton"):
            loss = loss_of(hidden, weight, labels, implementation, None)
            found = torch.autograd.grad(loss, (hidden, weight))
            worst = max(distance(a, b) for a, b in zip((loss, *found), (expected, *wanted), strict=True))
            print(f"cross entropy {implementation} in {dtype}: differs from float64 by {worst:.1e} (bound {bound:.0e})")
            assert worst < bound


def norms() -> None:
    """Gradients of a residual stream and its RMSNorm against float64, and how long they take beside what PyTorch's compiler makes."""
    from fast_llm.model.norm import rms_norm_beside

    def plain(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return F.rms_norm(x, weight.shape, weight, 1e-5), x * 1

    for tokens, width in ((8192, 4096), (32768, 576)):
        for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 3e-3)):
            x = torch.randn(tokens, width, device="cuda", dtype=dtype, requires_grad=True)
            weight = (1 + 0.1 * torch.randn(width, device="cuda", dtype=dtype)).requires_grad_()
            grads = torch.randn_like(x), torch.randn_like(x)
            exact = [t.detach().double().requires_grad_() for t in (x, weight)]
            wanted = torch.autograd.grad(plain(*exact), exact, [g.double() for g in grads])
            took = []
            for way in (lambda x, weight: rms_norm_beside(x, weight, 1e-5), plain):
                compiled = torch.compile(way)
                found = torch.autograd.grad(compiled(x, weight), (x, weight), grads)
                worst = max(distance(a, b) for a, b in zip(found, wanted, strict=True))
                assert worst < bound
                for _ in range(3):
                    torch.autograd.grad(compiled(x, weight), (x, weight), grads)
                # Of the kernels alone: launching them from Python takes as long.
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                    for _ in range(10):
                        made = compiled(x, weight)
                        torch.cuda.synchronize()
                        with torch.profiler.record_function("back"):
                            torch.autograd.grad(made, (x, weight), grads)
                        torch.cuda.synchronize()
                took.append([(e.key[:40], e.self_device_time_total / 10) for e in profile.key_averages()])
            named = ["; ".join(f"{name} {time:.0f}" for name, time in one if time > 2) for one in took]
            print(
                f"RMSNorm beside a residual stream, {tokens} x {width} in {dtype}: differ from float64 by {worst:.1e} (bound {bound:.0e});"
                f" us, forward and backward: ours {named[0]}; the compiler's {named[1]};"
                f" four passes of memory: {4 * x.nbytes / 4.2e6:.0f} us"
            )


def compiled() -> None:
    """Every weight's gradient with compiled blocks against that without the compiler, sequences whole and packed."""
    from fast_llm.config.section import Document, validate
    from fast_llm.config.train import BaseModelConfig
    from fast_llm.model.attention import Documents
    from fast_llm.model.llama import Llama, init_weights
    from fast_llm.parallel.single import SingleWeights

    transformer = {
        "num_layers": 2,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "head_groups": 4,
        "ffn_hidden_size": 1536,
    }
    config = validate(BaseModelConfig, Document({"vocab_size": 4096, "transformer": transformer}, {}, ""))
    device = torch.device("cuda", 0)
    tokens = torch.randint(4096, (2, 513), generator=torch.Generator().manual_seed(0)).to(device)
    lengths = (100, 412, 512)
    ends = torch.tensor([0, 100, 512, 1024], dtype=torch.int32, device=device)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 6e-2)):
        for documents in (None, Documents(lengths, ends, 512)):
            found = []
            for way in (False, True):
                torch._dynamo.reset()
                with torch.device("meta"):
                    model = Llama(config, "triton")
                if way:
                    for block in model.model.layers.values():
                        block.compile()
                weights = SingleWeights(model, dtype, device, lean=True)
                with weights.masters(changed=True) as tensors:
                    init_weights(tensors, config, 0)
                weights.publish()
                weights.before_micro_batch(True, True)
                positions = torch.arange(512, device=device).expand(2, -1).contiguous()
                model(tokens[:, :-1], positions, documents, tokens[:, 1:].contiguous()).backward()
                found.append({name: gradient.clone() for name, gradient in weights.local_gradients().items()})
            far = {name: distance(found[1][name], gradient.double()) for name, gradient in found[0].items()}
            name = max(far, key=lambda name: far[name])
            print(
                f"compiled blocks in {dtype}, {'packed' if documents else 'whole sequences'}: gradients differ by at most {far[name]:.1e}"
                f" (bound {bound:.0e}), that of {name}"
            )
            assert far[name] < bound


def products() -> None:
    """Products that add to an fp32 sum, compiled and not, against float64."""
    from fast_llm.model.linear import linear

    def twice(x: torch.Tensor, weight: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        return F.silu(linear(x, weight, total))

    for way, function in (("", twice), (", compiled", torch.compile(twice))):
        x = torch.randn(2, 1000, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = (0.05 * torch.randn(768, 512, device="cuda", dtype=torch.bfloat16)).requires_grad_()
        total = torch.zeros(768, 512, device="cuda")
        exact = [t.detach().double().requires_grad_() for t in (x, weight)]
        for _ in range(3):
            function(x, weight, total).sum().backward()
            F.silu(exact[0] @ exact[1].T).sum().backward()
        assert weight.grad is None and exact[1].grad is not None
        worst = max(distance(total, exact[1].grad), distance(x.grad, exact[0].grad))
        print(f"products that add{way}: differ from float64 by {worst:.1e} (bound 1e-02)")
        assert worst < 1e-2


def factors() -> None:
    """What products in fp8 take, as it is and turned, against PyTorch's rounding; and how long that takes."""
    from fast_llm.model.fp8 import FINE, WIDE, _scale

    for dtype in (FINE, WIDE):
        for size in ((8192, 4096), (8192, 14336), (14336, 4096), (1000, 48)):
            x = torch.randn(size, device="cuda", dtype=torch.bfloat16)
            x[3, 5] = 3e-3
            scale = _scale(x, dtype)
            straight, turned = torch.ops.fast_llm.shorten(x, scale, dtype, True, True)
            wanted = (x.float() * scale.reciprocal()).to(dtype)
            assert torch.equal(straight.view(torch.int8), wanted.view(torch.int8))
            assert torch.equal(turned.view(torch.int8), wanted.t().contiguous().view(torch.int8))
            for alone in (0, 1):
                found = torch.ops.fast_llm.shorten(x, scale, dtype, not alone, bool(alone))[alone]
                assert torch.equal(found.view(torch.int8), (straight, turned)[alone].view(torch.int8))
            assert torch.ops.fast_llm.amax(x) == x.abs().amax()
            x[3, 5] = torch.nan
            assert torch.ops.fast_llm.amax(x).isnan()
            assert torch.ops.fast_llm.shorten(x, scale, dtype, True, True)[0][3, 5].isnan()
            both, one = (
                triton_time(partial(torch.ops.fast_llm.shorten, x, scale, dtype, way, True)) for way in (True, False)
            )
            largest = triton_time(partial(torch.ops.fast_llm.amax, x))
            print(
                f"{size} to {dtype}, as it is and turned: the same bits; {1e3 * both:.0f} us, turned alone {1e3 * one:.0f}, the greatest"
                f" {1e3 * largest:.0f}; by memory {', '.join(f'{n * x.numel() / 4.2e6:.0f}' for n in (4, 3, 2))}"
            )


def triton_time(call: Callable[[], object]) -> float:
    """Milliseconds, median."""
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median"))


def adamw() -> None:
    """The kernel against the same update by PyTorch's operations, with masters in halves and whole, and moments of each dtype."""
    from fast_llm.config.train import OptimizerConfig
    from fast_llm.model.rounding import join, split_
    from fast_llm.optim.optimizer import Optimizer

    start = torch.randn(1000, 333, device="cuda")
    gradients = [torch.randn(1000, 333, device="cuda") for _ in range(20)]
    for halves in (False, True):
        for dtype in ("fp32", "bf16", "int8"):
            ends = []
            for kernel in (False, True):
                weight, low = start.clone(), {}
                if halves:
                    weight = torch.empty_like(start, dtype=torch.bfloat16)
                    low = {"w": torch.empty_like(start, dtype=torch.int16)}
                    split_(start.clone(), weight, low["w"])
                optimizer = Optimizer({"w": weight}, OptimizerConfig(moments_dtype=dtype), low, kernel)
                for gradient in gradients:
                    optimizer.step({"w": gradient.clone()}, 1e-2, 0.5)  # PyTorch scales them in place
                with optimizer.moments() as (_, found):
                    ends.append(((join(weight, low["w"]) if halves else weight), found["w"].float().cuda()))
            moved = (ends[0][0] - start).norm()
            worst = ((ends[1][0] - ends[0][0]).norm() / moved).item()
            squares = distance(ends[1][1], ends[0][1].double())
            # bf16: other chances gave 1.5e-3, and 3.6e-3 of the squares. 8 bits: the same chances but for a few.
            # fp32: 20 updates' roundings of a weight, 6e-8 each of a way of 0.1; 1.0e-5 were measured.
            bound = {"fp32": 3e-5, "bf16": 5e-4, "int8": 5e-3}[dtype]
            print(
                f"AdamW's kernel, masters {'in halves' if halves else 'whole'}, {dtype} moments: 20 updates differ by {worst:.1e}"
                f" of the way, squares by {squares:.1e} (bound {bound:.0e}, {3 * bound:.0e})"
            )
            assert worst < bound and squares < 3 * bound


def resume(folder: Path) -> None:
    shape = [
        *SMOL,
        "model.base_model.transformer.num_layers=4",
        "batch.sequence_length=512",
        "batch.batch_size=8",
        "batch.micro_batch_size=4",
    ]
    saves = ["training.checkpoint.interval=4", "training.export.interval=8"]
    whole = train(folder / "whole", [*shape, *saves], 8)
    train(folder / "parts", [*shape, *saves], 4)
    parts = train(folder / "parts", [*shape, *saves], 8)
    difference = max(
        abs(a["language_model_loss"] - b["language_model_loss"]) for a, b in zip(whole, parts, strict=True)
    )
    print(
        f"four and four steps differ from eight by {difference:.1e} nats (flash attention's backward is not deterministic)"
    )
    assert difference < 1e-2


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one.double() - other).norm() / other.norm()).item()


def train(folder: Path, settings: list[str], steps: int) -> list[dict[str, float]]:
    """Run the command and read its metrics."""
    command = [
        *(sys.executable, "-m", "fast_llm.cli", "train", "gpt", "model.distributed.training_dtype=bf16", *settings),
        *(f"training.train_iters={steps}", "training.logs.interval=1"),
        *(() if any(setting.startswith("data.") for setting in settings) else ("data.format=random",)),
        f"run.experiment_dir={folder}",
    ]
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-1500:], done.stderr[-3000:])
        raise SystemExit(1)
    assert "recompile_limit" not in done.stderr, done.stderr[-3000:]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return list({r["step"]: r for r in records if r["phase"] == "training"}.values())


if __name__ == "__main__":
    main()
