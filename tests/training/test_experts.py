"""Twenty steps of a model with experts against a plain loop of transformers and PyTorch's AdamW."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from fast_llm import cli
from fast_llm.checkpoint import state
from fast_llm.config.train import DataConfig
from fast_llm.data.dataset import open_dataset
from fast_llm.errors import ConfigError
from tests.families.architectures import random_architecture
from tests.families.reference import make
from tests.helpers import slow, spawn
from tests.training.runs import records, run, run_all, settings, weights, write_tokens

STEPS, COEFFICIENT = 20, 0.05
BIAS = "model.base_model.transformer.expert_bias_update_rate"
RATE = 0.003


class Biased:
    """transformers' router with a bias that takes part in the choice of experts alone."""

    def __init__(self, router: Any):
        self.router, self.bias = router, torch.zeros(router.num_experts)
        self.counts = torch.zeros(router.num_experts)
        router.forward = self

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden.flatten(0, -2) @ self.router.weight.t()
        probabilities = logits.softmax(-1)
        chosen = (probabilities + self.bias).topk(self.router.top_k, dim=-1).indices
        weights = probabilities.gather(-1, chosen)
        if getattr(self.router, "norm_topk_prob", True):
            weights = weights / weights.sum(-1, keepdim=True)
        self.counts = torch.bincount(chosen.flatten(), minlength=len(self.bias))
        return logits, weights, chosen

    def update(self) -> None:
        """Wang et al. 2024, algorithm 1."""
        for expert, count in enumerate(self.counts.tolist()):
            error = self.counts.double().mean().item() - count
            self.bias[expert] += RATE * ((error > 0) - (error < 0))


def plain_loop(
    start: Path, tokens: Path, with_biases: bool
) -> tuple[Any, list[tuple[float, float]], dict[str, Tensor]]:
    """transformers' model, trained on the run's sequences; both losses of each step; the biases of
    each layer with experts, by their names in checkpoints.
    """
    model = AutoModelForCausalLM.from_pretrained(
        start, dtype=torch.float32, attn_implementation="eager"
    )
    model.set_experts_implementation("eager")
    biased = {
        f"router_bias/layers.{name.split('.')[2]}": Biased(router)  # model.layers.N.mlp.gate
        for name, router in list(model.named_modules())
        if with_biases and name.endswith(".gate")
    }
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
        balancing = torch.zeros(())
        if not with_biases:
            of_layers = [load_balancing_loss_func((one,), *sizes) for one in out.router_logits]
            balancing = torch.stack([torch.as_tensor(one) for one in of_layers]).mean()
        found.append((loss.item(), balancing.item()))
        optimizer.zero_grad()
        (loss + COEFFICIENT * balancing).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for each in biased.values():
            each.update()
    return model, found, {name: each.bias for name, each in biased.items()}


@pytest.mark.parametrize(
    ("family", "processes", "biases"),
    [
        ("qwen3_moe", 1, False),
        pytest.param("mixtral", 1, False, marks=slow),
        pytest.param("qwen3_moe", 2, False, marks=slow),
        pytest.param("mixtral", 2, False, marks=slow),
        ("mixtral", 1, True),
        pytest.param("qwen3_moe", 2, True, marks=slow),
    ],
)
def test_twenty_steps_equal_a_plain_loop(
    tmp_path: Path, family: str, processes: int, biases: bool
) -> None:
    """Two processes divide the experts. Load is balanced by a loss, or by biases."""
    write_tokens(tmp_path / "tokens", 200, 96)
    experts = {"num_experts" if family == "qwen3_moe" else "num_local_experts": 8}
    values = random_architecture(family, 3) | experts | {"num_hidden_layers": 2}
    coefficient = 0.0 if biases else COEFFICIENT
    values |= {"num_experts_per_tok": 2, "router_aux_loss_coef": coefficient}
    make(family, values, tmp_path / "start")
    given = [
        # The shape comes from the model.
        *(word for word in settings(tmp_path) if not word.startswith("model.base_model")),
        f"pretrained.path={tmp_path}/start",
        f"batch.micro_batch_size={8 // processes}",
        f"training.train_iters={STEPS}",
        f"training.export.interval={STEPS}",
        f"training.checkpoint.interval={STEPS}",
        f"{BIAS}={RATE if biases else 'null'}",
        "batch.cross_document_attention=yes",
        "data.split=[1,0,0]",
        "optimizer.weight_decay=0.1",
        "optimizer.learning_rate.base=1e-3",
        "optimizer.epsilon=1e-4",
        f"model.distributed.expert_parallel={processes}",
    ]
    assert spawn(processes, run_all, [given]) == [[0]] * processes
    model, expected, wanted = plain_loop(tmp_path / "start", tmp_path / "tokens", biases)
    found = records(tmp_path / "run")
    for step, (loss, balancing) in enumerate(expected, start=1):
        assert found[step]["language_model_loss"] == pytest.approx(loss, rel=1e-5), step
        if not biases:
            assert found[step]["expert_auxiliary_loss"] == pytest.approx(balancing, rel=1e-5), step
    if biases:
        there = {name: torch.full_like(bias, torch.nan) for name, bias in wanted.items()}
        state.load(tmp_path / "run" / "checkpoint" / str(STEPS), there)
        for name, bias in wanted.items():
            assert bias.any() and torch.equal(there[name], bias)  # sums of ± the rate
    assert bool(wanted) == biases
    exported = tmp_path / "run" / "export" / family / str(STEPS)
    trained = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).state_dict()
    for name, weight in model.state_dict().items():
        # fp32 rounding of twenty updates.
        assert (trained[name] - weight).norm() <= 1e-5 * weight.norm(), name


