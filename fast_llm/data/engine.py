"""A fast tokenizer, `gigatoken`, under the control of `tokenizers`, the reference.

It gives the ids of the reference on ordinary text at many times the speed. Nothing but the
reference decides what is right:

1. **Admission.** It must agree on the texts of hard_texts.py and on a sample of the corpus.
2. **Characters.** Libraries have different versions of Unicode. A character outside ASCII is
   compared in many contexts when it first occurs. The reference encodes documents with a character
   on which the engine differs.
3. **Texts that it never gets:** texts that are not in the tokenizer's normal form (NFC), texts with
   half a mebibyte without a change between white space and other characters, on which the
   reference may fail, and for converted SentencePiece models with added tokens, texts with one of
   these. The reference encodes them.
4. **Size.** In every document, the bytes of the tokens must add up to those of the text.
5. **Sample.** The reference encodes one document in 256 again, and one part in 256 of long ones.
   The row's number decides which.

If 4 or 5 finds a difference, `DifferentTokens` ends the use of the engine, and everything that it
has written is thrown away and written again by the reference (prepare.py). So token files never
depend on the engine, on the number of workers, or on which worker finds a difference.

It takes some 100 MiB for Llama 3, and remembers words: it is made anew when the process has grown
by 256 MiB, which bounds the memory it takes.
"""

import itertools
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from tokenizers import models

from fast_llm.data.encode import Encoder, is_panic
from fast_llm.data.hard_texts import hard_texts

NAME = "gigatoken"
REFERENCE = f"tokenizers {version('tokenizers')}"
_NORMALIZERS = {"NFC", "Prepend", "Replace", "Sequence"}  # 2 and 3 are enough for these
_UNKNOWN, _EQUAL, _DIFFERENT = range(3)
_LONG = 2**15  # characters; of longer documents, parts are compared
_SPACING = 2**20  # characters from one such part to the next
_RUN = 2**18  # characters; half of the shortest run that is left to the reference
_CHUNK = 2**20  # tokens whose sizes are added at a time
_SPACE = re.compile(r"\s")


class DifferentTokens(Exception):
    """The engine and the reference differ on the document in row `row`."""

    def __init__(self, row: int):
        super().__init__(row)
        self.row = row


class NotAdmitted(Exception):
    """The engine cannot be used for this tokenizer; the text says why."""


def installed() -> str | None:
    """Name and version of the engine; None if it is not installed."""
    try:
        return f"{NAME} {version(NAME)}"
    except PackageNotFoundError:
        return None


