"""The fast encoding gives the tokens of `tokenizers`, whatever the text."""

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

from fast_llm.data import encode
from fast_llm.data.encode import Encoder
from tests.data import made

_QWEN2 = made.LLAMA3.replace("{1,3}", "")
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(*before: Any, use_regex: bool = False) -> Any:
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    return pre_tokenizers.Sequence([*before, last]) if before else last


def _split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


_FAST = {
    "gpt2": _byte_level(use_regex=True),
    "llama3": made.llama3_cut(),
    "qwen2": _byte_level(_split(_QWEN2)),
    "o200k": _byte_level(_split(_O200K)),
    "smollm2": _byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True),
    "words only": _byte_level(_split(r"[a-z\s]+|\P{L}")),  # leaves gaps; \P is not translated
    "gaps": _byte_level(_split(r"[a-z]+")),
}
_tokenizers = {name: made.train(cut) for name, cut in _FAST.items()}


def _copy(tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer.from_str(tokenizer.to_str())


def _reference(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    tokenizer.encode_special_tokens = True
    return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


def _tokens(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    return [np.frombuffer(content, encoder.dtype).tolist() for content in encoder.encode(texts) if content is not None]


_encoders = {name: Encoder(_copy(tokenizer), np.dtype(np.uint16)) for name, tokenizer in _tokenizers.items()}


@pytest.mark.parametrize("name", _FAST)
def test_which_are_fast(name: str) -> None:
    assert _encoders[name].fast == (name not in ("words only", "gaps"))


@pytest.mark.parametrize("name", _FAST)
def test_equals_tokenizers(name: str) -> None:
    characters = st.one_of(
        st.characters(codec="utf-8"),
        st.sampled_from("abcXYZ 0123456789 \n\n\r\t'’.,<|>_-éßſKﬆ中\u00a0\u2028\u3000\U0001f600\U00020000"),
    )
    piece = st.one_of(st.text(characters), st.sampled_from([*made.WORDS, made.BOS, made.EOS, "'LL", "  \n"]))

    @settings(max_examples=60, deadline=None)
    @given(st.lists(piece).map("".join))
    def check(text: str) -> None:
        assert _tokens(_encoders[name], [text]) == _reference(_tokenizers[name], [text])

    check()


def test_every_character() -> None:
    """Of the first plane, and some of the others, between letters and blanks."""
    codes = [*range(0xD800), *range(0xE000, 0x10000), *range(0x10000, 0x20400, 5)]
    texts = ["".join(f"a{chr(code)} " for code in codes[at : at + 256]) for at in range(0, len(codes), 256)]
    assert _tokens(_encoders["smollm2"], texts) == _reference(_tokenizers["smollm2"], texts)
    assert all(_encoders["smollm2"]._usable[limit] for limit in encode._LIMITS)


def test_characters_that_no_expression_matches() -> None:
    tokenizer = made.train(_byte_level(_split("[^☃]+")))
    encoder = Encoder(_copy(tokenizer), np.dtype(np.int32))
    assert encoder.fast
    assert _tokens(encoder, ["a☃b☃"]) == _reference(tokenizer, ["a☃b☃"])


def test_special_tokens_are_text() -> None:
    text = f"print('{made.EOS}')\n{made.BOS} x"
    for name in _FAST:
        (tokens,) = _tokens(_encoders[name], [text])
        assert 0 not in tokens and 1 not in tokens
        assert _tokenizers[name].decode(tokens) == text


def test_added_tokens_that_are_not_special_are_tokens() -> None:
    tokenizer = _copy(_tokenizers["llama3"])
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    encoder = Encoder(_copy(tokenizer), np.dtype(np.int32))
    assert encoder.fast
    texts = ["a <tool> b", "no tool"]
    assert _tokens(encoder, texts) == _reference(tokenizer, texts)
    assert tokenizer.token_to_id("<tool>") in _tokens(encoder, texts)[0]


@pytest.mark.parametrize("normalizer", [normalizers.NFC(), normalizers.Lowercase(), normalizers.Prepend("▁")])
def test_normalizers(normalizer: Any) -> None:
    tokenizer = _copy(_tokenizers["llama3"])
    tokenizer.normalizer = normalizer
    encoder = Encoder(_copy(tokenizer), np.dtype(np.int32))
    assert encoder.fast == isinstance(normalizer, normalizers.NFC)
    texts = ["Hello World", "e\u0301 \u00e9 Å \u212b", "\n"]
    assert _tokens(encoder, texts) == _reference(tokenizer, texts)


def test_a_difference_is_found_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_GPT2", r"\p{L}+|[^\p{L}]")
    encoder = Encoder(_copy(_tokenizers["gpt2"]), np.dtype(np.int32))
    assert not encoder.fast
    assert _tokens(encoder, ["it's 12"]) == _reference(_tokenizers["gpt2"], ["it's 12"])


def test_text_that_the_tokenizer_fails_on() -> None:
    slow = _encoders["words only"]
    texts = ["fine", "\ud800", "also fine"]  # half a surrogate pair is no character
    encoded = slow.encode(texts)
    assert [content is None for content in encoded] == [False, True, False]
    encoded = _encoders["llama3"].encode(texts)
    assert [content is None for content in encoded] == [False, True, False]


def test_millions_of_blanks() -> None:
    """Of which some more make the regular expressions of `tokenizers` give up."""
    started = time.monotonic()
    (content,) = _encoders["llama3"].encode([" " * 500_000 + "x"])
    assert content is not None and time.monotonic() - started < 20


def test_words_are_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_WORDS", 10)
    encoder = Encoder(_copy(_tokenizers["llama3"]), np.dtype(np.int32))
    texts = [made.text(seed, 50) for seed in range(5)]
    assert _tokens(encoder, texts) == _reference(_tokenizers["llama3"], texts)
    assert len(encoder._words) <= 10
