"""Losses by source against a plain loop in float64, over layouts; bits per byte."""

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fast_llm.config.train import DataConfig
from fast_llm.data.dataset import open_dataset
from fast_llm.data.source import short_names
from fast_llm.training.source_losses import SourceMonitor
from tests.helpers import needs_compiler, slow, spawn
from tests.training.runs import losses, records, run_all, settings, weights, write_tokens
from tests.training.test_charts import curve

LENGTH, BATCH, STEPS = 24, 7, 2  # of 7 sequences in micro-batches of 2, one row is padded
NAMES = ["code", "prose", "old"]
SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources, of which two say how many bytes of text they have, and a model."""
    folder = tmp_path_factory.mktemp("sources")
    for number, name in enumerate(NAMES):
        (folder / name).mkdir()
        documents = write_tokens(folder / name / "shard_0_0", 100 + 40 * number)
        content = {
            "tokenizer": {"writes_bos": number == 0, "writes_eos": True},
            "datasets": [{"prefix": "shard_0_0", "num_bytes": 4 * sum(map(len, documents))}],
        }
        (folder / name / "dataset.json").write_text(json.dumps(content))
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder / "model")
    return folder


def paths(folder: Path) -> list[Any]:
    weighted = zip((0.5, 0.3, 0.2), NAMES, strict=True)
    return [part for weight, name in weighted for part in (weight, f"{folder}/{name}/dataset.json")]


def arguments(folder: Path, run: Path, *further: str) -> list[str]:
    """Steps at a learning rate of 0, so that all of them have the weights of the model."""
    return [
        *(word for word in settings(run) if not word.startswith("model.base_model")),
        f"pretrained.path={folder}/model",
        f"data.path={json.dumps(paths(folder))}",
        "data.split=[1,1,0]",
        f"batch.batch_size={BATCH}",
        f"training.train_iters={STEPS}",
        f"training.logs.interval={STEPS}",
        f"training.validation.interval={STEPS}",
        "training.validation.iterations=1",
        "optimizer.learning_rate.base=0",
        *further,
    ]


def plain_loop(
    folder: Path, split: str, sequences: int, isolate: bool
) -> dict[str, tuple[float, int]]:
    """Summed loss and target tokens of each source, from transformers' model in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    config = DataConfig(path=paths(folder), split=[1, 1, 0])
    dataset = open_dataset(config, LENGTH, 1234, 128)
    found = dict.fromkeys(NAMES, (0.0, 0))
    for index in range(sequences):
        name = Path(dataset.splits[split].find(index)[0].name).parent.name
        packed = dataset.read(split, index)
        labels = packed.targets.copy()
        starts = [0, LENGTH]
        if isolate:
            labels[packed.ends] = -100
            starts = [*(start for start in packed.starts.tolist() if start < LENGTH), LENGTH]
        total, targets = found[name]
        for begin, end in pairwise(starts):
            with torch.no_grad():
                logits = model(torch.from_numpy(packed.tokens[None, begin:end])).logits[0]
            wanted = torch.from_numpy(labels[begin:end])
            total += cross_entropy(logits, wanted, reduction="sum").item()
            targets += int((wanted != -100).sum())
        found[name] = total, targets
    return found


# Processes, and settings.
LAYOUTS = [
    "1 micro=2",
    "2 tp=2 sp=yes micro=2",
    "1 micro=1 loss=torch",
    "1 micro=2 across=yes chunks=3",
    "3 zero=3 micro=1",
    "2 cp=2 micro=2",
    "2 pp=2 micro=1",
    "2 pp=2 micro=4 schedule=interleaved_zero_bubble layers=1",
    "8 pp=2 cp=2 tp=2 sp=yes micro=1",
]
KEYS = {
    "tp": "model.distributed.tensor_parallel",
    "sp": "model.distributed.sequence_tensor_parallel",
    "cp": "model.distributed.sequence_data_parallel",
    "pp": "model.distributed.pipeline_parallel",
    "zero": "model.multi_stage.zero_stage",
    "schedule": "model.multi_stage.pipeline_schedule",
    "layers": "model.multi_stage.layers_per_stage",
    "loss": "model.base_model.cross_entropy_impl",
    "chunks": "model.base_model.cross_entropy_splits",
    "across": "batch.cross_document_attention",
    "micro": "batch.micro_batch_size",
    "compile": "model.multi_stage.compile_all",
    "dtype": "model.distributed.training_dtype",
}


def train(processes: int, runs: list[list[str]], how: Callable[..., Any] = run_all) -> None:
    """In this process if it is one."""
    assert (how(runs) if processes == 1 else spawn(processes, how, runs)[0]) == [0] * len(runs)


