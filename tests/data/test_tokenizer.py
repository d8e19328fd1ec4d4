"""BOS, EOS, fingerprints, and every way in which a tokenizer can be missing."""

import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from fast_llm.data import tokenizer
from fast_llm.data.tokenizer import load, same_ids
from fast_llm.errors import DataError, MissingPackage
from tests.data import synthetic

TRUNCATION = {"direction": "Right", "strategy": "LongestFirst", "stride": 0}


@pytest.fixture(scope="module")
def made_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def llama(made_llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made_llama, tmp_path / "model")


def test_llama_begins_with_bos(llama: Path) -> None:
    loaded = load(str(llama))
    assert (loaded.bos, loaded.eos, loaded.adds_bos) == (0, 1, True)
    assert loaded.vocab_size == 320
    assert loaded.path == llama / "tokenizer.json"
    names = ("tokenizer.json", "tokenizer_config.json")
    assert loaded.files == {name: llama / name for name in names}
    assert load(str(llama / "tokenizer.json")).bos == 0


def test_gpt2_only_ends(tmp_path: Path) -> None:
    loaded = load(str(synthetic.gpt2(tmp_path)))
    assert (loaded.bos, loaded.eos, loaded.adds_bos) == (0, 0, False)


def test_add_bos_token_counts(tmp_path: Path) -> None:
    synthetic.gpt2(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {
        "add_bos_token": True
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load(str(tmp_path)).adds_bos


def test_where_special_tokens_are_named(llama: Path) -> None:
    (llama / "tokenizer_config.json").unlink()
    assert (load(str(llama)).bos, load(str(llama)).eos) == (None, None)
    (llama / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 319}))
    assert (load(str(llama)).bos, load(str(llama)).eos) == (0, 319)
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert (load(str(llama)).bos, load(str(llama)).eos) == (0, 5)
    (llama / "special_tokens_map.json").write_text(json.dumps({"eos_token": synthetic.EOS}))
    assert load(str(llama)).eos == 1
    # A token that the vocabulary lacks is None.
    (llama / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": 320}))
    (llama / "config.json").unlink()
    assert load(str(llama)).eos is None


def test_truncation_and_padding_are_off(llama: Path) -> None:
    tokenizer = load(str(llama)).tokenizer
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(llama / "tokenizer.json"))
    assert len(load(str(llama)).tokenizer.encode("a b c d e f g h i j k l").ids) > 8


FIXTURE = Path(__file__).parent.parent / "fixtures" / "v0.1"


def rewrite(folder: Path, **changes: object) -> None:
    """Change entries of a tokenizer.json."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize("further", [[], ["\ud800"]], ids=["", "half a surrogate pair"])
def test_fingerprint_with_and_without_orjson(
    further: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sorted by code points: not as Python 2, Java or UTF-16 sort."""
    tokens = ["b", "a", "\U0001f600", "\uffee", "", "aa", "\x00", '"', "é", *further]
    content = {"model": {"type": "BPE", "vocab": {token: at for at, token in enumerate(tokens)}}}
    model = json.dumps(content["model"], sort_keys=True)
    assert tokenizer._sorted_json(content["model"]) == model
    monkeypatch.setitem(sys.modules, "orjson", None)
    assert tokenizer._sorted_json(content["model"]) == model
    assert tokenizer._sorted_json(None) == "null"


def test_loaded_in_another_process(llama: Path) -> None:
    given = load(str(llama))
    sent = pickle.dumps(given)
    assert len(sent) < 1.5 * len(given.text)  # the tokenizer does not travel twice
    received = pickle.loads(sent)
    assert received.tokenizer.to_str() == given.tokenizer.to_str()
    same = [{**vars(each), "tokenizer": None} for each in (given, received)]
    assert same[0] == same[1]


def test_fingerprint_is_of_what_decides_tokens(llama: Path) -> None:
    path = llama / "tokenizer.json"

    def fingerprint(path: Path = llama) -> str:
        return load(str(path)).fingerprint([], [0, 1])

    before, old = fingerprint(), load(str(llama)).old_fingerprint
    assert before == fingerprint(path)
    content = json.loads(path.read_text(encoding="utf-8"))

    def changed(**changes: object) -> str:
        path.write_text(json.dumps({**content, **changes}))
        return fingerprint()

    path.write_text(json.dumps(dict(reversed(content.items())), indent=4))
    assert fingerprint() == before
    assert changed(truncation={**TRUNCATION, "max_length": 3}) == before
    # As `tokenizers` wrote it before 0.20.
    model = content["model"]
    spaced = {key: value for key, value in model.items() if value not in (None, False)}
    assert changed(model={**spaced, "merges": [" ".join(m) for m in model["merges"]]}) == before
    assert load(str(llama)).old_fingerprint == old

    # A padding token, and what has nothing to do with the ids of documents.
    added = content["added_tokens"]
    pad = {**added[1], "id": 320, "content": "<pad>"}
    assert changed(added_tokens=[*added, pad]) == before
    assert load(str(llama)).old_fingerprint != old
    assert changed(post_processor=None, decoder=None) == before

    think = {**pad, "content": "<think>", "special": False}
    renamed = [added[0], {**added[1], "content": "<|eot|>"}]
    vocab = {("<|eot|>" if t == synthetic.EOS else t): i for t, i in model["vocab"].items()}
    for changes in (
        {"model": {**model, "merges": model["merges"][:-1]}},
        {
            "model": {
                **model,
                "merges": [model["merges"][1], model["merges"][0], *model["merges"][2:]],
            }
        },
        {"model": {**model, "ignore_merges": False}},
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": None},
        {"added_tokens": [*added, think]},
        {"added_tokens": renamed, "model": {**model, "vocab": vocab}},  # another EOS
    ):
        assert changed(**changes) != before


