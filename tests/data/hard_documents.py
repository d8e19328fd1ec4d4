"""Documents at random on which tokenizers tend to differ: any characters, runs, line ends, words
of many scripts, invalid bytes replaced, special tokens, and pieces of source code.
"""

import random
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Literal

_WORDS = (
    *("the", "The", "don't", "DON'T", "it's", "we'LL", "'s", "'ſ", "def f(x):", "return", "self.x"),
    *(
        "\r\n",
        "\n\n",
        " \n",
        "\t\t",
        "    ",
        "  ",
        " ",
        "12",
        "345",
        "0x1f",
        "1e-9",
        "3.14",
        "==",
        "->",
    ),
    *(
        "();",
        "{}",
        "//",
        "/*",
        "...",
        "—",
        "«",
        "»",
        "、",
        "。",
        "€",
        "ſ",
        "\u212a",
        "中文",
        "日本語",
        "한국어",
    ),
    *(
        "русский",
        "Ελληνικά",
        "العربية",
        "हिन्दी",
        "ไทย",
        "İ",
        "ﬁ",
        "e\u0301",
        "é",
        "\u1112\u1161\u11ab",
    ),
    *(
        "👩‍👩‍👧",
        "👍🏽",
        "🇨🇦",
        "1️⃣",
        "\u2028",
        "\x85",
        "\x0b",
        "\x00",
        "\ufeff",
        "\ufffd",
        "▁",
        "_",
        "<|",
        "|>",
    ),
)
_FORMS: tuple[Literal["NFC", "NFD", "NFKC", "NFKD"], ...] = ("NFC", "NFD", "NFKC", "NFKD")


def hard_documents(seed: int, count: int, tokens: Sequence[str]) -> Iterator[str]:
    """`count` documents, the same for the same seed. `tokens`: spellings to put into some."""
    draw = random.Random(seed)
    for _ in range(count):
        kind = draw.randrange(9)
        size = int(2 ** draw.uniform(0, 8))
        if kind == 0:  # any characters
            codes = (draw.randrange(sys.maxunicode + 1) for _ in range(size))
            yield "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000) or "x"
        elif kind == 1:  # of one block
            base = draw.randrange(0x3100) & ~0x7F
            yield "".join(chr(base + draw.randrange(128)) for _ in range(size))
        elif kind == 2:  # runs
            characters = draw.choices(" \t\n\r\f\u00a0\u3000ab1=-_!'é中\u0301😀", k=1 + size // 16)
            yield "".join(c * int(2 ** draw.uniform(0, 9)) for c in characters)
        elif kind == 3:  # bytes
            yield draw.randbytes(size).decode("utf-8", "replace")
        elif kind == 4:  # special tokens and pieces of them
            some = draw.choices(tokens, k=1 + size // 32)
            yield "".join(t[draw.randrange(2) :] + draw.choice(_WORDS) for t in some)
        elif kind == 5:  # normal forms
            text = "".join(draw.choices(_WORDS, k=size))
            yield unicodedata.normalize(draw.choice(_FORMS), text)
        elif kind == 6:  # random words
            yield "".join(
                draw.choices("abcdefghijklmnopqrstuvwxyzABCDEF0123456789+/=_", k=size * 4)
            )
        elif kind == 7:
            yield " ".join(draw.choices(_WORDS, k=size))
        else:
            yield "".join(draw.choices(_WORDS, k=size))