def of_layout(layout: str) -> tuple[int, list[str]]:
    processes, *lines = layout.split()
    given = (line.split("=") for line in lines)
    return int(processes), [f"{KEYS[name]}={value}" for name, value in given]


@pytest.mark.parametrize(
    "layout",
    [pytest.param(each, marks=[slow] * (place > 1)) for place, each in enumerate(LAYOUTS)]
    + [pytest.param("1 micro=2 compile=yes", marks=[slow, needs_compiler])],
)
def test_losses_by_source_equal_a_plain_loop(made: Path, tmp_path: Path, layout: str) -> None:
    processes, further = of_layout(layout)
    train(processes, [arguments(made, tmp_path, *further)])
    isolate = "across=yes" not in layout
    expected = {
        "training": plain_loop(made, "training", STEPS * BATCH, isolate),
        "validation": plain_loop(made, "validation", BATCH, isolate),
    }
    for phase, by_source in expected.items():
        record = records(tmp_path / "run", phase)[STEPS]
        assert list(record["sources"]) == NAMES
        for name, (total, targets) in by_source.items():
            found = record["sources"][name]
            assert targets > 20 and found["target_tokens"] == targets
            # The sums are fp32 losses of a model in fp32.
            assert found["loss"] == pytest.approx(total / targets, rel=2e-6)
            assert found["perplexity"] == pytest.approx(math.exp(total / targets), rel=1e-5)
    sequences = records(tmp_path / "run")[STEPS]["sources"]
    assert sum(each["consumed_tokens"] for each in sequences.values()) == STEPS * BATCH * LENGTH


