"""A real pretrained Llama and real code, made once for all tests of this folder."""

import shutil
import sysconfig
from pathlib import Path

import pytest

from fast_llm import cli
from fast_llm.demo.real import CACHE
from fast_llm.demo.smollm2 import make_model, missing_packages

SOURCES = ("json", "asyncio", "email", "logging", "unittest")  # of Python's own library


@pytest.fixture(scope="session")
def model() -> Path:
    """A folder with SmolLM2-135M-Instruct in bf16, from its 4-bit release, and its tokenizer."""
    if missing := missing_packages():
        pytest.skip(f"needs {', '.join(missing)}: make test-real")
    return make_model(CACHE)


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of source files of Python's library."""
    folder = tmp_path_factory.mktemp("documents")
    for name in SOURCES:
        for file in sorted((Path(sysconfig.get_path("stdlib")) / name).glob("*.py")):
            if file.stat().st_size:
                shutil.copy(file, folder / f"{name}-{file.name}")
    return folder


@pytest.fixture(scope="session")
def data(model: Path, documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documents, prepared with the model's tokenizer."""
    output = tmp_path_factory.mktemp("data") / "code"
    settings = [f"output_path={output}", f"dataset.path={documents}", f"tokenizer.path={model}"]
    assert cli.main(["prepare", *settings]) == 0
    return output.with_suffix(".json")
