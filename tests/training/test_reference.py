"""Fifty steps of training against a plain loop of transformers and torch.optim.AdamW."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, LlamaForCausalLM

from fast_llm.config.train import DataConfig
from fast_llm.data.dataset import open_dataset
from tests.helpers import slow
from tests.training.runs import losses, run, settings, write_tokens

STEPS = 50


def plain_loop(
    start: Path, tokens: Path, documents: list[np.ndarray], z_loss: float
) -> tuple[LlamaForCausalLM, list[float]]:
    """Train transformers' model by PyTorch's AdamW, on the run's sequences: the model, and the loss
    of each step. `z_loss`: weight of the mean of (log Σ exp(logits))².
    """
    model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    config = DataConfig(format="list", path=[str(tokens)], split=[1, 0, 0])
    dataset = open_dataset(config, 24, 1234, 128)
    flat = torch.cat([torch.from_numpy(d) for d in documents])
    expected = []
    for step in range(1, STEPS + 1):
        sequences = torch.stack(
            [
                torch.from_numpy(dataset.read("training", (step - 1) * 8 + i).tokens)
                for i in range(8)
            ]
        )
        for sequence in sequences:  # each is a part of the documents
            assert any(
                torch.equal(flat[k : k + 25], sequence) for k in range(0, len(flat) - 24, 24)
            )
        logits = model(sequences[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())
        expected.append(loss.item())
        optimizer.zero_grad()
        z = torch.logsumexp(logits, -1).square().mean()
        (loss + z_loss * z).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * rate(step)
        optimizer.step()
    return model, expected


def rate(step: int) -> float:
    """Warmup over 5 steps, then a cosine, as a factor."""
    if step < 5:
        return step / 5
    angle = torch.tensor(torch.pi * (step - 5) / (STEPS - 5), dtype=torch.float64)
    return 0.5 * (1 + torch.cos(angle).item())


@pytest.mark.parametrize(
    ("tied", "z_loss"), [(True, 0.0), (False, 0.0), pytest.param(False, 0.01, marks=slow)]
)
def test_fifty_steps_equal_a_plain_loop(tmp_path: Path, tied: bool, z_loss: float) -> None:
    documents = write_tokens(tmp_path / "tokens")
    run(
        settings(
            tmp_path,
            f"model.base_model.tie_word_embeddings={'yes' if tied else 'no'}",
            "training.train_iters=0",
            "training.export.interval=1",
            "run.experiment_dir=" + str(tmp_path / "start"),
        )
    )
    start = tmp_path / "start" / "export" / "llama" / "0"
    run(
        settings(
            tmp_path,
            f"pretrained.path={start}",
            f"training.train_iters={STEPS}",
            f"training.export.interval={STEPS}",
            "batch.cross_document_attention=yes",  # a condition of the plain loop
            "data.split=[1,0,0]",
            f"model.base_model.z_loss_coefficient={z_loss}",
            "optimizer.weight_decay=0.1",
            "optimizer.learning_rate.decay_style=cosine",
            f"optimizer.learning_rate.decay_iterations={STEPS}",
            "optimizer.learning_rate.warmup_iterations=5",
        )
    )
    model, expected = plain_loop(start, tmp_path / "tokens", documents, z_loss)
    found = losses(tmp_path / "run")
    assert found[1] > 4 and found[STEPS] < found[1] - 0.5  # the model learns
    for number, wanted in enumerate(expected, start=1):
        assert abs(found[number] - wanted) < 1e-5 * wanted, number
    trained = load_file(tmp_path / "run" / "export" / "llama" / str(STEPS) / "model.safetensors")
    for name, weight in model.state_dict().items():
        if name in trained:
            # Rounding differs by 1e-7 a step, which Adam's division magnifies for weights with tiny
            # gradients.
            assert (trained[name] - weight).norm() < 1e-5 * weight.norm(), name
    assert AutoConfig.from_pretrained(start).tie_word_embeddings == tied
