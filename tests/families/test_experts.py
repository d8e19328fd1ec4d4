"""Models with experts against transformers: with router losses, and files with experts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from fast_llm.checkpoint.weights import export_hugging_face
from fast_llm.model.decoder import CausalLM
from fast_llm.model.experts import MixtureOfExperts
from fast_llm.models import family_of
from tests.families.architectures import random_architecture
from tests.families.reference import EXPERTS, gradients, inputs, make, our_loss, read, their_loss
from tests.helpers import some_fast

CASES = [(family, seed) for family in EXPERTS for seed in range(10)]
COEFFICIENT = 0.05  # times the mean loss of the layers


def routers(model: CausalLM) -> list[MixtureOfExperts]:
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


def load_balancing(model: Any) -> Tensor:
    """transformers' loss of each layer, averaged over the layers with experts."""
    logits = model.model(**inputs(model), output_router_logits=True).router_logits
    config = model.config
    losses = [
        load_balancing_loss_func((one,), config.num_local_experts, config.num_experts_per_tok)
        for one in logits
    ]
    return torch.stack([torch.as_tensor(loss) for loss in losses]).mean()


@pytest.mark.parametrize(("family", "seed"), some_fast(CASES, lambda one: one[1] == 0))
def test_gradients_with_load_balancing(tmp_path: Path, family: str, seed: int) -> None:
    values = random_architecture(family, seed)
    if family == "qwen3_moe":
        values |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    theirs = make(family, values, tmp_path)
    ours = read(tmp_path)
    every = routers(ours)
    for module in every:
        module.gate.losses.auxiliary_scale = COEFFICIENT / len(every)
    balancing = load_balancing(theirs)
    (their_loss(theirs) / 100 + COEFFICIENT * balancing).backward()
    (our_loss(ours) / 100).backward()
    sums = [module.gate.losses.sums for module in every]
    found = torch.stack([one for one in sums if one is not None])[:, 0].mean()
    assert float(found) == pytest.approx(float(balancing), rel=1e-5)
    wanted, got = gradients(theirs, ours), gradients(ours)
    for name, gradient in wanted.items():
        scale = max(gradient.norm(), wanted[name.replace(".bias", ".weight")].norm())
        # As in test_transformers.py.
        normed = ours.config.transformer.qk_norm != "none" and "self_attn" in name
        assert (got[name] - gradient).norm() <= (2e-5 if normed else 1e-5) * scale, name


def test_one_layer_has_the_loss_of_transformers(tmp_path: Path) -> None:
    """There transformers' loss, which sums over layers before it multiplies, is the same."""
    values = random_architecture("mixtral", 1) | {"num_hidden_layers": 1}
    theirs = make("mixtral", values, tmp_path)
    expected = theirs(**inputs(theirs), output_router_logits=True).aux_loss
    ours = read(tmp_path)
    our_loss(ours)
    (module,) = routers(ours)
    assert module.gate.losses.sums is not None
    assert float(module.gate.losses.sums[0]) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("family", EXPERTS)
def test_files_cut_anywhere_hold_the_same_experts(tmp_path: Path, family: str) -> None:
    """Also where the experts of one parameter lie in several files."""
    make(family, random_architecture(family, 1), tmp_path / "there")
    model = read(tmp_path / "there")
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    for parameters_per_file in (10**9, 1000):
        export_hugging_face(
            tmp_path / f"back {parameters_per_file}",
            weights,
            config={},
            dtype="fp32",
            files={},
            parameters_per_file=parameters_per_file,
            step=1,
            family=family_of(model.config),
        )
    original = load_file(tmp_path / "there" / "model.safetensors")
    for folder in tmp_path.glob("back *"):
        found: dict[str, Tensor] = {}
        for file in folder.glob("*.safetensors"):
            found |= load_file(file)
        assert found.keys() == original.keys()
        assert all(torch.equal(found[name], original[name]) for name in found)