class FastEncoder:
    """Encodes with the engine, and compares it with the reference. One per process."""

    def __init__(
        self,
        reference: Encoder,
        max_growth: int = 2**28,
        rate: int = 256,
        text: str | None = None,
    ):
        """`max_growth`: bytes of memory after which the engine is made anew. One document in
        `rate` is compared with the reference. `text`: the tokenizer.json of the reference, whose
        model comes last; without it the reference writes it, which takes a while.

        Raises NotAdmitted if the engine cannot read the tokenizer.
        """
        self.reference = reference
        self.dtype = reference.dtype
        self.max_growth, self.rate = max_growth, rate
        self._read(text or reference.tokenizer.to_str())
        try:
            self._start()
        except NotAdmitted:
            if text is None:
                raise
            self._read(reference.tokenizer.to_str())  # perhaps it reads only the present format
            self._start()
        self.memory = _memory()
        self.states = np.zeros(0x110000, np.uint8)  # of each character
        self.states[:128] = _EQUAL
        self.states[0xD800:0xE000] = _DIFFERENT  # surrogates: the reference refuses them
        self.sizes = self._token_sizes()

    def _read(self, text: str) -> None:
        self.json, self.added_tokens, self.normalizes, self.hidden = _readable_tokenizer(
            self.reference, text
        )
        self.prefix = _common_prefix(self.hidden)

    def _start(self) -> None:
        from gigatoken.gigatoken_rs import load_hf_json

        self.engine: Any = None  # frees the memory of the one before
        try:
            self.engine = load_hf_json(self.json)
        except BaseException as error:
            if not is_panic(error):
                raise
            reason = str(error).partition("\n")[0]
            raise NotAdmitted(f"it cannot read this tokenizer: {reason}") from error
        self.characters = 0  # that it has encoded

    def admit(self, sample: Sequence[str]) -> None:
        """Compare with the reference on hard texts and on a sample of the corpus.

        Raises NotAdmitted if they differ.
        """
        texts = [text for text in (*hard_texts(self.added_tokens), *sample) if text]
        known = [text for text in texts if self.is_safe(text)]
        for text, tokens in zip(known, self.reference.encode(known), strict=True):
            if tokens is not None and not self._equal(text, tokens):
                raise NotAdmitted(f"it differs from {REFERENCE} on {text[:40]!r}")

    def encode(self, texts: Sequence[str], rows: Sequence[int]) -> list[bytes | None]:
        """As Encoder does. `rows`: the number of each text among all documents.

        Raises DifferentTokens.
        """
        results: list[bytes | None] = [None] * len(texts)
        left, short, sampled = [], [], []
        tokens: list[NDArray[np.uint32]] = []
        for at, (text, row) in enumerate(zip(texts, rows, strict=True)):
            found = self._tokens(text) if self.is_safe(text) else None
            if found is None:
                left.append(at)
            elif len(text) > _LONG:
                results[at] = self._checked([text], [row], [found])[0]
                self._compare_parts(text, row)
            else:
                short.append(at)
                tokens.append(found)
                if _hash(row) % self.rate == 0:
                    sampled.append(at)
        checked = self._checked([texts[at] for at in short], [rows[at] for at in short], tokens)
        for at, content in zip(short, checked, strict=True):
            results[at] = content
        expected = self.reference.encode([texts[at] for at in (*left, *sampled)])
        for at, by_reference in zip(left, expected, strict=False):
            results[at] = by_reference
        for at, by_reference in zip(sampled, expected[len(left) :], strict=True):
            if results[at] != by_reference:
                raise DifferentTokens(rows[at])
        self.characters += sum(map(len, texts))
        # It takes up to 12 bytes for one of text. If something else takes the memory, this is rare.
        if self.characters >= self.max_growth // 8 and _memory() - self.memory > self.max_growth:
            self._start()
        return results

    def _tokens(self, text: str) -> NDArray[np.uint32] | None:
        """The engine's tokens; None if it fails."""
        try:
            tokens: NDArray[np.uint32] = self.engine.encode(text)
            return tokens
        except BaseException as error:
            if not is_panic(error):
                raise
            self._start()
            return None

    def _equal(self, text: str, expected: bytes | None) -> bool:
        tokens = self._tokens(text)
        return tokens is not None and tokens.astype(self.dtype).tobytes() == expected

    def _checked(
        self, texts: Sequence[str], rows: Sequence[int], tokens: Sequence[NDArray[np.uint32]]
    ) -> list[bytes]:
        """The tokens of each text as bytes of `dtype`.

        For many short texts at once: a call of NumPy takes as long as the engine for one of them.
        Raises DifferentTokens if the bytes of a text do not add up.
        """
        if not tokens:
            return []
        joined = np.concatenate(tokens) if len(tokens) > 1 else tokens[0]
        ends = np.cumsum([len(some) for some in tokens])
        if self.sizes is not None:
            expected = [len(text) if text.isascii() else len(text.encode()) for text in texts]
            wrong = np.flatnonzero(_sums(self.sizes, joined, ends) != expected)
            if len(wrong):
                raise DifferentTokens(rows[int(wrong[0])])
        same = self.dtype.itemsize == joined.itemsize
        data = (joined if same else joined.astype(self.dtype)).tobytes()
        edges = [0, *(ends * self.dtype.itemsize).tolist()]
        return [data[begin:end] for begin, end in itertools.pairwise(edges)]

    def _compare_parts(self, text: str, row: int) -> None:
        """Compare some parts of a long text."""
        size = _SPACING // self.rate
        for start in range(0, len(text), _SPACING):
            at = start + _hash(row + start) % (_SPACING - size)
            part = text[at : at + size]
            if len(part) == size and not self._equal(part, self.reference.encode([part])[0]):
                raise DifferentTokens(row)

    def is_safe(self, text: str) -> bool:
        """Whether the engine may encode a text."""
        # Few texts have what all of the spellings begin with.
        if self.hidden and self.prefix in text and any(token in text for token in self.hidden):
            return False
        if text.isascii():
            return not (len(text) >= 2 * _RUN and _has_long_run(text))
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        states = self.states[codes]
        if not states.all():
            self._learn(np.unique(codes[states == _UNKNOWN]).tolist())
            states = self.states[codes]
        return bool(
            (states == _EQUAL).all()
            and (not self.normalizes or unicodedata.is_normalized("NFC", text))
            and not (len(text) >= 2 * _RUN and _has_long_run(text))
        )

    def _learn(self, codes: list[int]) -> None:
        """Compare characters with the reference."""
        texts = [_contexts(chr(code)) for code in codes]
        for code, text, expected in zip(codes, texts, self.reference.encode(texts), strict=True):
            assigned = not self.normalizes or unicodedata.category(chr(code)) != "Cn"
            equal = assigned and self._equal(text, expected)
            self.states[code] = _EQUAL if equal else _DIFFERENT

    def _token_sizes(self) -> NDArray[np.int64] | None:
        """Bytes of each token; None if those of a text do not add up, because the tokenizer changes
        texts.
        """
        vocabulary: dict[int, bytes] = self.engine.vocab
        numbers = np.fromiter(vocabulary.keys(), np.int64, len(vocabulary))
        sizes = np.zeros(int(numbers.max()) + 1, np.int64)
        sizes[numbers] = np.fromiter(map(len, vocabulary.values()), np.int64, len(vocabulary))
        for text in (" The text,\n of  it\t12 é中\U0001f600 ", *self.added_tokens):
            tokens = self._tokens(f" {text}  a")
            if tokens is None or sizes[tokens].sum() != len(text.encode()) + 4:
                return None
        return sizes