SMALL = [
    "model.base_model.family=mixtral",
    "model.base_model.transformer.num_experts=4",
    "model.base_model.transformer.num_experts_per_token=2",
    "training.checkpoint.interval=2",
]


def test_biases_are_resumed_to_the_bit(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", 200)
    given = [*settings(tmp_path), *SMALL, f"{BIAS}=0.01"]
    once = f"run.experiment_dir={tmp_path}/once"
    assert run([*given, "training.train_iters=4", once]) == 0
    assert run([*given, "training.train_iters=2"]) == 0
    assert run([*given, "training.train_iters=4"]) == 0
    wanted, found = (weights(tmp_path / name / "checkpoint" / "4") for name in ("once", "run"))
    assert found == wanted
    biases = [name for name in wanted if "router_bias/" in name]
    assert len(biases) == 2
    before = weights(tmp_path / "once" / "checkpoint" / "2")
    assert all(before[name] != wanted[name] for name in biases)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    shown = capsys.readouterr()
    return " ".join((shown.out + shown.err).split())


def test_biases_that_begin_stay_and_are_refused_to_vanish(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tokens(tmp_path / "tokens", 200)
    given = [*settings(tmp_path), *SMALL]
    assert run([*given, "training.train_iters=2"]) == 0
    assert run([*given, "training.train_iters=4", f"{BIAS}=0.01"]) == 0
    assert "Biases of routers begin at 0" in said(capsys)
    assert run([*given, "training.train_iters=6", f"{BIAS}=0"]) == 0
    four, six = (weights(tmp_path / "run" / "checkpoint" / step) for step in ("4", "6"))
    biases = [name for name in four if "router_bias/" in name]
    assert biases and all(four[name] == six[name] for name in biases)
    with pytest.raises(ConfigError, match=r"expert_bias_update_rate: given null, but .*: 0 keeps"):
        run([*given, "training.train_iters=8"])
    # Another run that starts from the checkpoint.
    start = [
        f"pretrained.path={tmp_path}/run/checkpoint/6",
        f"run.experiment_dir={tmp_path}/second",
        "training.train_iters=0",
        "training.export.interval=1",
    ]
    capsys.readouterr()
    assert run([*given, *start, f"{BIAS}=0"]) == 0
    assert "exports leave the biases of routers out" in said(capsys)
    second = weights(tmp_path / "second" / "checkpoint" / "0")
    assert {name: second[name] for name in biases} == {name: six[name] for name in biases}
    capsys.readouterr()
    other = f"run.experiment_dir={tmp_path}/third"
    assert run([*given, *start, other]) == 0
    assert f"the biases of its routers are not used; to use them set {BIAS}" in said(capsys)
    capsys.readouterr()
    assert (
        cli.main(
            ["convert", f"input.path={tmp_path}/run/checkpoint/6", f"output.path={tmp_path}/out"]
        )
        == 0
    )
    assert "the biases of its routers are left out" in said(capsys)


def test_biases_need_experts(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    with pytest.raises(ConfigError, match=r"bias_update_rate: given 0\.01, but the model has"):
        run([*settings(tmp_path), "training.train_iters=1", f"{BIAS}=0.01"])
