"""What `fast-llm prepare` shows while it runs: how much is done, of which file, speed, time left,
and the documents it skips.

Work is measured in bytes of text, estimated from the sizes of files and blocks: rows differ in
length by orders of magnitude.
"""

import logging
import os
import sys
import time
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from fast_llm.data.documents import FILTERED, REASONS, Corpus, Table
from fast_llm.data.tables import JsonLines, TextFiles
from fast_llm.terminal import width

logger = logging.getLogger("fast_llm")

_UNNAMED = ("empty", FILTERED)
NAMED = 10  # skipped documents that are named, and large ones


class TextSize:
    """Bytes of text before each row of a corpus, an estimate."""

    def __init__(self, corpus: Corpus):
        rows_of, bytes_before = [np.zeros(1)], [np.zeros(1)]
        self.parts = corpus.starts
        self.names = [
            "" if isinstance(table, TextFiles) else os.path.basename(table.path)
            for table, _, _ in corpus.parts
        ]
        total = 0.0
        for start, (table, first, last) in zip(corpus.starts.tolist(), corpus.parts, strict=False):
            rows, sizes = _sizes(table, first, last)
            rows_of.append(start + rows - first)
            bytes_before.append(total + sizes - sizes[0])
            total += float(sizes[-1] - sizes[0])
        self._rows, self._before = np.concatenate(rows_of), np.concatenate(bytes_before)

    def between(self, first: int, last: int) -> float:
        """The bytes of rows [first, last)."""
        before = np.interp([first, last], self._rows, self._before)
        # A row of a corpus without text counts too.
        return float(before[1] - before[0]) + (last - first)

    def by_part(self, first: int, last: int) -> Iterable[tuple[int, float]]:
        """The parts that have some of the rows [first, last), each with the bytes of these."""
        part = int(np.searchsorted(self.parts, first, "right")) - 1
        while part < len(self.names) and self.parts[part] < last:
            rows = max(first, int(self.parts[part])), min(last, int(self.parts[part + 1]))
            yield part, self.between(*rows)
            part += 1


def _sizes(table: Table, first: int, last: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Rows of a table from `first` to `last`, and the bytes of text before each."""
    if isinstance(table, TextFiles):
        before = np.concatenate([[0], np.cumsum(table.sizes[first:last])])
        return np.arange(first, last + 1), before.astype(np.float64)
    if not isinstance(table, JsonLines):
        rows = np.array([first, last])
        return rows, rows * (table.bytes / max(1, table.rows))
    inside = (table.lines > first) & (table.lines < last)
    rows = np.concatenate([[first], table.lines[inside], [last]])
    scale = table.bytes / max(1, int(table.offsets[-1]))
    return rows, np.interp(rows, table.lines, table.offsets) * scale


class Progress:
    """A line on stderr: twice a second in a terminal, else every five seconds."""

    def __init__(
        self, corpus: Corpus, ranges: Iterable[tuple[int, int]], max_document_bytes: int = 2**26
    ):
        """`ranges`: the rows [first, last) that are to be done."""
        self.max_document_bytes = max_document_bytes
        self.size = TextSize(corpus)
        self.bytes_of_part: dict[int, float] = {}  # of these rows
        for first, last in ranges:
            for part, size in self.size.by_part(first, last):
                self.bytes_of_part[part] = self.bytes_of_part.get(part, 0) + size
        self.total = sum(self.bytes_of_part.values())
        self.done_of_part: dict[int, float] = {}
        self.done = 0.0  # bytes
        self.documents = self.tokens = self.skipped = self.large = 0
        self.documents_of_others = self.tokens_of_others = 0
        self.hidden = False  # while another rank shows the line
        self.started = self.shown = time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.without_field = {table.path for table in corpus.tables_without_field}

    def skip(self, where: str, reason: str) -> None:
        """Name a skipped document, unless it is empty, its file has no text at all, which the log
        says at the start, or ten were named already.
        """
        files = (where.rpartition(mark)[0] for mark in (":", ", "))  # of a line, row or item
        if reason == "not_text" and any(file in self.without_field for file in files):
            return
        self.skipped += reason not in _UNNAMED
        if reason not in _UNNAMED and self.skipped <= NAMED:
            last = "; further ones are only counted" if self.skipped == NAMED else ""
            limit = (
                f", more than dataset.max_document_bytes {self.max_document_bytes:,}"
                if reason == "too_large"
                else ""
            )
            logger.warning(f"Skipped {where}: {REASONS[reason]}{limit}{last}")

    def large_document(self, where: str, tokens: int) -> None:
        """Name a file that is one document of millions of tokens, unless ten were named already."""
        self.large += 1
        if self.large <= NAMED:
            logger.info(
                f"{where} is one document of {tokens:,} tokens: each text file is a document. If it"
                " holds several, write each to a file of its own, or to a line of jsonl."
            )

    def advance_others(self, first: int, last: int, documents: int, tokens: int) -> None:
        """Count rows that another rank has finished."""
        self.documents_of_others += documents
        self.tokens_of_others += tokens
        self.advance(first, last, documents, tokens)

    @property
    def due(self) -> bool:
        """Whether the line is to be shown again."""
        return time.monotonic() - self.shown >= (0.5 if self.terminal else 5)

    def advance(self, first: int, last: int, documents: int, tokens: int) -> None:
        """Count the finished rows [first, last) and show the line if it is due."""
        part = 0
        for part, size in self.size.by_part(first, last):
            self.done_of_part[part] = self.done_of_part.get(part, 0) + size
            self.done += size
        self.documents += documents
        self.tokens += tokens
        if self.hidden or not self.due:
            return
        self.shown = now = time.monotonic()
        seconds = now - self.started
        left = seconds / max(self.done, 1) * max(self.total - self.done, 0)
        line = (
            f"{100 * self.done / max(self.total, 1):.1f} %, {self.documents:,} documents,"
            f" {self.tokens:,} tokens, {self.tokens / seconds:,.0f} tokens/s,"
            f" {left // 3600:.0f}:{left // 60 % 60:02.0f}:{left % 60:02.0f} left{self._of(part)}"
        )
        if self.terminal:
            line = f"\r\x1b[K{line[: width(sys.stderr) - 1]}"
        self._write(line if self.terminal else line + "\n")

    def _of(self, part: int) -> str:
        """The file of a part and how much of it is done, if there are several."""
        if len(self.bytes_of_part) < 2 or not self.size.names[part]:
            return ""
        share = self.done_of_part.get(part, 0) / max(self.bytes_of_part.get(part, 0), 1)
        files = len(self.bytes_of_part)
        complete = sum(
            self.done_of_part.get(each, 0) >= 0.999 * size
            for each, size in self.bytes_of_part.items()
        )
        name = self.size.names[part]
        return f"; {name} {100 * min(share, 1):.0f} %, {complete:,} of {files:,} files"

    def finish(self) -> None:
        """Remove the line and log what this process did."""
        if self.terminal and not self.hidden:
            self._write("\r\x1b[K")
        seconds = max(time.monotonic() - self.started, 1e-9)
        documents = self.documents - self.documents_of_others
        tokens = self.tokens - self.tokens_of_others
        logger.info(
            f"Tokenized {documents:,} documents: {tokens:,} tokens in {seconds:,.1f} s,"
            f" {tokens / seconds:,.0f} tokens/s."
        )

    def _write(self, text: str) -> None:
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except OSError:  # the reader of a pipe has closed it; the preparation continues
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
