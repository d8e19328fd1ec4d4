"""A model of transformers and ours with the same weights, and what both compute."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from fast_llm.checkpoint import huggingface
from fast_llm.checkpoint.weights import load_weights
from fast_llm.config.document import Document
from fast_llm.config.model import BaseModelConfig
from fast_llm.config.validate import validate
from fast_llm.model.attention import PackedSequences
from fast_llm.model.decoder import CausalLM
from fast_llm.models import StoredPart, family_of, family_of_json
from tests.families.architectures import LENGTH, VOCABULARY

EXPERTS = "qwen3_moe", "mixtral", "gpt_oss"
# Three sequences, packed; one document is as long as its sequence.
LENGTHS = (LENGTH, 17, 31, 1, 5, 30, 12)


def make(family: str, values: dict[str, Any], folder: Path | None = None) -> Any:
    """A model of transformers with random weights, in eager attention; written to `folder`."""
    config = AutoConfig.for_model(family, **values)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    if family in EXPERTS:  # the grouped kernel needs multiples of four
        config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise * 0.1 + ("norm" in name) * weight)
    if folder is not None:
        model.save_pretrained(folder)
    return model


def settings_of(config: dict[str, Any]) -> BaseModelConfig:
    """The settings of a config.json, for a context of LENGTH."""
    values = family_of_json(config, "config.json").architecture(config, "config.json")
    return validate(BaseModelConfig, Document(values, {}, "")).for_context(LENGTH)


def read(folder: Path) -> CausalLM:
    """The model of a folder, in fp32."""
    model = settings_of(huggingface.read_json(folder / "config.json"))
    assert huggingface.check_weights(folder, model) == []
    ours = CausalLM(model)
    weights = {name: weight.detach() for name, weight in ours.named_parameters()}
    for weight in weights.values():
        weight.fill_(float("nan"))
    load_weights(weights, folder, family_of(model))
    return ours


def batch() -> tuple[Tensor, Tensor, Tensor, PackedSequences]:
    """Tokens, labels and positions [B, S], and documents."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(VOCABULARY, (3, LENGTH), generator=generator)
    labels = torch.randint(VOCABULARY, (3, LENGTH), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = -100
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).view(3, LENGTH)
    ends = torch.tensor((0, *LENGTHS)).cumsum(0).int()
    return tokens, labels, positions, PackedSequences(LENGTHS, ends, max(LENGTHS))


def inputs(model: Any) -> dict[str, Any]:
    """Arguments of a model of transformers for `batch()`.

    transformers finds documents by their positions, but for gpt-oss, which gets their masks.
    """
    tokens, _, positions, _ = batch()
    given = {"input_ids": tokens, "position_ids": positions, "use_cache": False}
    if model.config.model_type != "gpt_oss":
        return given
    documents = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    same = documents.view(3, LENGTH, 1) == documents.view(3, 1, LENGTH)
    full = (same & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())[:, None]
    masks = {
        "full_attention": full,
        "sliding_attention": full.triu(1 - model.config.sliding_window),
    }
    lowest = torch.finfo(model.dtype).min
    return given | {
        "attention_mask": {
            name: torch.zeros(full.shape, dtype=model.dtype).masked_fill(~mask, lowest)
            for name, mask in masks.items()
        }
    }


def their_loss(model: Any) -> Tensor:
    """The summed loss of `batch()` in transformers."""
    _, labels, _, _ = batch()
    logits = model(**inputs(model)).logits
    loss: Tensor = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    return loss


def our_loss(model: CausalLM) -> Tensor:
    """The summed loss of `batch()` in ours."""
    tokens, labels, positions, documents = batch()
    loss: Tensor = model(tokens, positions, documents, labels)
    return loss


def _as_parameters(theirs: dict[str, Any], ours: CausalLM) -> dict[str, Tensor]:
    """Tensors by our names of parameters, from tensors as files have them."""
    shapes = {name: tuple(weight.shape) for name, weight in ours.named_parameters()}
    found = {}
    for name, shape in shapes.items():
        parts = family_of(ours.config).stored_parts(name, shapes) or [StoredPart(name, shape)]
        assert len(parts) == 1
        tensor = theirs[parts[0].name][parts[0].region]
        found[name] = tensor.transpose(-1, -2) if parts[0].transposed else tensor
    return found


def gradients(model: torch.nn.Module, ours: CausalLM | None = None) -> dict[str, Tensor]:
    """Gradients by our names of parameters, also of the model of transformers that equals `ours`.

    transformers has some matrices together, as files have them, and those of experts in one.
    """
    if ours is not None and ours.config.family in ("phi3", "apertus", "gpt_oss"):
        return _as_parameters({n: w.grad for n, w in model.named_parameters()}, ours)
    found: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        if weight.grad is None:
            continue
        if name.endswith("experts.gate_up_proj"):
            above = name.removesuffix("gate_up_proj")
            gate, up = weight.grad.chunk(2, dim=1)
            found |= {f"{above}gate_proj.weight": gate, f"{above}up_proj.weight": up}
        else:
            found[f"{name}.weight" if name.endswith("experts.down_proj") else name] = weight.grad
    return found
