"""Context parallelism: each sequence is cut over a few processes.

Queries stay where they are; keys and values are gathered from all, and their gradients summed and scattered back ("The
Llama 3 Herd of Models", 2024, §3.3.2). With grouped heads they are a fraction of the activations, documents may lie
across any cut, and attention itself is the kernel that one device has. docs/decisions compares this with a ring.

Under the causal mask the end of a sequence is more work than its beginning. So it is cut in 2n pieces, and process r
of n holds pieces r and 2n - 1 - r (as in Brandon et al. 2023, "Striped Attention", but in whole pieces).

Letters: n processes, B sequences, S tokens of a whole sequence, K key and value heads, D head dimensions.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from fast_llm.model.attention import PackedSequences, VarlenQKV, varlen_attention
from fast_llm.model.batch import Batch
from fast_llm.model.decoder import Block
from fast_llm.model.loss import IGNORE_INDEX
from fast_llm.parallel.mesh import Axis


def apply_context_parallel(block: Block, axis: Axis) -> None:
    """Let a block's attention see the keys and values of all processes."""
    if axis.device_mesh is not None:
        block.self_attn.core = partial(_attention, axis.device_mesh)


def _attention(
    mesh: DeviceMesh, q: Tensor, k: Tensor, v: Tensor, varlen: VarlenQKV, flash: bool
) -> Tensor:
    """q [B, S/n, H, D], k and v [B, S/n, K, D] → [B, S/n, H, D]."""
    own = torch.stack((k, v), dim=2)[None]
    every = DTensor.from_local(own, mesh, [Shard(0)], run_check=False).redistribute(
        placements=[Replicate()]
    )
    rows = every.to_local(grad_placements=[Partial()]).flatten(0, 2)  # n·B·S/n, 2, K, D
    keys, values = rows.index_select(0, varlen.index).unbind(1)
    return varlen_attention(q.flatten(0, 1), keys, values, varlen, flash).view(q.shape)


def shard_batch(batch: Batch, rank: int, size: int) -> Batch:
    """What process `rank` of `size` has of a micro-batch."""
    if size == 1:
        return batch
    rows, length = batch.tokens.shape
    assert batch.documents is None or isinstance(batch.documents, PackedSequences), "cut once"
    piece = length // (2 * size)
    pieces = (rank, 2 * size - 1 - rank)
    own = torch.cat([torch.arange(p * piece, (p + 1) * piece) for p in pieces])
    labels = batch.labels[:, own]
    return replace(
        batch,
        tokens=batch.tokens[:, own],
        labels=labels,
        positions=batch.positions[:, own],
        documents=_varlen_qkv(batch.documents, rows, length, pieces, size),
        targets=int((labels != IGNORE_INDEX).sum()),
    )


def _varlen_qkv(
    documents: PackedSequences | None, rows: int, length: int, pieces: tuple[int, ...], size: int
) -> VarlenQKV:
    """Each document's part of each piece, with all of its keys up to there."""
    ends = (
        np.cumsum(documents.lengths) if documents is not None else np.arange(1, rows + 1) * length
    )
    begins = np.concatenate(([0], ends[:-1]))
    piece = length // (2 * size)
    queries, keys, index = [], [], []
    for row in range(rows):
        for number in pieces:
            low, high = row * length + number * piece, row * length + (number + 1) * piece
            inside = range(np.searchsorted(ends, low, "right"), np.searchsorted(begins, high))
            for begin, end in zip(begins[inside], np.minimum(ends[inside], high), strict=True):
                queries.append(int(end - max(begin, low)))
                keys.append(int(end - begin))
                index.append(_gathered_index(np.arange(begin, end), rows, length, size))
    return VarlenQKV.from_lengths(queries, keys, torch.from_numpy(np.concatenate(index)))


def _gathered_index(tokens: np.ndarray, rows: int, length: int, size: int) -> np.ndarray:
    """Where tokens of the flattened micro-batch are among those gathered: by process, row and place there."""
    row, position = np.divmod(tokens, length)
    number, offset = np.divmod(position, length // (2 * size))
    back = number >= size
    process = np.where(back, 2 * size - 1 - number, number)
    places: np.ndarray = (
        (process * rows + row) * (length // size) + back * (length // (2 * size)) + offset
    )
    return places
