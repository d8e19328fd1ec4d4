"""Tokenizers without tokenizer.json: SentencePiece's and Meta's `tokenizer.model`, Mistral's
`tekken.json`.

Each becomes the content of a tokenizer.json that gives the same ids to every text. Nothing but
`tokenizers` is needed, so that training can read these files too; `prepare` compares the result
for a SentencePiece model with the package sentencepiece (`check_sentencepiece`).

- SentencePiece's BPE merges the pair whose union has the highest score. The merges of
  tokenizer.json are therefore ordered by score; ids do not always have that order.
- The other two are byte-level BPE, as tiktoken computes it: the union with the lowest rank first.

Converting takes about a second.
"""

import base64
import json
import random
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from fast_llm.errors import DataError, MissingPackage

SPACE = "▁"  # how SentencePiece writes a space
_LLAMA3_RANKS = 128_000
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = (  # as Llama 3.1's tokenizer.json names tokens 128,000 to 128,255
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{number}|>" for number in range(3, 248)),
)
_TEKKEN_V3_SPECIAL = (  # of files from before they listed them
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]"),
    *("[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    "[TOOL_CONTENT]",
)
# Types of SentencePiece's pieces.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class Converted:
    """A tokenizer.json made from another file."""

    content: dict[str, Any]
    settings: dict[str, Any]
    """The tokenizer_config.json for a folder that has none."""
    sentencepiece: bool
    """Whether the file is SentencePiece's."""


def convert(name: str, data: bytes, settings: Mapping[str, Any]) -> Converted:
    """The tokenizer.json of a file's content.

    `name`: the file, for messages. `settings`: the content of tokenizer_config.json, or nothing;
    its `added_tokens_decoder` and `add_bos_token` count. Raises DataError for a file that is not a
    tokenizer, or that tokenizer.json cannot express.
    """
    made: Tokenizer
    bos: str | None
    eos: str | None
    is_sentencepiece = False
    if data[:1] == b"{":
        made, bos, eos = _tekken(name, data)
    elif _is_ranks(data):
        made, bos, eos = _meta(name, data)
    else:
        is_sentencepiece = True
        model = _read_sentencepiece(name, data)
        made, bos, eos = _sentencepiece(name, model), model.token("bos"), model.token("eos")
    _add_tokens(name, made, settings)
    named = settings.get("bos_token")
    named = named.get("content") if isinstance(named, dict) else named
    if isinstance(named, str) and made.token_to_id(named) is not None:
        bos = named
    if bos is not None and settings.get("add_bos_token", True):
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0",
            pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
            special_tokens=[(bos, made.token_to_id(bos))],
        )
    own = {"tokenizer_class": "PreTrainedTokenizerFast"}
    own |= {f"{key}_token": token for key, token in (("bos", bos), ("eos", eos)) if token}
    return Converted(json.loads(made.to_str()), own, is_sentencepiece)


def _add_tokens(name: str, made: Tokenizer, settings: Mapping[str, Any]) -> None:
    """Add the tokens that tokenizer_config.json names, with their ids."""
    listed = settings.get("added_tokens_decoder")
    tokens = listed.items() if isinstance(listed, dict) else ()
    try:
        ordered = sorted((int(number), token) for number, token in tokens)
        for number, token in ordered:
            kept = {key: token[key] for key in ("lstrip", "rstrip", "single_word") if key in token}
            special = bool(token.get("special", True))
            # Not normalized: SentencePiece's normalizer would put a space before the token.
            added = AddedToken(token["content"], special=special, normalized=False, **kept)
            made.add_special_tokens([added]) if special else made.add_tokens([added])
            if made.token_to_id(token["content"]) != number:
                raise DataError(
                    f"{name}: the tokenizer_config.json next to it gives token {number} to"
                    f" {token['content']!r}, but {made.token_to_id(token['content'])} is the next"
                    " free one; use the tokenizer.json of the model"
                )
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise DataError(
            f"{name}: added_tokens_decoder of the tokenizer_config.json next to it is damaged:"
            f" {error!r}"
        ) from error


