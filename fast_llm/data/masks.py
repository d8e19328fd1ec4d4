"""Tokens that are no targets: spans of a document that the model reads and is not trained on.

`dataset.loss_masking_spans` names a column with spans of characters, [begin, end] with both ends
inside, as in Fast-LLM 0.2. A token is masked if one of its characters is in a span, so that no
masked character is trained on. BOS and EOS are outside of all spans. The text is tokenized as a
whole: masks never change tokens.

`prepare` keeps them in a side file of each token file:

    <prefix>.masks.npy   int64 [2, spans]: first token, and the token after the last, counted from
                         the beginning of the token file; ascending, without overlap

Programs that do not know it read the same tokens. It takes 16 bytes a span, memory-mapped.
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fast_llm.data.tokenfile import ends_digest, file_digest
from fast_llm.errors import DataError

Spans = NDArray[np.int64]  # [2, spans]: begins and ends, where an end is outside
_SUFFIX = ".masks.npy"
_SMALL = 2**12  # bytes of a file that is read instead of mapped
NONE: Spans = np.zeros((2, 0), np.int64)


class MaskedText(str):
    """The text of a document, with the spans of characters that are masked."""

    spans: Spans


def masked_text(text: str, given: Any) -> MaskedText | None:
    """A text with the spans of its row; None if these are no spans of the text.

    `given`: a list of [begin, end], both inside; a missing value is an empty list.
    """
    try:
        pairs = np.array([] if given is None else given)
        spans = pairs.reshape(-1, 2)
    except ValueError:
        return None
    if spans.size and (
        spans.dtype.kind not in "iu"
        or pairs.ndim != 2
        or pairs.shape[1] != 2
        or spans.min() < 0
        or spans.max() >= len(text)
        or (spans[:, 0] > spans[:, 1]).any()
    ):
        return None
    found = MaskedText(text)
    found.spans = spans.astype(np.int64).T + np.array([[0], [1]])
    return found


def masked_tokens(spans: Spans, offsets: Sequence[tuple[int, int]]) -> Spans:
    """The runs of tokens that have a character in one of the spans.

    `offsets`: the characters [begin, end) of each token. A byte-level tokenizer may leave the space
    in front of a token out of them, so a token begins where the ones before ended.
    """
    if not spans.shape[1] or not offsets:
        return NONE
    characters = np.array(offsets, np.int64)  # tokens 2
    ended = np.maximum.accumulate(np.append(0, characters[:-1, 1]))
    characters[:, 0] = np.minimum(characters[:, 0], ended)
    size = int(max(spans.max(), characters.max()))
    edges = np.zeros(size + 2, np.int64)
    np.add.at(edges, spans[0], 1)
    np.add.at(edges, spans[1], -1)
    # Masked characters before each character.
    before = np.concatenate([[0], np.cumsum(np.cumsum(edges) > 0)])
    masked = before[characters[:, 1]] > before[characters[:, 0]]
    return runs(masked)


def runs(masked: NDArray[np.bool_]) -> Spans:
    """The runs of True."""
    edges = np.flatnonzero(np.diff(masked.astype(np.int8), prepend=0, append=0))
    return np.stack([edges[::2], edges[1::2]]).astype(np.int64)


@dataclass(frozen=True)
class DocumentMasks:
    """The masks of documents that follow each other; nothing if the data has none."""

    counts: NDArray[np.int64]  # [documents]: spans of each
    spans: Spans  # of all, each counted from the first token of its document

    @staticmethod
    def of(masks: Sequence[Spans] = ()) -> "DocumentMasks":
        """The masks of each document."""
        counts = np.array([each.shape[1] for each in masks], np.int64)
        return DocumentMasks(counts, np.concatenate([NONE, *masks], axis=1))

    @staticmethod
    def joined(parts: Sequence["DocumentMasks"]) -> "DocumentMasks":
        """The masks of several groups of documents, one after the other."""
        counts = [np.zeros(0, np.int64), *(part.counts for part in parts)]
        spans = [NONE, *(part.spans for part in parts)]
        return DocumentMasks(np.concatenate(counts), np.concatenate(spans, axis=1))

    def some(self, first: int, last: int) -> "DocumentMasks":
        """Those of the documents [first, last)."""
        ends = np.append(0, np.cumsum(self.counts))
        at = slice(*ends[[first, last]].tolist()) if len(self.counts) else slice(0)
        return DocumentMasks(self.counts[first:last], self.spans[:, at])

    def kept(self, is_kept: NDArray[np.bool_]) -> "DocumentMasks":
        """Those of the documents that are kept."""
        if not len(self.counts):
            return self
        spans = self.spans[:, np.repeat(is_kept, self.counts)]
        return DocumentMasks(self.counts[is_kept], spans)


class MaskWriter:
    """The masks of a token file, while it is written."""

    def __init__(self) -> None:
        self.parts: list[Spans] = []
        self.tokens = 0  # masked ones

    def add(self, masks: DocumentMasks, lengths: NDArray[np.int64], first: int) -> None:
        """The masks of documents of these lengths, from token `first` of the file on."""
        if not masks.spans.shape[1]:
            return
        begins = first + np.cumsum(lengths) - lengths
        part = masks.spans + np.repeat(begins, masks.counts)
        self.parts.append(part)
        self.tokens += int((part[1] - part[0]).sum())

    def write(self, prefix: Path, rank: int) -> str:
        """Write the file, which is complete or absent. Returns its sha256."""
        path = masks_path(prefix)
        partial = path.with_name(f"{path.name}.{rank}.partial")
        with partial.open("wb") as file:
            np.save(file, np.concatenate([NONE, *self.parts], axis=1))
            file.flush()
            os.fsync(file.fileno())
        digest = file_digest(partial)
        partial.replace(path)
        return digest


def masks_path(prefix: Path) -> Path:
    """The side file of a token file's masks."""
    return prefix.with_name(prefix.name + _SUFFIX)


