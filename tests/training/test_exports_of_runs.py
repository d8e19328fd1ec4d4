"""The small files of exports and conversions: config.json, tokenizer, generation_config.json."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from fast_llm import cli
from fast_llm.checkpoint import folder as folders
from fast_llm.checkpoint import weights
from fast_llm.data import tokenizer
from fast_llm.storage import content_digest
from fast_llm.tensors import torch_dtype
from fast_llm.training import saving
from fast_llm.training.trainer import Trainer
from tests.checkpoint.test_small_files import SMALL
from tests.checkpoint.test_transformers import LLAMA_3, logits, make
from tests.data import synthetic
from tests.helpers import some_fast, spawn
from tests.training.runs import run, settings, until, write_tokens


def convert(source: Path, output: Path, *further: str) -> None:
    assert cli.main(["convert", f"input.path={source}", f"output.path={output}", *further]) == 0


def pretrained(folder: Path, changes: dict[str, Any], *further: str) -> list[str]:
    """Settings of a run of two steps that continues a small model of transformers, made in
    `folder/model`.
    """
    write_tokens(folder / "tokens", 400)
    make(folder / "model", changes, torch.float32)
    model = [s for s in settings(folder) if s.startswith("model.")]
    return [
        *(s for s in settings(folder) if s not in model),
        f"pretrained.path={folder / 'model'}",
        "training.train_iters=2",
        "training.checkpoint.interval=1",
        "training.export.interval=2",
        *further,
    ]


def test_small_files_reach_the_export_by_every_way(tmp_path: Path) -> None:
    """From the source, from the run's copy when the source is gone, by convert; runs of before with
    fewer files too.
    """
    arguments = pretrained(tmp_path, {})
    config = (tmp_path / "model" / "config.json").read_bytes()
    small = {**SMALL, "config.json": config}
    del small["tokenizer.json"]  # an export needs a real one
    for name, content in small.items():
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_bytes(content)

    def files(folder: Path) -> dict[str, bytes]:
        found = {
            p.relative_to(folder).as_posix(): p.read_bytes()
            for p in folder.rglob("*")
            if p.is_file()
        }
        return {
            name: data
            for name, data in found.items()
            if name not in ("model.safetensors", folders.MANIFEST)
        }

    def exported(folder: Path) -> dict[str, bytes]:
        """The files of an export: its card aside, and the source's under its name there."""
        found = files(folder)
        assert b"library_name: transformers" in found.pop("README.md")
        return found

    assert run(arguments) == 0
    # The model is in fp32 and was trained in fp32: even config.json has the same bytes.
    assert files(tmp_path / "run" / "pretrained") == small
    small["BASE_README.md"] = small.pop("README.md")
    assert exported(tmp_path / "run" / "export" / "llama" / "2") == small
    convert(tmp_path / "run" / "checkpoint" / "2", tmp_path / "converted")
    assert exported(tmp_path / "converted") == small
    shutil.rmtree(tmp_path / "run" / "export")
    (tmp_path / "model").rename(tmp_path / "gone")
    assert run(arguments) == 0
    assert exported(tmp_path / "run" / "export" / "llama" / "2") == small
    shutil.rmtree(tmp_path / "run" / "export")
    shutil.rmtree(
        tmp_path / "run" / "pretrained" / "additional_chat_templates"
    )  # as an older version wrote it
    (tmp_path / "run" / "pretrained" / "README.md").unlink()
    assert run(arguments) == 0
    left = {
        name: data
        for name, data in small.items()
        if name != "BASE_README.md" and "additional" not in name
    }
    assert exported(tmp_path / "run" / "export" / "llama" / "2") == left


def tokenizer_config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text())
    return found