# Byte-level BPE: Meta's and Mistral's files.


def _is_ranks(data: bytes) -> bool:
    """Whether a file has a token in base64 and its rank in each line."""
    word, _, rank = data[:200].split(b"\n", 1)[0].partition(b" ")
    return rank.strip().isdigit() and word.replace(b"=", b"").isascii()


def _meta(name: str, data: bytes) -> tuple[Tokenizer, str, str]:
    ranks: dict[bytes, int] = {}
    try:
        for line in data.splitlines():
            word, rank = line.split()
            ranks[base64.b64decode(word, validate=True)] = int(rank)
    except ValueError as error:
        raise DataError(f"{name}: line {len(ranks) + 1} is not a token and its rank") from error
    if sorted(ranks.values()) != list(range(_LLAMA3_RANKS)):
        raise DataError(
            f"{name}: {len(ranks):,} tokens in tiktoken's format, which does not say how text is"
            f" cut into words; only Llama 3's {_LLAMA3_RANKS:,} tokens are known. Use the"
            " tokenizer.json of the model"
        )
    special = {token: len(ranks) + number for number, token in enumerate(LLAMA3_SPECIAL)}
    made = _byte_level(ranks, _LLAMA3_PATTERN, special)
    return made, LLAMA3_SPECIAL[0], LLAMA3_SPECIAL[1]


def _tekken(name: str, data: bytes) -> tuple[Tokenizer, str, str]:
    try:
        content = json.loads(data)
        config = content["config"]
        number = config["default_num_special_tokens"]
        listed = content.get("special_tokens")
        texts = [token["token_str"] for token in listed] if listed else [*_TEKKEN_V3_SPECIAL]
        texts += [f"<SPECIAL_{rank}>" for rank in range(len(texts), number)]
        special = {text: rank for rank, text in enumerate(texts)}
        words = [
            base64.b64decode(entry["token_bytes"], validate=True)
            for entry in content["vocab"][: config["default_vocab_size"] - number]
        ]
        ranks = {word: number + rank for rank, word in enumerate(words)}
        pattern = Regex(config["pattern"])
    except Exception as error:  # Regex raises Exception itself
        raise DataError(f"{name}: not a tekken.json: {error!r}") from error
    if len(special) != number or {"<s>", "</s>"} - special.keys():
        raise DataError(f"{name}: not a tekken.json: its special tokens are not {number:,}")
    return _byte_level(ranks, pattern, special), "<s>", "</s>"


def _byte_level(ranks: Mapping[bytes, int], pattern: Any, special: Mapping[str, int]) -> Tokenizer:
    """Byte-level BPE that merges what has the lowest rank, as tiktoken does."""
    characters = _byte_characters()
    spelled = {word: "".join(characters[byte] for byte in word) for word in ranks}
    merges: list[tuple[int, int, int, bytes, bytes]] = []
    for word, rank in ranks.items():
        merges += [
            (rank, ranks[left], ranks[right], left, right)
            for cut in range(1, len(word))
            if (left := word[:cut]) in ranks and (right := word[cut:]) in ranks
        ]
    vocabulary = {spelled[word]: rank for word, rank in ranks.items()}
    # Text never yields a special token: the pattern puts letters and brackets into several words.
    vocabulary |= {
        token: number for token, number in special.items() if number < min(ranks.values())
    }
    pairs = [(spelled[left], spelled[right]) for *_, left, right in sorted(merges)]
    made = Tokenizer(models.BPE(vocabulary, pairs, fuse_unk=False, ignore_merges=True))
    split = pre_tokenizers.Split(
        pattern if not isinstance(pattern, str) else Regex(pattern), "isolated"
    )
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in special]
    )
    return made


