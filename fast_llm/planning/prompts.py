"""The prompts of `training.samples` as tokens. No torch."""

from collections.abc import Mapping

from tokenizers import Tokenizer

from fast_llm.config.train import TrainConfig
from fast_llm.data.dataset import Dataset
from fast_llm.data.tokenizer import MAIN
from fast_llm.errors import ConfigError

_WHERE = "training.samples.prompts"


def encode_prompts(
    config: TrainConfig,
    files: Mapping[str, bytes],
    special_tokens: Mapping[str, int | None],
    dataset: Dataset,
) -> list[list[int]]:
    """The tokens of each prompt, with BOS where the documents of the training data have it.

    `files`: small files of exports, one of which is the tokenizer. Raises ConfigError.
    """
    samples = config.training.samples
    if samples.interval is None:
        return []
    tokenizer = read_tokenizer(files)
    bos, eos = special_tokens.get("bos"), special_tokens.get("eos")
    described = [each.get("tokenizer", {}) for each in dataset.metadata.values()]
    writes_bos = bos is not None and any(each.get("writes_bos") for each in described)
    found, problems = [], []
    for prompt in samples.prompts:
        tokens = tokenizer.encode(prompt).ids
        tokens = tokens[:-1] if tokens and tokens[-1] == eos else tokens
        if bos is not None and writes_bos and tokens[:1] != [bos]:
            tokens = [bos, *tokens]
        if not tokens:
            problems.append(f"{_WHERE}: given {prompt!r}, which has no tokens")
        if len(tokens) + samples.max_tokens > config.batch.sequence_length:
            problems.append(
                f"{_WHERE}: {prompt[:40]!r} has {len(tokens)} tokens, with"
                f" training.samples.max_tokens {samples.max_tokens} more than batch.sequence_length"
                f" {config.batch.sequence_length}; shorten it, or lower max_tokens"
            )
        found.append(tokens)
    if problems:
        raise ConfigError(problems)
    return found


def read_tokenizer(files: Mapping[str, bytes]) -> Tokenizer:
    """The tokenizer among the small files of exports. Raises ConfigError without one."""
    if MAIN not in files:
        raise ConfigError(
            [
                f"{_WHERE}: needs a tokenizer, and neither the pretrained model nor the data has"
                f" one; set data.tokenizer.path, or leave {_WHERE.rpartition('.')[0]} out"
            ]
        )
    return Tokenizer.from_str(files[MAIN].decode())