def _readable_tokenizer(reference: Encoder, text: str) -> tuple[str, list[str], bool, list[str]]:
    """A tokenizer.json (`text`) without special tokens, the spellings of all added tokens, whether
    it normalizes to NFC, and the spellings that the engine must not see.

    Raises NotAdmitted for what the comparisons cannot cover.
    """
    model = reference.tokenizer.model
    if not isinstance(model, models.BPE) or model.dropout:
        raise NotAdmitted(f"the tokenizer's model is {type(model).__name__}, not plain BPE")
    head, tail = _split(text)
    added, normalizer = head.get("added_tokens") or [], head.get("normalizer")
    kinds = set(_types(normalizer))
    if kinds - _NORMALIZERS:
        raise NotAdmitted(f"its normalizer {', '.join(sorted(kinds - _NORMALIZERS))}")
    ordinary = [token for token in added if not token.get("special")]
    simple = _always_prepending(normalizer)
    hidden = [token["content"] for token in ordinary] if simple != normalizer else []
    changed = {"added_tokens": ordinary, "normalizer": simple, "truncation": None, "padding": None}
    content = f"{json.dumps(head | changed)[:-1]}, {tail}"
    return content, [token["content"] for token in added], "NFC" in kinds, hidden


def _split(text: str) -> tuple[dict[str, Any], str]:
    """What a tokenizer.json says before its model, and the text of the rest. Reading all takes
    longer.
    """
    head: dict[str, Any] = {}
    at, decoder = text.index("{"), json.JSONDecoder()
    while True:
        at = _next(text, at + 1)
        key, end = decoder.raw_decode(text, at)
        if key == "model":
            return head, text[at:]
        head[key], at = decoder.raw_decode(text, _next(text, text.index(":", end) + 1))
        at = text.index(",", at)


def _next(text: str, at: int) -> int:
    """The place of the next character that is not white space."""
    while text[at].isspace():
        at += 1
    return at


def _always_prepending(normalizer: Any) -> Any:
    """The normalizer of a converted SentencePiece model (tokenizer_formats.py), as the engine can
    read it: it puts a space before a text, also if that is nothing but an added token.
    """
    if not isinstance(normalizer, dict):
        return normalizer
    if inner := normalizer.get("normalizers"):
        return {**normalizer, "normalizers": [_always_prepending(each) for each in inner]}
    pattern = normalizer.get("pattern", {}).get("Regex", "")
    if pattern.startswith(r"\A(?!(?:") and pattern.endswith(r")?\z)"):
        return {"type": "Prepend", "prepend": normalizer["content"]}
    return normalizer


def _types(value: Any) -> Iterator[str]:
    """The types of a normalizer and of those in it."""
    if isinstance(value, dict) and "type" in value:
        yield value["type"]
        for inner in value.get("normalizers", []):
            yield from _types(inner)


def _contexts(c: str) -> str:
    """A character next to others of each class. Words and numbers are cut differently if its class
    is different.
    """
    return (
        f"{c} {c}  {c}{c}{c} the{c}the The{c}THE{c}s 1{c}234{c}5 !{c}!! {c}\n\n{c} \n{c}\r\n"
        f"'{c}s {c}'s {c}'S {c}'ll\t{c}/{c}_{c} e{c}\u0301 o{c}\u0323 {c}\u3000{c}中{c}の{c}"
    )


def _sums(
    sizes: NDArray[np.int64], tokens: NDArray[np.uint32], ends: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The sum of `sizes` over the tokens up to each of `ends`, from the one before."""
    if len(ends) == 1:  # perhaps a large text: NumPy takes 16 bytes for a token
        parts = (tokens[at : at + _CHUNK] for at in range(0, len(tokens), _CHUNK))
        return np.array([sum(int(sizes.take(part).sum()) for part in parts)])
    begins = np.concatenate([[0], ends[:-1]])
    found = np.zeros(len(ends), np.int64)
    some = ends > begins  # reduceat gives an element for an empty range
    if some.any():
        found[some] = np.add.reduceat(sizes.take(tokens), begins[some])
    return found


def _memory() -> int:
    """Bytes that this process takes, which may have been forked after its engine was made."""
    return int(psutil.Process().memory_info().rss)


def _common_prefix(texts: list[str]) -> str:
    pairs = zip(min(texts, default=""), max(texts, default=""), strict=False)
    return "".join(one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _has_long_run(text: str) -> bool:
    """Whether white space, or other characters, fill `_RUN` characters from a multiple of it."""
    for at in range(0, len(text) - _RUN + 1, _RUN):
        piece = text[at : at + _RUN]
        if piece.isspace() or _SPACE.search(piece) is None:
            return True
    return False


def _hash(number: int) -> int:
    """Spreads numbers evenly over 32 bits."""
    return (number * 0x9E3779B97F4A7C15 & (2**64 - 1)) >> 32
