"""`training.samples`: equal to transformers, in its layouts, resumed, and in the report."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from fast_llm.config.document import read
from fast_llm.errors import ConfigError
from fast_llm.planning.preflight import preflight
from fast_llm.report import write_report
from tests.helpers import slow, spawn
from tests.training.runs import run, settings, write_tokens
from tests.training.test_merge import make

PROMPTS = ["The first", "a<b & c"]


def arguments(folder: Path, *further: str) -> list[str]:
    """A run of six steps that continues a small model with a tokenizer."""
    made = [word for word in settings(folder) if not word.startswith("model.")]
    return [
        *made,
        f"pretrained.path={folder}/model",
        "batch.sequence_length=80",
        "training.train_iters=6",
        "training.checkpoint.interval=2",
        "training.export.interval=2",
        "training.export.data_type=fp32",
        f"training.samples={{prompts: {json.dumps(PROMPTS)}, interval: 2, max_tokens: 12}}",
        *further,
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokens(tmp_path / "tokens", 400, vocabulary=320)
    # Rows as far apart as after training: ties of tokens are as unlikely.
    make(tmp_path / "model", 0, initializer_range=0.3)
    return tmp_path


def texts(run_folder: Path) -> list[tuple[int, list[str]]]:
    """Step and texts of each record, in the order of the file."""
    lines = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    records = [line for line in lines if line["phase"] == "samples"]
    assert all([one["prompt"] for one in record["samples"]] == PROMPTS for record in records)
    return [(record["step"], [one["text"] for one in record["samples"]]) for record in records]


def by_transformers(model: Path) -> list[str]:
    """The same texts by transformers' generate."""
    found = []
    loaded = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        ids = ids[:, :-1] if ids[0, -1] == loaded.config.eos_token_id else ids
        out = loaded.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        found.append(tokenizer.decode(out[0, ids.shape[1] :].tolist()))
    return found


def test_texts_are_those_of_transformers(folder: Path) -> None:
    assert run(arguments(folder)) == 0
    found = texts(folder / "run")
    assert [step for step, _ in found] == [0, 2, 4, 6]
    assert found[0][1] == by_transformers(folder / "model")
    assert found[-1][1] == by_transformers(folder / "run/export/llama/6")
    assert found[0][1] != found[-1][1]
    assert run(arguments(folder)) == 0  # complete: nothing is repeated
    assert texts(folder / "run") == found


def test_a_resumed_run_repeats_nothing_but_what_was_undone(folder: Path) -> None:
    assert run(arguments(folder, "run.experiment_dir=" + str(folder / "straight"))) == 0
    assert run(arguments(folder, "training.train_iters=4")) == 0
    assert run(arguments(folder)) == 0
    assert texts(folder / "run") == texts(folder / "straight")


@slow
@pytest.mark.parametrize(
    "layout", ["model.multi_stage.zero_stage=3", "model.distributed.tensor_parallel=2"]
)
def test_layouts(folder: Path, layout: str) -> None:
    """Each process takes part. Learning rates of 0 keep the texts apart from rounding."""
    words = arguments(folder, "optimizer.learning_rate.base=0")
    assert run([*words, f"run.experiment_dir={folder}/one"]) == 0
    assert spawn(2, run, [*words, layout]) == [0, 0]
    assert texts(folder / "run") == texts(folder / "one")


@slow
def test_three_processes_share_a_sequence(tmp_path: Path) -> None:
    """Inputs of a pass are divided by any number of them."""
    write_tokens(tmp_path / "tokens", 400, vocabulary=320)
    sizes: dict[str, Any] = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4}
    sizes |= {"intermediate_size": 33, "initializer_range": 0.3}
    make(tmp_path / "model", 0, size=321, **sizes)
    words = arguments(tmp_path, "optimizer.learning_rate.base=0", "batch.sequence_length=96")
    assert run([*words, f"run.experiment_dir={tmp_path}/one"]) == 0
    layout = "{tensor_parallel: 3, sequence_tensor_parallel: yes}"
    assert spawn(3, run, [*words, f"model.distributed={layout}"]) == [0, 0, 0]
    assert texts(tmp_path / "run") == texts(tmp_path / "one")


def test_the_report_shows_before_and_after(folder: Path) -> None:
    assert run(arguments(folder, "training.samples.interval=1")) == 0
    page = write_report([str(folder / "run")]).read_text()
    assert "<h2>Text before and after</h2>" in page and "<p>a&lt;b &amp; c</p>" in page
    section = page.partition("Text before and after")[2].partition("<h2>")[0]
    shown = [part.partition("</dt>")[0] for part in section.split("<dt>")[1:]]
    assert shown == [*(f"step {n}" for n in (0, 6)), *(f"step {n}" for n in range(1, 6))] * 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["training.samples={prompts: [a]}"], "training.samples.prompts requires it"),
        (["training.samples={interval: 2}"], "training.samples.interval requires it"),
        (["training.samples.prompts=[]"], "training.samples.interval requires it"),
        (["training.samples.max_tokens=79"], "with training.samples.max_tokens 79 more than batch"),
        (["training.samples.max_tokens=0"], "must be an integer from 1 to 1024"),
        (["run.experiment_dir=null"], "needs a folder to write to"),
    ],
)
def test_mistakes(folder: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preflight(read(None, arguments(folder, *words)), 1, weights=True)


@pytest.mark.parametrize("name", ["pipeline_parallel", "sequence_data_parallel"])
def test_layouts_without_samples(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"is not possible with model.distributed.{name}"):
        preflight(read(None, arguments(folder, f"model.distributed.{name}=2")), 2, weights=True)


def test_a_run_without_a_tokenizer(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    words = settings(tmp_path, "training.samples={prompts: [a], interval: 2}")
    words.append("training.train_iters=1")
    with pytest.raises(ConfigError, match="needs a tokenizer, and neither the pretrained model"):
        preflight(read(None, words), 1, weights=True)
