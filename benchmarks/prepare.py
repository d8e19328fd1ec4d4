"""Speed of `prepare`, in tokens per second and core.

    python benchmarks/prepare.py [--megabytes 20] [--vocabulary 32000] [--workers 1 2]

The text is the source of Python's standard library. The tokenizer is trained on it, with Llama 3's
pre-tokenization. Times include starting workers, reading, tokenizing, writing and flushing to disk.
Wall time, which other programs affect, and processor time are both given.
"""

import argparse
import json
import logging
import os
import sysconfig
import tempfile
import time
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from fast_llm.config.prepare import PrepareConfig
from fast_llm.data import workers
from fast_llm.data.prepare import prepare

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_texts(megabytes: int) -> list[str]:
    """The standard library's source files."""
    texts, size = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, OSError):
            continue
        size += len(texts[-1])
        if size >= megabytes * 1e6:
            break
    return [text for text in texts if text]


def train_tokenizer(texts: list[str], vocabulary: int, folder: Path) -> None:
    """A byte-level BPE tokenizer that cuts text as Llama 3's does."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    cut = pre_tokenizers.Split(Regex(_LLAMA3), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|end_of_text|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end_of_text|>"}')


def measure_prepare(texts: list[str], folder: Path, counts: list[int]) -> None:
    """End to end, from a jsonl that `datasets` has converted before."""
    with (folder / "texts.jsonl").open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")
    for count in counts:
        for size in (2**18, 2**20, 2**22):
            workers.RANGE_BYTES = size
            output = folder / f"out_{count}_{size}"
            values = {
                "output_path": str(output),
                "tokenize_workers": count,
                "dataset": {"path": str(folder / "texts.jsonl")},
                "tokenizer": {"path": str(folder)},
            }
            config = PrepareConfig.model_validate(values)
            started, busy = time.perf_counter(), _processor_time()
            metadata = prepare(config)
            seconds, busy = time.perf_counter() - started, _processor_time() - busy
            tokens = json.loads(metadata.read_text())["num_tokens"]
            name = f"{count} workers, {size // 1024} KiB each"
            rate, each = tokens / seconds / 1e6, tokens / busy / 1e6
            print(
                f"{name:32} {rate:8.2f} million tokens/s, {each:.2f} for each second of processor"
                f" time; {seconds:.1f} s"
            )


def _processor_time() -> float:
    """Of this process and of those that it has waited for."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=20)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    arguments = parser.parse_args()
    logging.getLogger("fast_llm").setLevel(logging.ERROR)
    texts = read_texts(arguments.megabytes)
    with tempfile.TemporaryDirectory() as name:
        os.environ["HF_DATASETS_CACHE"] = f"{name}/cache"
        folder = Path(name)
        train_tokenizer(texts, arguments.vocabulary, folder)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        print(
            f"{len(texts)} files, {sum(map(len, texts)) / 1e6:.1f} million characters,"
            f" {arguments.vocabulary} tokens"
        )
        measure_prepare(texts, folder, arguments.workers)


if __name__ == "__main__":
    main()
