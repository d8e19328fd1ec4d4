"""Text to tokens, several times as fast as `tokenizers` alone, with the same tokens.

Byte-level BPE tokenizers (GPT-2's, Llama 3's, Qwen's, SmolLM2's) first cut text into words by regular expressions, then
look up the tokens of each word. `tokenizers` spends nearly all its time on keeping track of where each character
came from, which token files do not need. Here Python's `re` cuts, and a dictionary remembers each word's tokens as
bytes; words that are new are given to the tokenizer's own BPE model. The regular expressions are the tokenizer's,
translated: what \\p{L}, \\p{N} and \\s stand for is asked of the tokenizer's own engine, character by character.

Everything else goes through `tokenizers`: other kinds of tokenizers and expressions, texts with added tokens that are
not special, characters above U+1FFFF, and a tokenizer for which a comparison at the start finds any difference.

Spellings of special tokens (`<|end_of_text|>` in a program about tokenizers) are plain text: a document can not end
itself.

On one core about three times as many tokens/s as `tokenizers` at first, and five times once most words have come up
(benchmarks/prepare.py). The dictionary takes up to about 200 MB. A text takes 30 times its size in memory while it is
encoded, and 110 times if it goes through `tokenizers`.
"""

import functools
import json
import random
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, pre_tokenizers

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LIMITS = (0x80, 0x10000, 0x20000)  # a table for the characters below each; most text needs only the first
_WORDS = 2**20  # remembered
_LONGEST = 64  # characters of a word that is remembered
_CHARACTERS = 2**22  # given to `tokenizers` at a time


