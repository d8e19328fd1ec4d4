"""Twenty steps of a model with experts against a plain loop of transformers and PyTorch's AdamW."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from fast_llm.config.train import DataConfig
from fast_llm.data.dataset import open_dataset
from tests.families.architectures import random_architecture
from tests.families.reference import make
from tests.helpers import slow, spawn
from tests.training.runs import records, run_all, settings, write_tokens

STEPS, COEFFICIENT = 20, 0.05


def plain_loop(start: Path, tokens: Path) -> tuple[Any, list[tuple[float, float]]]:
    """transformers' model, trained on the run's sequences; both losses of each step."""
    model = AutoModelForCausalLM.from_pretrained(
        start, dtype=torch.float32, attn_implementation="eager"
    )
    model.set_experts_implementation("eager")
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-4,
    )
    config = DataConfig(format="list", path=[str(tokens)], split=[1, 0, 0])
    dataset = open_dataset(config, 24, 1234, 96)
    found = []
    for step in range(STEPS):
        numbers = range(step * 8, step * 8 + 8)
        read = [torch.from_numpy(dataset.read("training", number).tokens) for number in numbers]
        sequences = torch.stack(read)
        out = model(sequences[:, :-1], output_router_logits=True, use_cache=False)
        loss = cross_entropy(out.logits.flatten(0, 1), sequences[:, 1:].flatten())
        sizes = model.config.num_local_experts, model.config.num_experts_per_tok
        of_layers = [load_balancing_loss_func((logits,), *sizes) for logits in out.router_logits]
        balancing = torch.stack([torch.as_tensor(one) for one in of_layers]).mean()
        found.append((loss.item(), balancing.item()))
        optimizer.zero_grad()
        (loss + COEFFICIENT * balancing).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model, found


@pytest.mark.parametrize(
    ("family", "processes"),
    [
        ("qwen3_moe", 1),
        pytest.param("mixtral", 1, marks=slow),
        pytest.param("qwen3_moe", 2, marks=slow),
        pytest.param("mixtral", 2, marks=slow),
    ],
)
def test_twenty_steps_equal_a_plain_loop(tmp_path: Path, family: str, processes: int) -> None:
    """Two processes divide the experts."""
    write_tokens(tmp_path / "tokens", 200, 96)
    experts = {"num_experts" if family == "qwen3_moe" else "num_local_experts": 8}
    values = random_architecture(family, 3) | experts | {"num_hidden_layers": 2}
    values |= {"num_experts_per_tok": 2, "router_aux_loss_coef": COEFFICIENT}
    make(family, values, tmp_path / "start")
    given = [
        # The shape comes from the model.
        *(word for word in settings(tmp_path) if not word.startswith("model.base_model")),
        f"pretrained.path={tmp_path}/start",
        f"batch.micro_batch_size={8 // processes}",
        f"training.train_iters={STEPS}",
        f"training.export.interval={STEPS}",
        "batch.cross_document_attention=yes",
        "data.split=[1,0,0]",
        "optimizer.weight_decay=0.1",
        "optimizer.learning_rate.base=1e-3",
        "optimizer.epsilon=1e-4",
        f"model.distributed.expert_parallel={processes}",
    ]
    assert spawn(processes, run_all, [given]) == [[0]] * processes
    model, expected = plain_loop(tmp_path / "start", tmp_path / "tokens")
    found = records(tmp_path / "run")
    for step, (loss, balancing) in enumerate(expected, start=1):
        assert found[step]["language_model_loss"] == pytest.approx(loss, rel=1e-5), step
        assert found[step]["expert_auxiliary_loss"] == pytest.approx(balancing, rel=1e-5), step
    exported = tmp_path / "run" / "export" / family / str(STEPS)
    trained = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).state_dict()
    for name, weight in model.state_dict().items():
        # fp32 rounding of twenty updates.
        assert (trained[name] - weight).norm() <= 1e-5 * weight.norm(), name
