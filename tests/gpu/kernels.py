"""Every kernel that a GPU runs, against float64, on packed documents.

With gradients and under no_grad; compiled and not.

Bounds: 1e-5 for fp32 sums of some thousand terms. bf16 has 8 bits and fp16 11, so that a rounding
is at most 2e-3 and 2.4e-4; a result is rounded two or three times.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fast_llm.checkpoint.staging import HostCopy
from fast_llm.config.document import Document
from fast_llm.config.model import BaseModelConfig
from fast_llm.config.optimizer import OptimizerConfig
from fast_llm.config.validate import validate
from fast_llm.kernels.rounding import join_master, split_master_
from fast_llm.model.attention import PackedSequences
from fast_llm.model.decoder import CausalLM, init_weights
from fast_llm.model.fp8 import E4M3, E5M2, _scale
from fast_llm.model.layers import enable_fp8
from fast_llm.model.linear import linear
from fast_llm.model.loss import SourceLosses, VocabShard, ZLoss, cross_entropy
from fast_llm.model.norm import fused_add_rms_norm
from fast_llm.optim.optimizer import Optimizer
from fast_llm.parallel.single import SingleWeights
from fast_llm.tensors import Stored
from tests.gpu.attention import (
    attention_of_context_parallelism,
    attention_with_sinks,
    engine,
    engines,
    packed,
    packed_attention,
    short,
    windowed_attention,
)
from tests.gpu.checks import Rows, distance, farthest, report

DEVICE = torch.device("cuda", 0)
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def norms() -> Rows:
    """A residual stream and its RMSNorm."""

    def ours(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return fused_add_rms_norm(x, weight, 1e-5)

    for tokens, width in ((8192, 4096), (32768, 576)):
        for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 3e-3)):
            x = torch.randn(tokens, width, device=DEVICE, dtype=dtype, requires_grad=True)
            weight = (1 + 0.1 * torch.randn(width, device=DEVICE, dtype=dtype)).requires_grad_()
            grads = torch.randn_like(x), torch.randn_like(x)
            exact = [t.detach().double().requires_grad_() for t in (x, weight)]
            expected = F.rms_norm(exact[0], exact[1].shape, exact[1], 1e-5), exact[0] * 1
            wanted = *expected, *torch.autograd.grad(expected, exact, [g.double() for g in grads])
            for compiled in (False, True):
                function = torch.compile(ours) if compiled else ours
                with torch.no_grad():
                    quiet = function(x, weight)
                out = function(x, weight)
                found = *out, *torch.autograd.grad(out, (x, weight), grads), *quiet
                how = f"{tokens} x {width}, {short(dtype)}{', compiled' * compiled}"
                yield f"RMSNorm and residual, {how}", farthest(found, (*wanted, *expected)), bound
                torch._dynamo.reset()


def cross_entropies() -> Rows:
    for dtype in (torch.float32, torch.bfloat16):
        hidden = torch.randn(1000, 512, device=DEVICE, dtype=dtype, requires_grad=True)
        weight = (0.05 * torch.randn(128256, 512, device=DEVICE, dtype=dtype)).requires_grad_()
        labels = torch.randint(128256, (1000,), device=DEVICE)
        labels[5:50] = -100
        exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
        expected = F.cross_entropy(
            exact[0] @ exact[1].T, labels, ignore_index=-100, reduction="sum"
        )
        wanted = expected, *torch.autograd.grad(expected, exact)
        for implementation in ("torch", "fused", "triton"):
            loss = cross_entropy(hidden, weight, labels, implementation, None)
            gradients = torch.autograd.grad(loss, (hidden, weight))
            with torch.no_grad():
                quiet = cross_entropy(hidden, weight, labels, implementation, None)
            far = farthest((loss, *gradients, quiet), (*wanted, expected))
            yield f"cross entropy {implementation}, {short(dtype)}", far, BOUNDS[dtype]
            yield from _token_losses(hidden, weight, labels, implementation, (loss, *gradients))
        squares = torch.logsumexp(exact[0] @ exact[1].T, -1)[labels != -100].square().sum()
        of_z_loss = torch.autograd.grad(1e-2 * squares, exact)
        wanted = expected, squares, *(a + b for a, b in zip(wanted[1:], of_z_loss, strict=True))
        for implementation in ("fused", "triton"):
            z_loss = ZLoss(1e-2, torch.zeros((), dtype=torch.float64, device=DEVICE))
            loss = cross_entropy(hidden, weight, labels, implementation, None, z_loss=z_loss)
            found = loss, z_loss.total, *torch.autograd.grad(loss, (hidden, weight))
            how = f"cross entropy {implementation} with z-loss, {short(dtype)}"
            yield how, farthest(found, wanted), BOUNDS[dtype]


def _token_losses(
    hidden: Tensor, weight: Tensor, labels: Tensor, implementation: str, without: Any
) -> Rows:
    """The terms of the loss, by source; keeping them changes no bit of loss and gradients."""
    terms = torch.empty(len(labels), device=DEVICE)
    loss = cross_entropy(hidden, weight, labels, implementation, None, token_losses=terms)
    kept = loss, *torch.autograd.grad(loss, (hidden, weight))
    changed = sum(int((one != other).sum()) for one, other in zip(kept, without, strict=True))
    name = f"cross entropy {implementation}, {short(hidden.dtype)}"
    yield f"{name}, numbers that token losses change", changed, 0
    logits = hidden.detach().double() @ weight.detach().double().T
    exact = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    by_source = SourceLosses(torch.zeros(2, 3, dtype=torch.float64, device=DEVICE))
    sources = torch.tensor([0, 2, 2, 0], device=DEVICE)
    by_source.add(terms, labels.view(4, 250), sources)
    rows, counts = exact.view(4, 250).sum(1), (labels.view(4, 250) != -100).sum(1)
    expected = [(each[0] + each[3], 0, each[1] + each[2]) for each in (rows, counts)]
    yield (
        f"{name}, sums by source",
        distance(by_source.sums.cpu(), torch.tensor(expected)),
        BOUNDS[hidden.dtype],
    )


def cross_entropy_in_two() -> Rows:
    """A head divided over two processes: both halves on this GPU, reductions from float64."""
    hidden = torch.randn(1000, 512, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = (0.05 * torch.randn(128256, 512, device=DEVICE, dtype=torch.bfloat16)).requires_grad_()
    labels = torch.randint(128256, (1000,), device=DEVICE)
    labels[5:50] = -100
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logits = exact[0] @ exact[1].T
    expected = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    wanted = expected, *torch.autograd.grad(expected, exact, retain_graph=True)
    sums = logits.detach().logsumexp(-1).float()
    chosen = logits.detach().gather(1, labels.clamp_min(0)[:, None])[:, 0].float()
    for implementation in ("torch", "fused", "triton"):
        found = [torch.zeros_like(hidden), torch.zeros_like(weight)]
        for first in (0, 64128):
            seen = 0

            def combine(*mine: Tensor) -> tuple[Tensor, Tensor]:
                nonlocal seen
                begin, seen = seen % 1000, seen + len(mine[0])
                return sums[begin : begin + len(mine[0])], chosen[begin : begin + len(mine[0])]

            part = VocabShard(first, combine)
            loss = cross_entropy(
                hidden, weight[first : first + 64128], labels, implementation, None, part
            )
            for total, gradient in zip(
                found, torch.autograd.grad(loss, (hidden, weight)), strict=True
            ):
                total += gradient
        yield (
            f"cross entropy {implementation}, vocabulary over two",
            farthest((loss, *found), wanted),
            1e-2,
        )


def blocks() -> Rows:
    """Each weight's gradient, compiled against not compiled, with a validation before and after."""
    transformer = {
        "num_layers": 2,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "head_groups": 4,
        "ffn_hidden_size": 1536,
    }
    config = validate(
        BaseModelConfig, Document({"vocab_size": 4096, "transformer": transformer}, {}, "")
    )
    tokens = torch.randint(4096, (2, 513), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    positions = torch.arange(512, device=DEVICE).expand(2, -1).contiguous()

    def run(
        dtype: torch.dtype, documents: PackedSequences | None, compiled: bool, fp8: bool
    ) -> dict[str, Tensor]:
        torch._dynamo.reset()
        with torch.device("meta"):
            model = CausalLM(config, "triton")
        for block in model.model.layers.values():
            if fp8:
                enable_fp8(block)
            if compiled:
                block.compile()
        weights = SingleWeights(model, dtype, DEVICE, fuse_grad_accumulation=True)
        with weights.masters(changed=True) as tensors:
            init_weights(tensors, config, 0)
        weights.sync_model_weights()
        given = tokens[:, :-1], positions, documents, tokens[:, 1:].contiguous()
        with torch.no_grad():
            first = model(*given)
        weights.before_micro_batch(True, True)
        loss = model(*given)
        loss.backward()
        with torch.no_grad():
            last = model(*given)
        losses = {
            "loss": loss.detach(),
            "loss of the validation before": first,
            "loss of the validation behind": last,
        }
        return losses | {
            name: gradient.clone() for name, gradient in weights.local_gradients().items()
        }

    # bf16's gradients of queries and keys nearly cancel at random weights.
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 6e-2)):
        for documents in (None, packed((100, 412, 512))):
            for name in engines(dtype) if documents else ["PyTorch"]:
                with engine(name):
                    plain, found = (
                        run(dtype, documents, compiled, False) for compiled in (False, True)
                    )
                far = {key: distance(found[key], value) for key, value in plain.items()}
                worst = max(far, key=lambda key: math.inf if far[key] != far[key] else far[key])
                how = f"{short(dtype)}, {f'packed, {name}' if documents else 'one document each'}"
                yield f"blocks compiled and not, {how}: {worst}", far[worst], bound
    # fp8 has 3 bits: another rounding of what is rounded to it moves gradients as far as fp8 itself
    # does. So both are measured by their distance from those in bf16.
    documents = packed((100, 412, 512))
    with engine(engines(torch.bfloat16)[-1]):
        exact, plain, found = (
            run(torch.bfloat16, documents, *how)
            for how in ((False, False), (False, True), (True, True))
        )
    losses = [key for key in exact if key.startswith("loss")]
    yield (
        "blocks in fp8, compiled: losses, relative to bf16",
        max(distance(found[key], exact[key]) for key in losses),
        1e-2,
    )
    far = {
        key: distance(found[key], value) / distance(plain[key], value)
        for key, value in exact.items()
        if key not in losses
    }
    worst = max(far, key=lambda key: math.inf if far[key] != far[key] else far[key])
    yield f"blocks in fp8: distance from bf16, compiled by not compiled: {worst}", far[worst], 1.5


