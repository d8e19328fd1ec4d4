"""The memory of the fast engine has a bound, whatever the documents."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.data import synthetic

pytestmark = pytest.mark.slow

# Peak memory in MiB, of one process, above what it had after the first document.
_PROGRAM = """
import random, sys
import numpy as np
from fast_llm.data.encode import Encoder
from fast_llm.data.engine import FastEncoder
from fast_llm.data.tokenizer import load

folder, kind, max_growth = sys.argv[1:]
encoder = FastEncoder(Encoder(load(folder).tokenizer, np.dtype(np.uint16)), int(max_growth), 2**20)
draw, LETTERS = random.Random(0), "abcdefghijklmnopqrstuvwxyz"
def peak():  # not ru_maxrss, which begins with that of the process that started this one
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) // 2**10
encoder.encode(["warm up"], [1])
before = peak()
if kind == "small":  # 40 MB of words that occur once, in documents of 1 KB
    for _ in range(40):
        words = ["".join(draw.choices(LETTERS, k=9)) for _ in range(100_000)]
        texts = [" ".join(words[at : at + 100]) for at in range(0, len(words), 100)]
        encoder.encode(texts, [1] * len(texts))
else:  # one document of 40 MB
    encoder.encode(["some words of a text, again and again.\\n" * 10**6], [1])
print(peak() - before)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.llama(tmp_path_factory.mktemp("llama"), 1000)


def growth(model: Path, kind: str, max_growth: int) -> int:
    """Mebibytes."""
    command = [sys.executable, "-c", _PROGRAM, str(model), kind, str(max_growth)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_words_that_occur_once(model: Path) -> None:
    """What is remembered is forgotten at the bound, here 32 MiB. The allocator keeps some of it."""
    assert growth(model, "small", 2**25) < 200
    assert growth(model, "small", 2**40) > 350  # without a bound


def test_one_large_document(model: Path) -> None:
    """Some copies of text and tokens, not the 110 times that `tokenizers` takes."""
    assert growth(model, "large", 2**28) < 40 * 12
