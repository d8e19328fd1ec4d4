"""Context parallelism: each sequence is cut over several processes.

Queries stay local. Keys and values are all-gathered, and their gradients reduce-scattered ("The
Llama 3 Herd of Models", 2024, §3.3.2). With grouped heads they are a small part of the activations.
Documents may cross any cut, and attention runs in the kernel of one device. docs/decisions compares
this with ring attention.

Attention with a window of W tokens needs only the last W - 1 keys before a chunk. So processes
gather the last W - 1 tokens of each chunk, if a chunk is longer than that, and not all of its keys.

Under the causal mask, later tokens are more work. So each sequence is cut into 2n chunks, and
process r of n holds chunks r and 2n - 1 - r (load balancing as in Brandon et al. 2023, "Striped
Attention", by chunks).

Letters: n processes, B sequences, S tokens of a full sequence, H query heads, K key and value
heads, D head dimensions.
"""

from dataclasses import dataclass, replace
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
    mesh: DeviceMesh,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    varlen: VarlenQKV,
    flash: bool,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """q [B, S/n, H, D], k and v [B, S/n, K, D] → [B, S/n, H, D]."""
    if window is not None:
        assert varlen.windowed is not None, "the batch was sharded for another window"
        varlen = varlen.windowed
    rows = _gather(mesh, torch.stack((k, v), dim=2), varlen.last)
    keys, values = rows.index_select(0, varlen.index).unbind(1)
    scoring = window, scale, softcap, sinks
    return varlen_attention(q.flatten(0, 1), keys, values, varlen, flash, *scoring).view(q.shape)


def _gather(mesh: DeviceMesh, own: Tensor, last: int | None) -> Tensor:
    """Keys and values [B, S/n, 2, K, D] of this process → [rows, 2, K, D] of all processes.

    Rows are ordered by process, sequence and position. With `last`, those of this process come
    first. They are followed by the last tokens of each chunk, of all processes.
    """
    if last == 0:
        return own.flatten(0, 1)
    sent = own
    if last is not None:
        chunk = own.shape[1] // 2
        sent = own.unflatten(1, (2, chunk))[:, :, chunk - last :].flatten(1, 2)
    gathered = DTensor.from_local(sent[None], mesh, [Shard(0)], run_check=False).redistribute(
        placements=[Replicate()]
    )
    rows = gathered.to_local(grad_placements=[Partial()]).flatten(0, 2)
    return rows if last is None else torch.cat((own.flatten(0, 1), rows))


def shard_batch(batch: Batch, rank: int, size: int, window: int | None = None) -> Batch:
    """The part of a micro-batch that process `rank` of `size` computes.

    `window`: that of blocks whose attention has one.
    """
    if size == 1:
        return batch
    rows, length = batch.tokens.shape
    assert batch.documents is None or isinstance(batch.documents, PackedSequences), (
        "a batch is sharded once"
    )
    chunk = length // (2 * size)
    chunks = (rank, 2 * size - 1 - rank)
    own = torch.cat([torch.arange(p * chunk, (p + 1) * chunk) for p in chunks])
    labels, sources = batch.labels[:, own], batch.sources
    if sources is not None and sources.dim() == 2:  # of tokens, in an evaluation
        sources = sources[:, own]
    return replace(
        batch,
        sources=sources,
        tokens=batch.tokens[:, own],
        labels=labels,
        positions=batch.positions[:, own],
        documents=Sharding(rank, size, rows, length).varlen_qkv(batch.documents, window),
        targets=int((labels != IGNORE_INDEX).sum()),
    )


@dataclass(frozen=True)
class Sharding:
    """Which tokens of `rows` sequences of `length` tokens process `rank` of `size` has."""

    rank: int
    size: int
    rows: int
    length: int

    @property
    def chunk(self) -> int:
        """Tokens of a chunk."""
        return self.length // (2 * self.size)

    def varlen_qkv(self, documents: PackedSequences | None, window: int | None) -> VarlenQKV:
        """The queries of each document in each chunk of this process, with the keys they see.

        Without `documents` each sequence is one document. The result contains that of blocks with
        a `window`.
        """
        every = self._seen(documents, None)
        return every if window is None else replace(every, windowed=self._seen(documents, window))

    def _seen(self, documents: PackedSequences | None, window: int | None) -> VarlenQKV:
        rows, length, chunk = self.rows, self.length, self.chunk
        ends = (
            np.cumsum(documents.lengths)
            if documents is not None
            else np.arange(1, rows + 1) * length
        )
        begins = np.concatenate(([0], ends[:-1]))
        last = None if window is None or window > chunk else window - 1
        queries, keys, index = [], [], []
        for row in range(rows):
            for number in (self.rank, 2 * self.size - 1 - self.rank):
                low, high = row * length + number * chunk, row * length + (number + 1) * chunk
                inside = range(np.searchsorted(ends, low, "right"), np.searchsorted(begins, high))
                for begin, end in zip(begins[inside], np.minimum(ends[inside], high), strict=True):
                    query = max(begin, low)
                    key = begin if window is None else max(begin, query - window + 1)
                    queries.append(int(end - query))
                    keys.append(int(end - key))
                    index.append(self.gathered_index(np.arange(key, end), last))
        varlen = VarlenQKV.from_lengths(queries, keys, torch.from_numpy(np.concatenate(index)))
        return replace(varlen, last=last)

    def gathered_index(self, tokens: np.ndarray, last: int | None) -> np.ndarray:
        """Indices of `tokens` of the flattened micro-batch [B·S] in the rows of `_gather`."""
        row, position = np.divmod(tokens, self.length)
        number, offset = np.divmod(position, self.chunk)
        mirrored = number >= self.size
        process = np.where(mirrored, 2 * self.size - 1 - number, number)
        index: np.ndarray
        if last is None:
            index = (process * self.rows + row) * 2 * self.chunk + mirrored * self.chunk + offset
            return index
        own = row * 2 * self.chunk + mirrored * self.chunk + offset
        sent = ((process * self.rows + row) * 2 + mirrored) * last + offset - (self.chunk - last)
        index = np.where(process == self.rank, own, self.rows * 2 * self.chunk + sent)
        return index
