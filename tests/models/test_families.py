"""Every family: what its file says of parameters, against the model that is built."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fast_llm.config.document import Document
from fast_llm.config.model import BaseModelConfig
from fast_llm.config.validate import validate
from fast_llm.model.decoder import CausalLM
from fast_llm.models import FAMILIES
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
            assert find_entry(FAMILIES[name].tensor_plan, path) is not None, path


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(config=configs())
def test_an_exported_config_means_the_same_model(name: str, config: BaseModelConfig) -> None:
    family = FAMILIES[name]
    exported = family.export_config(None, config, "bf16", {})
    assert exported["model_type"] == name
    settings_again = family.architecture(exported, "config.json")
    again = validate(BaseModelConfig, Document(settings_again, {}, ""))
    assert family.shapes(again) == family.shapes(config)
