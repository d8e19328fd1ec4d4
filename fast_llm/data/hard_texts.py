"""Texts on which tokenizers tend to differ. A fast engine must pass all of them before it is used.

They are the same in every process and take `tokenizers` a few tenths of a second: words of all
classes of characters next to each other, runs, contractions, white space, emoji sequences,
combining marks, random words, added tokens, and parts of their spellings.
"""

import itertools
import random
from collections.abc import Iterable, Iterator

# One of each kind of character that a tokenizer's expressions tell apart.
_CHARACTERS = (
    *"aZ1'\"!_/ \t\n\r",
    "é",
    "ß",
    "中",
    "の",
    "Ⅷ",
    "²",
    "٣",
    "\u0301",
    "\u200d",
    "\u00a0",
    "\u3000",
    "\x00",
    "😀",
)
_PIECES = (
    *(
        "the",
        "The",
        "THE",
        "don't",
        "DON'T",
        "it's",
        "we'll",
        "we'LL",
        "'s",
        "'S",
        "'ſ",
        "'d",
        "''",
    ),
    *(
        "\r\n",
        "\n\n",
        "\n \n",
        " \n",
        "\t\t",
        "    ",
        "  ",
        " ",
        "12",
        "345",
        "6789",
        "0x1f",
        "1e-9",
    ),
    *(
        "==",
        "!=",
        "->",
        "();",
        "{}",
        "//",
        "/*",
        "*/",
        "...",
        "—",
        "«",
        "»",
        "、",
        "。",
        "€",
        "ſ",
        "\u212a",
    ),
    *(
        "中文",
        "日本語",
        "ありがとう",
        "한국어",
        "русский",
        "Ελληνικά",
        "العربية",
        "हिन्दी",
        "ไทย",
        "İ",
        "ﬁ",
    ),
    *(
        "e\u0301",
        "é",
        "n\u0303",
        "ñ",
        "\u1112\u1161\u11ab",
        "한",
        "o\u0323\u0302",
        "ộ",
        "\ufeff",
        "\ufffd",
    ),
    *(
        "👩‍👩‍👧",
        "👍🏽",
        "🇨🇦",
        "1️⃣",
        "☃️",
        "\u2028",
        "\x85",
        "\x0b",
        "\x0c",
        "\x1f",
        "\x7f",
        "<",
        ">",
        "|",
        "▁",
    ),
)
_RUNS = (
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    15,
    16,
    17,
    31,
    32,
    33,
    63,
    64,
    65,
    127,
    128,
    129,
    255,
    256,
    257,
    1000,
)


def hard_texts(added_tokens: Iterable[str]) -> Iterator[str]:
    """The texts. `added_tokens`: spellings that the tokenizer treats specially, or that it would if
    they were not special tokens.
    """
    yield "".join(map(chr, range(128)))
    for some in itertools.product(_CHARACTERS, repeat=2):
        yield "".join(some)
        yield "".join((*some, *some[::-1], some[0], "a"))
    for character in _CHARACTERS:
        for run in _RUNS:
            yield f"a{character * run}b"
            yield character * run
    draw = random.Random(0)
    for length in range(2, 400, 3):
        yield "".join(draw.choices(_CHARACTERS, k=length // 4 + 2))
        yield "".join(draw.choices(_PIECES, k=length // 2))
        yield "".join(
            draw.choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", k=length)
        )
    for token in added_tokens:
        yield f"{token}a {token}{token} b\n{token}\n {token} {token[:-1]} {token[1:]} x{token}é"
