"""Activations of a block and tensors of the cross entropy, in bytes.

One function a group of tensors that `model/` holds at the same time; sizes are of one process and
micro-batch (`LocalSizes`). docs/forecasts.md has the formulas. Only arithmetic.
"""

from fast_llm.models.sizes import (
    CHUNK_ROWS,
    FP32_LOGITS,
    chunk_length,
    queries_per_block,
)
from fast_llm.planning.layout import LocalSizes


def attended_keys(s: LocalSizes) -> float:
    """Keys that attention reads, of a block on average.

    With context parallelism these are all keys up to the later of this process's two chunks. With a
    window they are those of both chunks, and of the window before each.
    """
    if s.layout.context == 1:
        return s.tokens
    return mean_over_blocks(s, s.tokens * (s.layout.context + 0.5), s.tokens)


def mean_over_blocks(s: LocalSizes, full: float, own: float) -> float:
    """The mean of `full`, and of `own` and the tokens in the window before both chunks.

    These are of blocks without and with a window that is shorter than a chunk.
    """
    windows, layout = s.workload.windows, s.layout
    chunk = s.workload.sequence_length // (2 * layout.context)
    before = [
        2 * layout.micro_batch_size * (window - 1) if window is not None and window <= chunk else -1
        for window in windows
    ]
    return sum(full if tokens < 0 else min(full, own + tokens) for tokens in before) / len(windows)


def attention_tensors(s: LocalSizes) -> tuple[float, float]:
    """Bytes that attention keeps for its backward pass: queries, keys and values; its results."""
    workload, context = s.workload, s.layout.context
    width = 4 if s.upcasts else s.dtype_bytes  # model/attention.py: attention is in fp32 then
    queries, keys = s.query_size * s.tokens * width, s.key_size * width
    if not workload.flash:
        heads = s.query_size // workload.head_size
        # Scores before and after softmax, of all pairs of tokens.
        scores = 2 * s.tokens * workload.sequence_length * heads * 4
        return queries + 2 * keys * s.tokens, queries + scores
    log_sums = 4 * s.tokens * s.query_size // workload.head_size
    if s.on_cpu and context > 1:
        # PyTorch's attention, with a mask for each chunk of the sequence but the first.
        expanded = s.query_size if workload.kv_heads != workload.heads else s.key_size
        attended = s.tokens * context * (1 + 0.5 / context)
        masks = s.tokens * s.tokens * (2 * context + 1)
        return width * (
            s.query_size * s.tokens + 2 * expanded * attended
        ) + masks, queries + log_sums
    return queries + 2 * keys * attended_keys(s), queries + log_sums


def saved_activations(s: LocalSizes, level: str) -> float:
    """Bytes of a block's activations between forward and backward, its input included.

    `level`: mlp_recompute_level.
    """
    inputs, results = attention_tensors(s)
    parts = s.workload.mlp_inputs * s.mlp  # gate and up
    if level == "block":
        return s.stream
    if level == "selective":  # results of matmuls and of attention
        projected = s.queries + 2 * s.keys + parts
        return 3 * s.stream + projected + results
    norm_scales = 4 * s.stream_tokens
    normed = s.normed + norm_scales
    fused_gate = s.layout.compiled or s.on_cpu
    if s.workload.fp8:  # each matmul keeps its fp8 input; the compiler keeps one for several
        hidden = s.tokens * s.hidden
        attention_input = (1 if s.layout.compiled else 3) * hidden + norm_scales
        attention_output = s.tokens * s.query_size
        mlp_input = (1 if s.layout.compiled else 2) * hidden + norm_scales
        mlp = mlp_input + parts + (0 if fused_gate else s.mlp) + s.tokens * s.ffn
    else:
        attention_input = normed
        # Upcast attention gives fp32; the next matmul keeps its result in the compute dtype.
        attention_output = s.queries if s.upcasts else 0
        mlp = normed + parts + (1 if fused_gate else 2) * s.mlp
    # Tokens sorted by expert, one row for each of a token's experts.
    mlp += s.workload.expert_rows * s.normed
    mlp_kept = {
        "none": mlp,
        "activation": normed + parts + s.stream,  # the result of the last matmul, too
        "activation_and_input": parts + s.stream,
        "full": 0,
    }[level]
    if s.workload.normed_heads:  # norms keep their inputs
        attention_input += s.queries + s.keys
    if s.workload.norms_results:
        attention_input += s.stream
        mlp_kept += 0 if level == "full" else s.stream
    # The residual stream is kept at the block's input, and between attention and MLP.
    return 2 * s.stream + attention_input + inputs + results + attention_output + mlp_kept


def recomputed_activations(s: LocalSizes) -> float:
    """Bytes of activations that a block's backward pass recomputes, added to the saved ones."""
    level = s.layout.recompute
    if level == "none":
        return 0.0
    if level == "activation":
        return 2 * s.mlp
    if level == "activation_and_input":
        return 2 * s.mlp + s.normed
    everything = saved_activations(s, "none")
    if level == "selective":
        results = attention_tensors(s)[1]
        # An upcasting CPU frees results of matmuls as soon as they are read again; else values are
        # that result itself.
        read = s.queries + 2 * s.keys + 2 * s.stream if s.upcasts else s.keys
        return everything - s.stream - 2 * s.mlp - results - read
    return everything - saved_activations(s, level)