class Encoder:
    """Encodes texts without special tokens. One per process."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype[Any]):
        """`tokenizer` is changed: it never makes special tokens any more. `dtype` must hold the vocabulary."""
        self.tokenizer = tokenizer
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True
        self.dtype = np.dtype(dtype)
        self._words = _Words(self.tokenizer, self.dtype)
        self._added: list[str] = []
        self._limit = 0
        self._stages: tuple[str | None, ...] = ()
        self._read_settings(json.loads(self.tokenizer.to_str()))
        self._usable = {limit: limit <= self._limit and self._agrees(limit) for limit in _LIMITS[:1]}

    @property
    def fast(self) -> bool:
        """Whether this tokenizer is one of those that are encoded here."""
        return self._usable[_LIMITS[0]]

    def encode(self, texts: Sequence[str]) -> list[bytes | None]:
        """The tokens of each text as bytes of `dtype`; None for one on which the tokenizer fails."""
        results: list[bytes | None] = [self._encode_fast(text) if self.fast else None for text in texts]
        for some in _batches([i for i, result in enumerate(results) if result is None], texts):
            encoded = self._encode_slowly([texts[i] for i in some])
            for i, tokens in zip(some, encoded, strict=True):
                results[i] = tokens
        return results

    def _encode_fast(self, text: str) -> bytes | None:
        """None if it has to go through `tokenizers`."""
        limit = _limit(text)
        if limit not in self._usable:  # the tables for more than ASCII take half a second
            self._usable[limit] = limit <= self._limit and self._agrees(limit)
        if not self._usable[limit] or any(added in text for added in self._added):
            return None
        return self._cut_and_look_up(text, limit)

    def _cut_and_look_up(self, text: str, limit: int) -> bytes | None:
        pieces = [text]
        for stage in self._stages:
            find = _pattern(stage, limit).findall
            pieces = find(text) if len(pieces) == 1 else [part for piece in pieces for part in find(piece)]
        # A regular expression that does not match everything leaves gaps, which are pieces too.
        if sum(map(len, pieces)) != len(text):
            return None
        try:
            return b"".join(map(self._words.__getitem__, pieces))
        except Exception:  # `tokenizers` is asked again, and says whether this text can be encoded
            return None

    def _encode_slowly(self, texts: list[str]) -> list[bytes | None]:
        try:
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            return [np.array(encoding.ids, self.dtype).tobytes() for encoding in encodings]
        except BaseException as error:
            # The regular expressions of `tokenizers` give up on some texts, with a panic that is no Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            if len(texts) == 1:
                return [None]
            return [self._encode_slowly([text])[0] for text in texts]

    def _read_settings(self, settings: dict[str, Any]) -> None:
        model, normalizer = settings["model"], settings.get("normalizer")
        stages = _read_stages(settings.get("pre_tokenizer"))
        if model.get("type") != "BPE" or model.get("dropout") or stages is None:
            return
        if normalizer is not None and normalizer.get("type") not in ("NFC", "NFD", "NFKC", "NFKD"):
            return
        self._stages = stages
        self._added = [token["content"] for token in settings.get("added_tokens", ()) if not token["special"]]
        # Unicode's normal forms leave ASCII as it is.
        self._limit = _LIMITS[-1] if normalizer is None else _LIMITS[0]

    def _agrees(self, limit: int) -> bool:
        """Compare with `tokenizers` on text that is more varied than any document."""
        draw = random.Random(0)
        characters = [some for some in _VARIED if max(some) < chr(limit)]
        texts = ["".join(draw.choices(characters, k=200)) for _ in range(20)]
        try:
            return [self._cut_and_look_up(text, limit) for text in texts] == self._encode_slowly(texts)
        except (ValueError, re.error):  # an expression that can not be translated
            return False


class _Words(dict[str, bytes]):
    """The tokens of each word that came up."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype[Any]):
        super().__init__()
        self.model, self.code = tokenizer.model, dtype.char
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        # The printable character that byte-level BPE has for each byte, by way of valid UTF-8.
        self.spelling: dict[int, str] = {}
        for character in map(
            chr, [*range(0x80), *range(0x80, 0x800), *range(0x800, 0x10000, 0x40), *range(0x10000, 0x110000, 0x1000)]
        ):
            if not "\ud800" <= character <= "\udfff":
                self.spelling.update(zip(character.encode(), plain.pre_tokenize_str(character)[0][0], strict=True))

    def __missing__(self, word: str) -> bytes:
        spelled = word.encode().decode("latin-1").translate(self.spelling)
        tokens = array(self.code, [token.id for token in self.model.tokenize(spelled)]).tobytes()
        if len(word) <= _LONGEST:
            if len(self) >= _WORDS:
                self.clear()
            self[word] = tokens
        return tokens


_ASCII = [*map(chr, range(128)), *(["'s", "'LL", " the", "\n\n", "\r\n", "   ", "\t", "123", "ab", "Zz"] * 8)]
_VARIED = [
    *_ASCII,
    *map(chr, range(0x80, 0x800)),
    *map(chr, range(0x800, 0xD800, 37)),
    *map(chr, range(0xE000, 0x20000, 111)),
    *(["'ſ", "\u2028", "\u00a0", "\u3000", "e\u0301", "½", "٣", "中文", "😀", "ﬁ"] * 20),
]


def _batches(which: list[int], texts: Sequence[str]) -> Iterator[list[int]]:
    """Groups of limited size, since `tokenizers` keeps much about each character."""
    some: list[int] = []
    size = 0
    for i in which:
        some.append(i)
        size += len(texts[i])
        if size >= _CHARACTERS:
            yield some
            some, size = [], 0
    if some:
        yield some


_ABOVE = (re.compile("[^\0-\uffff]"), re.compile("[^\0-\U0001ffff]"))


def _limit(text: str) -> int:
    """The smallest limit that no character of the text reaches."""
    if text.isascii():
        return _LIMITS[0]
    if not _ABOVE[0].search(text):
        return _LIMITS[1]
    return _LIMITS[2] if not _ABOVE[1].search(text) else 0x110000


