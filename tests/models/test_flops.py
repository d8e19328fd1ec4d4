"""FLOPs of a step with frozen parameters: those that PyTorch counts in a real step."""

from collections import Counter
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fast_llm.config.document import Document
from fast_llm.config.model import BaseModelConfig
from fast_llm.config.validate import validate
from fast_llm.model.decoder import CausalLM
from fast_llm.models import FAMILIES, family_of
from fast_llm.models.flops import BlockBackward
from tests.families.architectures import architecture
from tests.helpers import TINY

TOP = "all but the head"
FROZEN = {
    "nothing": [],
    "the embedding": ["model.embed_tokens.weight"],
    TOP: ["model.*"],
    "the first block": ["model.embed_tokens.weight", "model.layers.0.*"],
    "the head and an MLP": ["lm_head.weight", "model.layers.1.mlp.*"],
    "all but one down projection": ["*embed*", "lm_head*", "model.norm*", "*.0.*", "*.1.[si]*",
                                    "*.1.post*", "*.1.mlp.[gu]*"],
    "all but biases and norms": ["*_proj.weight", "*embed*", "lm_head*"],
    "all but the second block's norm of queries": ["*embed*", "lm_head*", "*.0.*", "*.1.*_proj*",
                                                   "*.1.*layernorm*", "model.norm*"],
}  # fmt: skip


def counted(config: BaseModelConfig, frozen: set[str], length: int) -> tuple[float, int]:
    """FLOPs of matmuls in a step, and how many attentions are differentiated."""
    torch.manual_seed(0)
    model = CausalLM(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
        parameter.requires_grad_(name not in frozen)
    tokens = torch.randint(config.vocab_size, (2, length + 1))
    positions = torch.arange(length)[None]
    seen = Calls()
    with FlopCounterMode(display=False) as counter, seen:
        model(tokens[:, :-1], positions, None, tokens[:, 1:]).backward()
    assert seen.names["forward"] == config.transformer.num_layers
    return sum(counter.get_flop_counts()["Global"].values()), seen.names["backward"]


class Calls(TorchDispatchMode):
    """Counts the calls of attention, whose FLOPs PyTorch does not count on CPUs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention" in str(func):
            self.names["backward" if "backward" in str(func) else "forward"] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("case", "tied"),
    # A tied head is the embedding.
    [(case, tied) for case in FROZEN for tied in (False, True) if (case, tied) != (TOP, True)],
)
def test_what_is_frozen_is_not_computed(case: str, tied: bool) -> None:
    transformer = {**TINY["transformer"], "qk_norm": "head", "add_linear_biases": "everywhere"}
    values = {
        **TINY,
        "family": "qwen3",
        "tie_word_embeddings": tied,
        "transformer": transformer,
    }
    config, length = validate(BaseModelConfig, Document(values, {}, "")), 16
    family = family_of(config)
    names = list(family.shapes(config))
    frozen = {name for name in names if any(fnmatchcase(name, one) for one in FROZEN[case])}
    matmuls, attentions = counted(config, frozen, length)
    cost = family.cost(config, length, frozen)
    blocks, _ = family.backward(config, frozen)
    assert attentions == sum(block.attention for block in blocks)
    t = config.transformer
    scores = 2 * t.num_attention_heads * t.kv_channels * length  # forward, of a token and block
    expected = cost.model_flops_per_token - sum(scores * (1 + 2 * one.attention) for one in blocks)
    assert matmuls == pytest.approx(2 * length * expected, rel=1e-9)


def test_nothing_frozen_is_the_same_cost() -> None:
    config = validate(BaseModelConfig, Document(TINY, {}, ""))
    family = family_of(config)
    assert family.cost(config, 64, frozenset()) == family.cost(config, 64)
    blocks, head = family.backward(config)
    assert {*blocks, head} == {BlockBackward()}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_counts_all_of_its_matrices(name: str) -> None:
    """Counted matrix by matrix, a step costs what the formula of the whole model says."""
    values = architecture(name) | {"model_type": name, "tie_word_embeddings": False}
    settings = FAMILIES[name].architecture(values, "config.json")
    config = validate(BaseModelConfig, Document(settings, {}, ""))
    whole, part = (FAMILIES[name].cost(config, 40, frozen) for frozen in ((), ("lm_head.weight",)))
    head = 2 * config.transformer.hidden_size * config.vocab_size
    for count in ("model_flops_per_token", "hardware_flops_per_token"):
        difference = getattr(whole, count) - getattr(part, count)
        assert difference == pytest.approx(head, rel=1e-9), count
