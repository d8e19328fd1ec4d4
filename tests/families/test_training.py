"""Every family with compiled blocks, in bf16 with 8-bit moments, and resumed.

Slow: all but one family.
"""

from pathlib import Path
from typing import Any

import pytest

from fast_llm.models import FAMILIES
from tests.families.architectures import VOCABULARY, architecture
from tests.families.reference import make
from tests.families.test_layouts import D, arguments
from tests.helpers import needs_compiler, some_fast
from tests.training.runs import losses, run, weights, write_tokens

BF16 = [f"{D}.training_dtype=bf16", "optimizer.moments_dtype=int8"]
COMPILED = "model.multi_stage.compile_all=yes"


def families(*fast: str) -> list[Any]:
    return some_fast(FAMILIES, lambda name: name in fast)


def model(root: Path, family: str) -> None:
    write_tokens(root / "tokens", vocabulary=VOCABULARY)
    make(family, architecture(family) | {"tie_word_embeddings": True}, root / "tied")


def train(root: Path, name: str, *further: str) -> dict[int, float]:
    """The losses of a run, which has a checkpoint of each step."""
    assert run(arguments(root, name, True, ["training.train_iters=4", *further])) == 0
    return losses(root / name)


@pytest.mark.parametrize("family", families("gemma3_text"))
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, family: str) -> None:
    """With weights in bf16, the low bits of their masters, and 8-bit moments."""
    model(tmp_path, family)
    undisturbed = train(tmp_path, "whole", *BF16)
    train(tmp_path, "resumed", *BF16, "training.train_iters=2")
    again = train(tmp_path, "resumed", *BF16)
    assert again == undisturbed
    one, other = (weights(tmp_path / name / "checkpoint" / "4") for name in ("whole", "resumed"))
    assert one == other


@pytest.mark.parametrize("family", families())
def test_bf16_with_small_moments_is_near_fp32(tmp_path: Path, family: str) -> None:
    """bf16 has 8 bits: losses of 4 steps differed by at most 0.04 %, and 0.2 % with experts, of
    which some tokens get others.
    """
    model(tmp_path, family)
    exact, rounded = train(tmp_path, "fp32"), train(tmp_path, "bf16", *BF16)
    assert rounded == pytest.approx(exact, rel=5e-3)
    assert rounded != exact


@needs_compiler
@pytest.mark.parametrize("family", families())
def test_compiled_blocks_compute_the_same(tmp_path: Path, family: str) -> None:
    """fp32, in another order of sums: first losses to 1e-6, later ones after updates to 1e-5."""
    model(tmp_path, family)
    plain, compiled = train(tmp_path, "plain"), train(tmp_path, "compiled", COMPILED)
    assert compiled[1] == pytest.approx(plain[1], rel=1e-6)
    assert compiled == pytest.approx(plain, rel=1e-5)
