"""Fixtures of several files of tests."""

import random
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from tests.data import synthetic


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files that make several token files, with odd ones among them."""
    folder = tmp_path_factory.mktemp("large")
    draw = random.Random(0)
    for number in range(600):
        (folder / f"{number:04}.py").write_text(synthetic.text(number, draw.randrange(1, 1400)))
    (folder / "0100.py").write_bytes(b"")
    (folder / "0200.py").write_bytes(b"\xff\xfe not UTF-8")
    (folder / "0599.py").write_bytes(b"")
    return folder
