"""config.json of every family: both spellings, exports of what was read, exports from scratch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from fast_llm.checkpoint import huggingface
from fast_llm.checkpoint.weights import export_hugging_face
from fast_llm.config.document import Document
from fast_llm.config.model import BaseModelConfig
from fast_llm.config.validate import validate
from fast_llm.model.decoder import CausalLM
from fast_llm.models import FAMILIES, contradictions, family_of
from tests.families.architectures import family_seeds, random_architecture
from tests.families.reference import EXPERTS, make, read, settings_of, their_loss
from tests.helpers import some_fast

# Types of positions that the architectures below cannot change to: phi3 knows two; full layers of
# EXAONE 4 have none; Ministral 3 has one original length for positions and for its temperature.
CANNOT = {"phi3": ("yarn",), "exaone4": ("yarn", "default"), "ministral3": ("yarn",)}
CASES = some_fast(family_seeds(6), lambda one: one[1] == 0)


def published(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json of transformers 5 in the spelling of most published models."""
    rope = config.pop("rope_parameters")
    full, sliding = rope.get("full_attention", rope), rope.get("sliding_attention")
    scaling = {key: value for key, value in full.items() if key != "rope_theta"}
    # Without `rope_scaling`, transformers scales an Apertus.
    plain = scaling["rope_type"] == "default" and config["model_type"] != "apertus"
    share = full.get("partial_rotary_factor")
    later = {
        **config,
        **({} if share is None else {"partial_rotary_factor": share}),
        "rope_theta": full["rope_theta"],
        "rope_scaling": None if plain else scaling,
        "torch_dtype": config["dtype"],
    }
    del later["dtype"]
    if sliding is not None and config["model_type"] == "gemma3_text":
        later["rope_local_base_freq"] = sliding["rope_theta"]
    return later


def export(model: CausalLM, source: dict[str, Any] | None, folder: Path) -> None:
    config = family_of(model.config).export_config(source, model.config, "fp32", {})
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    export_hugging_face(
        folder,
        weights,
        config=config,
        dtype="fp32",
        files={},
        parameters_per_file=10**9,
        step=1,
        family=family_of(model.config),
    )


@pytest.mark.parametrize(("family", "seed"), CASES)
def test_both_spellings_mean_the_same(tmp_path: Path, family: str, seed: int) -> None:
    make(family, random_architecture(family, seed), tmp_path)
    config = huggingface.read_json(tmp_path / "config.json")
    again = json.loads(json.dumps(config))
    assert config["model_type"] == family and "rope_parameters" in config
    assert settings_of(published(again)) == settings_of(config)


@pytest.mark.parametrize(("family", "seed"), CASES)
def test_exports_are_what_was_read(tmp_path: Path, family: str, seed: int) -> None:
    make(family, random_architecture(family, seed), tmp_path / "there")
    model = read(tmp_path / "there")
    source = huggingface.read_json(tmp_path / "there" / "config.json")
    export(model, source, tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_text() == (
        tmp_path / "there" / "config.json"
    ).read_text()
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("there", "back"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("family", "seed"), CASES)
def test_a_new_config_means_the_same_model(tmp_path: Path, family: str, seed: int) -> None:
    """What is written without a source is read by transformers as the model that was trained."""
    theirs = make(family, random_architecture(family, seed), tmp_path / "there")
    model = read(tmp_path / "there")
    assert contradictions(model.config) == []
    export(model, None, tmp_path / "new")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "new", attn_implementation="eager", dtype=torch.float32
    ).eval()
    if family in EXPERTS:
        again.set_experts_implementation("eager")
    assert float(their_loss(again)) == pytest.approx(float(their_loss(theirs)), rel=1e-6)


def test_a_family_that_rotates_all_dimensions_is_refused_a_share() -> None:
    two = {"num_layers": 2, "rotary": {"partial_rotary_factor": 0.5}}
    model = validate(BaseModelConfig, Document({"transformer": two}, {}, ""))
    assert contradictions(model) == [
        (
            "transformer.rotary.partial_rotary_factor",
            "given [0.5, 0.5], but Llama has [1.0, 1.0]; choose another model.base_model.family",
        )
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_of_a_stage_are_exported(family: str) -> None:
    """In each spelling, and from settings: what is written reads as these positions, or the
    preflight refuses them.
    """
    values = random_architecture(family, 0)
    config = AutoConfig.for_model(family, **values, dtype="float32")
    made = json.loads(config.to_json_string(use_diff=False))
    for source in (made, published(json.loads(json.dumps(made)))):
        base = settings_of(source)
        own = base.transformer.rotary
        assert own is not None
        for change in (
            {"theta": 777.0},
            {"type": "yarn", "scale_factor": 4.0, "original_context_length": 64},
            {"type": "default"},
        ):
            changed = base.with_rotary(own.model_copy(update=change))
            rotary = changed.transformer.rotary
            for given in (source, None):
                written = family_of(base).export_config(given, base, "fp32", {}, 0, rotary)
                found = [name for name, _ in contradictions(changed, written)]
                refused = "type" in change and family in CANNOT
                assert bool(found) == (refused and change["type"] in CANNOT[family]), (
                    change,
                    found,
                )