def products() -> Rows:
    """Products whose weight gradient is added to an fp32 sum."""

    def twice(x: Tensor, weight: Tensor, main_grad: Tensor) -> Tensor:
        return F.silu(linear(x, weight, main_grad=main_grad))

    for compiled in (False, True):
        function = torch.compile(twice) if compiled else twice
        x = torch.randn(2, 1000, 512, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        weight = (
            0.05 * torch.randn(768, 512, device=DEVICE, dtype=torch.bfloat16)
        ).requires_grad_()
        total = torch.zeros(768, 512, device=DEVICE)
        exact = [t.detach().double().requires_grad_() for t in (x, weight)]
        with torch.no_grad():
            quiet = function(x, weight, total)
        for _ in range(3):
            function(x, weight, total).sum().backward()
            expected = F.silu(exact[0] @ exact[1].T)
            expected.sum().backward()
        assert weight.grad is None and x.grad is not None
        far = farthest((total, x.grad, quiet), (exact[1].grad, exact[0].grad, expected))
        yield f"weight gradients added in fp32{', compiled' * compiled}", far, 1e-2


def fp8_rounding() -> Rows:
    """Bits of our rounding to fp8 that differ from PyTorch's, and greatest numbers that differ."""
    for dtype in (E4M3, E5M2):
        for size in ((8192, 4096), (8192, 14336), (14336, 4096), (1000, 48)):
            x = torch.randn(size, device=DEVICE, dtype=torch.bfloat16)
            x[3, 5] = 3e-3
            scale = _scale(x, dtype)
            wanted = (x.float() * scale.reciprocal()).to(dtype)
            both = torch.ops.fast_llm.quantize_fp8(x, scale, dtype, True, True)
            alone = [
                torch.ops.fast_llm.quantize_fp8(x, scale, dtype, not turned, bool(turned))[turned]
                for turned in (0, 1)
            ]
            expected = wanted.view(torch.int8), wanted.t().contiguous().view(torch.int8)
            pairs = [*zip(both, expected, strict=True), *zip(alone, expected, strict=True)]
            different = sum(int((one.view(torch.int8) != other).sum()) for one, other in pairs)
            different += int(torch.ops.fast_llm.amax(x) != x.abs().amax())
            x[3, 5] = torch.nan
            kept = torch.ops.fast_llm.quantize_fp8(x, scale, dtype, True, True)[0][3, 5].isnan()
            different += int(not (torch.ops.fast_llm.amax(x).isnan() and kept))
            yield (
                f"rounding to {short(dtype)}, {size[0]} x {size[1]}, numbers that differ",
                different,
                0,
            )


def adamw() -> Rows:
    """Twenty AdamW updates by the kernel and by PyTorch, relative to the change of the weights.

    fp32: twenty roundings of a weight, 6e-8 each, of a change of 0.1. bf16: other random numbers
    of stochastic rounding gave 1.5e-3. int8: nearly all random numbers are the same.
    """
    start = torch.randn(1000, 333, device=DEVICE)
    gradients = [torch.randn(1000, 333, device=DEVICE) for _ in range(20)]
    for halves in (False, True):
        kinds: list[tuple[Any, float]] = [("fp32", 3e-5), ("bf16", 5e-4), ("int8", 5e-3)]
        for dtype, bound in kinds:
            ends = []
            for kernel in (False, True):
                weight, low = start.clone(), {}
                if halves:
                    weight = torch.empty_like(start, dtype=torch.bfloat16)
                    low = {"w": torch.empty_like(start, dtype=torch.int16)}
                    split_master_(start.clone(), weight, low["w"])
                optimizer = Optimizer(
                    {"w": weight}, OptimizerConfig(moments_dtype=dtype), low, kernel
                )
                for gradient in gradients:
                    optimizer.step(
                        {"w": gradient.clone()}, 1e-2, 0.5
                    )  # PyTorch scales them in place
                with optimizer.moments() as (_, found):
                    ends.append(
                        (
                            join_master(weight, low["w"]) if halves else weight,
                            found["w"].float().to(DEVICE),
                        )
                    )
            how = f"{dtype} moments{', split masters' * halves}"
            moved = (ends[0][0] - start).norm()
            yield f"AdamW, {how}", ((ends[1][0] - ends[0][0]).norm() / moved).item(), bound
            yield f"AdamW, {how}, squares", distance(ends[1][1], ends[0][1]), 3 * bound


def checkpoint_copies() -> Rows:
    """Bytes that differ when weights are updated while a checkpoint's copy of them is under way."""
    weights = [torch.randn(2**27, device=DEVICE) for _ in range(4)]
    stored = {str(number): Stored.of(one, (one,)) for number, one in enumerate(weights)}
    expected = [one.cpu() for one in weights]
    copy = HostCopy()
    for _ in range(2):  # the first one allocates
        copy.copy(stored)
        copy.before_update()
        for one in weights:
            one.add_(1)
        copy.wait()
        parts = [copy.part(name, one) for name, one in stored.items()]
        different = sum(int((a != b).sum()) for a, b in zip(parts, expected, strict=True))
        yield "checkpoint's copy during an update: different numbers", different, 0
        expected = [one.cpu() for one in weights]


def main() -> None:
    torch.manual_seed(0)
    report(
        packed_attention,
        windowed_attention,
        attention_of_context_parallelism,
        attention_with_sinks,
        norms,
        cross_entropies,
        cross_entropy_in_two,
        blocks,
        products,
        fp8_rounding,
        adamw,
        checkpoint_copies,
    )


if __name__ == "__main__":
    main()
