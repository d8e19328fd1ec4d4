"""config.json of published models: read as transformers reads them, or refused.

`published.json` has the values, and where each was read: files, tests and logs of public
repositories that quote a model's config.json. Where no repository is named, a search of public code
found the text by its words, without a place. Numbers of parameters are those of Keras Hub.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from fast_llm.config.document import Document
from fast_llm.config.model import BaseModelConfig
from fast_llm.config.validate import validate
from fast_llm.errors import CheckpointError, ConfigError
from fast_llm.models import FAMILIES, family_of, family_of_json
from tests.families.architectures import VOCABULARY
from tests.families.reference import make, our_loss, read, their_loss
from tests.helpers import some_fast

Config = dict[str, Any]
MODELS = json.loads(Path(__file__).with_name("published.json").read_text())
READ = [one for one in MODELS if "refused" not in one]
FAST = (
    "Ministral 3 3B Reasoning, text",
    "Gemma 3 1B",
    "OLMo 3 7B Think DPO",
    "EXAONE 4 32B",
)
NAMES = some_fast([one["model"] for one in READ], lambda name: name in FAST)


def published(model: str) -> Config:
    return next(dict(one["config"]) for one in READ if one["model"] == model)


def settings(config: Config) -> BaseModelConfig:
    values = family_of_json(config, "config.json").architecture(config, "config.json")
    return validate(BaseModelConfig, Document(values, {}, ""))


def completed(config: Config) -> Config:
    """The file as transformers writes it: with all defaults, in its newest spelling."""
    written: Config = json.loads(AutoConfig.for_model(**config).to_json_string(use_diff=False))
    return written


def test_every_family_has_a_published_model() -> None:
    assert {one["config"]["model_type"] for one in READ} == set(FAMILIES)
    assert len({one["model"] for one in MODELS}) == len(MODELS)
    assert all(one["source"] for one in MODELS)


@pytest.mark.parametrize("one", READ, ids=lambda one: one["model"])
def test_files_mean_what_transformers_reads(one: Config) -> None:
    found = settings(one["config"])
    assert found == settings(completed(one["config"]))
    if "parameters" in one:
        assert family_of(found).cost(found, 1).parameters == one["parameters"]


@pytest.mark.parametrize(
    "one", [one for one in MODELS if "refused" in one], ids=lambda o: o["model"]
)
def test_others_are_refused_with_a_reason(one: Config) -> None:
    with pytest.raises(CheckpointError) as caught:
        settings(one["config"])
    assert one["refused"] in str(caught.value)


@pytest.mark.parametrize("model", NAMES)
def test_absent_keys_have_the_defaults_of_transformers(model: str) -> None:
    """Each key in turn is left out, and given as null where transformers accepts it."""
    config = published(model)
    compared = 0
    for key in config.keys() - {"model_type"}:
        rest = {name: value for name, value in config.items() if name != key}
        for less in (rest, {**config, key: None}):
            try:
                found = settings(less)
            except (CheckpointError, ConfigError):
                continue  # said, not read otherwise
            try:
                theirs = completed(less)
            except Exception:  # transformers refuses it, in one of many ways
                continue
            assert found == settings(theirs), (key, key in less)
            compared += 1
    assert compared > len(config) / 2


@pytest.mark.parametrize("model", NAMES)
def test_small_ones_have_the_loss_of_transformers(tmp_path: Path, model: str) -> None:
    config = shrunk(published(model))
    arguments = {key: value for key, value in config.items() if key != "model_type"}
    theirs = make(config["model_type"], arguments, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))  # in the published spelling
    expected = float(their_loss(theirs).detach())
    assert float(our_loss(read(tmp_path)).detach()) == pytest.approx(expected, rel=1e-6)


def shrunk(config: Config) -> Config:
    """The same architecture with few small layers, whose window and scaling begin early."""
    small = dict(config)
    heads: int = config["num_attention_heads"]
    layers = min(config["num_hidden_layers"], 8)
    groups: int = config.get("num_key_value_heads", heads)
    small |= {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 40,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": max(1, 4 * groups // heads),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    fewer = {
        "head_dim": 10,
        "sliding_window": 7,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "max_window_layers": layers,
    }
    small |= {key: value for key, value in fewer.items() if config.get(key) is not None}
    for key in ("layer_types", "no_rope_layers"):
        if config.get(key) is not None:
            small[key] = config[key][:layers]
    for key in ("rope_scaling", "rope_parameters"):
        if "original_max_position_embeddings" in (config.get(key) or {}):
            small[key] = {**config[key], "original_max_position_embeddings": 16}
        # A factor for each pair of rotated channels.
        width = (small.get("head_dim") or 16) * config.get("partial_rotary_factor", 1)
        for name in ("short_factor", "long_factor"):
            if name in (config.get(key) or {}):
                small[key] = {**small[key], name: config[key][name][: int(width) // 2]}
    return {key: value for key, value in small.items() if key not in ("torch_dtype", "dtype")}
