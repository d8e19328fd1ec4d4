"""Tokenizers and texts that tests make in a moment."""

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = [
    *(
        "def",
        "return",
        "the",
        "of",
        "import",
        "self",
        "a",
        "model,",
        "trains",
        "été",
        "naïve",
        "中文",
        "x1",
        "=",
    ),
    *("12345", "(y)", "\n\n", "   ", "\t", "it's", "«quote»", "\n"),
]


def llama3_cut() -> Any:
    """How Llama 3 cuts text into words."""
    cut = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    return pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def train(
    cut: Any, vocab_size: int = 320, special: tuple[str, ...] = (BOS, EOS), **model: Any
) -> Tokenizer:
    """A byte-level BPE tokenizer, trained on WORDS."""
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text(seed, 400) for seed in range(20)], trainer)
    return tokenizer


def text(seed: int, words: int) -> str:
    """Some words at random."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def llama(folder: Path, vocab_size: int = 320) -> Path:
    """A folder with a tokenizer like Llama 3's: BOS in front, EOS behind."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train(llama3_cut(), vocab_size, ignore_merges=True)
    front = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), front]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": BOS, "eos_token": {"content": EOS}})
    )
    return folder


def gpt2(folder: Path) -> Path:
    """A folder with a tokenizer like GPT-2's: one token is BOS and EOS, and none is prepended."""
    folder.mkdir(parents=True, exist_ok=True)
    token = "<|endoftext|>"
    tokenizer = train(pre_tokenizers.ByteLevel(add_prefix_space=False), special=(token,))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": token, "eos_token": token})
    )
    return folder
