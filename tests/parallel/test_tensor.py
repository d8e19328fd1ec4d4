"""A family's tensor plan covers its model, pattern by pattern."""

import torch

from fast_llm.config.document import Document
from fast_llm.config.model import BaseModelConfig
from fast_llm.config.validate import validate
from fast_llm.model.decoder import CausalLM
from fast_llm.models.parameters import tensor_plan
from fast_llm.models.tensor_plan import Columns, Rows, find_entry
from tests.helpers import TINY


def test_each_module_with_weights_has_an_entry_and_each_entry_a_module() -> None:
    config = validate(BaseModelConfig, Document(TINY, {}, ""))
    plan = tensor_plan(config)
    with torch.device("meta"):
        model = CausalLM(config)
    names = dict(model.named_modules())
    for name, module in names.items():
        own = list(module.named_parameters(recurse=False))
        assert not own or find_entry(plan, name) is not None, name
    for pattern, entry in plan.items():
        found = [name for name in names if find_entry({pattern: entry}, name)]
        assert found or pattern == "*.act_fn", pattern  # a module in families with xIELU
    assert find_entry(plan, "model.layers.1.self_attn.o_proj") == Columns()
    assert find_entry(plan, "model.layers.1.mlp.up_proj") == Rows()
    assert find_entry(plan, "model.layers.1") is None
