"""Sizes that both the model and the planner use. No torch."""

# Rows of a matrix that are cast to fp32, or accumulated in fp32, at a time on the CPU: they stay in
# its cache.
CHUNK_ROWS = 1024
# Logits of the fused cross entropy that exist at once. Every chunk costs a pass over the head's
# gradient (12 bytes a weight): 1.5 ms on an H200 for a head of 128,256 × 4,096, whose matmuls take
# 4 ms per 1,024 tokens. So chunks are large on a GPU: a gigabyte of logits, which raises peak
# memory by at most as much. On the CPU new memory is slow.
LOGITS_PER_CHUNK = {"cuda": 2**29, "cpu": 2**25}
# Of them, logits that are in fp32 at once where no kernel computes their softmax.
FP32_LOGITS = {"cuda": 2**26, "cpu": 2**22}
# Queries of a block of limited or windowed attention in PyTorch: at least so many, however small
# the window is; at most so many, because a block's limited scores exist at once.
FEWEST_QUERIES, MOST_QUERIES = 256, 1024
# Neighbouring numbers of 8-bit moments that share one int16 `block_absmax`.
QUANTIZATION_BLOCK = 128


def queries_per_block(window: int | None) -> int:
    """How many queries limited or windowed attention takes at once in PyTorch."""
    return MOST_QUERIES if window is None else min(max(window, FEWEST_QUERIES), MOST_QUERIES)


def chunk_length(device_type: str, tokens: int, vocabulary: int, num_chunks: int | None) -> int:
    """How many tokens have logits at once in a fused cross entropy over a vocabulary.

    `num_chunks` is the number of chunks that tokens are divided into; by default as few as keep the
    logits small, and at least two.
    """
    length = -(-tokens // (num_chunks or 2))
    if num_chunks is None:
        limit = LOGITS_PER_CHUNK.get(device_type, LOGITS_PER_CHUNK["cuda"])
        length = min(length, limit // vocabulary)
    return max(1, length)