@pytest.mark.parametrize(
    "rope",
    [None, LLAMA_3, {k: v for k, v in LLAMA_3.items() if k != "original_max_position_embeddings"}],
    ids=["plain", "llama3", "llama3 by max_position_embeddings"],
)
@pytest.mark.parametrize("spelling", ["published", "transformers 5"])
def test_sequences_longer_than_the_model_states(
    tmp_path: Path, rope: dict[str, Any] | None, spelling: str
) -> None:
    """The export states the length that was trained, and its rotary angles are the source's."""
    arguments = pretrained(tmp_path, {"max_position_embeddings": 16, "rope_parameters": rope})
    arguments.append("optimizer.learning_rate.base=0")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    scaling = dict(config.pop("rope_parameters"))
    if rope is not None and "original_max_position_embeddings" not in rope:
        scaling.pop("original_max_position_embeddings", None)
    if spelling == "published":
        config |= {
            "rope_theta": scaling.pop("rope_theta"),
            "rope_scaling": scaling if rope else None,
        }
    else:
        config["rope_parameters"] = scaling
    path.write_text(json.dumps(config, indent=2))
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"model_max_length": 16}')
    assert run(arguments) == 0
    export = tmp_path / "run" / "export" / "llama" / "2"
    found = json.loads((export / "config.json").read_text())
    assert found["max_position_embeddings"] == 24 and tokenizer_config(export) == {
        "model_max_length": 24
    }
    changed = {"max_position_embeddings", "rope_parameters", "rope_scaling"}
    assert {k: v for k, v in found.items() if k not in changed} == {
        k: v for k, v in config.items() if k not in changed
    }
    before, after = (AutoConfig.from_pretrained(folder) for folder in (tmp_path / "model", export))
    assert after.rope_parameters == before.rope_parameters
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(export)), logits(theirs))
    convert(tmp_path / "run" / "checkpoint" / "2", tmp_path / "converted")
    for name in ("config.json", "tokenizer_config.json"):
        assert (tmp_path / "converted" / name).read_bytes() == (export / name).read_bytes()
    # A run that starts from the checkpoint and trains shorter sequences keeps the model's longer
    # length.
    following = [
        s
        for s in arguments
        if not s.startswith(("pretrained.path", "run.", "batch.sequence_length"))
    ]
    following += [
        f"pretrained.path={tmp_path / 'run' / 'checkpoint' / '2'}",
        "pretrained.format=distributed",
    ]
    assert run([*following, "batch.sequence_length=8", f"run.experiment_dir={tmp_path}/next"]) == 0
    config = json.loads((tmp_path / "next" / "export" / "llama" / "2" / "config.json").read_text())
    assert config["max_position_embeddings"] == 24


def test_shorter_sequences_change_nothing(tmp_path: Path) -> None:
    assert run(pretrained(tmp_path, {"max_position_embeddings": 24})) == 0
    export = tmp_path / "run" / "export" / "llama" / "2"
    assert (export / "config.json").read_bytes() == (
        tmp_path / "model" / "config.json"
    ).read_bytes()


def from_scratch(folder: Path, *further: str) -> list[str]:
    """Settings of a run from random weights, its tokenizer in the folder `tokenizer`."""
    write_tokens(folder / "tokens", 400)
    synthetic.llama(folder / "tokenizer")
    return [
        *settings(folder),
        "training.train_iters=1",
        "training.checkpoint.interval=1",
        "training.export.interval=1",
        "model.base_model.vocab_size=4096",
        "model.base_model.max_position_embeddings=16",
        *further,
    ]


@pytest.mark.parametrize("manifest", ["now", "before"])
def test_a_model_from_scratch_has_its_tokens(tmp_path: Path, manifest: str) -> None:
    """Exports and conversions know BOS and EOS; older checkpoints by the run's tokenizer."""
    assert run(from_scratch(tmp_path, f"data.tokenizer.path={tmp_path / 'tokenizer'}")) == 0
    export, checkpoint = (
        tmp_path / "run" / "export" / "llama" / "1",
        tmp_path / "run" / "checkpoint" / "1",
    )
    loaded = tokenizer.load(str(tmp_path / "tokenizer"))
    if manifest == "before":
        content = json.loads((checkpoint / folders.MANIFEST).read_text())
        del content["info"]["tokens"], content["sha256"]
        content["sha256"] = content_digest(content)
        (checkpoint / folders.MANIFEST).write_text(json.dumps(content))
    convert(checkpoint, tmp_path / "converted")
    for folder in (export, tmp_path / "converted"):
        config = AutoConfig.from_pretrained(folder)
        assert (config.bos_token_id, config.eos_token_id) == (loaded.bos, loaded.eos) == (0, 1)
        assert config.max_position_embeddings == 24
        assert (folder / "tokenizer.json").read_bytes() == (
            tmp_path / "tokenizer" / "tokenizer.json"
        ).read_bytes()
    assert (export / "config.json").read_bytes() == (
        tmp_path / "converted" / "config.json"
    ).read_bytes()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stated", ["right", "wrong", "absent"])
def test_weights_come_back_in_their_dtype(tmp_path: Path, dtype: str, stated: str) -> None:
    """A Hugging Face folder → a checkpoint → a Hugging Face folder, and copied at once."""
    make(tmp_path / "model", {}, torch_dtype(dtype))
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    if stated != "right":
        config.pop("dtype")
    if stated == "wrong":
        config["torch_dtype"] = "float32" if dtype == "bf16" else "bfloat16"
    path.write_text(json.dumps(config, indent=2) + "\n")
    checkpoint = tmp_path / "kept" / "checkpoint" / "0"
    convert(tmp_path / "model", checkpoint, "input.format=llama", "output.format=distributed")
    convert(checkpoint, tmp_path / "back")
    convert(tmp_path / "model", tmp_path / "copy", "input.format=llama")
    for folder in (tmp_path / "back", tmp_path / "copy"):
        files = [(f / "model.safetensors").read_bytes() for f in (tmp_path / "model", folder)]
        assert files[0] == files[1]
        assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch_dtype(dtype)
        if stated == "right":
            assert (folder / "config.json").read_bytes() == path.read_bytes()
    convert(checkpoint, tmp_path / "asked", "output.data_type=bf16")
    assert {t.dtype for t in load_file(tmp_path / "asked" / "model.safetensors").values()} == {
        torch.bfloat16
    }


