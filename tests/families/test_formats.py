"""Formats: own checkpoints and Hugging Face folders, recognised and converted into each other.

Also what is said about folders: dropout that is not applied, and folders with images.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fast_llm import cli
from fast_llm.config.document import read
from fast_llm.planning.preflight import preflight
from fast_llm.planning.run_spec import RunSpec
from tests.families.architectures import VOCABULARY, architecture
from tests.families.reference import make
from tests.families.test_layouts import arguments
from tests.families.test_published import MODELS
from tests.helpers import some_fast
from tests.training.runs import losses, run, write_tokens

FAMILIES = some_fast(["llama", "gemma3_text", "qwen3_moe"], lambda name: name == "gemma3_text")


def plan(root: Path, *further: str) -> RunSpec:
    """What a run of two steps from the folder `untied` would do."""
    return preflight(read(None, arguments(root, "planned", False, list(further))), 1, weights=True)


def convert(source: Path, output: Path, *further: str) -> int:
    return cli.main(["convert", f"input.path={source}", f"output.path={output}", *further])


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder with data, and a model in `untied`, without a tokenizer."""
    write_tokens(tmp_path / "tokens", vocabulary=VOCABULARY)
    family = getattr(request, "param", "llama")
    values = architecture(family) | {"tie_word_embeddings": False}
    if family == "qwen3_moe":
        values |= {"num_experts": 4, "num_experts_per_tok": 2}
    make(family, values, tmp_path / "untied")
    return tmp_path


def same_weights(one: Path, other: Path) -> bool:
    first, second = (load_file(path / "model.safetensors") for path in (one, other))
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


@pytest.mark.parametrize("folder", FAMILIES, indirect=True)
def test_auto_knows_own_checkpoints_from_folders(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run, a second one from its checkpoint, and conversions, all without naming a format."""
    assert run(arguments(folder, "run", False, [])) == 0
    checkpoint = folder / "run" / "checkpoint" / "2"
    export = next((folder / "run" / "export").glob("*/2"))
    family = export.parent.name
    for path, expected in ((checkpoint, "distributed"), (export, family), (None, family)):
        chosen = [f"pretrained.path={path}"] if path else []
        for stated in ([], ["pretrained.format=auto"]):
            assert plan(folder, *chosen, *stated).config.pretrained.format == expected

    # The first losses from the checkpoint and from the export are the same.
    for name, path in (("second", checkpoint), ("third", export)):
        assert run(arguments(folder, name, False, [f"pretrained.path={path}"])) == 0
    assert losses(folder / "second") == losses(folder / "third")

    automatic = ["input.format=auto", "output.format=auto"]
    assert convert(checkpoint, folder / "made", *automatic) == 0
    assert same_weights(folder / "made", export)
    assert convert(export, folder / "copy", *automatic) == 0
    assert same_weights(folder / "copy", export)
    back = folder / "kept" / "checkpoint" / "0"
    assert convert(export, back, "input.format=auto", "output.format=distributed") == 0
    assert convert(back, folder / "again", *automatic) == 0
    assert same_weights(folder / "again", export)

    into = ["input.format=auto", "output.format=distributed"]
    assert convert(checkpoint, folder / "twice", *into) == 2
    assert (
        f"{checkpoint}: is already in distributed format; copy the folder"
        in capsys.readouterr().err
    )


def test_convert_refuses_the_name_of_another_family(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, made = folder / "untied", folder / "kept" / "checkpoint" / "0"
    cases = [
        (model, ["input.format=qwen3"], "input.format: given qwen3"),
        (model, ["input.format=llama", "output.format=qwen3"], "output.format: given qwen3"),
        (model, ["input.format=qwen3", "output.format=distributed"], "input.format: given qwen3"),
        (made, ["output.format=qwen3"], "output.format: given qwen3"),
    ]
    assert convert(model, made, "input.format=llama", "output.format=distributed") == 0
    capsys.readouterr()
    for source, settings, message in cases:
        assert convert(source, folder / "out", *settings) == 2
        said = capsys.readouterr().err
        assert f"{message}, but the model of {source} is llama; use auto" in said
        assert not (folder / "out").exists()


def test_an_export_without_a_tokenizer_is_complete(folder: Path) -> None:
    """The model's folder has none: its export has none, and transformers loads it."""
    assert run(arguments(folder, "run", False, [])) == 0
    export = folder / "run" / "export" / "llama" / "2"
    assert not list(export.glob("tokenizer*"))
    model = AutoModelForCausalLM.from_pretrained(export)
    assert model.config.vocab_size == VOCABULARY
    before, after = (load_file(path / "model.safetensors") for path in (folder / "untied", export))
    assert before.keys() == after.keys()
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"].float())


def test_what_is_not_applied_is_said(folder: Path) -> None:
    path = folder / "untied" / "config.json"
    config = json.loads(path.read_text())
    assert not [one for one in plan(folder).warnings if "config.json" in one]
    config |= {"attention_dropout": 0.1, "resid_pdrop": 0.2, "hidden_dropout": 0.0}
    path.write_text(json.dumps(config | {"dual_chunk_attention_config": {"chunk_size": 16}}))
    said = [one for one in plan(folder).warnings if "config.json" in one]
    assert [one.partition("pretrained.path: ")[2] for one in said] == [
        "attention_dropout: 0.1 of the model's config.json is not applied: there is no dropout in"
        " training",
        "resid_pdrop: 0.2 of the model's config.json is not applied: there is no dropout in"
        " training",
        "dual_chunk_attention_config of the model's config.json is not applied: attention is"
        " full, as in transformers; it is the same for sequences within one chunk",
    ]


@pytest.mark.parametrize(
    ("model", "text_model"),
    [("Gemma 3 4B", "gemma3_text"), ("Ministral 3 3B Reasoning", "ministral3 or mistral")],
)
def test_folders_with_images_are_refused(
    folder: Path, model: str, text_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = next(one["config"] for one in MODELS if one["model"] == model)
    (folder / "untied" / "config.json").write_text(json.dumps(config))
    kind = config["model_type"]
    sentence = (
        f"{kind} models read images too, and nest their text model: save it alone, with"
        f" AutoModelForCausalLM.from_pretrained(…) and save_pretrained(…), as {text_model}"
    )
    assert cli.main(["train", "--validate", *arguments(folder, "run", False, [])]) == 2
    assert sentence in capsys.readouterr().err
    assert convert(folder / "untied", folder / "out", "input.format=auto") == 2
    assert sentence in capsys.readouterr().err
