"""Continued pretraining of a real model on real code, compared with transformers."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from fast_llm.checkpoint import folder as folders
from fast_llm.checkpoint import huggingface
from fast_llm.checkpoint.weights import load_weights
from fast_llm.config.document import read
from fast_llm.config.model import BaseModelConfig
from fast_llm.config.train import DataConfig
from fast_llm.data.dataset import open_dataset
from fast_llm.data.tokenfile import TokenFile
from fast_llm.model.decoder import CausalLM
from fast_llm.models import FAMILIES, llama
from fast_llm.planning.preflight import preflight
from fast_llm.training.job import train
from fast_llm.training.model_card import CARD
from tests.training.runs import records

LENGTH, STEPS, SEED = 128, 6, 1234
pytestmark = pytest.mark.slow

SPLIT: list[float] = [9, 1, 0]


def settings(model: Path, data: Path, experiment: Path, *further: str) -> list[str]:
    return [
        f"pretrained.path={model}",
        f"data.path={data}",
        f"data.split={SPLIT}",
        "batch.batch_size=4",
        "batch.micro_batch_size=2",
        f"batch.sequence_length={LENGTH}",
        "batch.cross_document_attention=yes",  # as transformers computes a plain sequence
        f"model.distributed.seed={SEED}",
        f"training.validation.interval={STEPS}",
        "training.validation.iterations=2",
        f"training.export.interval={STEPS}",
        "training.logs.interval=1",
        f"run.experiment_dir={experiment}",
        *further,
    ]


def run(arguments: list[str]) -> int:
    """Train in this process, on all cores."""
    return train(preflight(read(None, arguments), 1, weights=True))


def validation_loss(model: Any, data: Path) -> float:
    """transformers' mean loss of the run's validation sequences."""
    dataset = open_dataset(DataConfig(path=[str(data)], split=SPLIT), LENGTH, SEED, 49152)
    sequences = torch.stack(
        [torch.from_numpy(dataset.read("validation", i).tokens) for i in range(8)]
    ).long()
    with torch.no_grad():
        logits = model.eval()(sequences[:, :-1]).logits.float()
    return float(cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten()))


def reference(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def ours(folder: Path, tokens: Tensor) -> Tensor:
    """Logits of a folder by this project's own model, in fp32."""
    config = BaseModelConfig.model_validate(
        llama.FAMILY.architecture(huggingface.read_json(folder / "config.json"), "")
    )
    model = CausalLM(config)
    with torch.no_grad():
        load_weights(dict(model.named_parameters()), folder, FAMILIES["llama"])
        found: Tensor = model(tokens, torch.arange(tokens.shape[1]).expand(tokens.shape))
    return found


def test_ids_are_the_tokenizers(model: Path, documents: Path, data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    (entry,) = json.loads(data.read_text())["datasets"]
    file = TokenFile(data.parent / entry["prefix"])
    starts = [file.start_of(i) for i in range(file.documents)] + [file.tokens]
    found = [file.tokens_at(*part).tolist() for part in pairwise(starts)]
    texts = [path.read_text(encoding="utf-8") for path in sorted(documents.iterdir())]
    expected = [
        [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        for text in texts
    ]
    assert len(found) > 60 and sorted(found) == sorted(expected)


def test_there_and_back_is_the_same_folder(model: Path, data: Path, tmp_path: Path) -> None:
    """The fp32 loss before the first step is transformers'; a bf16 export has the same bytes."""
    arguments = settings(
        model, data, tmp_path / "run", "training.train_iters=0", "training.export.data_type=bf16"
    )
    assert run(arguments) == 0
    loss = records(tmp_path / "run", "validation")[0]["language_model_loss"]
    assert loss == pytest.approx(validation_loss(reference(model), data), rel=1e-5)
    assert loss < 4  # the model knows code: a random one would have 10.8
    export = tmp_path / "run" / "export" / "llama" / "0"
    names = {path.name for path in model.iterdir()}
    assert {path.name for path in export.iterdir()} == names | {folders.MANIFEST, CARD}
    assert all((export / name).read_bytes() == (model / name).read_bytes() for name in names)


def test_the_model_learns_and_its_export_is_used(model: Path, data: Path, tmp_path: Path) -> None:
    further = [
        f"training.train_iters={STEPS}",
        "model.distributed.training_dtype=bf16",
        "optimizer.learning_rate.base=3e-4",
        "optimizer.learning_rate.warmup_iterations=2",
    ]
    assert run(settings(model, data, tmp_path / "run", *further)) == 0
    found = records(tmp_path / "run", "validation")
    before, after = (found[step]["language_model_loss"] for step in (0, STEPS))
    assert after < before - 0.01
    export = tmp_path / "run" / "export" / "llama" / str(STEPS)
    theirs = reference(export)
    # The run computes with the fp32 weights rounded to bf16, as the export has them, and in bf16.
    assert validation_loss(theirs, data) == pytest.approx(after, abs=5e-3)
    tokenizer = AutoTokenizer.from_pretrained(export)
    tokens = tokenizer("def read_json(path):\n    ", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = theirs(tokens).logits
    torch.testing.assert_close(ours(export, tokens), expected, rtol=1e-4, atol=1e-3)
    written = theirs.generate(tokens, max_new_tokens=16, do_sample=False)[0, tokens.shape[1] :]
    assert len(written) == 16 or written[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(written, skip_special_tokens=True).strip()
    fact = tokenizer("Paris is the capital of", return_tensors="pt").input_ids
    assert "France" in tokenizer.decode(theirs.generate(fact, max_new_tokens=4, do_sample=False)[0])