class Masks:
    """The masks of a token file, open for reading from any thread."""

    def __init__(self, prefix: Path, tokens: int):
        """`tokens`: of the token file. Raises DataError for a file that is damaged."""
        path = masks_path(prefix)
        try:
            # An empty array cannot be mapped.
            mode: Any = "r" if path.stat().st_size > _SMALL else None
            spans = np.load(path, mmap_mode=mode, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"{path}: cannot be read, but tokens of {prefix} are masked: {error}; copy it"
                " there, or prepare the data again"
            ) from error
        if not _is_valid(spans, tokens):
            raise DataError(
                f"{path}: does not hold ascending spans of the {tokens:,} tokens of {prefix}; it is"
                " damaged or belongs to another token file: prepare the data again"
            )
        self.path, self.spans = path, spans

    @functools.cached_property
    def digest(self) -> str:
        """Tells the file from others, as `TokenFile.identity` does."""
        return f"{self.spans.shape[1]} {ends_digest(self.path)}"

    @functools.cached_property
    def _before(self) -> NDArray[np.int64]:
        """[spans + 1]: masked tokens before each span."""
        return np.append(0, np.cumsum(self.spans[1] - self.spans[0]))

    def count(self, begins: NDArray[np.int64], ends: NDArray[np.int64]) -> int:
        """The masked tokens in ranges [begin, end) of the token file."""
        return int((self._until(ends) - self._until(begins)).sum())

    def _until(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """The masked tokens before each of these tokens."""
        if not self.spans.shape[1]:
            return np.zeros(len(tokens), np.int64)
        spans = np.searchsorted(self.spans[0], tokens)  # that begin before it
        inside = np.where(spans > 0, self.spans[1][np.maximum(spans - 1, 0)] - tokens, 0)
        before: NDArray[np.int64] = self._before[spans] - np.maximum(inside, 0)
        return before

    def within(self, begin: int, end: int) -> NDArray[np.int64]:
        """The masked tokens of [begin, end), counted from `begin`."""
        first = int(np.searchsorted(self.spans[1], begin, "right"))
        last = int(np.searchsorted(self.spans[0], end))
        pieces = [
            np.arange(max(int(self.spans[0][at]), begin), min(int(self.spans[1][at]), end))
            for at in range(first, last)
        ]
        return np.concatenate([np.zeros(0, np.int64), *pieces]) - begin


def _is_valid(spans: NDArray[Any], tokens: int) -> bool:
    """Whether these are ascending spans of a token file."""
    if spans.dtype != np.int64 or spans.ndim != 2 or len(spans) != 2:
        return False
    if not spans.shape[1]:
        return True
    begins, ends = spans
    inside = int(begins[0]) >= 0 and int(ends[-1]) <= tokens
    return inside and bool((ends > begins).all() and (begins[1:] >= ends[:-1]).all())