def without_sources(every: list[list[str]]) -> list[int]:
    """Train as if the data had one source."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SourceMonitor, "several", False)
        return run_all(every)


@pytest.mark.parametrize(
    "layout",
    [
        "1 micro=2",
        "1 micro=2 dtype=bf16",
        *(
            pytest.param(each, marks=slow)
            for each in (
                "1 micro=2 loss=torch",
                "1 micro=2 loss=torch dtype=bf16",
                "2 tp=2 sp=yes micro=1 dtype=bf16",
                "4 pp=2 zero=2 micro=1",
                "3 zero=3 micro=1",
            )
        ),
    ],
)
def test_training_keeps_its_bits(made: Path, tmp_path: Path, layout: str) -> None:
    processes, further = of_layout(layout)
    further += [
        "training.train_iters=3",
        "training.logs.interval=1",
        "training.checkpoint.interval=3",
        "optimizer.learning_rate.base=1e-2",
    ]
    plain = arguments(made, tmp_path, *further, f"run.experiment_dir={tmp_path}/plain")
    train(processes, [arguments(made, tmp_path, *further)])
    train(processes, [plain], without_sources)
    for phase in ("training", "validation"):
        assert losses(tmp_path / "run", phase) == losses(tmp_path / "plain", phase)
    one, other = (weights(tmp_path / name / "checkpoint" / "3") for name in ("run", "plain"))
    assert one == other
    assert (
        "sources" in records(tmp_path / "run")[3]
        and "sources" not in records(tmp_path / "plain")[3]
    )


def test_bits_per_byte(made: Path, tmp_path: Path) -> None:
    """Of each source and validation set, and over all sources together."""
    further = f"data.validation_sets.further={made}/old/dataset.json"
    run_all([arguments(made, tmp_path, further, "training.tensorboard=yes")])
    predicted = {}  # target tokens, and the bytes of their text
    for number, name in enumerate(NAMES):
        file = open_dataset(
            DataConfig(path=[f"{made}/{name}/dataset.json"], split=[1, 0, 0]), LENGTH, 0, 128
        ).splits["training"]
        (source,) = file.sources
        tokens, documents = source.tokens, source.documents
        first_is_text = number > 0  # the first token of a document is not BOS
        share = 1 - documents / (tokens - documents) if first_is_text else 1
        predicted[name] = tokens - documents, 4 * tokens * share
    for phase in ("training", "validation"):
        record = records(tmp_path / "run", phase)[STEPS]
        text = 0.0
        for name, (targets, size) in predicted.items():
            found = record["sources"][name]
            assert found["bits_per_byte"] == pytest.approx(
                found["loss"] * targets / size / math.log(2)
            )
            text += found["target_tokens"] * size / targets
            drawn = curve(tmp_path / "run", f"{phase.capitalize()}/sources/{name}/bits_per_byte")
            assert drawn[STEPS] == pytest.approx(found["bits_per_byte"])
        counted = sum(each["target_tokens"] for each in record["sources"].values())
        assert record["bits_per_byte"] == pytest.approx(
            record["language_model_loss"] * counted / text / math.log(2)
        )
    targets, size = predicted["old"]
    assert record["further_bits_per_byte"] == pytest.approx(
        record["further_loss"] * targets / size / math.log(2)
    )
    assert record["further_perplexity"] == pytest.approx(math.exp(record["further_loss"]))
    log = (tmp_path / "run" / "runs" / "0" / "logs" / "logs_rank_0.txt").read_text()
    assert " bits/byte  " in log and "validation by source: code " in log
    assert "Bits per byte" not in log


def test_stages_and_a_resume_continue_the_counts(made: Path, tmp_path: Path) -> None:
    """Names of `data.sources`; a source of which a stage takes nothing has no loss there."""
    given = {"books": f"{made}/prose/dataset.json", "programs": f"{made}/code/dataset.json"}
    stages = [{"until": 2, "weights": {"books": 1}}, {"weights": {"books": 1, "programs": 1}}]
    staged = [
        word
        for word in arguments(made, tmp_path, "training.checkpoint.interval=1")
        if not word.startswith(("data.path", "training.train_iters"))
    ]
    staged += ["data.format=mixture", f"data.sources={json.dumps(given)}"]
    staged += [f"data.stages={json.dumps(stages)}", "training.logs.interval=1"]
    for steps in (3, 4):  # the second start resumes
        run_all([[*staged, f"training.train_iters={steps}"]])
    mixture = {"format": "mixture", "sources": given, "split": [1, 1, 0]}
    config = DataConfig.model_validate(mixture)
    whole = open_dataset(config, LENGTH, 1234, 128).splits["training"].sources
    sequences = {name: source.sequences for name, source in zip(given, whole, strict=True)}
    consumed = dict.fromkeys(given, 0)
    for step, record in records(tmp_path / "run").items():
        assert list(record["sources"]) == ["books", "programs"]
        for name, found in record["sources"].items():
            before, consumed[name] = consumed[name], found["consumed_tokens"]
            assert (found["loss"] is None) == (before == consumed[name])
            assert found["target_tokens"] <= consumed[name] - before
            assert found["epochs"] == pytest.approx(consumed[name] / LENGTH / sequences[name])
        assert sum(consumed.values()) == step * BATCH * LENGTH
        assert (consumed["programs"] > 0) == (step > 2)
    validation = records(tmp_path / "run", "validation")[4]["sources"]
    assert all(found["loss"] > 1 for found in validation.values())


def test_unknown_bytes_are_said_once(made: Path, tmp_path: Path) -> None:
    """And the source's losses are there all the same."""
    write_tokens(tmp_path / "foreign")
    mixed = [0.5, f"{made}/code/dataset.json", 0.5, f"{tmp_path}/foreign"]
    run_all([arguments(made, tmp_path, f"data.path={json.dumps(mixed)}")])
    for phase in ("training", "validation"):
        record = records(tmp_path / "run", phase)[STEPS]
        assert "bits_per_byte" in record["sources"]["code"]
        assert "bits_per_byte" not in record["sources"]["foreign"] and "bits_per_byte" not in record
        assert record["sources"]["foreign"]["loss"] > 1
    log = (tmp_path / "run" / "runs" / "0" / "logs" / "logs_rank_0.txt").read_text()
    assert (
        log.count(
            "Bits per byte are not logged for foreign: no dataset.json has its bytes of text"
            " (num_bytes, which `fast-llm prepare` writes)."
        )
        == 1
    )


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["a/code/dataset.json", "b/prose/dataset.json"], ["code", "prose"]),
        (["data/code.json", "data/prose.json"], ["code", "prose"]),
        (["code/v1/dataset.json", "prose/v1/dataset.json"], ["code/v1", "prose/v1"]),
        (["x.json (a and 1 more)", "x.json (b)"], ["x (a and 1 more)", "x (b)"]),
        (["a/dataset.json", "a/dataset.json", "b"], ["a 1", "a 2", "b"]),
        (["code", "prose"], ["code", "prose"]),
        (["dataset.json"], ["dataset"]),
        (["runs/x.1", "runs/x.2"], ["x.1", "x.2"]),
        ([], []),
    ],
)
def test_short_names(names: list[str], short: list[str]) -> None:
    assert short_names(names) == short


def test_sources_of_padded_rows_and_of_one_source(made: Path) -> None:
    one = DataConfig(path=[f"{made}/code/dataset.json"], split=[1, 0, 0])
    assert open_dataset(one, LENGTH, 0, 128).source_names == ["code"]
    several = open_dataset(DataConfig(path=paths(made), split=[1, 1, 0]), LENGTH, 0, 128)
    read = [several.read("training", index).source for index in range(200)]
    shares = np.bincount(read) / len(read)
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.01)
