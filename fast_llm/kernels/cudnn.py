"""Attention within documents by cuDNN, on GPUs from Hopper on: some 1.6 times as fast as PyTorch's variable-length kernel there.

PyTorch takes whole sequences to cuDNN; that documents lie packed in one (cuDNN's "ragged" tensors) can be said through NVIDIA's
package cudnn-frontend alone (`pip install nvidia-cudnn-frontend`). Without it all is as it was.

cuDNN builds a plan for each shape, in a tenth of a second. Micro-batches have ever other documents, so the plans are for round numbers of
documents, of tokens and of tokens of the longest, and the rest of the documents are empty: a run needs a dozen or two.

Letters: T tokens, H query heads, K key and value heads, D head dimensions, N documents.
"""

import math
from functools import cache
from importlib import import_module
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Loaded:
    """What this machine has. A plain attribute, since the compiler of models would look into a function."""

    library: ModuleType | None = None


def load(device: torch.device) -> str:
    """Make ready, if that can be; why it can not, or nothing. The kernels are tried on a small example: a wrong one is not used."""
    if torch.cuda.get_device_capability(device) < (9, 0):
        return "it has no fast kernels for this GPU"
    try:
        _Loaded.library = import_module("cudnn")
        _try(device)
    except Exception as error:  # whatever the library does: there is another way
        _Loaded.library = None
        if isinstance(error, ImportError):
            return "the package nvidia-cudnn-frontend is not installed (pip install nvidia-cudnn-frontend)"
        return (str(error).strip() or repr(error)).splitlines()[0]
    return ""


def usable(q: Tensor) -> bool:
    """Whether this is for queries [T, H, D] like these."""
    return (
        _Loaded.library is not None
        and q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 128
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> Tensor:
    """Causal attention: q [T, H, D], k and v [T', K, D] → [T, H, D]; ends int32 [N + 1], cumulative, from 0.

    A document's last query sees all its keys, the one before all but one, and so on. `cu_seqlens_k`: none are those of the queries.
    """
    out: Tensor = _Attention.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)  # type: ignore[no-untyped-call]
    return out


class _Attention(torch.autograd.Function):
    # Every argument has a parameter: without gradients, Dynamo (PyTorch 2.11 to 2.13) compares their numbers to decide whether
    # `forward` takes `ctx`, and with `*longest` it dropped q instead.
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None,
        max_seqlen_q: int, max_seqlen_k: int,
    ) -> Tensor:  # fmt: skip
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        ends = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        out, log_sums = torch.ops.fast_llm.ragged_attention(q, k, v, *ends)
        ctx.save_for_backward(q, k, v, out, log_sums, cu_seqlens_q, cu_seqlens_k)
        ctx.longest = max_seqlen_q, max_seqlen_k
        attended: Tensor = out
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = torch.ops.fast_llm.ragged_attention_backward(
            grad.contiguous(), *ctx.saved_tensors, *ctx.longest
        )
        return *gradients, None, None, None, None


