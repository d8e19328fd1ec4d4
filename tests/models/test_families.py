"""Each family's shapes and tensor plan, compared with the model that is built."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fast_llm.config.document import Document
from fast_llm.config.families import FamilyName
from fast_llm.config.model import BaseModelConfig, TransformerConfig
from fast_llm.config.validate import validate
from fast_llm.model.decoder import CausalLM
from fast_llm.models import FAMILIES
from fast_llm.models.parameters import attended_length
from fast_llm.models.tensor_plan import find_entry


@st.composite
def configs(draw: st.DrawFn) -> BaseModelConfig:
    groups = draw(st.integers(1, 3))
    transformer = {
        "num_layers": draw(st.integers(1, 3)),
        "hidden_size": draw(st.integers(1, 40)),
        "num_attention_heads": groups * draw(st.integers(1, 3)),
        "head_groups": groups,
        "kv_channels": 2 * draw(st.integers(1, 8)),
        "ffn_hidden_size": draw(st.integers(1, 50)),
        "add_linear_biases": draw(
            st.sampled_from(["nowhere", "everywhere", "only_attention", "only_mlp"])
        ),
    }
    values = {
        "vocab_size": draw(st.integers(1, 99)),
        "tie_word_embeddings": draw(st.booleans()),
        "transformer": transformer,
    }
    return validate(BaseModelConfig, Document(values, {}, ""))


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(config=configs(), length=st.integers(1, 4096))
def test_shapes_are_those_of_the_model(name: str, config: BaseModelConfig, length: int) -> None:
    with torch.device("meta"):
        built = {name: tuple(p.shape) for name, p in CausalLM(config).named_parameters()}
    family = FAMILIES[name]
    assert family.shapes(config) == built
    assert family.embedding in built
    assert (family.head in built) == (not config.tie_word_embeddings)
    assert family.cost(config, length).parameters == sum(map(math.prod, built.values()))


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=20, deadline=None)
@given(config=configs())
def test_the_tensor_plan_has_every_parameter(name: str, config: BaseModelConfig) -> None:
    with torch.device("meta"):
        model = CausalLM(config)
    for path, module in model.named_modules():
        if list(module.named_parameters(recurse=False)):
            assert find_entry(FAMILIES[name].tensor_plan(config), path) is not None, path


@pytest.mark.parametrize("name", FAMILIES)
def test_names_are_those_of_the_settings(name: str) -> None:
    assert name in get_args(FamilyName)
    assert len(FAMILIES) == len(get_args(FamilyName))


def test_a_window_leaves_the_keys_that_a_query_sees() -> None:
    """FLOPs of attention: twice the mean number of keys, of all layers."""
    transformer = {"num_layers": 4, "layer_types": [*["sliding_attention"] * 3, "full_attention"]}
    t = validate(TransformerConfig, Document(transformer | {"window_size": 64}, {}, ""))
    length = 1000
    seen = np.minimum(np.arange(length) + 1, 64).mean()
    expected = (3 * 2 * seen + length) / 4
    assert attended_length(t, length) == pytest.approx(expected, rel=1e-2)
    assert attended_length(t, 50) == 50
