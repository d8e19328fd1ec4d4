"""Model cards of exports: the same bytes by every way, what they say, what the Hub reads."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from fast_llm import cli
from fast_llm.checkpoint import folder as folders
from fast_llm.report.records import RunRecords
from fast_llm.training import model_card
from fast_llm.training.merge import merge
from fast_llm.training.model_card import BASE_CARD, CARD, read_front_matter
from tests.training.runs import losses, run, settings, write_tokens
from tests.training.test_exports_of_runs import convert, pretrained
from tests.training.test_merge import make

BASE = b"""---
license: other
license_name: llama-nine
license_link: https://example.org/licence
language: [de, en]
base_model: someone/else
extra_gated_prompt: "yes?"
---
# A base
"""


def front_matter(folder: Path) -> dict[str, Any]:
    """What the Hub's own package reads."""
    values: dict[str, Any] = ModelCard.load(folder / CARD).data.to_dict()
    return values


def cells(folder: Path, first: str) -> list[str]:
    """The other cells of the row of a table that begins with `first`."""
    line = next(x for x in (folder / CARD).read_text().splitlines() if x.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def continued(folder: Path, *further: str) -> list[str]:
    """A run of four steps on two sources, with validation, from a base with a card."""
    made = pretrained(folder, {})
    write_tokens(folder / "other", 200)
    (folder / "model" / CARD).write_bytes(BASE)
    return [
        *(word for word in made if not word.startswith("data.path")),
        f"data.path=[0.75,{folder}/tokens,0.25,{folder}/other]",
        "training.train_iters=4",
        "training.validation={interval: 2, iterations: 2}",
        "training.averages.ema={decay: 0.5, interval: 1}",
        *further,
    ]


def test_what_a_card_says(tmp_path: Path) -> None:
    words = continued(tmp_path)
    assert run(words) == 0
    export = tmp_path / "run/export/llama/4"
    assert front_matter(export) == {
        "license": "other",
        "license_name": "llama-nine",
        "license_link": "https://example.org/licence",
        "language": ["de", "en"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fast-llm", "continued-pretraining"],
    }
    assert (export / BASE_CARD).read_bytes() == BASE
    text = (export / CARD).read_text()
    assert "# model, continued\n" in text and str(tmp_path) not in text
    assert "continues model: 4 steps on 768 tokens" in text  # 4 · 8 sequences of 24
    assert 'from_pretrained(path, dtype="float32")' in text
    assert cells(export, "tokens") == ["576", "75.0%"] and cells(export, "other") == [
        "192",
        "25.0%",
    ]
    assert cells(export, "steps") == ["4 of 4"]
    assert cells(export, "learning rate: base") == ["0.01"]
    found = losses(tmp_path / "run", "validation")
    assert cells(export, "the training data")[:3] == [
        f"{found[0]:.4f}",
        f"{found[4]:.4f}",
        f"{found[4] - found[0]:+.4f}",
    ]
    assert "That of the base model: [llama-nine](https://example.org/licence)." in text
    average = (tmp_path / "run/export/llama-ema/4" / CARD).read_text()
    kind = "an exponential moving average with decay 0.5, updated every step"
    assert f"a running average of those in training: {kind}." in average
    # The earlier export has the losses of its own step.
    assert cells(tmp_path / "run/export/llama/2", "the training data")[1] == f"{found[2]:.4f}"


def test_the_same_bytes_by_every_way(tmp_path: Path) -> None:
    """Of an export, of convert, and of a run that was interrupted and undid a validation."""
    words = continued(tmp_path)
    assert run(words) == 0
    cards = {
        name: (tmp_path / f"run/export/{name}/{step}" / CARD).read_bytes()
        for name, step in (("llama", 4), ("llama-ema", 4))
    }
    convert(tmp_path / "run/checkpoint/4", tmp_path / "converted")
    assert (tmp_path / "converted" / CARD).read_bytes() == cards["llama"]
    assert (tmp_path / "converted" / BASE_CARD).read_bytes() == BASE
    convert(tmp_path / "run/checkpoint/4", tmp_path / "ema", "input.average=ema")
    assert (tmp_path / "ema" / CARD).read_bytes() == cards["llama-ema"]
    earlier = (tmp_path / "run/export/llama/2" / CARD).read_bytes()
    convert(tmp_path / "run/checkpoint/2", tmp_path / "two")  # later losses are not in it
    assert (tmp_path / "two" / CARD).read_bytes() == earlier
    for lost in ("checkpoint/4", "checkpoint/3", "export"):
        shutil.rmtree(tmp_path / "run" / lost)
    assert run(words) == 0
    assert (tmp_path / "run/export/llama/2" / CARD).read_bytes() == earlier
    assert (tmp_path / "run/export/llama-ema/4" / CARD).read_bytes() == cards["llama-ema"]
    folders.verify(tmp_path / "run/export/llama/4")


def test_losses_of_an_undone_attempt_are_left_out(tmp_path: Path) -> None:
    """A later start with another rate, and without validations of its own."""
    words = continued(tmp_path)
    assert run(words) == 0
    undone = losses(tmp_path / "run", "validation")[4]
    for lost in ("checkpoint/4", "checkpoint/3", "export/llama/4", "export/llama-ema/4"):
        shutil.rmtree(tmp_path / "run" / lost)
    off = [word for word in words if not word.startswith("training.validation")]
    assert run([*off, "optimizer.learning_rate.base=1e-4"]) == 0
    after = cells(tmp_path / "run/export/llama/4", "the training data")[1]
    assert after == f"{losses(tmp_path / 'run', 'validation')[2]:.4f}" != f"{undone:.4f}"


def test_losses_of_later_steps_are_kept_for_later_exports(tmp_path: Path) -> None:
    """An export is written while training continues: later losses are there already."""
    lines = [
        {"run": 0, "phase": "validation", "step": step, "language_model_loss": 4.0 - step}
        for step in (0, 3)
    ]
    lines.append({"run": 0, "phase": "validation", "step": 4, "further_loss": 1.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = RunRecords(tmp_path, ("validation",))
    (early,) = model_card.losses_at(records, 2)
    assert (early.last_step, early.last) == (0, 4.0)
    late, further = model_card.losses_at(records, 4)
    assert (late.last_step, late.last, further.last_step) == (3, 1.0, 4)
    # Each loss has its own steps, if a set was measured on another interval.
    info = {"step": 4, "settings": {}}
    assert "| 0 → 3 |" in model_card.trained_card(info, {}, "bf16", [late, further])
    assert "at step 0 and step 3" in model_card.trained_card(info, {}, "bf16", [late])


def test_a_model_trained_from_random_weights(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    words = ["training.train_iters=1", "training.export.interval=1"]
    assert run(settings(tmp_path, *words, "run.experiment_name=a name of mine")) == 0
    export = tmp_path / "run/export/llama/1"
    assert front_matter(export)["tags"] == ["fast-llm"] and not (export / BASE_CARD).exists()
    text = (export / CARD).read_text()
    assert "# a name of mine\n" in text and "was trained from random weights: 1 step" in text
    assert "licence" not in text.lower() and "Losses" not in text


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("Qwen/Qwen3-0.6B@main", "Qwen/Qwen3-0.6B"),
        ("/x/hub/models--a-b--c--d.1/snapshots/0123", "a-b/c--d.1"),
        ("/models/Llama-3.1-8B", ""),
        ("models", ""),
        ("", ""),
    ],
)
def test_names_on_the_hub(path: str, name: str) -> None:
    assert model_card._hub_name(path) == name
    shown = model_card.trained_card({"settings": {"pretrained": {"path": path}}}, {}, "bf16", [])
    values = yaml.safe_load(shown.split("---\n")[1])
    assert values.get("base_model") == (name or None)


def test_a_local_folder_is_not_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models/mine").mkdir(parents=True)
    assert model_card._hub_name("models/mine") == ""


@pytest.mark.parametrize(
    "card", [b"", b"no front matter", b"---\n[1\n---\n", b"---\n- 1\n---\n", b"\xff\xfe---", b"---"]
)
def test_damaged_cards(card: bytes) -> None:
    assert read_front_matter(card) == {}
    shown = model_card.trained_card(
        {"settings": {"pretrained": {"path": "a/b"}}}, {CARD: card}, "bf16", []
    )
    assert "whose folder had no card that names it" in shown


def test_a_problem_with_the_card_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("of the card")

    monkeypatch.setattr("fast_llm.training.model_card.trained_card", fail)
    write_tokens(tmp_path / "tokens")
    assert run(settings(tmp_path, "training.train_iters=1", "training.export.interval=1")) == 0
    assert "The export of step 1 has no model card: of the card." in capsys.readouterr().out
    assert not (tmp_path / "run/export/llama/1" / CARD).exists()


def test_a_merge_states_its_formula(tmp_path: Path) -> None:
    base, new = make(tmp_path / "base", 0), make(tmp_path / "new", 1)
    (new / CARD).write_bytes(BASE)
    merge(str(tmp_path / "out"), [str(new)], [0.3], str(base))
    text = (tmp_path / "out" / CARD).read_text()
    assert "`base + Σ wᵢ (modelᵢ - base)`" in text and "    0.3 × new + 0.7 × base\n" in text
    assert cells(tmp_path / "out", "new") == ["0.3"] and cells(tmp_path / "out", "base") == ["base"]
    # The base has no card, so what licence holds is not known.
    assert front_matter(tmp_path / "out") == {
        "language": ["de", "en"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fast-llm", "merge"],
    }
    assert (tmp_path / "out" / BASE_CARD).read_bytes() == BASE
    (base / CARD).write_bytes(BASE.replace(b"# A base", b"# The same licence"))
    merge(str(tmp_path / "both"), [str(new), str(base)])
    assert front_matter(tmp_path / "both")["license_name"] == "llama-nine"
    text = (tmp_path / "both" / CARD).read_text()
    assert "`Σ wᵢ modelᵢ / Σ wᵢ`" in text and "    0.5 × new + 0.5 × base\n" in text


def test_convert_of_a_model_keeps_its_card(tmp_path: Path) -> None:
    """Another dtype of the same model has the card of the model."""
    make(tmp_path / "model", 0)
    (tmp_path / "model" / CARD).write_bytes(BASE)
    words = ["convert", "input.format=auto", f"input.path={tmp_path}/model"]
    assert cli.main([*words, f"output.path={tmp_path}/out", "output.data_type=bf16"]) == 0
    assert (tmp_path / "out" / CARD).read_bytes() == BASE
    assert not re.search("BASE", " ".join(p.name for p in (tmp_path / "out").iterdir()))