def _byte_characters() -> dict[int, str]:
    """The character that byte-level BPE writes for each byte (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {
        byte: chr(256 + number) for number, byte in enumerate(hidden)
    }


# SentencePiece.


@dataclass
class _Model:
    """What a SentencePiece model says (sentencepiece_model.proto), with its defaults."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    """Spelling, score and type of each id."""
    unigram: bool = True
    byte_fallback: bool = False
    space_behind: bool = False
    ids: dict[str, int] = field(default_factory=lambda: {"unk": 0, "bos": 1, "eos": 2, "pad": -1})
    charsmap: bytes = b""
    dummy_prefix: bool = True
    trim_spaces: bool = True
    escape_spaces: bool = True

    def token(self, name: Literal["unk", "bos", "eos"]) -> str | None:
        """The spelling of a special token."""
        number = self.ids[name]
        return self.pieces[number][0] if 0 <= number < len(self.pieces) else None


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: number, and an int, a float or bytes."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value - 2**64 if value >= 2**63 else value

    while place < len(data):
        key = varint()
        number, kind = key >> 3, key & 7
        if kind == 0:
            yield number, varint()
            continue
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        if not 0 <= size <= len(data) - place:
            raise ValueError("cut off")
        content = data[place : place + size]
        place += size
        yield (
            number,
            content if kind == 2 else struct.unpack("<f" if kind == 5 else "<d", content)[0],
        )


def _read_sentencepiece(name: str, data: bytes) -> _Model:
    model = _Model()
    kind = 0
    try:
        for number, value in _fields(data):
            if number == 1:
                piece = dict(_fields(value))
                model.pieces.append((piece[1].decode(), piece.get(2, 0.0), piece.get(3, _NORMAL)))
            elif number == 2:
                trainer = dict(_fields(value))
                kind = trainer.get(3, 1)
                model.space_behind = bool(trainer.get(24, 0))
                model.byte_fallback = bool(trainer.get(35, 0))
                for place, token in enumerate(model.ids, 40):
                    model.ids[token] = trainer.get(place, model.ids[token])
            elif number == 3:
                normalizer = dict(_fields(value))
                model.charsmap = normalizer.get(2, b"")
                model.dummy_prefix = bool(normalizer.get(3, 1))
                model.trim_spaces = bool(normalizer.get(4, 1))
                model.escape_spaces = bool(normalizer.get(5, 1))
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{name}: not a SentencePiece model: {error!r}") from error
    if not model.pieces or kind not in (1, 2):
        raise DataError(f"{name}: not a SentencePiece model of kind BPE or unigram")
    model.unigram = kind == 1
    return model


def _sentencepiece(name: str, model: _Model) -> Tokenizer:
    unused = any(kind == _UNUSED for *_, kind in model.pieces)
    if model.space_behind or not model.escape_spaces or (unused and not model.unigram):
        raise DataError(
            f"{name}: tokenizer.json cannot express this SentencePiece model (spaces behind words,"
            " spaces kept, or unused pieces); use another tokenizer"
        )
    unknown = model.token("unk") or "<unk>"
    if model.unigram:
        # sentencepiece never finds the other pieces in text; a low score has the same effect.
        low = 1000 * (min(score for _, score, _ in model.pieces) - 10)
        in_text = (_NORMAL, _USER_DEFINED)
        scores = [(piece, score if kind in in_text else low) for piece, score, kind in model.pieces]
        made = Tokenizer(models.Unigram(scores, model.ids["unk"], model.byte_fallback))
    else:
        made = Tokenizer(
            models.BPE(
                {piece: number for number, (piece, *_) in enumerate(model.pieces)},
                _merges(model),
                unk_token=unknown,
                fuse_unk=True,
                byte_fallback=model.byte_fallback,
            )
        )
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.trim_spaces:
        steps.append(normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    symbols = [piece for piece, _, kind in model.pieces if kind == _USER_DEFINED]
    if model.dummy_prefix and symbols:
        # Symbols are normalized too, and must stay as they are. So a text that is nothing but one
        # symbol has no space in front, as it has in sentencepiece.
        alone = "|".join(re.escape(symbol) for symbol in symbols)
        steps.append(normalizers.Replace(Regex(rf"\A(?!(?:{alone})?\z)"), " "))
    elif model.dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    behind = [decoders.Strip(" ", 1, 0)] if model.dummy_prefix else []
    made.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *behind]
    )
    for piece, _, kind in model.pieces:
        if kind in (_UNKNOWN, _CONTROL):
            made.add_special_tokens([AddedToken(piece, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            made.add_tokens([AddedToken(piece, special=False, normalized=True)])
    return made


def _merges(model: _Model) -> list[tuple[str, str]]:
    """Pairs of pieces, in the order in which SentencePiece merges them."""
    normal = {piece: score for piece, score, kind in model.pieces if kind == _NORMAL}
    pairs = [
        (-score, -len(left), -len(right), left, right)
        for piece, score in normal.items()
        for cut in range(1, len(piece))
        if (left := piece[:cut]) in normal and (right := piece[cut:]) in normal
    ]
    pairs.sort(key=lambda pair: pair[:3])
    return [(left, right) for *_, left, right in pairs]


def check_sentencepiece(name: str, data: bytes) -> None:
    """Compare the ids of a converted model with the package sentencepiece's, over hard texts and
    every piece.

    Raises DataError if they differ, and MissingPackage without the package. Takes about a second.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise MissingPackage(
            "sentencepiece", f"{name} is SentencePiece's, and comparing its ids with those"
        ) from error
    reference = SentencePieceProcessor(model_proto=data)
    model = _read_sentencepiece(name, data)
    texts = [*HARD_TEXTS, *_texts_of_pieces(model)]
    tokenizer = _sentencepiece(name, model)
    tokenizer.encode_special_tokens = True
    found = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    for text, encoding, expected in zip(texts, found, reference.encode(texts), strict=True):
        if encoding.ids != expected:
            raise DataError(
                f"{name}: tokenizer.json cannot express this SentencePiece model: the ids of"
                f" {text[:60]!r} differ from sentencepiece's; use another tokenizer"
            )