# Operations, so that the compiler leaves them alone and recomputation can keep what they make.
_ENDS = "Tensor cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
torch.library.define(
    "fast_llm::ragged_attention", f"(Tensor q, Tensor k, Tensor v, {_ENDS}) -> (Tensor, Tensor)"
)
torch.library.define(
    "fast_llm::ragged_attention_backward",
    f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor log_sums, {_ENDS}) -> (Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("fast_llm::ragged_attention")
def _nothing_yet(q: Tensor, k: Tensor, v: Tensor, *ends: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[0], q.shape[1], dtype=torch.float32)


@torch.library.register_fake("fast_llm::ragged_attention_backward")
def _no_gradients_yet(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@torch.library.impl("fast_llm::ragged_attention", "cuda")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> tuple[Tensor, Tensor]:
    documents, rest = _places(
        q, k, cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    )
    shape = (
        documents,
        round_up(max_seqlen_q, 1),
        round_up(max_seqlen_k, 1),
        *q.shape[1:],
        k.shape[1],
        cu_seqlens_k is None,
    )
    out, log_sums = _nothing_yet(q, k, v)
    _run(
        _plan(q.device, q.dtype, shape),
        rest | {"q": q, "k": k, "v": v, "out": out, "log_sums": log_sums},
    )
    return out, log_sums


@torch.library.impl("fast_llm::ragged_attention_backward", "cuda")
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None, max_seqlen_q: int, max_seqlen_k: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    documents, rest = _places(
        q, k, cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    )
    shape = (
        documents,
        round_up(max_seqlen_q, 1),
        round_up(max_seqlen_k, 1),
        *q.shape[1:],
        k.shape[1],
        cu_seqlens_k is None,
    )
    grad_q, grad_k, grad_v = _no_gradients_yet(grad, q, k, v)
    known = {"q": q, "k": k, "v": v, "out": out, "log_sums": log_sums, "grad": grad}
    plan = _plan(q.device, q.dtype, shape, (round_up(len(q), 8), round_up(len(k), 8)))
    _run(plan, rest | known | {"grad_q": grad_q, "grad_k": grad_k, "grad_v": grad_v})
    return grad_q, grad_k, grad_v


def round_up(number: int, parts: int) -> int:
    """The next power of two, or with more `parts` the next multiple of as small a part of the last power of two."""
    step = max(1, (1 << (number - 1).bit_length() - 1) // parts) if number > 1 else 1
    return -(-number // step) * step


def pad(ends: Tensor, documents: int) -> Tensor:
    """Ends [N + 1] with empty documents behind them: [documents + 1]."""
    return torch.cat([ends, ends[-1:].expand(documents + 1 - len(ends))])


def _places(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> tuple[int, dict[str, Tensor]]:
    """The round number of documents, the tokens of each, and where each begins in queries, keys, and sums."""
    documents = round_up(len(cu_seqlens_q) - 1, 1)
    cu_seqlens_q, cu_seqlens_k = pad(cu_seqlens_q, documents), pad(cu_seqlens_k, documents)
    sums = cu_seqlens_q.long() * q.shape[1]
    return documents, {
        "query_lengths": cu_seqlens_q.diff(),
        "key_lengths": cu_seqlens_k.diff(),
        "queries_begin": sums * q.shape[2],
        "keys_begin": cu_seqlens_k.long() * (k.shape[1] * k.shape[2]),
        "sums_begin": sums,
    }


@cache
def _handle(device: torch.device) -> Any:
    assert _Loaded.library is not None
    with torch.cuda.device(device):
        return _Loaded.library.create_handle()


@cache
def _plan(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    tokens: tuple[int, int] | None = None,
) -> tuple[torch.device, Any, dict[str, Any], int]:
    """cuDNN's graph, its tensors by name, and the bytes that it works in; that of the backward pass with the most `tokens`."""
    library = _Loaded.library
    assert library is not None
    kinds = library.data_type
    kind = kinds.BFLOAT16 if dtype == torch.bfloat16 else kinds.HALF
    documents, max_seqlen_q, max_seqlen_k, heads, width, groups, same = shape
    graph = library.pygraph(
        io_data_type=kind,
        intermediate_data_type=kinds.FLOAT,
        compute_data_type=kinds.FLOAT,
        handle=_handle(device),
    )
    tensors: dict[str, Any] = {}
    for name in ("query_lengths", "key_lengths"):
        tensors[name] = graph.tensor(
            name=name, dim=(documents, 1, 1, 1), stride=(1, 1, 1, 1), data_type=kinds.INT32
        )
    for name in ("queries_begin", "keys_begin", "sums_begin"):
        tensors[name] = graph.tensor(
            name=name, dim=(documents + 1, 1, 1, 1), stride=(1, 1, 1, 1), data_type=kinds.INT64
        )
    # Dimensions are those of [N, heads, longest, D]; strides say that the heads of a token lie together.
    queries = (
        (documents, heads, max_seqlen_q, width),
        (max_seqlen_q * heads * width, width, heads * width, 1),
    )
    keys = (
        (documents, groups, max_seqlen_k, width),
        (max_seqlen_k * groups * width, width, groups * width, 1),
    )
    sums = (documents, heads, max_seqlen_q, 1), (max_seqlen_q * heads, 1, heads, 1)
    layouts = {"queries": queries, "keys": keys, "sums": sums}

    def given(name: str, layout: str) -> Any:
        dim, stride = layouts[layout]
        kept = kinds.FLOAT if layout == "sums" else kind
        tensors[name] = graph.tensor(name=name, dim=dim, stride=stride, data_type=kept)
        return tensors[name].set_ragged_offset(tensors[f"{layout}_begin"])

    def made(name: str, layout: str, tensor: Any) -> None:
        dim, stride = layouts[layout]
        tensor.set_output(True).set_dim(dim).set_stride(stride).set_ragged_offset(
            tensors[f"{layout}_begin"]
        )
        tensors[name] = tensor.set_data_type(kinds.FLOAT if layout == "sums" else kind)

    q, k, v = given("q", "queries"), given("k", "keys"), given("v", "keys")
    how = {
        "attn_scale": 1 / math.sqrt(width),
        "use_padding_mask": True,
        "seq_len_q": tensors["query_lengths"],
        "seq_len_kv": tensors["key_lengths"],
        # Where queries are keys both are the same, and the backward pass of the former takes 1.8 times as long.
        "diagonal_alignment": getattr(
            library.diagonal_alignment, "TOP_LEFT" if same else "BOTTOM_RIGHT"
        ),
        "diagonal_band_right_bound": 0,
    }
    if tokens is None:
        out, log_sums = graph.sdpa(name="attention", q=q, k=k, v=v, generate_stats=True, **how)
        made("out", "queries", out)
        made("log_sums", "sums", log_sums)
    else:
        out, grad, log_sums = (
            given("out", "queries"),
            given("grad", "queries"),
            given("log_sums", "sums"),
        )
        gradients = graph.sdpa_backward(
            name="attention_backward", q=q, k=k, v=v, o=out, dO=grad, stats=log_sums,
            max_total_seq_len_q=tokens[0], max_total_seq_len_kv=tokens[1], **how,
        )  # fmt: skip
        for name, layout, tensor in zip(
            ("grad_q", "grad_k", "grad_v"), ("queries", "keys", "keys"), gradients, strict=True
        ):
            made(name, layout, tensor)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([library.heur_mode.A, library.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    return device, graph, tensors, max(1, graph.get_workspace_size())


def _run(plan: tuple[torch.device, Any, dict[str, Any], int], values: dict[str, Tensor]) -> None:
    device, graph, tensors, size = plan
    assert _Loaded.library is not None
    handle = _handle(device)
    _Loaded.library.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    graph.execute(
        {tensors[name]: value for name, value in values.items()}, workspace, handle=handle
    )


def _try(device: torch.device) -> None:
    """Compare both kinds with fp32; raises AssertionError."""
    for kept in ((1, 70, 200), (1, 70, 333)):
        _try_one(device, (1, 70, 200), kept)


def _try_one(device: torch.device, lengths: tuple[int, ...], kept: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    ends = [
        torch.tensor([0, *accumulate(one)], dtype=torch.int32, device=device)
        for one in (lengths, kept)
    ]
    q, grad = (torch.randn(271, 4, 64, generator=generator).to(device) for _ in range(2))
    k, v = (torch.randn(sum(kept), 2, 64, generator=generator).to(device) for _ in range(2))
    rounded = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    exact = [x.detach().float().requires_grad_() for x in rounded]
    q, k, v = rounded
    out = attention(q, k, v, ends[0], None if kept == lengths else ends[1], max(lengths), max(kept))
    parts = []
    for one, two, three in zip(
        exact[0].split(lengths), exact[1].split(kept), exact[2].split(kept), strict=True
    ):
        seen = torch.ones(len(one), len(two), dtype=torch.bool, device=device).tril(
            len(two) - len(one)
        )
        two, three = two.repeat_interleave(2, 1), three.repeat_interleave(2, 1)
        scores = torch.einsum("qhd,khd->hqk", one, two) / 8
        parts.append(
            torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -math.inf).softmax(-1), three)
        )
    expected = torch.cat(parts)
    found = out, *torch.autograd.grad(out, rounded, grad.bfloat16())
    wanted = expected, *torch.autograd.grad(expected, exact, grad.bfloat16().float())
    worst = max(((a - b).norm() / b.norm()).item() for a, b in zip(found, wanted, strict=True))
    assert worst < 1e-2, f"its results are off by {worst:.1e}"  # bf16's rounding makes 3e-3
