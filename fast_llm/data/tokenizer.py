"""A model's tokenizer: its files, its BOS and EOS tokens, and a fingerprint that identifies it.

Read with `tokenizers` from tokenizer.json, or from what tokenizer_formats.py converts to it.
Neither transformers nor torch is needed. Documents begin with BOS if the tokenizer adds one, since
the model was trained that way: Llama 3's adds BOS; SmolLM2's and GPT-2's, whose BOS is also their
EOS, add nothing. The BOS and EOS tokens are those that the model's folder names, looked up in this
order: tokenizer_config.json, special_tokens_map.json, generation_config.json, config.json, and the
file of a converted tokenizer.

Loading a tokenizer of 128,000 tokens takes about a second, converting one up to four.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fast_llm.data.tokenizer_formats import Converted, check_sentencepiece, convert
from fast_llm.errors import DataError, lfs_problem
from fast_llm.hub import download
from fast_llm.terminal import nearest

MAIN = "tokenizer.json"
FILES = (
    MAIN,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "merges.txt",
)
TEMPLATES = "additional_chat_templates/"  # a folder of jinja files
SOURCES = (MAIN, "tekken.json", "tokenizer.model")  # the first that a folder has is read
_VERSIONED = "tokenizer.model.v*"  # how Mistral names them
_IDS = ("generation_config.json", "config.json")
_CUTS = ("normalizer", "pre_tokenizer")
_LARGEST = 2**28  # bytes
_HUB = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class Loaded:
    """A tokenizer, its special tokens and its files."""

    tokenizer: Tokenizer
    """Neither truncates nor pads. The special tokens that were asked for are ordinary added tokens
    in it."""
    path: Path
    """The file that it was read from."""
    bos: int | None
    eos: int | None
    adds_bos: bool
    """Whether the tokenizer puts BOS before each document."""
    vocab_size: int
    """The largest id + 1."""
    files: dict[str, Path | bytes]
    """What a copy of its folder has: a file, or the content of a converted one. tokenizer.json
    comes first."""
    added: tuple[dict[str, Any], ...]
    """`added_tokens` of its tokenizer.json."""
    rules: str
    """Digest of model, normalizer and pre-tokenizer."""
    old_fingerprint: str
    """What earlier versions wrote as fingerprint: of everything but truncation and padding."""
    text: str
    """The tokenizer.json that `tokenizer` was read from. Its model comes last."""

    def __reduce__(self) -> Any:
        return _from_text, (
            {key: value for key, value in vars(self).items() if key != "tokenizer"},
        )

    def contents(self) -> dict[str, bytes]:
        """The files of a copy of its folder."""
        return {
            name: file if isinstance(file, bytes) else file.read_bytes()
            for name, file in self.files.items()
        }

    def fingerprint(self, special_tokens: Sequence[str], written: Sequence[int | None]) -> str:
        """The sha256 of everything that decides the ids of documents.

        `special_tokens`: those recognised in text. `written`: BOS and EOS, if they are written.
        Added tokens that text never yields, the decoder and chat templates do not count.
        """
        matched = [
            {key: value for key, value in token.items() if key != "special"}
            for token in self.added
            if not token.get("special") or token.get("content") in special_tokens
        ]
        ends = {self.tokenizer.id_to_token(token): token for token in written if token is not None}
        content = json.dumps([self.rules, matched, ends], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def load(path: str, special_tokens: Sequence[str] = (), compare: bool = False) -> Loaded:
    """The tokenizer of a folder, of a file, or of a model on the Hub (`organisation/name`, also
    `…@revision`).

    `special_tokens`: recognised in text, as if they were not special. `compare`: also compare a
    SentencePiece model with the package sentencepiece. Raises DataError if the tokenizer is missing
    or cannot be read, MissingPackage for the Hub without huggingface_hub, or without sentencepiece
    to compare with.
    """
    file = _find(path)
    settings = _optional(file.parent / "tokenizer_config.json")
    content, converted = _content(file, settings, compare)
    added = tuple(token for token in content.get("added_tokens") or () if isinstance(token, dict))
    ends_with_model = "model" not in content or next(reversed(content)) == "model"
    if converted is None and not special_tokens and ends_with_model:
        data = _read(file)  # as it stands: writing it again takes a while
        text = data.decode(json.detect_encoding(data))
    else:
        content["model"] = content.pop("model", None)
        text = json.dumps(_recognising(content, special_tokens))
    tokenizer = make(file, text)
    own = {} if converted is None else converted.settings
    bos, eos = (_special(file.parent, tokenizer, name, own) for name in ("bos", "eos"))
    _check_special_tokens(special_tokens, file, tokenizer, added, {"BOS": bos, "EOS": eos})
    adds_bos = bos is not None and (
        tokenizer.encode("").ids[:1] == [bos] or settings.get("add_bos_token") is True
    )
    if converted is not None:
        ends = {"bos": bos, "eos": eos}
        own = own | {
            f"{name}_token": tokenizer.id_to_token(token)
            for name, token in ends.items()
            if token is not None
        }
    return Loaded(
        tokenizer,
        file,
        bos,
        eos,
        adds_bos,
        _vocab_size(tokenizer, content),
        _files(file, content, own),
        added,
        *_digests(content),
        text,
    )


def same_ids(loaded: Loaded, described: Mapping[str, Any], copy: Path | None) -> bool:
    """Whether documents have the ids that `loaded` gives them.

    `described`: `tokenizer` of their dataset.json. `copy`: its files next to them, which
    tell whether a fingerprint of an earlier version differs in what matters.
    """
    recorded = described["fingerprint"]
    expected = fingerprint_for(loaded, described)
    if recorded in (expected, loaded.old_fingerprint):
        return True
    try:
        own = None if copy is None or not copy.is_dir() else load(str(copy))
    except DataError:
        return False
    return (
        own is not None
        and recorded == own.old_fingerprint
        and expected == fingerprint_for(own, described)
    )


def fingerprint_for(loaded: Loaded, described: Mapping[str, Any]) -> str:
    """The fingerprint of a tokenizer for documents that a dataset.json describes."""
    ends = [described.get(name) for name in ("bos", "eos") if described.get(f"writes_{name}")]
    written = [token for token in ends if isinstance(token, int) and token >= 0]
    special = described.get("special_tokens")
    return loaded.fingerprint(special if isinstance(special, list) else [], written)


def is_tokenizer(names: Iterable[str]) -> bool:
    """Whether files with these names contain a tokenizer that `load` reads."""
    return any(name in SOURCES or Path(name).match(_VERSIONED) for name in names)


# Files.


def _find(path: str) -> Path:
    place = Path(path).expanduser()
    if place.is_file():
        return place
    if place.is_dir():
        return _in_folder(place, path)
    if not _HUB.fullmatch(path) or path.startswith("."):
        raise DataError(
            f"{path}: no such file or folder, and not a model on the Hugging Face Hub"
            " (organisation/name)"
        )
    patterns = [*FILES, _VERSIONED, *_IDS, f"{TEMPLATES}*.jinja"]
    return _in_folder(download(path, DataError, allow=patterns), path)


def _in_folder(folder: Path, path: str) -> Path:
    for name in SOURCES:
        if (folder / name).is_file():
            return folder / name
    if versions := sorted(folder.glob(_VERSIONED)):
        return versions[-1]
    raise DataError(
        f"{path}: no {MAIN}, tekken.json or tokenizer.model in it; give the model's folder"
    )


def _content(
    file: Path, settings: Mapping[str, Any], compare: bool
) -> tuple[dict[str, Any], Converted | None]:
    """The tokenizer.json of a file, which may have to be converted."""
    data = _read(file)
    if file.suffix == ".json" or data[:1] == b"{":
        content = _parse(file, data)
        if "model" in content or "config" not in content:
            return content, None
    if not settings.get("added_tokens_decoder"):
        settings = {**settings, "added_tokens_decoder": _old_added_tokens(file.parent, settings)}
    converted = convert(str(file), data, settings)
    if compare and converted.sentencepiece:
        check_sentencepiece(str(file), data)
    return converted.content, converted


def _old_added_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """added_tokens.json, which transformers wrote before `added_tokens_decoder`, in its form."""
    named = [value for key, value in settings.items() if key.endswith("_token")]
    special = {token.get("content") if isinstance(token, dict) else token for token in named}
    return {
        str(number): {"content": token, "special": token in special}
        for token, number in _optional(folder / "added_tokens.json").items()
    }


def _files(file: Path, content: dict[str, Any], own: dict[str, Any]) -> dict[str, Path | bytes]:
    """The files of a copy; `own`: the tokenizer_config.json of a converted tokenizer."""
    folder = file.parent
    templates = sorted((folder / TEMPLATES).glob("*.jinja"))
    beside: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path
        for path in [*(folder / name for name in FILES[1:]), *templates]
        if path.is_file()
    }
    if not own:
        return {MAIN: file, **beside}
    main = json.dumps(content, ensure_ascii=False).encode()
    made = (json.dumps(own, indent=1) + "\n").encode()
    return {MAIN: main, "tokenizer_config.json": made, **beside, file.name: file}


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _LARGEST:
            raise DataError(f"{path}: larger than {_LARGEST // 2**20} MiB; this is not a tokenizer")
        if not path.is_file():  # reading a pipe would block
            raise DataError(f"{path}: not a file")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if problem := lfs_problem(path, data):
        raise DataError(problem)
    return data


def _parse(path: Path, data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a JSON object")
    return content


def _optional(path: Path) -> dict[str, Any]:
    return _parse(path, _read(path)) if path.is_file() else {}


# Special tokens.


def make(file: Path, content: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json's text. Raises DataError that names `file`."""
    try:
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:
        raise DataError(f"{file}: not a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _from_text(values: Mapping[str, Any]) -> Loaded:
    """In another process: `tokenizers` would send the text again."""
    return Loaded(tokenizer=make(values["path"], values["text"]), **values)


def _vocab_size(tokenizer: Tokenizer, content: Mapping[str, Any]) -> int:
    """The largest id + 1. Reading it from the parsed file is faster than `Tokenizer.get_vocab`."""
    vocabulary = content["model"]["vocab"]
    ids = vocabulary.values() if isinstance(vocabulary, dict) else (len(vocabulary) - 1,)
    added = tokenizer.get_added_tokens_decoder()
    return max(*added, max(ids, default=-1), -1) + 1


def _recognising(content: dict[str, Any], special_tokens: Sequence[str]) -> dict[str, Any]:
    """The tokenizer.json in which these special tokens are ordinary added tokens."""
    if not special_tokens:
        return content
    added = [
        {**token, "special": False} if token.get("content") in special_tokens else token
        for token in content.get("added_tokens") or ()
    ]
    return {**content, "added_tokens": added}


def _check_special_tokens(
    wanted: Sequence[str],
    file: Path,
    tokenizer: Tokenizer,
    added: Sequence[Mapping[str, Any]],
    ends: Mapping[str, int | None],
) -> None:
    """Raises DataError for tokens that cannot be recognised in text."""
    known = [str(token.get("content")) for token in added]
    for token in wanted:
        if token not in known:
            shown = ", ".join(known[:8]) + (", …" if len(known) > 8 else "") or "none"
            raise DataError(
                f"tokenizer.special_tokens: {token!r} is not an added token of {file}"
                f"{nearest(token, known)}; its added tokens are {shown}"
            )
        for name, number in ends.items():
            if number is not None and number == tokenizer.token_to_id(token):
                raise DataError(
                    f"tokenizer.special_tokens: {token} is {name}, which begins or ends documents:"
                    " a text that spells it would become several; leave it out"
                )


def _special(folder: Path, tokenizer: Tokenizer, name: str, own: Mapping[str, Any]) -> int | None:
    """The id of BOS or EOS (`name`: bos, eos) that the model's folder names, else the file of a
    converted tokenizer (`own`).
    """
    files = ("tokenizer_config.json", "special_tokens_map.json")
    for settings in (_optional(folder / file) for file in files):
        found = _id(settings, tokenizer, name)
        if found is not None:
            return found
    for file in _IDS:
        number = _optional(folder / file).get(f"{name}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and number >= 0 and tokenizer.id_to_token(number) is not None:
            return number
    return _id(own, tokenizer, name)


def _id(settings: Mapping[str, Any], tokenizer: Tokenizer, name: str) -> int | None:
    token = settings.get(f"{name}_token")
    text = token.get("content") if isinstance(token, dict) else token
    found: int | None = tokenizer.token_to_id(text) if isinstance(text, str) else None
    return found


# Fingerprints. Equal for equal tokenizers, whatever the order and spacing in the file and the
# version of `tokenizers`.


def _digests(content: Mapping[str, Any]) -> tuple[str, str]:
    """Of the rules and of everything that earlier versions counted, in JSON. The model is most of
    both.
    """
    model = _sorted_json(_model(content))
    decisive = {
        key: model if key == "model" else json.dumps(value, sort_keys=True)
        for key, value in content.items()
        if key not in ("truncation", "padding", "version")
    }
    rules = [model, *(json.dumps(content.get(key), sort_keys=True) for key in _CUTS)]
    old = [f"{json.dumps(key)}: {value}" for key, value in sorted(decisive.items())]
    return _sha256(f"[{', '.join(rules)}]"), _sha256(f"{{{', '.join(old)}}}")


def _sorted_json(model: Any) -> str:
    """JSON of a model, sorted. orjson sorts 128,000 tokens four times as fast as `json`, which then
    finds them in its own order.
    """
    # It refuses half of a surrogate pair, and what JSON does not have.
    with contextlib.suppress(ImportError, TypeError, ValueError, KeyError):
        import orjson

        if isinstance(model["vocab"], dict):
            in_order = orjson.dumps(model["vocab"], option=orjson.OPT_SORT_KEYS)
            model = {**model, "vocab": orjson.loads(in_order)}
    return json.dumps(model, sort_keys=True)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _model(content: Mapping[str, Any]) -> Any:
    """The model. Files from before 2024 spell merges "a b" instead of ["a", "b"], and lack later
    settings.
    """
    if not isinstance(content.get("model"), dict):
        return content.get("model")
    model = {
        key: value
        for key, value in content["model"].items()
        if value is not None and value is not False
    }
    if isinstance(model.get("merges"), list):
        model["merges"] = [
            merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]
        ]
    return model
