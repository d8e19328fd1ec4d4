"""`fast-llm extend-vocabulary`: rows, logits in transformers, files, and training afterwards."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fast_llm import cli
from fast_llm.checkpoint import folder as folders
from fast_llm.checkpoint.huggingface import weight_files
from fast_llm.data.tokenizer import load
from fast_llm.errors import ConfigError, DataError
from fast_llm.training.vocabulary import RECORD, extend_vocabulary
from tests.data import synthetic
from tests.data.test_tokenizer_formats import trained
from tests.helpers import some_fast
from tests.training.runs import records, run

OLD, HIDDEN = 320, 24
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = ["bfloat16", "float16", "float32"]
WORDS = ["returnself", "中文été", "<note>"]


def make(
    folder: Path, tied: bool = False, dtype: str = "bfloat16", size: int = OLD, **saving: Any
) -> Path:
    """A small Llama of transformers with a tokenizer of 320 tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder, **saving)
    return synthetic.llama(folder)


@pytest.fixture
def words(tmp_path: Path) -> Path:
    (tmp_path / "words.txt").write_text("\n".join([*WORDS, "", ""]))
    return tmp_path / "words.txt"


def matrix(folder: Path, name: str) -> torch.Tensor:
    with safe_open(weight_files(folder)[name], framework="pt") as file:
        found: torch.Tensor = file.get_tensor(name)
        return found


@pytest.mark.parametrize("dtype", some_fast(DTYPES, lambda dtype: dtype == "bfloat16"))
@pytest.mark.parametrize(("tied", "sharded"), [(False, False), (False, True), (True, True)])
def test_logits_of_old_tokens_are_unchanged(
    tmp_path: Path, words: Path, tied: bool, sharded: bool, dtype: str
) -> None:
    saving: dict[str, Any] = {"max_shard_size": "20KB"} if sharded else {}
    model = make(tmp_path / "m", tied, dtype, **saving)
    assert (model / "model.safetensors.index.json").exists() == sharded
    (tmp_path / "special.txt").write_text("<|note|>\n")
    special = [str(tmp_path / "special.txt")]
    output = tmp_path / "new"
    extend_vocabulary(str(model), str(output), [str(words)], special, multiple_of=64)

    config = json.loads((output / "config.json").read_text())
    assert config == {**json.loads((model / "config.json").read_text()), "vocab_size": 384}
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in (model, output)
    )
    assert after.dtype == before.dtype == getattr(torch, dtype)
    tokens = torch.randint(OLD, (2, 17))
    with torch.no_grad():
        expected, found = before(tokens).logits, after(tokens).logits
    assert found.shape == (2, 17, 384) and torch.equal(found[..., :OLD], expected)

    assert {name: path.name for name, path in weight_files(output).items()} == {
        name: path.name for name, path in weight_files(model).items()
    }
    for name in weight_files(model):
        old, new = matrix(model, name), matrix(output, name)
        if name not in (EMBEDDING, HEAD):
            assert torch.equal(old, new)
            continue
        assert torch.equal(new[:OLD], old)
        tokenizer = load(str(model)).tokenizer
        for number, word in enumerate([*WORDS, "<|note|>"], OLD):
            pieces = tokenizer.encode(word, add_special_tokens=False).ids
            assert len(pieces) > 1
            assert torch.equal(new[number], old[pieces].float().mean(0).to(old.dtype))
        mean = old.double().mean(0).to(old.dtype)
        assert torch.equal(new[OLD + 4 :], mean.expand(60, HIDDEN))
    if sharded:
        index = json.loads((output / "model.safetensors.index.json").read_text())
        sizes = [matrix(output, name).nbytes for name in weight_files(output)]
        assert index["metadata"]["total_size"] == sum(sizes)
    folders.verify(output)