def limited_scores(s: LocalSizes) -> float:
    """Bytes of attention's scores where PyTorch limits them (model/sdpa.py), in its backward pass.

    Of one block of queries: scores before and after tanh and softmax, and two gradients, in fp32.
    Our CPU kernel has none.
    """
    w, layout = s.workload, s.layout
    if not w.limits_scores or not w.flash or (s.on_cpu and layout.context == 1):
        return 0.0
    heads, longest = s.query_size // w.head_size, w.sequence_length
    sizes = []
    for window in w.windows:
        queries = min(longest, queries_per_block(window))
        sizes.append(queries * min(longest, queries + (longest if window is None else window)))
    return 5.0 * 4 * layout.micro_batch_size * heads * max(sizes)


def backward_temporaries(s: LocalSizes) -> float:
    """Bytes of activation gradients at the widest place of a block's backward pass.

    The incoming gradient is not included.

    That place is the MLP, or attention where a process has the keys of a long sequence.
    """
    tokens, hidden, ffn, w = s.tokens, s.hidden, s.ffn, s.dtype_bytes
    weight = hidden * ffn
    widest: float = max(2 * s.mlp, s.mlp + weight * w, limited_scores(s) - 3 * s.mlp)
    if not s.on_cpu and s.workload.flash:
        attended = attended_keys(s)
        # Gradients of queries and, for each query head, of keys and values in fp32; then in the
        # compute dtype. The MLP's activations are freed.
        fp32 = 4 * s.query_size * (tokens + 2 * attended)
        results = w * (2 * s.query_size * tokens + 2 * s.key_size * attended)
        widest = max(widest, fp32 + results - 3 * s.mlp)
    if s.workload.fp8:
        # Gradient and weight in fp8, and in fp32 before where there is no kernel; then both
        # matmuls' results. The input of the down projection is freed.
        both, fp32_bytes = ffn * tokens * (2 * w + 1), 4 if s.on_cpu else 0
        return max(
            widest,
            both + fp32_bytes * ffn * tokens,
            both + weight * (1 + fp32_bytes),
            both + weight * (1 + w) + s.normed,
        )
    if not s.upcasts:
        return widest
    return max(
        widest,
        s.mlp + upcast_matmul_bytes(tokens, hidden, ffn),
        s.mlp + weight * w + upcast_matmul_bytes(hidden, tokens, ffn),
        # The outputs of gate and up, and the gated activation, are freed.
        s.normed + weight * w - s.mlp + upcast_matmul_bytes(ffn, tokens, hidden),
    )


def upcast_matmul_bytes(rows: int, inner: int, columns: int) -> float:
    """Bytes in fp32 that a 16-bit matmul holds on an UPCASTING_CPU (model/linear.py).

    The factors are [rows, inner] and [inner, columns].
    """
    # The left factor in one piece and rows of the right one; or the sum in one piece and rows of
    # both.
    longer, shorter = sorted((inner, columns))
    return 4.0 * (rows * longer + (rows + longer) * min(CHUNK_ROWS, shorter))


# Cross entropy.


def uses_torch_loss(s: LocalSizes) -> bool:
    """Whether PyTorch's cross entropy is used, which needs all logits."""
    return s.workload.loss == "torch" and s.layout.tensor == 1


def loss_tensors(s: LocalSizes) -> float:
    """Bytes of the logits and of the cross entropy's temporaries."""
    if uses_torch_loss(s):
        # In fp32: probabilities, and gradients before and after the softmax.
        return 12.0 * s.tokens * s.vocabulary
    chunk = chunk_length(
        "cpu" if s.on_cpu else "cuda", s.tokens, s.vocabulary, s.workload.loss_chunks
    )
    scratch: float = 0
    if s.workload.loss == "fused" and not s.on_cpu:
        fp32_rows = min(max(1, FP32_LOGITS["cuda"] // s.vocabulary), chunk)
        scratch = 4 * s.vocabulary * fp32_rows
    if s.upcasts:
        scratch += max(
            upcast_matmul_bytes(chunk, s.hidden, s.vocabulary),
            upcast_matmul_bytes(chunk, s.vocabulary, s.hidden),
        )
    elif s.on_cpu and s.mixed_precision:
        rows = min(CHUNK_ROWS, s.vocabulary) * s.workload.trains_head
        scratch += (4 + s.dtype_bytes) * rows * s.hidden
    return chunk * s.vocabulary * s.dtype_bytes + scratch


def loss_backward_tensors(s: LocalSizes) -> float:
    """Bytes of the head's gradient, and of temporaries while it is computed.

    Temporaries are some rows in fp32, or the logits' gradient.
    """
    gradient = s.vocabulary * s.hidden * s.dtype_bytes * s.workload.trains_head
    if s.upcasts and uses_torch_loss(s):
        logits = s.tokens * s.vocabulary * s.dtype_bytes
        return gradient + logits + upcast_matmul_bytes(s.vocabulary, s.tokens, s.hidden)
    if s.on_cpu:
        rows = min(CHUNK_ROWS, s.vocabulary) * s.workload.trains_head
        return gradient + 4.0 * rows * s.hidden
    return 0.0 if s.fuses_head_gradient else gradient
