"""Token files of datatrove's `DocumentTokenizer` and `DocumentTokenizerMerger`.

    x.ds            tokens of all documents one after the other, little endian, 2 or 4 bytes each
    x.ds.index      u64 [documents]: the token at which each document ends
    x.ds.loss       u8 [tokens], optional: 0 where the token has no loss
    x.ds.metadata   text, optional: "<tokenizer>|<bytes of a token>" in its first line

The size of x.ds and the last end say how large a token is; x.ds.metadata is compared with it. The
index is memory-mapped and checked once (8 bytes a document). A loss mask is read once (a byte a
token), because one that is not all ones is refused.
"""

import logging
import mmap
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fast_llm.data import tokenizer
from fast_llm.data.tokenfile import TokenFile, open_file, with_file_limit
from fast_llm.errors import DataError
from fast_llm.hub import cache_folder, cached

logger = logging.getLogger("fast_llm")

SUFFIX = ".ds"
_BLOCK = 2**20  # documents checked at a time
_MASK_BLOCK = 2**24  # bytes of a mask read at a time


def open_token_file(path: Path) -> TokenFile:
    """A file of datatrove, or the pair with this prefix. Raises DataError."""
    is_pair = path.with_name(path.name + ".idx").exists()
    return DatatroveFile(path) if path.suffix == SUFFIX and not is_pair else TokenFile(path)


class DatatroveFile(TokenFile):
    """A .ds file and its index, open for reading from any thread."""

    def __init__(self, path: Path):
        """Open the files. Raises DataError that names the file and what is wrong with it."""
        self.prefix = self.bin = path
        self.idx = path.with_name(path.name + ".index")
        with open_file(self.bin) as (descriptor, size):
            self._ends = self._read_index()
            self.documents = len(self._ends)
            self.tokens = int(self._ends[-1]) if self.documents else 0
            self.dtype = np.dtype(f"<u{self._token_size(size)}")
            self._check_mask()
            self._bin = with_file_limit(lambda: os.dup(descriptor))
        weakref.finalize(self, os.close, self._bin)

    def _read_index(self) -> NDArray[np.uint64]:
        """[documents]: the token at which each ends, ascending."""
        if not self.idx.exists():
            raise DataError(
                f"{self.idx}: no such file; it says where the documents of {self.bin.name} end:"
                " copy it there, or tokenize again with `save_index=True`"
            )
        with open_file(self.idx) as (descriptor, size):
            if size % 8:
                raise DataError(
                    f"{self.idx}: {size} bytes, must be 8 for each document; it is truncated: copy"
                    " it again"
                )
            if not size:
                return np.zeros(0, "<u8")
            content = with_file_limit(lambda: mmap.mmap(descriptor, size, access=mmap.ACCESS_READ))
        ends = np.frombuffer(content, "<u8")
        for first in range(0, len(ends), _BLOCK):
            some = ends[max(0, first - 1) : first + _BLOCK]
            if (some[1:] < some[:-1]).any():
                wrong = max(0, first - 1) + int(np.argmax(some[1:] < some[:-1])) + 1
                raise DataError(
                    f"{self.idx}: document {wrong} ends at token {ends[wrong]:,}, before it begins"
                    f" at {ends[wrong - 1]:,}; it is damaged: copy it again"
                )
        return ends

    def _token_size(self, size: int) -> int:
        """The bytes of a token, 2 or 4. `size`: of the .ds file."""
        named = self._described()[1]
        if not self.tokens and not size:
            return named or 2
        if size not in (2 * self.tokens, 4 * self.tokens):
            raise DataError(
                f"{self.bin}: {size:,} bytes, but its index lists {self.tokens:,} tokens, which"
                f" need {2 * self.tokens:,} bytes (2 each) or {4 * self.tokens:,} (4 each); it is"
                " truncated, or the index belongs to another file: copy both again"
            )
        found = size // self.tokens
        if named is not None and found != named:
            raise DataError(
                f"{self.bin}: tokens of {found} bytes by its size and its index, but"
                f" {self.bin.name}.metadata says {named}; one of the three files is truncated or"
                " belongs to another: copy them again"
            )
        return found

    def _described(self) -> tuple[str, int | None]:
        """The name of the tokenizer and the bytes of a token that the .metadata file says; "" and
        None for what it does not say.
        """
        path = self.bin.with_name(self.bin.name + ".metadata")
        if not path.exists():
            return "", None
        with open_file(path) as (descriptor, _):
            first = os.pread(descriptor, 2**12, 0).partition(b"\n")[0]
        name, _, digits = first.rpartition(b"|")
        size = int(digits) if digits.strip() in (b"2", b"4") else None
        return name.decode(errors="replace").strip(), size

    def check_tokenizer(self, model: tokenizer.Loaded) -> None:
        """Raises DataError if the .metadata file names a tokenizer on this machine that gives text
        other ids than the model's; warns if the named one is not here. Its EOS is not known.
        """
        name, _ = self._described()
        if not name or name == "Unknown Tokenizer" or cache_folder(name) in model.path.parts:
            return
        here = [Path(name), self.bin.parent / name]
        path = next((str(path) for path in here if path.exists()), None) or cached(
            name, tokenizer.MAIN
        )
        try:
            theirs = None if path is None else tokenizer.load(path)
        except DataError:
            theirs = None
        if theirs is None:
            logger.warning(
                f"{self.bin}: its tokens are of the tokenizer {name}, which is not on this machine"
                " and is not compared with the model's."
            )
        elif theirs.fingerprint([], []) != model.fingerprint([], []):
            raise DataError(
                f"{self.bin}: made with another tokenizer than the model's: its .metadata file"
                f" names {name}, which gives text other ids than {model.path}; tokenize again with"
                " the model's tokenizer"
            )

    def _check_mask(self) -> None:
        """Raises DataError if some tokens have no loss."""
        path = self.bin.with_name(self.bin.name + ".loss")
        if not path.exists():
            return
        with open_file(path) as (descriptor, size):
            if size != self.tokens:
                raise DataError(
                    f"{path}: {size:,} bytes, must be one for each of the {self.tokens:,} tokens of"
                    f" {self.bin.name}; it belongs to another file or is truncated"
                )
            place = 0
            while part := os.pread(descriptor, _MASK_BLOCK, place):
                if not (values := np.frombuffer(part, np.uint8)).all():
                    token = place + int(np.argmin(values != 0))
                    raise DataError(
                        f"{path}: takes token {token:,} (document"
                        f" {self.document_at(token):,}) and perhaps others out of the loss; loss"
                        f" masks are not applied. Delete {path.name} to train on all tokens"
                    )
                place += len(part)

    def lengths_of(self, first: int, last: int) -> NDArray[np.integer[Any]]:
        """The tokens of each of the documents [first, last)."""
        last = min(last, self.documents)
        return np.diff(np.append(self.starts_of(first, last), self.start_of(last)))

    def starts_of(self, first: int, last: int) -> NDArray[np.int64]:
        """The first token of each of the documents [first, last)."""
        before = self._ends[max(0, first - 1) : last - 1].astype(np.int64)
        return before if first else np.append(np.int64(0), before)[: last - first]

    def document_at(self, token: int, first: int = 0) -> int:
        """The number of the document, `first` or a later one, that contains a token."""
        return first + int(np.searchsorted(self._ends[first:], np.uint64(token), "right"))

    def start_of(self, document: int) -> int:
        """The first token of a document; the total number of tokens if there is no such
        document.
        """
        return int(self._ends[min(document, self.documents) - 1]) if document > 0 else 0
