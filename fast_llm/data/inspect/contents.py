"""Documents and packed sequences, decoded, each document with the file and row it came from.

Sequences are what the trainer reads: `Dataset.read` gives their tokens, the places where documents
begin, and the inputs without a target. Reading one takes some 50 µs and decoding it some
milliseconds.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fast_llm.data.dataset import SPLITS, Dataset
from fast_llm.data.fim import FIM_COUNTS
from fast_llm.data.origins import add_origins
from fast_llm.data.source import DocumentSpan, RandomSource, Source
from fast_llm.data.tokenfile import TokenFile
from fast_llm.data.tokenizer import Loaded
from fast_llm.errors import DataError
from fast_llm.terminal import nearest


def decode(loaded: Loaded | None, tokens: Sequence[int]) -> str | None:
    """Text with special tokens; None without a tokenizer."""
    if loaded is None:
        return None
    text: str = loaded.tokenizer.decode(list(tokens), skip_special_tokens=False)
    return text


def documents(
    files: Sequence[TokenFile], numbers: Iterable[int], loaded: Loaded | None
) -> list[dict[str, Any]]:
    """Documents by their numbers, which count through all token files from 0.

    Raises DataError for a number that does not exist.
    """
    before = np.cumsum([0, *(file.documents for file in files)])
    found = []
    for number in numbers:
        if not 0 <= number < before[-1]:
            raise DataError(
                f"--document: given {number}, must be from 0 to {int(before[-1]) - 1}: the dataset"
                f" has {int(before[-1]):,} documents"
            )
        place = int(np.searchsorted(before, number, "right")) - 1
        file, inside = files[place], number - int(before[place])
        begin = file.start_of(inside)
        tokens = file.tokens_at(begin, file.start_of(inside + 1)).tolist()
        document = {
            "number": number,
            "file": str(file.prefix),
            "document": inside,
            "tokens": len(tokens),
            "ids": tokens,
            "text": decode(loaded, tokens),
        }
        if file.masks is not None:
            masked = file.masks.within(begin, begin + len(tokens))
            document |= _masked(tokens, masked, loaded)
        found.append(document)
    return add_origins(found)


def _masked(
    tokens: Sequence[int], masked: NDArray[np.int64], loaded: Loaded | None
) -> dict[str, Any]:
    """`masked_tokens`: which tokens of a document are masked; `marked`: its text, with ⟦ ⟧ around
    them.
    """
    is_masked = np.zeros(len(tokens), bool)
    is_masked[masked] = True
    edges = [0, *(np.flatnonzero(np.diff(is_masked)) + 1).tolist(), len(tokens)]
    pieces = [decode(loaded, tokens[begin:end]) or "" for begin, end in pairwise(edges)]
    hidden = [is_masked[begin] if len(tokens) else False for begin in edges[:-1]]
    marked = [f"⟦{text}⟧" if no else text for text, no in zip(pieces, hidden, strict=True)]
    return {
        "masked_tokens": masked.tolist(),
        "marked": None if loaded is None else "".join(marked),
    }


def _masked_in(source: Source | RandomSource, span: DocumentSpan) -> NDArray[np.int64]:
    """The masked tokens of a span, counted from its first one.

    `PackedSample` does not have the mask of a sequence's first token, which is no target.
    """
    for file in source.files if isinstance(source, Source) else ():
        if str(file.prefix) == span.prefix and file.masks is not None:
            first = file.start_of(span.document) + span.begin
            return file.masks.within(first, first + span.tokens)
    return np.zeros(0, np.int64)


def evenly_spread(count: int, wanted: int) -> list[int]:
    """`wanted` of the numbers below `count`, evenly spread."""
    return sorted({round(at) for at in np.linspace(0, count - 1, min(count, wanted))})


def _require_split(dataset: Dataset, split: str) -> None:
    if split not in dataset.splits:
        empty = f": data.split gives {split} no documents"
        why = empty if split in SPLITS else nearest(split, dataset.splits)
        raise DataError(f"--split: given {split}, must be {' or '.join(dataset.splits)}{why}")


def sequences(
    dataset: Dataset, split: str, numbers: Iterable[int], isolate: bool, loaded: Loaded | None
) -> list[dict[str, Any]]:
    """Packed sequences as the trainer reads them.

    `isolate`: documents are kept apart (batch.cross_document_attention: no), so that the last token
    of each document has no target. Raises DataError for a split that the data does not have.
    """
    _require_split(dataset, split)
    found = []
    for index in numbers:
        packed = dataset.read(split, index)
        source, _, epoch = dataset.splits[split].find(index)
        ends = (packed.ends if isolate else packed.breaks).tolist()
        parts = []
        # Documents that fill-in-the-middle has moved beyond the end have no place.
        filled = len(packed.tokens) - packed.padding
        begins = [start for start in packed.starts.tolist() if start < filled]
        spans = dataset.locate(split, index)
        for span, begin, end in zip(spans, begins, [*begins[1:], filled], strict=False):
            tokens = packed.tokens[begin:end].tolist()
            part = {
                "file": span.prefix,
                "document": span.document,
                "first_token": span.begin,
                "position": begin,
                "tokens": len(tokens),
                "text": decode(loaded, tokens),
                "without_loss": None,
            }
            if end - 1 in ends:
                part["without_loss"] = "the next token belongs to another document"
            elif packed.padding and end == filled:
                part["without_loss"] = "padding follows"
            if source.masked:
                part |= _masked(tokens, _masked_in(source, span), loaded)
            parts.append(part)
        length = source.length
        padded = range(length - packed.padding, length)
        lost = sorted({*ends, *padded, *packed.masked.tolist()})
        found.append(
            {
                "index": index,
                "split": split,
                "source": source.name,
                "epoch": epoch,
                "length": length,
                "targets": length - len(lost),
                "padding": packed.padding,
                "masked": lost,
                "starts": packed.starts.tolist(),
                "ids": packed.tokens.tolist(),
                "documents": parts,
                "fim": dict(zip(FIM_COUNTS, packed.fim, strict=True)) if any(packed.fim) else None,
            }
        )
    add_origins([part for sequence in found for part in sequence["documents"]])
    return found