def test_the_tokenizer_and_the_record(tmp_path: Path, words: Path) -> None:
    model, output = make(tmp_path / "m"), tmp_path / "new"
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {"0": {"content": synthetic.BOS, "special": True}}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "notes.md").write_text("kept")
    (tmp_path / "special.txt").write_text("<|note|>\n")
    arguments = ["extend-vocabulary", str(model), str(output), "--tokens", str(words)]
    assert cli.main([*arguments, "--special-tokens", str(tmp_path / "special.txt")]) == 0
    assert (output / "notes.md").read_text() == "kept"
    loaded = load(str(output))
    assert (loaded.vocab_size, loaded.bos, loaded.eos, loaded.adds_bos) == (324, 0, 1, True)
    reference = PreTrainedTokenizerFast(tokenizer_file=str(output / "tokenizer.json"))
    assert [reference.convert_tokens_to_ids(word) for word in WORDS] == [320, 321, 322]
    ids = loaded.tokenizer.encode("a returnself中文été<note>b <|note|>").ids
    assert [token for token in ids if token >= OLD] == [320, 321, 322, 323]
    loaded.tokenizer.encode_special_tokens = True
    assert 323 not in loaded.tokenizer.encode("<|note|>").ids
    decoder = json.loads((output / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert [decoder[str(n)]["content"] for n in range(320, 324)] == [*WORDS, "<|note|>"]
    assert (decoder["322"]["special"], decoder["323"]["special"]) == (False, True)
    record = json.loads((output / RECORD).read_text())
    assert record["vocab_size"] == {"before": 320, "now": 324}
    assert record["initialisation"] == "pieces"
    old = load(str(model)).tokenizer.encode("returnself", add_special_tokens=False).ids
    assert record["tokens"][0] == {"text": "returnself", "id": 320, "pieces": old}


@pytest.mark.parametrize("kind", ["mean", "zero"])
def test_other_initialisations(tmp_path: Path, words: Path, kind: Any) -> None:
    model, output = make(tmp_path / "m"), tmp_path / "new"
    extend_vocabulary(str(model), str(output), [str(words)], [], kind)
    for name in (EMBEDDING, HEAD):
        old, new = matrix(model, name), matrix(output, name)
        expected = old.double().mean(0) if kind == "mean" else torch.zeros(HIDDEN)
        assert torch.equal(new[OLD:], expected.to(old.dtype).expand(3, HIDDEN))


def test_padding_rows_of_the_model_are_used(tmp_path: Path, words: Path) -> None:
    model, output = make(tmp_path / "m", size=328), tmp_path / "new"
    extend_vocabulary(str(model), str(output), [str(words)])
    old, new = matrix(model, HEAD), matrix(output, HEAD)
    assert new.shape == old.shape == (328, HIDDEN)
    assert torch.equal(new[:OLD], old[:OLD]) and torch.equal(new[323:], old[323:])
    assert not torch.equal(new[OLD:323], old[OLD:323])


def test_tokens_that_only_the_tokenizer_has(tmp_path: Path) -> None:
    """Data with them is refused, with this way out."""
    model, output = make(tmp_path / "m"), tmp_path / "new"
    tokenizer = load(str(model)).tokenizer
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    tokenizer.save(str(model / "tokenizer.json"))
    extend_vocabulary(str(model), str(output), [])
    assert (output / "tokenizer.json").stat().st_size > 0
    assert load(str(output)).fingerprint([], []) == load(str(model)).fingerprint([], [])
    (row,) = json.loads((output / RECORD).read_text())["tokens"]
    assert (row["text"], row["id"]) == ("<think>", 320) and len(row["pieces"]) > 1
    pieces = matrix(model, EMBEDDING)[row["pieces"]].float().mean(0)
    assert torch.equal(matrix(output, EMBEDDING)[320], pieces.bfloat16())
    with pytest.raises(DataError, match="new: there is nothing to add: no --tokens or --special-"):
        extend_vocabulary(str(output), str(tmp_path / "again"), [])


def test_a_sentencepiece_model(tmp_path: Path, words: Path) -> None:
    model, output = make(tmp_path / "m", size=400), tmp_path / "new"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (model / name).unlink()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "bos_token_id": 1, "eos_token_id": 2}))
    data = trained()
    (model / "tokenizer.model").write_bytes(data)
    extend_vocabulary(str(model), str(output), [str(words)])
    assert not (output / "tokenizer.model").exists()
    loaded = load(str(output))
    assert (loaded.bos, loaded.eos, loaded.adds_bos, loaded.vocab_size) == (1, 2, True, 403)
    text = "def x1 return"
    expected = SentencePieceProcessor(model_proto=data).encode(text)
    assert loaded.tokenizer.encode(text, add_special_tokens=False).ids == expected
    assert 402 in loaded.tokenizer.encode("a <note> b").ids


