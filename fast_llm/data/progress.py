"""What `fast-llm prepare` shows while it runs: rows done, speed, time left, and the documents it
skips.
"""

import logging
import os
import sys
import time

from fast_llm.data.documents import REASONS

logger = logging.getLogger("fast_llm")

_NAMED = 10  # skipped documents that are named, and large ones


class Progress:
    """A line on stderr: twice a second in a terminal, else every five seconds."""

    def __init__(self, rows: int, max_document_bytes: int = 2**26):
        self.rows, self.max_document_bytes = rows, max_document_bytes
        self.done = self.documents = self.tokens = self.skipped = self.large = 0
        self.started = self.shown = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def skip(self, where: str, reason: str) -> None:
        """Name a skipped document, unless it is empty or ten were named already."""
        self.skipped += reason != "empty"
        if reason != "empty" and self.skipped <= _NAMED:
            last = "; further ones are only counted" if self.skipped == _NAMED else ""
            limit = (
                f", more than dataset.max_document_bytes {self.max_document_bytes:,}"
                if reason == "too_large"
                else ""
            )
            logger.warning(f"Skipped {where}: {REASONS[reason]}{limit}{last}")

    def large_document(self, where: str, tokens: int) -> None:
        """Name a file that is one document of millions of tokens, unless ten were named already."""
        self.large += 1
        if self.large <= _NAMED:
            logger.info(
                f"{where} is one document of {tokens:,} tokens: each text file is a document. If it"
                " holds several, write each to a file of its own, or to a line of jsonl."
            )

    def advance(self, rows: int, documents: int, tokens: int) -> None:
        """Count finished rows and show the line if it is due."""
        self.done += rows
        self.documents += documents
        self.tokens += tokens
        now = time.monotonic()
        if now - self.shown < (0.5 if self.terminal else 5):
            return
        self.shown, seconds = now, now - self.started
        left = seconds / self.done * (self.rows - self.done)
        line = (
            f"{100 * self.done / self.rows:.1f} %, {self.documents:,} documents, {self.tokens:,}"
            f" tokens, {self.tokens / seconds:,.0f} tokens/s,"
            f" {left // 3600:.0f}:{left // 60 % 60:02.0f}:{left % 60:02.0f} left"
        )
        self._write(f"\r\x1b[K{line}" if self.terminal else line + "\n")

    def finish(self) -> None:
        """Remove the line and log the totals."""
        if self.terminal:
            self._write("\r\x1b[K")
        seconds = max(time.monotonic() - self.started, 1e-9)
        logger.info(
            f"Tokenized {self.documents:,} documents: {self.tokens:,} tokens in {seconds:,.1f} s,"
            f" {self.tokens / seconds:,.0f} tokens/s."
        )

    def _write(self, text: str) -> None:
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except OSError:  # the reader of a pipe has closed it; the preparation continues
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
