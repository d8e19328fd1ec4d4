"""Make the suite's training data: Llama 3's tokenizer, and Python's library as tokens.

    pip install --no-deps llama-models tiktoken
    python -m tests.gpu.data OUT                  (a minute; 20 MB)

OUT/code.json and OUT/code/ hold about 2.4 million tokens in hundreds of documents, and the
tokenizer. It is converted from `tokenizer.model` of Meta's package `llama-models`. Copy OUT to a
GPU machine that has no network or packages.
"""

import json
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from fast_llm.data.tokenizer_formats import LLAMA3_SPECIAL
from tests.gpu.files import BOS, EOS

BYTES = 10_500_000  # of text


def tokenizer(folder: Path) -> None:
    """Write Llama 3.1's tokenizer.json and tokenizer_config.json, or exit without the packages."""
    found = find_spec("llama_models")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("pip install --no-deps llama-models tiktoken")
    from tokenizers.processors import Sequence, TemplateProcessing
    from transformers.convert_slow_tokenizer import TikTokenConverter

    model = Path(next(iter(found.submodule_search_locations))) / "llama3" / "tokenizer.model"
    made = TikTokenConverter(str(model), extra_special_tokens=list(LLAMA3_SPECIAL)).converted()
    template = TemplateProcessing(
        single=f"{BOS}:0 $A:0",
        pair=f"{BOS}:0 $A:0 {BOS}:1 $B:1",
        special_tokens=[(BOS, made.token_to_id(BOS))],
    )
    made.post_processor = (
        Sequence([made.post_processor, template]) if made.post_processor else template
    )
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": 131072,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def documents(folder: Path) -> None:
    """Every so many-th source file of Python's library, about BYTES in all."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = [
        p
        for p in sorted(library.rglob("*.py"))
        if "site-packages" not in p.parts and p.stat().st_size
    ]
    sizes = [path.stat().st_size for path in paths]
    every = max(1, sum(sizes) // BYTES)
    folder.mkdir(parents=True)
    for number, path in enumerate(paths[::every]):
        shutil.copyfile(path, folder / f"{number:04}.py")


def main(out: Path) -> int:
    """Write OUT/code.json and OUT/code/; return the exit code of `fast-llm prepare`."""
    from fast_llm.cli import main as fast_llm

    with TemporaryDirectory() as folder:
        texts, model = Path(folder) / "texts", Path(folder) / "tokenizer"
        tokenizer(model)
        documents(texts)
        return fast_llm(
            [
                "prepare",
                f"dataset.path={texts}",
                f"output_path={out / 'code'}",
                f"tokenizer.path={model}",
            ]
        )


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
