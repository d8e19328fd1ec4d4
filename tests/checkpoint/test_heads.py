"""Tied embeddings in a folder that also holds a head: here and in transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fast_llm import cli
from fast_llm.config.document import read
from fast_llm.errors import UserError
from fast_llm.models import parameters
from fast_llm.planning.preflight import preflight
from tests.checkpoint.test_transformers import logits, make
from tests.training.runs import losses, run, write_tokens

EMBEDDING, HEAD = parameters.EMBEDDING, parameters.HEAD
MESSAGE = (
    r"{file}: lm_head\.weight {differs}, but .*config\.json says tie_word_embeddings: true\. To"
    r" keep this head, as"
    r" transformers does, give model\.base_model\.tie_word_embeddings: no, or false in"
    r" config\.json; to use the embedding"
    r" instead, remove lm_head\.weight from the weights"
)


def tied(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Make a tied model's folder. Returns its weights."""
    make(folder, {"tie_word_embeddings": True}, dtype)
    tensors: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return tensors


def save(folder: Path, weights: dict[str, Tensor], sharded: bool = False) -> None:
    if not sharded:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return
    (folder / "model.safetensors").unlink()
    files = {name: "head.safetensors" if name == HEAD else "rest.safetensors" for name in weights}
    for file in set(files.values()):
        save_file(
            {n: t for n, t in weights.items() if files[n] == file}, folder / file, {"format": "pt"}
        )
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": files})
    )


def arguments(folder: Path, *further: str) -> list[str]:
    return [
        f"pretrained.path={folder / 'model'}",
        f"data.path={folder}/tokens",
        "batch.batch_size=2",
        "batch.micro_batch_size=2",
        "batch.sequence_length=24",
        "data.split=[1,0,0]",
        "training.logs.interval=1",
        f"run.experiment_dir={folder}/run",
        *further,
    ]


def one_bit(head: Tensor) -> Tensor:
    changed = head.clone()
    changed[-1, -1] += 1e-3
    return changed


HEADS: dict[str, tuple[Any, str]] = {
    "one number": (one_bit, "differs from model.embed_tokens.weight"),
    "rounded": (lambda head: head.bfloat16(), "differs from model.embed_tokens.weight"),
    "other rows": (
        lambda head: head[:100],
        r"has the shape \[100, 32\], model.embed_tokens.weight \[128, 32\]",
    ),
    "integers": (lambda head: head.to(torch.int8), "differs from model.embed_tokens.weight"),
}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_another_head_is_refused(
    tmp_path: Path, name: str, sharded: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    change, differs = HEADS[name]
    write_tokens(tmp_path / "tokens")
    weights = tied(tmp_path / "model")
    save(tmp_path / "model", {**weights, HEAD: change(weights[EMBEDDING]).clone()}, sharded)
    message = MESSAGE.format(
        file="head.safetensors" if sharded else "model.safetensors", differs=differs
    )
    with pytest.raises(UserError, match=message):
        preflight(read(None, arguments(tmp_path, "training.train_iters=1")), 1, weights=True)
    assert cli.main(["train", "--validate", *arguments(tmp_path, "training.train_iters=1")]) == 2
    assert "says tie_word_embeddings: true" in capsys.readouterr().err
    for kind in ("llama", "distributed"):
        settings = [
            f"input.path={tmp_path}/model",
            "input.format=llama",
            f"output.path={tmp_path}/a/b/c",
        ]
        assert cli.main(["convert", *settings, f"output.format={kind}"]) == 2
        assert "says tie_word_embeddings: true" in capsys.readouterr().err
        assert not (tmp_path / "a" / "b" / "c").exists()


@pytest.mark.parametrize("sharded", [False, True])
def test_an_equal_head_is_dropped_and_one_alone_is_both(tmp_path: Path, sharded: bool) -> None:
    write_tokens(tmp_path / "tokens")
    weights = tied(tmp_path / "model", torch.bfloat16)
    embedding = weights[EMBEDDING]
    embedding[0, 0], embedding[0, 1] = 0.0, -0.0
    rest = {name: tensor for name, tensor in weights.items() if name != EMBEDDING}
    same = embedding.clone()
    same[0, 1] = 0.0
    variants = {
        "neither": weights,
        "equal": {**weights, HEAD: embedding.clone()},
        "zero's sign": {**weights, HEAD: same},
        "wider": {**weights, HEAD: embedding.double()},
        "head alone": {**rest, HEAD: embedding},
    }
    found = {}
    for name, tensors in variants.items():
        folder = tmp_path / name
        tied(folder / "model")
        write_tokens(folder / "tokens")
        save(folder / "model", tensors, sharded)
        assert run(arguments(folder, "training.train_iters=2", "training.export.interval=2")) == 0
        exported = load_file(folder / "run" / "export" / "llama" / "2" / "model.safetensors")
        assert HEAD not in exported and exported.keys() == weights.keys()
        theirs = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
        found[name] = losses(folder / "run")
    assert all(one == found["neither"] for one in found.values())


def test_the_head_is_trained_if_asked_for(tmp_path: Path) -> None:
    """Loss and logits equal transformers'; exports, resumed runs and conversions have the head."""
    write_tokens(tmp_path / "tokens")
    weights = tied(tmp_path / "model")
    save(tmp_path / "model", {**weights, HEAD: weights[EMBEDDING].flip(0).contiguous()})
    untied = "model.base_model.tie_word_embeddings=no"
    steps = [
        "training.export.interval=1",
        "training.checkpoint.interval=1",
        "optimizer.learning_rate.base=0",
    ]
    assert run(arguments(tmp_path, untied, *steps, "training.train_iters=1")) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    export = tmp_path / "run" / "export" / "llama" / "1"
    ours = AutoModelForCausalLM.from_pretrained(export)
    assert torch.equal(logits(ours), logits(theirs))
    assert json.loads((export / "config.json").read_text())["tie_word_embeddings"] is False
    # The run resumes, also without its source, and converts.
    (tmp_path / "model").rename(tmp_path / "gone")
    assert run(arguments(tmp_path, untied, *steps, "training.train_iters=2")) == 0
    checkpoint = tmp_path / "run" / "checkpoint" / "2"
    assert (
        cli.main(["convert", f"input.path={checkpoint}", f"output.path={tmp_path}/converted"]) == 0
    )
    second = tmp_path / "run" / "export" / "llama" / "2"
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "converted" / name).read_bytes() == (second / name).read_bytes()
    # Another run starts from the checkpoint. The checkpoint decides, whatever config.json says.
    following = [
        *(
            a
            for a in arguments(tmp_path, *steps, "training.train_iters=1")
            if not a.startswith(("pretrained", "run"))
        ),
        f"pretrained.path={checkpoint}",
        "pretrained.format=distributed",
        f"run.experiment_dir={tmp_path}/next",
    ]
    assert run(following) == 0
    again = load_file(tmp_path / "next" / "export" / "llama" / "1" / "model.safetensors")
    assert torch.equal(again[HEAD], load_file(second / "model.safetensors")[HEAD])


def test_where_there_is_no_head_the_model_decides(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    tied(tmp_path / "model")
    with pytest.raises(
        UserError,
        match=r"tie_word_embeddings: given false, but .*config\.json says true; leave it out",
    ):
        preflight(
            read(
                None,
                arguments(
                    tmp_path, "training.train_iters=1", "model.base_model.tie_word_embeddings=no"
                ),
            ),
            1,
            weights=True,
        )
