"""Published tokenizers without tokenizer.json: ids equal the original libraries'.

Llama 3's `tokenizer.model` comes with the package llama-models, Mistral's files with
mistral-common. The texts are hard ones, random ones, and every tenth file of Python's library.
"""

import random
import sysconfig
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fast_llm.data.prepare import prepare
from fast_llm.data.tokenizer import load
from fast_llm.data.tokenizer_formats import HARD_TEXTS
from tests.data.preparing import configure, content, read

pytestmark = pytest.mark.slow
Encode = Callable[[str], list[int]]


def package(name: str) -> Path:
    found = find_spec(name)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"needs {name}: make test-real")
    return Path(next(iter(found.submodule_search_locations)))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    draw = random.Random(1)
    found = [*HARD_TEXTS, "a [REFERENCE_DOC_13]b", "<|begin_of_text|> <|eot_id|>"]
    found += [
        "".join(draw.choices("ab \n=a1.\t\u00e9中", k=draw.randrange(1, 60))) for _ in range(400)
    ]
    found += ["".join(chr(draw.randrange(1, 0x2FFF)) for _ in range(40)) for _ in range(200)]
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py"))[::10]:
        if "site-packages" not in path.parts:
            found.append(path.read_bytes().decode(errors="ignore"))
    return found


def sentencepiece(name: str) -> tuple[Path, Encode]:
    from sentencepiece import SentencePieceProcessor

    path = package("mistral_common") / "data" / name
    return path, SentencePieceProcessor(model_file=str(path)).encode


def tekken(name: str) -> tuple[Path, Encode]:
    path = package("mistral_common") / "data" / name
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    made = Tekkenizer.from_file(path)
    return path, lambda text: made.encode(text, bos=False, eos=False)


def meta(_: str) -> tuple[Path, Encode]:
    path = package("llama_models") / "llama3" / "tokenizer.model"
    from llama_models.llama3.tokenizer import Tokenizer

    made = Tokenizer(path)
    return path, lambda text: made.encode(text, bos=False, eos=False)


FILES: list[Any] = [
    (sentencepiece, "tokenizer.model.v1"),
    (sentencepiece, "mistral_instruct_tokenizer_240216.model.v2"),
    (sentencepiece, "mistral_instruct_tokenizer_240323.model.v3"),
    (sentencepiece, "mistral_instruct_tokenizer_241114.model.v7"),
    (tekken, "tekken_240718.json"),
    (tekken, "tekken_240911.json"),
    (meta, "tokenizer.model"),
]


@pytest.mark.parametrize(("kind", "name"), FILES, ids=lambda value: str(value))
def test_ids_are_the_original_librarys(
    kind: Callable[[str], tuple[Path, Encode]], name: str, texts: list[str], tmp_path: Path
) -> None:
    original, encode = kind(name)
    folder = tmp_path / "model"
    folder.mkdir()
    file = {sentencepiece: "tokenizer.model", meta: "tokenizer.model"}.get(kind, "tekken.json")
    (folder / file).write_bytes(original.read_bytes())
    loaded = load(str(folder), compare=True)
    loaded.tokenizer.encode_special_tokens = True
    for text, found in zip(
        texts, loaded.tokenizer.encode_batch(texts, add_special_tokens=False), strict=True
    ):
        assert found.ids == encode(text), text[:200]
    expected = (128000, 128001) if kind is meta else (1, 2)
    assert (loaded.bos, loaded.eos, loaded.adds_bos) == (*expected, True)

    # Prepared data, and the tokenizer that lies next to it, in transformers too.
    documents = tmp_path / "texts"
    documents.mkdir()
    chosen = [text for text in texts[-12:] if text]
    for number, text in enumerate(chosen):
        (documents / f"{number:03}.txt").write_bytes(text.encode())
    metadata = prepare(configure(tmp_path / "out", documents, folder))
    ids = [[expected[0], *encode(text), expected[1]] for text in chosen]
    assert read(metadata) == ids
    copy = tmp_path / content(metadata)["tokenizer"]["path"]
    theirs = AutoTokenizer.from_pretrained(copy)
    assert [[*theirs(text).input_ids, theirs.eos_token_id] for text in chosen] == ids


def test_names_of_llama_3s_special_tokens() -> None:
    """As in Llama 3.1's tokenizer.json; Meta's later code renamed reserved ones from 128,005 on."""
    original, _ = meta("")
    from llama_models.llama3.tokenizer import Tokenizer

    made, loaded = Tokenizer(original), load(str(original))
    assert loaded.vocab_size == made.n_words == 128256
    for token in ("begin_of_text", "end_of_text", "eot_id", "eom_id", "python_tag"):
        name = f"<|{token}|>"
        assert loaded.tokenizer.token_to_id(name) == made.special_tokens[name]
