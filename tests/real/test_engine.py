"""The fast engine gives the ids of `tokenizers`: seven published tokenizers, 105,000 documents.

No document comes twice, neither for a tokenizer nor for two of them. HARD_DOCUMENTS=100000 in the
environment takes so many for each tokenizer.
"""

import itertools
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fast_llm.data.encode import Encoder
from fast_llm.data.engine import FastEncoder
from fast_llm.data.tokenizer import load
from tests.data.hard_documents import hard_documents
from tests.real import published

pytestmark = pytest.mark.slow
COUNT = int(os.environ.get("HARD_DOCUMENTS", "15000"))  # for each tokenizer
SEEN: set[str] = set()


def distinct(documents: Iterator[str]) -> Iterator[str]:
    """Those that no test has had."""
    for text in documents:
        if text not in SEEN:
            SEEN.add(text)
            yield text


def library() -> Iterator[str]:
    """Every twentieth file of Python's library."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))[::20]:
        if "site-packages" not in path.parts:
            yield path.read_bytes().decode(errors="ignore") or " "


@pytest.mark.parametrize("name", published.NAMES)
def test_same_ids(name: str, tmp_path: Path) -> None:
    try:
        folder = published.make(name, tmp_path)
    except published.Missing as missing:
        pytest.skip(f"needs {missing}: make test-real")
    reference = Encoder(load(str(folder)).tokenizer, np.dtype(np.int32))
    fast = FastEncoder(reference)
    fast.admit([])
    tokens = fast.added_tokens[:300]
    hard = hard_documents(seed=published.NAMES.index(name), count=3 * COUNT, tokens=tokens)
    documents = [*itertools.islice(distinct(hard), COUNT), *library()]
    assert len(documents) > COUNT
    different = []
    for first in range(0, len(documents), 500):
        some = documents[first : first + 500]
        # Compared by this test: the engine's own sample would end it.
        found = fast.encode(some, [1] * len(some))
        for text, one, other in zip(some, found, reference.encode(some), strict=True):
            if one != other:
                different.append(text[:100])
    assert not different
    # The engine encoded nearly all that is neither without a meaning nor left to the reference.
    assert sum(fast.is_safe(text) for text in documents) > 0.6 * len(documents)
