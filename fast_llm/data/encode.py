"""Text to tokens with `tokenizers`, one thread per worker process.

The spelling of a special token inside a text (`<|end_of_text|>` in a program about tokenizers) is
encoded as plain text, so it never ends the document. Encoding takes about 110 times the size of a
text in memory.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fast_llm.data.masks import MaskedText, Spans, masked_tokens


class Encoder:
    """Encodes texts without special tokens. One per process."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype[Any], characters: int = 2**20):
        """Changes `tokenizer`: it no longer produces special tokens. `dtype` must hold the
        vocabulary. About `characters` are encoded at a time.
        """
        self.tokenizer = tokenizer
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True
        self.dtype = np.dtype(dtype)
        self.characters = characters

    def encode(self, texts: Sequence[str]) -> list[bytes | None]:
        """The tokens of each text as bytes of `dtype`; None if the tokenizer fails on it."""
        return [tokens for some in self._batches(texts) for tokens in self._encode(some)]

    def masked_tokens(self, text: MaskedText, content: bytes) -> Spans | None:
        """The masked tokens of a text whose tokens are `content`; None if it has other tokens."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        if np.array(encoding.ids, self.dtype).tobytes() != content:
            return None
        return masked_tokens(text.spans, encoding.offsets)

    def _encode(self, texts: Sequence[str]) -> list[bytes | None]:
        try:
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            return [np.array(encoding.ids, self.dtype).tobytes() for encoding in encodings]
        except BaseException as error:
            if not is_panic(error):
                raise
            if len(texts) == 1:
                return [None]
            return [self._encode([text])[0] for text in texts]

    def _batches(self, texts: Sequence[str]) -> Iterator[list[str]]:
        """Groups of limited size, since `tokenizers` keeps a lot of memory per character."""
        some: list[str] = []
        size = 0
        for text in texts:
            some.append(text)
            size += len(text)
            if size >= self.characters:
                yield some
                some, size = [], 0
        if some:
            yield some


def is_panic(error: BaseException) -> bool:
    """Whether a library written in Rust failed. Regular expressions fail on some texts with a
    panic, which is not an Exception.
    """
    if isinstance(error, MemoryError):  # of the machine, not of the text
        return False
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