def _texts_of_pieces(model: _Model) -> list[str]:
    """Texts that contain every piece, in an order at random."""
    pieces = [
        piece.replace(SPACE, " ")
        for piece, _, kind in model.pieces
        if kind in (_NORMAL, _USER_DEFINED)
    ]
    random.Random(0).shuffle(pieces)
    return ["".join(pieces[first : first + 100]) for first in range(0, len(pieces), 100)]


HARD_TEXTS = (
    *("", " ", "  ", " a", "a ", "  a  b   c ", "\n", "\n\n a\n", "\t", "\ta\t b", "a\r\nb\r\n"),
    *("a" * 999, " " * 99, "ab" * 300, "=" * 77, "\n" * 40, "0" * 50, "1234567890", "3.14e-10"),
    *("▁", "▁▁a ▁b", "<s>", "</s>", " <s> a</s>", "<unk>", "<0x0A>", "<pad>", "[INST] a [/INST]"),
    *("été naïve", "e\u0301te\u0301", "ﬁ ½ ① Ａ １", "中文字符，测试。", "日本語 テスト", "한국어"),
    *(
        "العربية نص",
        "עברית",
        "हिन्दी",
        "ไทย",
        "🙂👩‍👩‍👧🏽",
        "\ud7ff\ue000\U0010ffff",
        "\u200b\ufeff\u00ad",
    ),
    *("\u00a0a\u2003b\u3000c", "a\x00b\x7f", "\x01\x02", "def f(x):\n    return x ** 2\n"),
    *("I'm  don't  WE'LL", "http://a.b/c?d=e&f", "¡Hola! ¿Qué?", "\U00011de0 \U0001f9ff"),
)