def test_weights_of_several_dtypes_come_back_in_the_one_that_is_stated(tmp_path: Path) -> None:
    make(tmp_path / "model", {}, torch.float32)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights = {name: t if "norm" in name else t.bfloat16() for name, t in weights.items()}
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    convert(tmp_path / "model", tmp_path / "copy", "input.format=llama")
    assert {t.dtype for t in load_file(tmp_path / "copy" / "model.safetensors").values()} == {
        torch.float32
    }


def test_two_models_do_not_share_a_folder_of_small_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "one", {}, torch.bfloat16)
    make(tmp_path / "two", {"rms_norm_eps": 1e-4}, torch.bfloat16)
    into = ["input.format=llama", "output.format=distributed"]
    convert(tmp_path / "one", tmp_path / "kept" / "checkpoints" / "one", *into)
    output = tmp_path / "kept" / "checkpoints" / "two"
    assert cli.main(["convert", f"input.path={tmp_path}/two", f"output.path={output}", *into]) == 2
    assert (
        f"{tmp_path}/kept/pretrained: has the files of another model, which this one's would"
        " replace; choose an output.path in a folder of its own, as in"
        " <folder>/checkpoint/0"
    ) in capsys.readouterr().err
    assert not output.exists()


def full_at_first(root: Path, name: str, *further: str) -> int:
    """The disk of `run` is full when step 4 is exported first, until step 6 is done."""
    to_bytes, check, reached, attempts = weights.tensor_bytes, Trainer.check_finite, [0], [0]

    def disturbed(tensor: Tensor) -> memoryview:
        if name == "run" and not attempts[0]:
            attempts[0] = 1
            until(lambda: reached[0] >= 6)
            raise OSError(errno.ENOSPC, "No space left on device", "the disk")
        return to_bytes(tensor)

    def checked(trainer: Trainer, step: int) -> None:
        check(trainer, step)
        reached[0] = step
        if step == 7 and name == "run":
            until(lambda: folders.is_complete(root / name / "export" / "llama" / "4"))

    weights.tensor_bytes = disturbed
    Trainer.check_finite = checked  # type: ignore[method-assign, assignment]
    saving._PAUSE = 0.05
    steps = ["training.train_iters=8", "training.export.interval=4", "training.num_workers=0"]
    how = [*steps, "training.checkpoint.interval=8", f"run.experiment_dir={root}/{name}"]
    return run(settings(root, *how, *further))


@pytest.mark.parametrize("world", some_fast([1, 2], (2).__eq__))
def test_training_continues_during_an_export(tmp_path: Path, world: int) -> None:
    """A failed write is retried. The bytes are those of an export that training waits for."""
    write_tokens(tmp_path / "tokens", 400)
    assert spawn(world, full_at_first, tmp_path, "run") == [0] * world
    plain = "training.checkpoint.background=no"
    assert spawn(world, full_at_first, tmp_path, "plain", plain) == [0] * world
    for step in ("4", "8"):
        found, expected = (
            folders.verify(tmp_path / name / "export" / "llama" / step) for name in ("run", "plain")
        )
        assert found.files == expected.files, step
    said = (tmp_path / "run" / "runs" / "0" / "logs" / "logs_rank_0.txt").read_text()
    failed = "could not be written: No space left on device (the disk). Training continues;"
    assert failed in said
    moments = [said.index(part) for part in ("step 6/8  loss", "Training continues;", "step 8/8  ")]
    assert moments == sorted(moments)
    assert "Exported" in said and "training paused for" in said


def test_exports_of_an_earlier_attempt_are_replaced(tmp_path: Path) -> None:
    """Those of steps after the checkpoint that a run resumes from; `keep` does not count them."""
    write_tokens(tmp_path / "tokens", 400)
    steps = ["training.train_iters=4", "training.checkpoint.interval=2", "training.num_workers=0"]
    arguments = settings(tmp_path, *steps, "training.export.interval=1")
    assert run(arguments) == 0
    exports = tmp_path / "run" / "export" / "llama"
    before = {step: folders.verify(path).files for step, path in folders.find(exports)}
    assert before.keys() == {1, 2, 3, 4}
    shutil.rmtree(tmp_path / "run" / "checkpoint" / "4")
    changed = [*arguments, "optimizer.learning_rate.base=0.02", "training.export.keep=1"]
    assert run([*changed, "training.train_iters=3"]) == 0
    after = {step: folders.verify(path).files for step, path in folders.find(exports)}
    assert after.keys() == {3, 4} and after[3] != before[3] and after[4] == before[4]