def test_fingerprint_has_the_special_tokens_of_text(llama: Path) -> None:
    added = json.loads((llama / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    rewrite(llama, added_tokens=[*added, {**added[1], "id": 320, "content": "<fim>"}])
    loaded = load(str(llama))
    plain, with_fim = loaded.fingerprint([], [0, 1]), loaded.fingerprint(["<fim>"], [0, 1])
    assert plain != with_fim == load(str(llama), ["<fim>"]).fingerprint(["<fim>"], [0, 1])
    described: dict[str, Any] = {"bos": 0, "eos": 1, "writes_bos": True, "writes_eos": True}
    assert same_ids(loaded, {**described, "fingerprint": plain}, None)
    assert not same_ids(loaded, {**described, "fingerprint": with_fim}, None)
    described["special_tokens"] = ["<fim>"]
    assert same_ids(loaded, {**described, "fingerprint": with_fim}, None)
    assert not same_ids(loaded, {**described, "fingerprint": plain}, None)


def test_data_of_an_earlier_version_is_accepted(tmp_path: Path) -> None:
    """Version 0.1 wrote another fingerprint. A padding token does not matter; a merge does."""
    described = json.loads((FIXTURE / "a.json").read_text())["tokenizer"]
    copy = FIXTURE / described["path"]
    model = shutil.copytree(copy, tmp_path / "model")
    loaded = load(str(model))
    assert described["fingerprint"] == loaded.old_fingerprint != loaded.fingerprint([], [])
    assert same_ids(loaded, described, None)

    content = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    pad = {**content["added_tokens"][0], "id": loaded.vocab_size, "content": "<pad>"}
    rewrite(model, added_tokens=[*content["added_tokens"], pad])
    assert same_ids(load(str(model)), described, copy)
    assert not same_ids(load(str(model)), described, None)  # nothing to compare with
    assert not same_ids(load(str(model)), described, tmp_path / "missing")
    damaged = shutil.copytree(copy, tmp_path / "damaged")
    (damaged / "tokenizer.json").write_text("{")
    assert not same_ids(load(str(model)), described, damaged)
    rewrite(model, model={**content["model"], "merges": content["model"]["merges"][:-1]})
    assert not same_ids(load(str(model)), described, copy)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "tokenizer.json",
            "version https://git-lfs.github.com/spec/v1\n",
            r"tokenizer.json: a Git LFS pointer.*`git lfs pull`",
        ),
        (
            "tokenizer_config.json",
            "version https://git-lfs.github.com/spec/v1\n",
            "tokenizer_config.json: a Git LFS pointer",
        ),
        ("tokenizer.json", "{", "tokenizer.json: not JSON"),
        ("tokenizer.json", "[]", "tokenizer.json: not a JSON object"),
        ("tokenizer.json", "{}", "tokenizer.json: not a tokenizer"),
        ("tokenizer.json", "[" * 100_000, "tokenizer.json: not JSON"),
    ],
)
def test_damaged_files(llama: Path, name: str, content: str, message: str) -> None:
    (llama / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load(str(llama))


def test_too_large(llama: Path) -> None:
    with (llama / "tokenizer.json").open("r+b") as file:
        file.truncate(2**28 + 1)  # takes no room on the disk
    with pytest.raises(DataError, match="larger than 256 MiB; this is not a tokenizer"):
        load(str(llama))


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"no tokenizer.json, tekken.json or tokenizer.model in it; give the model's folder",
    ):
        load(str(tmp_path))
    for path in (str(tmp_path / "nothing"), "./a/b", "gpt2", "a/b/c"):
        with pytest.raises(
            DataError, match="no such file or folder, and not a model on the Hugging Face Hub"
        ):
            load(path)


def test_from_the_hub(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(
        name: str, revision: str | None, allow_patterns: list[str], ignore_patterns: None
    ) -> str:
        asked.append(
            (
                name,
                revision,
                "tokenizer.json" in allow_patterns,
                "model.safetensors" in allow_patterns,
            )
        )
        return str(llama)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load("meta-llama/Llama-3.1-8B").bos == 0
    load("meta-llama/Llama-3.1-8B@main")
    assert asked == [
        ("meta-llama/Llama-3.1-8B", None, True, False),
        ("meta-llama/Llama-3.1-8B", "main", True, False),
    ]
    (llama / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"meta-llama/Llama-3.1-8B: no tokenizer.json, .* in it"):
        load("meta-llama/Llama-3.1-8B")


def test_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        DataError,
        match=r"org/name: not a local folder, and downloading it .*; check the name and",
    ):
        load("org/name")


def test_hub_client_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        MissingPackage, match=r"org/name is not a local folder.*pip install huggingface_hub"
    ):
        load("org/name")
