"""Models of transformers, imported and exported: equal bits, logits and config.json."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fast_llm.checkpoint import folder as folders
from fast_llm.checkpoint import huggingface
from fast_llm.checkpoint.weights import export_hugging_face, load_weights
from fast_llm.config.model import BaseModelConfig
from fast_llm.model.decoder import CausalLM
from fast_llm.models import FAMILIES, llama, parameters
from fast_llm.models.parameters import shapes

LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500000.0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "llama 3.1": {"rope_parameters": LLAMA_3, "num_key_value_heads": 2},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5}},
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        "max_position_embeddings": 40,
    },
    "yarn": {"rope_parameters": YARN},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "odd": {
        "vocab_size": 101,
        "head_dim": 10,
        "intermediate_size": 37,
        "attention_bias": True,
        "rms_norm_eps": 1e-5,
    },
}


def make(folder: Path, changes: dict[str, Any], dtype: torch.dtype, size: str = "5GB") -> Any:
    """Write a model of transformers. Returns it as transformers reads it back, in fp32."""
    torch.manual_seed(0)
    small = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": 3,
        "eos_token_id": [4, 5],
    }
    model = LlamaForCausalLM(LlamaConfig(**{**small, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size=size)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def read(folder: Path) -> tuple[BaseModelConfig, dict[str, Tensor], dict[str, Any]]:
    config = huggingface.read_json(folder / "config.json")
    model = BaseModelConfig.model_validate(llama.FAMILY.architecture(config, str(folder)))
    assert huggingface.check_weights(folder, model) == []
    weights = {name: torch.full(shape, float("nan")) for name, shape in shapes(model).items()}
    load_weights(weights, folder, FAMILIES["llama"])
    return model, weights, config


def export(source: Path, target: Path, dtype: str, parameters_per_file: int = 10**9) -> None:
    model, weights, config = read(source)
    export_hugging_face(
        target,
        weights,
        config=llama.FAMILY.export_config(config, model, dtype, {}),
        dtype=dtype,
        files={"generation_config.json": (source / "generation_config.json").read_bytes()},
        parameters_per_file=parameters_per_file,
        step=1,
    )


def tensors(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def logits(model: Any) -> Tensor:
    tokens = torch.arange(3, 3 + 80)[None] % 100
    with torch.no_grad():
        found: Tensor = model.eval()(tokens).logits
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_there_and_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    original = make(tmp_path / "original", ARCHITECTURES[name], torch.bfloat16, "20KB")
    export(tmp_path / "original", tmp_path / "there", "bf16")
    one, other = tensors(tmp_path / "original"), tensors(tmp_path / "there")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key].view(torch.int16), other[key].view(torch.int16)) for key in one)
    # The complete config.json, in its order.
    assert (tmp_path / "there" / "config.json").read_text() == (
        tmp_path / "original" / "config.json"
    ).read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "there", dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(original))
    assert loaded.generation_config.eos_token_id == [4, 5]
    # The export of an export has the same bytes; with other file sizes, the same weights.
    export(tmp_path / "there", tmp_path / "again", "bf16")
    for file in (tmp_path / "there").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    export(tmp_path / "there", tmp_path / "cut", "bf16", 2000)
    assert (tmp_path / "cut" / "model.safetensors.index.json").exists()
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype=torch.float32)
    assert torch.equal(logits(cut), logits(original))


@pytest.mark.parametrize("name", ["llama 3.1", "linear", "dynamic", "yarn"])
def test_logits_of_scaled_positions(tmp_path: Path, name: str) -> None:
    """80 tokens are more than the context length of "dynamic", which changes its angles."""
    original = make(tmp_path, ARCHITECTURES[name], torch.float32)
    model, weights, _ = read(tmp_path)
    ours = CausalLM(model.for_context(80))
    ours.load_state_dict(weights)
    tokens = torch.arange(3, 83)[None] % 100
    with torch.no_grad():
        found = ours(tokens, torch.arange(80)[None])
    torch.testing.assert_close(found, logits(original), rtol=1e-4, atol=1e-4)


def test_fp32_weights_are_rounded_to_the_exports_dtype(tmp_path: Path) -> None:
    original = make(tmp_path / "original", {}, torch.float32)
    export(tmp_path / "original", tmp_path / "export", "bf16")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "export").dtype == torch.bfloat16
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.copy_(parameter.bfloat16())
    assert torch.equal(logits(loaded), logits(original))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_both_spellings_are_read_as_transformers_reads_them(tmp_path: Path, name: str) -> None:
    make(tmp_path, ARCHITECTURES[name], torch.float32)
    later = huggingface.read_json(tmp_path / "config.json")
    assert "rope_parameters" in later and "dtype" in later
    rope = dict(later.pop("rope_parameters"))
    theta = rope.pop("rope_theta")
    published = {
        **later,
        "rope_theta": theta,
        "rope_scaling": rope if rope["rope_type"] != "default" else None,
        "torch_dtype": later.pop("dtype"),
    }
    published.pop("dtype")
    again = huggingface.read_json(tmp_path / "config.json")
    assert llama.FAMILY.architecture(published, "") == llama.FAMILY.architecture(again, "")
    (tmp_path / "config.json").write_text(json.dumps(published))
    read_by_transformers = AutoConfig.from_pretrained(tmp_path).to_dict()
    asked = {"_name_or_path": None, "dtype": None}
    assert read_by_transformers | asked == LlamaConfig(**again).to_dict() | asked


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_exports_from_scratch_are_read_as_they_are_meant(tmp_path: Path, name: str) -> None:
    original = make(tmp_path / "original", ARCHITECTURES[name], torch.float32)
    model, weights, config = read(tmp_path / "original")
    scratch = llama.FAMILY.export_config(None, model, "fp32", {"bos": 3, "eos": 4})
    export_hugging_face(
        tmp_path / "scratch",
        weights,
        config=scratch,
        dtype="fp32",
        files={},
        parameters_per_file=10**9,
        step=1,
    )
    assert llama.FAMILY.architecture(scratch, "") == llama.FAMILY.architecture(config, "")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "scratch")
    assert torch.equal(logits(loaded), logits(original))
    assert loaded.config.max_position_embeddings == config["max_position_embeddings"]
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id) == (3, 4)
    assert folders.verify(tmp_path / "scratch").kind == "export"


@pytest.mark.parametrize("tied", [False, True])
def test_the_padding_token_is_trained_as_every_other(tmp_path: Path, tied: bool) -> None:
    """transformers gives the embedding of `pad_token_id` no gradient; all others are equal.

    In continued pretraining nothing is padded, and in published models that token often is EOS.
    """
    pad = 7
    tokens = torch.randint(20, (2, 24), generator=torch.Generator().manual_seed(0))
    labels = tokens.roll(-1, 1)
    assert (tokens == pad).any()
    changes = {"tie_word_embeddings": tied, "pad_token_id": pad}
    theirs = {"as published": make(tmp_path, changes, torch.float32)}
    model, weights, config = read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    theirs["without padding"] = AutoModelForCausalLM.from_pretrained(tmp_path)
    gradients = {}
    for name, reference in theirs.items():
        torch.nn.functional.cross_entropy(
            reference(tokens).logits.flatten(0, 1), labels.flatten()
        ).backward()
        gradients[name] = {key: p.grad for key, p in reference.named_parameters()}
    ours = CausalLM(model)
    ours.load_state_dict(
        weights | ({parameters.HEAD: weights[parameters.EMBEDDING]} if tied else {})
    )
    positions = torch.arange(24).expand(2, -1)
    (ours(tokens, positions, None, labels) / labels.numel()).backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(
            parameter.grad, gradients["without padding"][name], rtol=1e-4, atol=1e-6
        )
        published = gradients["as published"][name]
        other = torch.ones(len(published), dtype=torch.bool)
        other[pad] = name != parameters.EMBEDDING
        torch.testing.assert_close(parameter.grad[other], published[other], rtol=1e-4, atol=1e-6)
    row = [found[parameters.EMBEDDING][pad] for found in gradients.values()]
    assert (row[0] - row[1]).norm() > 1e-2, "a token that does not occur would show nothing"
    assert json.loads((tmp_path / "config.json").read_text())["pad_token_id"] is None
    assert llama.FAMILY.export_config(config, model, "fp32", {})["pad_token_id"] == pad
