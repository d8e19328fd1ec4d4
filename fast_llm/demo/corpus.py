"""The demo's text and tokenizer, made from files of the Python installation."""

import ast
import json
import pydoc_data.topics
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

VOCABULARY = 4096


def write_prose(path: Path) -> int:
    """Write Python's reference and the library's docstrings as JSON lines. Returns the bytes."""
    documents = list(pydoc_data.topics.topics.values())
    for source in sources():
        try:
            tree = ast.parse(source.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue
        texts = [
            ast.get_docstring(node)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        document = "\n\n".join(text for text in texts if text)
        if len(document) > 200:
            documents.append(document)
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return sum(map(len, documents))


def write_code(folder: Path) -> int:
    """Copy the source files of the standard library. Returns the bytes."""
    folder.mkdir()
    size = 0
    root = Path(sysconfig.get_paths()["stdlib"])
    for source in sources():
        target = folder / "_".join(source.relative_to(root).parts)
        shutil.copyfile(source, target)
        size += target.stat().st_size
    return size


def sources() -> Iterator[Path]:
    """Source files of the standard library, without its tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    unwanted = {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "turtledemo",
        "__pycache__",
    }
    for path in sorted(root.rglob("*.py")):
        if not unwanted & set(path.relative_to(root).parts) and path.stat().st_size < 200_000:
            yield path


def train_tokenizer(folder: Path, model: Path) -> None:
    """Train a byte-level BPE that prepends BOS, as Llama 3's tokenizer does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [json.loads(line)["text"] for line in (folder / "prose.jsonl").read_text().splitlines()]
    texts += [
        path.read_text(encoding="utf-8", errors="replace")
        for path in sorted((folder / "code").iterdir())[::4]
    ]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A",
        pair=f"{special[0]} $A {special[0]} $B",
        special_tokens=[(special[0], 0), (special[1], 1)],
    )
    model.mkdir()
    tokenizer.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": special[0],
                "eos_token": special[1],
                "model_max_length": 131072,
            },
            indent=2,
        )
    )
    (model / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 0, "eos_token_id": 1}, indent=2)
    )
