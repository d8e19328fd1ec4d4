"""Triton kernels for operations that take PyTorch several passes over memory.

Triton comes with PyTorch for NVIDIA GPUs. Without it, AVAILABLE is false and callers use PyTorch.
Tests run the kernels on the CPU in Triton's interpreter (TRITON_INTERPRET=1).

Letters: T rows, V vocabulary, E hidden size, M and N rows and columns of any matrix.
"""

import torch
from torch import Tensor

from fast_llm.kernels.rounding import BLOCK, DROPPED_BITS, GOLDEN, MAX_QUANTIZED, MIX

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
except ImportError:
    AVAILABLE = False

if AVAILABLE:

    @triton.jit
    def _softmax_cross_entropy(  # type: ignore[no-untyped-def]
        logits,
        labels,
        log_sums,
        chosen,
        row_stride,
        vocabulary,
        ignore_index: tl.constexpr,
        known: tl.constexpr,
        gradient: tl.constexpr,
        z_loss: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One row: online softmax (Milakov & Gimelshein 2018), then the gradient in place."""
        row = tl.program_id(0).to(tl.int64)
        logits += row * row_stride
        label = tl.load(labels + row)
        offsets = tl.arange(0, BLOCK)
        if known:
            log_sum = tl.load(log_sums + row)
        else:
            # Each lane starts with a logit: a maximum is -inf only if all of its logits are.
            largest = tl.full((BLOCK,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK,), tl.float32)
            for begin in range(0, vocabulary, BLOCK):
                inside = begin + offsets < vocabulary
                x = tl.load(logits + begin + offsets, mask=inside, other=float("-inf")).to(
                    tl.float32
                )
                new = tl.maximum(largest, x)
                # A lane without a finite logit holds -inf, and -inf - -inf is NaN.
                total = tl.where(
                    new == float("-inf"), 0.0, total * tl.exp(largest - new) + tl.exp(x - new)
                )
                largest = new
            maximum = tl.max(largest, 0)
            log_sum = maximum + tl.log(tl.sum(total * tl.exp(largest - maximum), 0))
            here = label >= 0
            target = tl.load(logits + tl.where(here, label, 0)).to(tl.float32)
            tl.store(chosen + row, tl.where(here, target, 0.0))
            tl.store(log_sums + row, log_sum)
        if gradient:
            # Every thread has read the label's logit before any logit is overwritten.
            tl.debug_barrier()
            scale = tl.where(label != ignore_index, 1.0, 0.0)
            for begin in range(0, vocabulary, BLOCK):
                inside = begin + offsets < vocabulary
                x = tl.load(logits + begin + offsets, mask=inside, other=float("-inf")).to(
                    tl.float32
                )
                probability = tl.exp(x - log_sum)
                if z_loss != 0:
                    probability *= 1.0 + 2.0 * z_loss * log_sum
                gradient_x = scale * (probability - tl.where(begin + offsets == label, 1.0, 0.0))
                tl.store(
                    logits + begin + offsets, gradient_x.to(logits.dtype.element_ty), mask=inside
                )

    # Triton's kernels may read globals that are constexpr: the numbers of kernels/rounding.py.
    _GOLDEN, _MIX_1, _MIX_2 = tl.constexpr(GOLDEN), tl.constexpr(MIX[0]), tl.constexpr(MIX[1])
    _DROPPED_BITS = tl.constexpr(DROPPED_BITS)
    _MAX_INT8 = tl.constexpr(MAX_QUANTIZED[torch.int8])
    _MAX_UINT8 = tl.constexpr(MAX_QUANTIZED[torch.uint8])

    @triton.jit(do_not_specialize=["seed"])
    def _adamw(  # type: ignore[no-untyped-def]
        weight, low_bits, gradient, exp_avg, exp_avg_sq, absmax, absmax_sq, count,
        rate, keep, beta_1, beta_2, epsilon, root, factor, seed,
        split_master: tl.constexpr, moment_bits: tl.constexpr,
        ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One pass over ROWS blocks in fp32: each number is read once and written once."""
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        place = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = place < count
        g = tl.load(gradient + place, mask=inside).to(tl.float32) * factor
        if split_master:
            bits = tl.load(weight + place, mask=inside).to(tl.int32) << 16
            bits += tl.load(low_bits + place, mask=inside).to(tl.int32)
            w = bits.to(tl.float32, bitcast=True)
        else:
            w = tl.load(weight + place, mask=inside)
        if moment_bits == 8:
            m = _dequantize_int8(exp_avg + place, absmax + row, inside, row * BLOCK < count)
            v = _dequantize_uint8(exp_avg_sq + place, absmax_sq + row, inside, row * BLOCK < count)
        elif moment_bits == 16:
            m = _load_bf16(exp_avg + place, inside)
            v = _load_bf16(exp_avg_sq + place, inside)
        else:
            m = tl.load(exp_avg + place, mask=inside)
            v = tl.load(exp_avg_sq + place, mask=inside)
        m += (1 - beta_1) * (g - m)
        v = beta_2 * v + (1 - beta_2) * g * g
        w = w * keep - rate * m / (tl.sqrt(v) * root + epsilon)
        if split_master:
            bits = w.to(tl.int32, bitcast=True)
            high = (bits + 0x8000) >> 16
            tl.store(weight + place, high.to(tl.int16), mask=inside)
            tl.store(low_bits + place, (bits - (high << 16)).to(tl.int16), mask=inside)
        else:
            tl.store(weight + place, w, mask=inside)
        if moment_bits == 32:
            tl.store(exp_avg + place, m, mask=inside)
            tl.store(exp_avg_sq + place, v, mask=inside)
        else:
            # Each half of the hash is the random number of one moment.
            random = _hash(place, seed)
            random_sq = (random & 0xFFFF).to(tl.int32)
            bits, bits_sq = m.to(tl.int32, bitcast=True), v.to(tl.int32, bitcast=True)
            if moment_bits == 16:
                nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # ties to even
                tl.store(exp_avg + place, nearest.to(tl.int16), mask=inside)
                rounded = (bits_sq + random_sq) >> 16
                tl.store(exp_avg_sq + place, rounded.to(tl.int16), mask=inside)
            else:
                random = (random >> 16).to(tl.int32)
                quantized, top = _quantize(bits & 0x7FFFFFFF, random, inside, _MAX_INT8, 0)
                quantized = tl.where(bits < 0, -quantized, quantized)
                tl.store(exp_avg + place, quantized.to(tl.int8), mask=inside)
                tl.store(absmax + row, top.to(tl.int16), mask=row * BLOCK < count)
                quantized, top = _quantize(bits_sq, random_sq, inside, _MAX_UINT8, 1)
                tl.store(exp_avg_sq + place, quantized.to(tl.uint8), mask=inside)
                tl.store(absmax_sq + row, top.to(tl.int16), mask=row * BLOCK < count)

    @triton.jit
    def _load_bf16(pointers, inside):  # type: ignore[no-untyped-def]
        return (tl.load(pointers, mask=inside).to(tl.int32) << 16).to(tl.float32, bitcast=True)

    @triton.jit
    def _dequantize_int8(pointers, absmax, inside, block_inside):  # type: ignore[no-untyped-def]
        quantized = tl.load(pointers, mask=inside, other=0).to(tl.int32)
        top = tl.load(absmax, mask=block_inside, other=0).to(tl.int32)[:, None]
        level = tl.where(quantized == 0, 0, tl.abs(quantized) + top - _MAX_INT8)
        number = (level << _DROPPED_BITS).to(tl.float32, bitcast=True)
        return tl.where(quantized < 0, -number, number)

    @triton.jit
    def _dequantize_uint8(pointers, absmax, inside, block_inside):  # type: ignore[no-untyped-def]
        quantized = tl.load(pointers, mask=inside, other=0).to(tl.int32)
        top = tl.load(absmax, mask=block_inside, other=0).to(tl.int32)[:, None]
        level = tl.where(quantized == 0, 0, quantized + top - _MAX_UINT8)
        return (level << _DROPPED_BITS).to(tl.float32, bitcast=True)

    @triton.jit
    def _quantize(  # type: ignore[no-untyped-def]
        bits, random, inside, largest: tl.constexpr, smallest: tl.constexpr
    ):
        """fp32 bits without sign, and 16 random bits each → quantized, absmax of blocks."""
        level = tl.where(inside, (bits + (random << (_DROPPED_BITS - 16))) >> _DROPPED_BITS, 0)
        top = tl.max(level, 1)
        quantized = tl.maximum(level - top[:, None] + largest, smallest)
        return tl.where(level > 0, quantized, 0), top

    @triton.jit
    def _hash(place, seed):  # type: ignore[no-untyped-def]
        """`_hash` of kernels/rounding.py: 32 bits for each place."""
        x = place.to(tl.uint32) * _GOLDEN + seed.to(tl.uint32)  # a large seed arrives in 64 bits
        x = (x ^ (x >> 16)) * _MIX_1
        x = (x ^ (x >> 15)) * _MIX_2
        return x ^ (x >> 16)

    @triton.jit
    def _rms_norm_backward(  # type: ignore[no-untyped-def]
        grad_x, partial_sums, grad, residual_grad, x, weight, inverse, rows, width,
        with_residual: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """A program takes ROWS rows at a time, and sums what they add to the weight's gradient."""
        column = tl.arange(0, BLOCK)
        columns_inside = column < width
        w = tl.load(weight + column, mask=columns_inside, other=0).to(tl.float32)[None, :]
        grad_weight = tl.zeros((ROWS, BLOCK), tl.float32)
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        place = row.to(tl.int64)[:, None] * width + column[None, :]
        rows_inside = (row < rows)[:, None] & columns_inside[None, :]
        next_x = tl.load(x + place, mask=rows_inside, other=0)
        next_grad = tl.load(grad + place, mask=rows_inside, other=0)
        step = tl.num_programs(0) * ROWS
        for _ in range(tl.program_id(0) * ROWS, rows, step):
            # The next rows are loaded before these are used, so that memory does not wait for sums.
            current, current_inside = place, rows_inside
            normed, g = next_x.to(tl.float32), next_grad.to(tl.float32)
            scale = tl.load(inverse + row, mask=row < rows, other=0)[:, None]
            if with_residual:
                other = tl.load(residual_grad + current, mask=current_inside, other=0)
            row += step
            place = row.to(tl.int64)[:, None] * width + column[None, :]
            rows_inside = (row < rows)[:, None] & columns_inside[None, :]
            next_x = tl.load(x + place, mask=rows_inside, other=0)
            next_grad = tl.load(grad + place, mask=rows_inside, other=0)
            normed *= scale
            grad_weight += g * normed
            g *= w
            # The component along x only changes the norm of x, which is divided out.
            share = tl.sum(g * normed, 1)[:, None] / width
            result = (g - normed * share) * scale
            if with_residual:
                result += other.to(tl.float32)
            tl.store(grad_x + current, result.to(grad_x.dtype.element_ty), mask=current_inside)
        tl.store(
            partial_sums + tl.program_id(0) * width + column,
            tl.sum(grad_weight, 0),
            mask=columns_inside,
        )

    @triton.jit
    def _add(main_grad, addend, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < count
        added = tl.load(main_grad + place, mask=inside) + tl.load(addend + place, mask=inside).to(
            tl.float32
        )
        tl.store(main_grad + place, added, mask=inside)

    @triton.jit
    def _amax(x, bits, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """fp32 bits without sign, read as integers, sort like the numbers, with NaN last."""
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        numbers = (
            tl.load(x + place, mask=place < count, other=0)
            .to(tl.float32)
            .to(tl.int32, bitcast=True)
        )
        tl.atomic_max(bits, tl.max(numbers & 0x7FFFFFFF, 0))

    @triton.jit
    def _quantize_fp8(  # type: ignore[no-untyped-def]
        x, scale, row_major, transposed, rows, columns, largest: tl.constexpr,
        with_row_major: tl.constexpr, with_transposed: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        numbers = tl.load(x + row[:, None] * columns + column[None, :], mask=inside).to(tl.float32)
        # Triton's `/` is off by up to 2 ulp, which would round some ties the other way.
        numbers *= tl.div_rn(1.0, tl.load(scale))
        # Not `clamp`, which would turn NaN into the largest number.
        numbers = tl.where(
            numbers > largest, largest, tl.where(numbers < -largest, -largest, numbers)
        )
        short = numbers.to(row_major.dtype.element_ty)
        if with_row_major:
            tl.store(row_major + row[:, None] * columns + column[None, :], short, mask=inside)
        if with_transposed:
            place = column[:, None] * rows + row[None, :]
            tl.store(
                transposed + place,
                tl.trans(short),
                mask=(column < columns)[:, None] & (row < rows)[None, :],
            )


def softmax_cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    gradient: bool,
    log_sums: Tensor | None = None,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """log Σ exp of each row of logits [T, V], and its label's logit, both fp32 [T].

    The loss is their difference, plus z_loss · (log Σ exp)². With `gradient`, the gradient of the
    summed loss replaces the logits. The logit of a negative label is 0; a label equal to
    `ignore_index` has no gradient.
    `log_sums` are given if they are known already, as those of a larger vocabulary; then only the
    gradient is computed.
    """
    known = log_sums is not None
    if log_sums is None:
        log_sums = torch.empty(len(labels), dtype=torch.float32, device=logits.device)
    chosen = torch.empty_like(log_sums)
    block = min(8192, triton.next_power_of_2(logits.shape[1]))
    _softmax_cross_entropy[(len(labels),)](
        logits, labels, log_sums, chosen, logits.stride(0), logits.shape[1],
        ignore_index, known, gradient, z_loss, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return log_sums, chosen


def adamw_(
    weight: Tensor,
    low_bits: Tensor | None,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    block_absmax: tuple[Tensor, Tensor] | None,
    *,
    step: int,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    epsilon: float,
    factor: float,
    seed: int,
) -> None:
    """AdamW's `step`-th update with `factor` times a gradient, in one pass over memory (formula:
    optim/optimizer.py).

    The weight is fp32, or a split master (kernels/rounding.py). Moments are fp32, or bf16 with
    stochastic rounding of the second, or 8 bits with their `block_absmax` and stochastic rounding
    of both. All tensors are contiguous.
    """

    def bits(tensor: Tensor) -> Tensor:
        return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor

    rows = 8
    _adamw[(triton.cdiv(weight.numel(), rows * BLOCK),)](
        bits(weight), weight if low_bits is None else low_bits, gradient,
        bits(exp_avg), bits(exp_avg_sq),
        *((exp_avg, exp_avg_sq) if block_absmax is None else block_absmax), weight.numel(),
        learning_rate / (1 - betas[0] ** step), 1 - learning_rate * weight_decay, *betas, epsilon,
        (1 - betas[1] ** step) ** -0.5, factor, seed,
        low_bits is not None, 8 * exp_avg.dtype.itemsize, ROWS=rows, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


def rms_norm_backward(
    grad: Tensor, residual_grad: Tensor | None, x: Tensor, weight: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x · inverse · weight by x, with `residual_grad` added, and by the weight [E].

    grad, residual_grad and x are [T, E] and contiguous; inverse, fp32 [T], is 1 / rms of the rows.
    Computed in fp32.
    """
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    together = max(1, 2048 // block)
    programs = min(triton.cdiv(rows, together), _programs(x.device))
    grad_x = torch.empty_like(x)
    partial_sums = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    _rms_norm_backward[(programs,)](
        grad_x, partial_sums, grad, grad if residual_grad is None else residual_grad,
        x, weight, inverse, rows, width, residual_grad is not None, ROWS=together, BLOCK=block,
        num_warps=min(16, max(4, block * together // 512)),
    )  # fmt: skip
    return grad_x, partial_sums.sum(0).to(weight.dtype)


def _programs(device: torch.device) -> int:
    """As many programs as run at once: each leaves a row of partial sums."""
    return (
        4 * torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 3
    )


def add_(main_grad: Tensor, addend: Tensor) -> None:
    """Add to an fp32 tensor in place; both are contiguous.

    PyTorch's addition of two dtypes reaches half of the memory bandwidth.
    """
    block = 4096
    _add[(triton.cdiv(main_grad.numel(), block),)](
        main_grad, addend, main_grad.numel(), BLOCK=block, num_warps=8
    )


def amax(x: Tensor) -> Tensor:
    """The largest magnitude, an fp32 scalar; x is contiguous."""
    block = 16384
    bits = torch.zeros((), dtype=torch.int32, device=x.device)
    _amax[(triton.cdiv(x.numel(), block),)](x, bits, x.numel(), BLOCK=block, num_warps=8)
    return bits.view(torch.float32)


def quantize_fp8(x: Tensor, scale: Tensor, row_major: Tensor, transposed: Tensor) -> None:
    """Divide x [M, N], contiguous, by `scale` and round it to fp8, into [M, N] and [N, M].

    A result that is empty is not computed.
    """
    (rows, columns), height, width = x.shape, 64, 128
    _quantize_fp8[(triton.cdiv(rows, height), triton.cdiv(columns, width))](
        x, scale, row_major, transposed, rows, columns, torch.finfo(row_major.dtype).max,
        row_major.numel() > 0, transposed.numel() > 0,
        ROWS=height, COLUMNS=width, num_warps=4,
    )  # fmt: skip
