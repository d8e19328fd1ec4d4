"""Twenty steps of every family against a plain loop of transformers and torch.optim.AdamW."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from fast_llm.config.train import DataConfig
from fast_llm.data.dataset import open_dataset
from fast_llm.models import FAMILIES
from tests.families.architectures import VOCABULARY, architecture
from tests.families.reference import make
from tests.families.test_layouts import arguments
from tests.training.runs import losses, run, write_tokens

STEPS, BATCH, LENGTH, RATE = 20, 4, 24, 1e-3
SETTINGS = [
    f"training.train_iters={STEPS}",
    f"training.export.interval={STEPS}",
    f"training.checkpoint.interval={STEPS}",
    "batch.cross_document_attention=yes",  # a condition of the plain loop
    f"optimizer.learning_rate.base={RATE}",
    "optimizer.learning_rate.decay_style=constant",
    "optimizer.weight_decay=0.1",
    # Adam divides gradients that are 0 but for rounding by themselves, unless epsilon is above.
    "optimizer.epsilon=1e-4",
    "optimizer.gradient_norm_clipping=1.0",
]


def plain_loop(start: Path, tokens: Path) -> tuple[torch.nn.Module, list[float]]:
    """Train transformers' model on the run's sequences: the model, and the loss of each step."""
    model = AutoModelForCausalLM.from_pretrained(
        start, dtype=torch.float32, attn_implementation="eager"
    )
    if hasattr(model.config, "num_local_experts"):
        model.set_experts_implementation("eager")
    decays = {
        name: weight.dim() > 1 and "bias" not in name for name, weight in model.named_parameters()
    }
    groups = [
        {"params": [w for n, w in model.named_parameters() if decays[n] == yes], "weight_decay": d}
        for yes, d in ((True, 0.1), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.999), eps=1e-4)
    config = DataConfig(format="list", path=[str(tokens)], split=[1, 0, 0])
    dataset = open_dataset(config, LENGTH, 1234, VOCABULARY)
    expected = []
    for step in range(STEPS):
        read = [dataset.read("training", step * BATCH + row).tokens for row in range(BATCH)]
        sequences = torch.stack([torch.from_numpy(each) for each in read])
        logits = model(sequences[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model, expected


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps_equal_a_plain_loop(tmp_path: Path, family: str) -> None:
    values = architecture(family) | {"tie_word_embeddings": False}
    if family in ("qwen3_moe", "mixtral"):
        values |= {"router_aux_loss_coef": 0.0}
    write_tokens(tmp_path / "tokens", vocabulary=VOCABULARY)
    make(family, values, tmp_path / "untied")
    assert run(arguments(tmp_path, "run", False, SETTINGS)) == 0
    model, expected = plain_loop(tmp_path / "untied", tmp_path / "tokens")
    found = losses(tmp_path / "run")
    assert found[STEPS] < found[1]  # the model learns
    for number, wanted in enumerate(expected, start=1):
        assert abs(found[number] - wanted) < 1e-5 * wanted, number
    trained = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "export" / family / str(STEPS), dtype=torch.float32
    )
    wanted_weights = model.state_dict()
    for name, weight in trained.state_dict().items():
        # Rounding of gradients, divided by their size or by epsilon.
        distance = (weight - wanted_weights[name]).norm()
        assert distance < 1e-5 * max(weight.norm(), weight.numel() ** 0.5 * 1e-2), name
