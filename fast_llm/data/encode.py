"""Text to tokens with `tokenizers`, one thread per worker process.

The spelling of a special token inside a text (`<|end_of_text|>` in a program about tokenizers) is
encoded as plain text, so it never ends the document. Encoding takes about 110 times the size of a
text in memory.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

_CHARACTERS = 2**20  # encoded at a time


class Encoder:
    """Encodes texts without special tokens. One per process."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype[Any]):
        """Changes `tokenizer`: it no longer produces special tokens. `dtype` must hold the
        vocabulary.
        """
        self.tokenizer = tokenizer
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True
        self.dtype = np.dtype(dtype)

    def encode(self, texts: Sequence[str]) -> list[bytes | None]:
        """The tokens of each text as bytes of `dtype`; None if the tokenizer fails on it."""
        return [tokens for some in _batches(texts) for tokens in self._encode(some)]

    def _encode(self, texts: Sequence[str]) -> list[bytes | None]:
        try:
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            return [np.array(encoding.ids, self.dtype).tobytes() for encoding in encodings]
        except BaseException as error:
            # The regular expressions of `tokenizers` fail on some texts with a panic, which is not
            # an Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            if len(texts) == 1:
                return [None]
            return [self._encode([text])[0] for text in texts]


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """Groups of limited size, since `tokenizers` keeps a lot of memory per character."""
    some: list[str] = []
    size = 0
    for text in texts:
        some.append(text)
        size += len(text)
        if size >= _CHARACTERS:
            yield some
            some, size = [], 0
    if some:
        yield some