def _read_stages(settings: dict[str, Any] | None) -> tuple[str | None, ...] | None:
    """The regular expressions that cut text, one after the other; None stands for one digit each.

    None altogether if text is cut in another way.
    """
    if settings is None:
        return None
    steps = settings["pretokenizers"] if settings["type"] == "Sequence" else [settings]
    stages: list[str | None] = []
    for position, step in enumerate(steps):
        if step["type"] == "ByteLevel":
            if step.get("add_prefix_space", True) or position != len(steps) - 1:
                return None
            return (*stages, _GPT2) if step.get("use_regex", True) else tuple(stages)
        if step["type"] == "Digits" and step.get("individual_digits"):
            stages.append(None)
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step.get("invert"):
            if "Regex" not in step["pattern"]:
                return None
            stages.append(step["pattern"]["Regex"])
        else:
            return None
    return None


@functools.cache
def _pattern(stage: str | None, limit: int) -> re.Pattern[str]:
    """A stage for texts whose characters are all below the limit. Raises ValueError if it can not be translated."""
    if stage is None:
        digits = _members(None, limit)
        return re.compile(f"[{digits}]|[^{digits}]+")
    return re.compile(_translate(stage, lambda name: _members(name, limit)))


@functools.cache
def _members(name: str | None, limit: int) -> str:
    """The characters of a class such as \\p{L}, or the numerals if None, as they stand inside [ ]."""
    characters = "".join(chr(code) for code in range(limit) if not 0xD800 <= code < 0xE000)
    if name is None:
        # Runs of digits and of other characters by turns; the first is none.
        runs = [run for run, _ in pre_tokenizers.Digits(individual_digits=False).pre_tokenize_str(characters)]
        others = set("".join(runs[::2]))
    else:
        left = pre_tokenizers.Split(Regex(f"{name}+"), "removed").pre_tokenize_str(characters)
        others = {character for run, _ in left for character in run}
    codes = [ord(character) for character in characters if character not in others]
    ranges: list[list[int]] = []
    for code in codes:
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    ranges = ranges or [[0x10FFFF, 0x10FFFF]]  # none below the limit: something that does not occur
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges)


_TOKEN = re.compile(
    r"(?P<kind>\\p\{\^?\w+\}|\\[sSdD])"  # a class of characters
    r"|(?P<group>\(\?i:|\(\?:|\(\?!|\(\?=|\((?!\?))"
    r"|(?P<quantifier>(?:[?*+]|\{\d+(?:,\d*)?\})[+?]?)"
    r"|(?P<other>\\[rnt]|\\[^\w\s]|[|)]|[^\\()\[\]{}^$.?*+|])",
    re.ASCII,
)
_IN_SET = re.compile(r"(?P<kind>\\p\{\w+\}|\\[sd])|(?P<other>\\[rnt]|\\[^\w\s]|[^\\\[\]&^])", re.ASCII)


def _translate(pattern: str, members: Callable[[str], str]) -> str:
    """An Oniguruma expression in Python's spelling. Raises ValueError for what may mean something else there."""
    result: list[str] = []
    at = 0
    while at < len(pattern):
        if pattern[at] == "[":
            at += 1
            result.append("[")
            if pattern[at : at + 1] == "^":
                at += 1
                result.append("^")
            while (found := _IN_SET.match(pattern, at)) is not None:
                result.append(members(found["kind"]) if found["kind"] else found["other"])
                at = found.end()
            if pattern[at : at + 1] != "]":
                raise ValueError(f"{pattern[at:]!r} inside [ ]")
            result.append("]")
            at += 1
            continue
        found = _TOKEN.match(pattern, at)
        if found is None or (found["quantifier"] and found["quantifier"].endswith("}+")):
            raise ValueError(f"{pattern[at:]!r}")
        kind = found["kind"]
        if kind and kind[1] in "SD":
            result.append(f"[^{members(kind.lower())}]")
        elif kind:
            result.append(f"[{members(kind)}]")
        else:
            result.append("(?:" if found["group"] == "(" else found[0])
        at = found.end()
    return "".join(result)