def test_it_trains(tmp_path: Path, words: Path) -> None:
    """With documents of new tokens; the old model is refused."""
    model, output = make(tmp_path / "m", dtype="float32"), tmp_path / "new"
    extend_vocabulary(str(model), str(output), [str(words)])
    (tmp_path / "texts").mkdir()
    for number in range(30):
        text = synthetic.text(number, 40).replace("self", "returnself")
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    settings = [f"dataset.path={tmp_path / 'texts'}", f"output_path={tmp_path / 'data'}"]
    assert cli.main(["prepare", *settings, f"tokenizer.path={output}"]) == 0
    assert json.loads((tmp_path / "data.json").read_text())["max_token_id"] >= OLD

    def arguments(pretrained: Path) -> list[str]:
        return [
            f"pretrained.path={pretrained}",
            f"data.path={tmp_path / 'data.json'}",
            "data.split=[1,0,0]",
            "batch.batch_size=4",
            "batch.sequence_length=32",
            "training.train_iters=3",
            "training.logs.interval=1",
            "training.export.interval=3",
            "optimizer.learning_rate.base=1e-2",
            f"run.experiment_dir={tmp_path / 'run'}",
        ]

    with pytest.raises(ConfigError, match="made with another tokenizer than the model's"):
        run(arguments(model))
    assert run(arguments(output)) == 0
    losses = [record["language_model_loss"] for record in records(tmp_path / "run").values()]
    assert losses[-1] < losses[0]
    export = tmp_path / "run" / "export" / "llama" / "3"
    assert matrix(export, EMBEDDING).shape == (323, HIDDEN)
    assert (export / RECORD).read_bytes() == (output / RECORD).read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\xff", "words.txt: cannot be read: not UTF-8"),
        (
            b"new\n<|end_of_text|>\n",
            r"words.txt:2: '<\|end_of_text\|>' is token 1 already; remove it",
        ),
        (b"new\nnew\n", r"words.txt:2: 'new' is listed twice, first at .*words.txt:1; remove one$"),
        (
            b"new\nnewer \n",
            "words.txt:2: 'newer ' ends with white space, which would be part of the token;"
            " remove it$",
        ),
        (b"\n", "there is nothing to add"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, content: bytes, message: str) -> None:
    model = make(tmp_path / "m")
    (tmp_path / "words.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        extend_vocabulary(str(model), str(tmp_path / "new"), [str(tmp_path / "words.txt")])
    with pytest.raises(DataError, match=r"nothing.txt: cannot be read: No such file"):
        extend_vocabulary(str(model), str(tmp_path / "new"), [str(tmp_path / "nothing.txt")])
    assert not (tmp_path / "new").exists()


def test_lines_of_token_files(tmp_path: Path) -> None:
    """Lines end at a line feed alone; a byte order mark is not part of a token."""
    model = make(tmp_path / "m")
    (tmp_path / "a.txt").write_bytes("\ufeffnew\r\none\u2028two\n new".encode())
    (tmp_path / "b.txt").write_text("<note>\n new\n")
    extend_vocabulary(str(model), str(tmp_path / "new"), [str(tmp_path / "a.txt")])
    record = json.loads((tmp_path / "new" / RECORD).read_text())
    assert [token["text"] for token in record["tokens"]] == ["new", "one\u2028two", " new"]
    with pytest.raises(
        DataError, match=r"b.txt:2: ' new' is listed twice, first at .*a.txt:3; remove one$"
    ):
        extend_vocabulary(
            str(model),
            str(tmp_path / "newer"),
            [str(tmp_path / "a.txt")],
            [str(tmp_path / "b.txt")],
        )


def test_an_existing_folder_is_kept(
    tmp_path: Path, words: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make(tmp_path / "m")
    assert cli.main(["extend-vocabulary", str(model), str(model), "--tokens", str(words)]) == 2
    assert f"{model}: exists already; choose another folder" in capsys.readouterr().err
