"""Context parallelism: each sequence is cut over several processes.

Queries stay local. Keys and values are all-gathered, and their gradients reduce-scattered ("The
Llama 3 Herd of Models", 2024, §3.3.2). With grouped heads they are a small part of the activations.
Documents may cross any cut, and attention runs in the kernel of one device. docs/decisions compares
this with ring attention.

Under the causal mask, later tokens are more work. So each sequence is cut into 2n chunks, and
process r of n holds chunks r and 2n - 1 - r (load balancing as in Brandon et al. 2023, "Striped
Attention", by chunks).

Letters: n processes, B sequences, S tokens of a full sequence, H query heads, K key and value
heads, D head dimensions.
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
    """Replace a block's attention by one over the keys and values of all processes of `axis`."""
    if axis.device_mesh is not None:
        block.self_attn.core = partial(_attention, axis.device_mesh)


def _attention(
    mesh: DeviceMesh, q: Tensor, k: Tensor, v: Tensor, varlen: VarlenQKV, flash: bool
) -> Tensor:
    """q [B, S/n, H, D], k and v [B, S/n, K, D] → [B, S/n, H, D]."""
    own = torch.stack((k, v), dim=2)[None]
    gathered = DTensor.from_local(own, mesh, [Shard(0)], run_check=False).redistribute(
        placements=[Replicate()]
    )
    rows = gathered.to_local(grad_placements=[Partial()]).flatten(0, 2)  # n·B·S/n, 2, K, D
    keys, values = rows.index_select(0, varlen.index).unbind(1)
    return varlen_attention(q.flatten(0, 1), keys, values, varlen, flash).view(q.shape)


def shard_batch(batch: Batch, rank: int, size: int) -> Batch:
    """The part of a micro-batch that process `rank` of `size` computes."""
    if size == 1:
        return batch
    rows, length = batch.tokens.shape
    assert batch.documents is None or isinstance(batch.documents, PackedSequences), (
        "a batch is sharded once"
    )
    chunk = length // (2 * size)
    chunks = (rank, 2 * size - 1 - rank)
    own = torch.cat([torch.arange(p * chunk, (p + 1) * chunk) for p in chunks])
    labels = batch.labels[:, own]
    return replace(
        batch,
        tokens=batch.tokens[:, own],
        labels=labels,
        positions=batch.positions[:, own],
        documents=_varlen_qkv(batch.documents, rows, length, chunks, size),
        targets=int((labels != IGNORE_INDEX).sum()),
    )


def _varlen_qkv(
    documents: PackedSequences | None, rows: int, length: int, chunks: tuple[int, ...], size: int
) -> VarlenQKV:
    """The queries of each document in each of `chunks`, with all of its keys up to there.

    `chunks`: the numbers of this process's chunks. `length`: S. Without `documents` each sequence
    is one document.
    """
    ends = (
        np.cumsum(documents.lengths) if documents is not None else np.arange(1, rows + 1) * length
    )
    begins = np.concatenate(([0], ends[:-1]))
    chunk = length // (2 * size)
    queries, keys, index = [], [], []
    for row in range(rows):
        for number in chunks:
            low, high = row * length + number * chunk, row * length + (number + 1) * chunk
            inside = range(np.searchsorted(ends, low, "right"), np.searchsorted(begins, high))
            for begin, end in zip(begins[inside], np.minimum(ends[inside], high), strict=True):
                queries.append(int(end - max(begin, low)))
                keys.append(int(end - begin))
                index.append(_gathered_index(np.arange(begin, end), rows, length, size))
    return VarlenQKV.from_lengths(queries, keys, torch.from_numpy(np.concatenate(index)))


def _gathered_index(tokens: np.ndarray, rows: int, length: int, size: int) -> np.ndarray:
    """Indices of `tokens` of the flattened micro-batch [B·S] in the gathered keys [n·B·S/n].

    The gathered keys are ordered by process, sequence and position on that process.
    """
    row, position = np.divmod(tokens, length)
    number, offset = np.divmod(position, length // (2 * size))
    mirrored = number >= size
    process = np.where(mirrored, 2 * size - 1 - number, number)
    index: np.ndarray = (
        (process * rows + row) * (length // size) + mirrored * (length // (2 * size)) + offset
    )
    return index
