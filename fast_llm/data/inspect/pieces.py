"""What a tokenizer makes of a text, token by token, as `prepare` encodes documents.

The bytes of a token come from the token itself. In byte-level vocabularies each character stands
for one byte (GPT-2's alphabet); in SentencePiece vocabularies `▁` is a space and `<0xE4>` a byte.
"""

import json
import re
from typing import Any

import numpy as np

from fast_llm.data.encode import Encoder
from fast_llm.data.tokenizer import Loaded

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LISTED = 50  # special tokens


def describe(loaded: Loaded, text: str | None) -> dict[str, Any]:
    """A tokenizer and, if a text is given, its tokens as a document."""
    added = loaded.tokenizer.get_added_tokens_decoder()
    content: dict[str, Any] = {
        "kind": "tokenizer",
        "path": str(loaded.path),
        "vocab_size": loaded.vocab_size,
        "bos": _named(loaded, loaded.bos),
        "eos": _named(loaded, loaded.eos),
        "adds_bos": loaded.adds_bos,
        "added_tokens": [
            {"id": number, "token": token.content, "special": token.special}
            for number, token in sorted(added.items())[:_LISTED]
        ],
        "number_of_added_tokens": len(added),
    }
    if text is not None:
        tokens = pieces(loaded, text)
        content |= {"text": text, "bytes": len(text.encode()), "tokens": tokens}
    return content


def _named(loaded: Loaded, token: int | None) -> dict[str, Any] | None:
    if token is None:
        return None
    return {"id": token, "token": loaded.tokenizer.id_to_token(token)}


def pieces(loaded: Loaded, text: str) -> list[dict[str, Any]]:
    """The tokens of a document with this text: id, token, bytes in hexadecimal, and whether it is
    BOS or EOS.
    """
    encoded = Encoder(loaded.tokenizer, np.dtype(np.int64)).encode([text])[0]
    ids = np.frombuffer(encoded or b"", np.int64).tolist()
    bytes_of = _byte_level() if _is_byte_level(loaded) else None
    found = []
    front = [loaded.bos] if loaded.adds_bos else []
    for number in [*front, *ids, *([] if loaded.eos is None else [loaded.eos])]:
        special = number in (loaded.bos, loaded.eos)
        token = str(loaded.tokenizer.id_to_token(number))
        data = b"" if special else _bytes(token, bytes_of)
        found.append({"id": number, "token": token, "bytes": data.hex(), "special": special})
    return found


def _bytes(token: str, bytes_of: dict[str, int] | None) -> bytes:
    if bytes_of is not None:
        if all(character in bytes_of for character in token):
            return bytes(bytes_of[character] for character in token)
        return token.encode()  # a token that was added as text
    if found := _BYTE.fullmatch(token):
        return bytes([int(found[1], 16)])
    return token.replace("\u2581", " ").encode()


def _is_byte_level(loaded: Loaded) -> bool:
    decoder = json.loads(loaded.tokenizer.to_str()).get("decoder")
    return '"ByteLevel"' in json.dumps(decoder)


def _byte_level() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are themselves, the others are characters from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + place): byte for place, byte in enumerate(others)}
