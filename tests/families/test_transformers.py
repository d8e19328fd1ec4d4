"""Every family computes what transformers computes: losses and gradients of random architectures.

fp32 on both sides, which sum the same numbers in other orders. A gradient's difference is at most
1e-5 of its norm, and 2e-5 in Gemma 2: docs/decisions/bounds-on-every-processor.md has what was
measured against float64.
"""

from pathlib import Path

import pytest

from tests.families.architectures import family_seeds, random_architecture
from tests.families.reference import gradients, make, our_loss, read, their_loss
from tests.helpers import some_fast


def larger(name: str) -> str:
    """The weight whose gradient has the size of the terms of another one that cancel.

    A bias of keys without rotation adds one number to all scores: its gradient is 0. The numbers of
    xIELU get one sum each over all activations.
    """
    above, activation, _ = name.partition("act_fn.")
    return f"{above}up_proj.weight" if activation else name.replace(".bias", ".weight")


@pytest.mark.parametrize(("family", "seed"), some_fast(family_seeds(12), lambda one: one[1] == 0))
def test_losses_and_gradients(tmp_path: Path, family: str, seed: int) -> None:
    theirs = make(family, random_architecture(family, seed), tmp_path)
    ours = read(tmp_path)
    expected, found = their_loss(theirs), our_loss(ours)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    expected.backward()
    found.backward()
    wanted, got = gradients(theirs, ours), gradients(ours)
    assert wanted.keys() == got.keys()
    t = ours.config.transformer
    for name, gradient in wanted.items():
        if name.endswith(("mlp.gate.weight", "mlp.gate.bias")) and (
            t.num_experts_per_token == 1 and t.normalize_expert_weights
        ):
            # The weight of the only expert is 1, whatever the router says: its gradient is 0.
            assert max(gradient.norm(), got[name].norm()) < 1e-5
            continue
        scale = max(gradient.norm(), wanted[larger(name)].norm())
        bound = 2e-5 if family == "gemma2" else 1e-5
        assert (got[name] - gradient).norm() <= bound * scale, name
