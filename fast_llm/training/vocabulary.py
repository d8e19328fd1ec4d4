"""`fast-llm extend-vocabulary`: a model with more tokens, in Hugging Face format.

The tokens are added to the tokenizer, and rows to the embedding and the head. The rows of old
tokens keep their bytes, so that logits of old tokens do not change. A new row is the mean of the
rows of the pieces that the token was before (`pieces`, as in Gee et al., "Fast Vocabulary
Transfer", 2022), the mean of all old rows (`mean`, as in Hewitt, "Initializing New Word Embeddings
for Pretrained Language Models", 2021), or 0. Sums are fp32 for pieces and fp64 for all rows.

Tensors are copied in pieces of 16 MiB, so memory holds little more than the tokenizer. It costs
what reading and writing the model costs.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from fast_llm.checkpoint import folder as folders
from fast_llm.checkpoint import huggingface
from fast_llm.checkpoint.weights import INDEX, new_folder, tensor_bytes
from fast_llm.config.document import Document
from fast_llm.config.model import BaseModelConfig
from fast_llm.config.validate import validate
from fast_llm.data import tokenizer
from fast_llm.errors import CheckpointError, ConfigError, DataError
from fast_llm.models import Family, family_of, family_of_json
from fast_llm.training.process import quiet_torch_distributed

logger = logging.getLogger("fast_llm")

RECORD = "vocabulary_extension.json"
Initialisation = Literal["pieces", "mean", "zero"]
_COPIED = 2**24  # bytes at a time
_ROWS = 4096  # at a time


@dataclass(frozen=True)
class _Token:
    """A token that needs a row."""

    text: str
    id: int
    pieces: list[int]
    """The tokens that its text was before."""


def extend_vocabulary(
    model: str,
    output: str,
    tokens: Sequence[str],
    special_tokens: Sequence[str] = (),
    initialisation: Initialisation = "pieces",
    multiple_of: int = 1,
) -> None:
    """Write the folder `output`: the model with the tokens of text files, one in each line.

    Tokens that the tokenizer has and the model lacks get rows too. Raises DataError or
    CheckpointError for files that cannot be used, ConfigError for weights that do not fit.
    """
    quiet_torch_distributed()
    final = Path(output).expanduser()
    if final.exists():
        raise CheckpointError(f"{final}: exists already; choose another folder")
    folder = huggingface.fetch(model, weights=True)
    config = huggingface.read_json(folder / "config.json")
    place = f"{folder}/config.json"
    architecture = family_of_json(config, place).architecture(config, place)
    shape = validate(BaseModelConfig, Document(architecture, {}, place))
    if problems := huggingface.check_weights(folder, shape):
        raise ConfigError(problems)
    loaded = tokenizer.load(str(folder), compare=True)
    wanted = _read(tokens, special_tokens, loaded)
    files, added = _tokenizer_files(folder, loaded, wanted, shape.vocab_size)
    if not added:
        raise DataError(
            f"{folder}: there is nothing to add: no --tokens or --special-tokens, and config.json's"
            f" vocab_size {shape.vocab_size} holds all {loaded.vocab_size} tokens"
        )
    size = max(shape.vocab_size, added[-1].id + 1)
    size += -size % multiple_of
    files["config.json"] = _json({**config, "vocab_size": size})
    files[RECORD] = _json(
        {
            "vocab_size": {"before": shape.vocab_size, "now": size},
            "initialisation": initialisation,
            "tokens": [vars(token) for token in added],
        }
    )
    with new_folder(final, f"{final}: could not be written", None) as into:
        names = _write_weights(folder, into, family_of(shape), added, size, initialisation)
        for name, content in files.items():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            (into / name).write_bytes(content)
        digests = folders.digests(into, [*names, *files])
        folders.publish(into, final, "export", 0, {}, digests)
    logger.info(
        f"Wrote {final}: {len(added):,} tokens, {added[0].id} to {added[-1].id};"
        f" vocab_size {shape.vocab_size:,} → {size:,}. {RECORD} has how each row began."
    )


# Tokens and the tokenizer.


def _read(
    tokens: Sequence[str], special_tokens: Sequence[str], loaded: tokenizer.Loaded
) -> dict[str, bool]:
    """The tokens of text files, and whether they are special. Blank lines do not count."""
    found: dict[str, bool] = {}
    places: dict[str, str] = {}
    for path, special in [(path, False) for path in tokens] + [(x, True) for x in special_tokens]:
        try:
            # Without the byte order mark that some editors write.
            text = Path(path).expanduser().read_bytes().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise DataError(f"{path}: cannot be read: {reason}") from error
        # Unlike str.splitlines, which also ends lines at U+2028, U+0085 and form feeds.
        for number, line in enumerate(text.split("\n"), 1):
            token, place = line.removesuffix("\r"), f"{path}:{number}"
            if not token.strip():
                continue
            if token != token.rstrip():
                raise DataError(
                    f"{place}: {token!r} ends with white space, which would be part of the token;"
                    " remove it"
                )
            known = loaded.tokenizer.token_to_id(token)
            if known is not None:
                raise DataError(f"{place}: {token!r} is token {known} already; remove it")
            if token in found:
                raise DataError(
                    f"{place}: {token!r} is listed twice, first at {places[token]}; remove one"
                )
            found[token], places[token] = special, place
    return found


def _tokenizer_files(
    folder: Path, loaded: tokenizer.Loaded, wanted: Mapping[str, bool], vocab_size: int
) -> tuple[dict[str, bytes], list[_Token]]:
    """The small files of the new model, and the tokens that need rows, by id."""
    files = {**loaded.contents(), **huggingface.small_files(folder)}
    content = json.loads(files[tokenizer.MAIN])
    known = content.get("added_tokens") or []
    new = [
        {
            "id": loaded.vocab_size + number,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": special,
        }
        for number, (text, special) in enumerate(wanted.items())
    ]
    files[tokenizer.MAIN] = _json({**content, "added_tokens": [*known, *new]})
    settings = json.loads(files.get("tokenizer_config.json", b"{}"))
    if isinstance(settings.get("added_tokens_decoder"), dict):
        listed: dict[str, Any] = {
            str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
            for entry in new
        }
        settings["added_tokens_decoder"] |= listed
        files["tokenizer_config.json"] = _json(settings)
    if "added_tokens.json" in files:
        more: dict[str, Any] = {str(entry["content"]): entry["id"] for entry in new}
        files["added_tokens.json"] = _json({**json.loads(files["added_tokens.json"]), **more})
    # These cannot have the new tokens, and tokenizer.json says all that they say.
    for name in [name for name in files if tokenizer.is_tokenizer([name])]:
        if name != tokenizer.MAIN:
            del files[name]
            logger.info(f"{name} is left out: it cannot hold the new tokens; tokenizer.json does.")

    without = [entry for entry in known if entry["id"] < vocab_size]
    before = tokenizer.make(loaded.path, json.dumps({**content, "added_tokens": without}))
    before.encode_special_tokens = True
    rows = [(entry["content"], entry["id"]) for entry in [*known, *new] if entry not in without]
    added = [
        _Token(text, number, before.encode(text, add_special_tokens=False).ids)
        for text, number in sorted(rows, key=lambda row: row[1])
    ]
    after = tokenizer.make(loaded.path, files[tokenizer.MAIN].decode())
    wrong = [token.text for token in added if after.token_to_id(token.text) != token.id]
    if wrong or max(before.get_vocab().values()) >= vocab_size:
        raise DataError(
            f"{folder}: tokens beyond vocab_size {vocab_size} are not all added tokens of its"
            " tokenizer; use the tokenizer that the model was trained with"
        )
    return files, added


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


# Weights.


def _write_weights(
    folder: Path,
    into: Path,
    family: Family,
    added: Sequence[_Token],
    size: int,
    initialisation: Initialisation,
) -> list[str]:
    """Copy the weights, with rows for `size` tokens. Returns the names of the files."""
    where = huggingface.weight_files(folder)
    wanted = (family.embedding, family.head)  # also a copy of a tied embedding
    names = {family.stored_name(name, where, where) for name in wanted}
    total = 0
    headers = {path: huggingface.read_header(path) for path in sorted(set(where.values()))}
    for path, header in headers.items():
        rows = {
            name: _last_rows(path, name, added, size, initialisation)
            for name in sorted(names & header.keys())
        }
        total += _copy_file(path, into / path.name, header, rows, size)
    written = [path.name for path in headers]
    if not (folder / "model.safetensors").exists():
        index = huggingface.read_json(folder / INDEX)
        metadata: dict[str, Any] = index.get("metadata") or {}
        content = {**index, "metadata": {**metadata, "total_size": total}}
        (into / INDEX).write_bytes(_json(content))
        written.append(INDEX)
    return written


def _last_rows(
    path: Path, name: str, added: Sequence[_Token], size: int, initialisation: Initialisation
) -> Tensor:
    """The rows of an embedding or head from the first added token on, up to `size` rows."""
    with safe_open(path, framework="pt") as file:
        old = file.get_slice(name)
        before, width = old.get_shape()
        first = min(added[0].id, before)
        mean = torch.zeros(width, dtype=torch.float64)
        for begin in range(0, first, _ROWS):
            mean += old[begin : min(begin + _ROWS, first)].double().sum(0)
        mean /= max(first, 1)
        # Padding at the end too. A head's row of zeros has the logit 0, which is above most.
        rows = mean.expand(size - first, width).to(old[:1].dtype).clone()
        rows[: before - first] = old[first:before]
        for token in added:
            if initialisation == "pieces" and token.pieces:
                pieces = [old[piece : piece + 1].float() for piece in token.pieces]
                rows[token.id - first] = torch.cat(pieces).mean(0)
            else:
                rows[token.id - first] = 0 if initialisation == "zero" else mean
    return rows


def _copy_file(
    source: Path,
    target: Path,
    header: Mapping[str, dict[str, Any]],
    rows: Mapping[str, Tensor],
    size: int,
) -> int:
    """Copy a safetensors file with other last rows of some tensors. Returns their total bytes."""
    with source.open("rb") as file, target.open("wb") as out:
        length = int.from_bytes(file.read(8), "little")
        metadata = json.loads(file.read(length)).get("__metadata__")
        content: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
        parts: list[tuple[int, int, Tensor | None]] = []
        end = 0
        for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, last = tensor["data_offsets"]
            shape, nbytes, new = tensor["shape"], last - begin, rows.get(name)
            if new is not None:
                row = new.shape[1] * new.element_size()
                last, shape, nbytes = begin + (size - len(new)) * row, [size, shape[1]], size * row
            parts.append((begin, last, new))
            offsets = [end, end + nbytes]
            content[name] = {"dtype": tensor["dtype"], "shape": shape, "data_offsets": offsets}
            end += nbytes
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        out.write(len(text).to_bytes(8, "little") + text)
        for begin, last, new in parts:
            file.seek(8 + length + begin)
            for at in range(begin, last, _COPIED):
                out.write(file.read(min(_COPIED, last - at)))
            if new is not None:
                out.write(tensor_bytes(new))
    return end
