"""`fast-llm upcycle`: the new model computes what the dense one does, and learns."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fast_llm import cli
from fast_llm.models import FAMILIES
from fast_llm.training.upcycle import RECORD, TARGETS, upcycle
from tests.families.architectures import VOCABULARY, architecture
from tests.families.reference import batch, make, our_loss, read
from tests.training.runs import losses, run, settings, write_tokens

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    ("mistral", {"sliding_window": 5, "head_dim": 10, "tie_word_embeddings": False}),
    (
        "llama",
        {
            "rope_parameters": LLAMA3,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
        },
    ),
]


@pytest.mark.parametrize(("family", "further"), CASES)
def test_as_the_dense_model_in_transformers(
    tmp_path: Path, family: str, further: dict[str, Any]
) -> None:
    values = architecture(family) | further
    if "use_sliding_window" in values:
        values["use_sliding_window"] = False
    dense = make(family, values, tmp_path / "dense")
    upcycle(str(tmp_path / "dense"), str(tmp_path / "sparse"), 4, 2)
    sparse = AutoModelForCausalLM.from_pretrained(
        tmp_path / "sparse", dtype=torch.float32, attn_implementation="eager"
    )
    sparse.set_experts_implementation("eager")
    assert sparse.config.model_type == TARGETS[family]
    tokens = batch()[0]
    with torch.no_grad():
        wanted, found = (one(tokens, use_cache=False).logits for one in (dense, sparse))
        # fp32: two experts' halves are added instead of one whole.
        assert (found - wanted).norm() <= 2e-6 * wanted.norm()
        ours = our_loss(read(tmp_path / "sparse"))
        assert float(ours) == pytest.approx(float(our_loss(read(tmp_path / "dense"))), rel=1e-6)
    routers = [w for n, w in sparse.state_dict().items() if n.endswith("gate.weight")]
    assert len({tuple(w.flatten().tolist()) for w in routers}) == 4  # of each layer another
    for name, weight in sparse.state_dict().items():
        if "experts" in name:
            assert all(torch.equal(one, weight[0]) for one in weight), name
    card = (tmp_path / "sparse" / "README.md").read_text()
    assert "Each MLP of dense is now 4 experts" in card
    record = json.loads((tmp_path / "sparse" / RECORD).read_text())
    assert (record["experts"], record["experts_per_token"]) == (4, 2)


def test_experts_learn_different_things(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", 200, VOCABULARY)
    make("mistral", architecture("mistral"), tmp_path / "dense")
    command = ["upcycle", f"{tmp_path}/dense", f"{tmp_path}/sparse", "--experts", "4"]
    assert cli.main(command) == 0
    given = [
        *(word for word in settings(tmp_path) if not word.startswith("model.base_model")),
        f"pretrained.path={tmp_path}/sparse",
        "training.train_iters=20",
        "training.export.interval=20",
    ]
    assert run(given) == 0
    loss = losses(tmp_path / "run")
    assert loss[20] < loss[1]
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export" / "mixtral" / "20")
    for name, weight in trained.state_dict().items():
        if name.endswith("experts.down_proj"):
            assert not torch.equal(weight[0], weight[1]), name


@pytest.mark.parametrize(
    ("family", "further", "options", "problem"),
    [
        ("olmo2", {}, [], "its family is olmo2, which has no counterpart with experts"),
        ("llama", {"mlp_bias": True}, [], "cannot become a Mixtral model:"),
        ("qwen3", {"attention_bias": False}, ["--experts", "1"], "there must be two experts"),
        ("mistral", {}, ["--experts-per-token", "9"], "as many at least as compute a token"),
    ],
)
def test_mistakes(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    family: str,
    further: dict[str, Any],
    options: list[str],
    problem: str,
) -> None:
    make(family, architecture(family) | further, tmp_path / "dense")
    command = ["upcycle", f"{tmp_path}/dense", f"{tmp_path}/sparse", *options]
    assert cli.main(command) == 2
    assert problem in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "sparse").exists()
    (tmp_path / "sparse").mkdir()
    assert cli.main(command[:3]) == 2
    assert "exists already" in capsys.readouterr().err


def test_targets_are_families() -> None:
    assert TARGETS.keys() | set(TARGETS.values()) <= FAMILIES.keys()
