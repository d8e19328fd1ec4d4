"""`fast-llm upcycle`: a dense model as a mixture of experts.

As in "Sparse upcycling" (Komatsuzaki et al. 2023), each MLP becomes N experts, which are copies of
it, and a router with random weights. The weights of a token's experts sum to 1, so that the new
model computes what the dense one does, up to rounding. Training then makes the experts different:
each gets other tokens.

Experts have the size of the MLP: docs/decisions/upcycling-copies-the-mlp.md has the alternatives.

Memory holds one matrix of the dense model, and the same matrix of all experts in the dtype of the
model.
"""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fast_llm.checkpoint.weights import export_hugging_face
from fast_llm.config.model import BaseModelConfig
from fast_llm.errors import CheckpointError, ConfigError
from fast_llm.model.decoder import init_weights
from fast_llm.models import contradictions, family_of
from fast_llm.training.merge import PARAMETERS_PER_FILE, StoredModel, open_model
from fast_llm.training.model_card import upcycled_card, with_card
from fast_llm.training.process import quiet_torch_distributed

logger = logging.getLogger("fast_llm")

RECORD = "upcycling.json"
# Family of a dense model → that of its mixture of experts.
TARGETS = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}


def upcycle(
    model: str, output: str, experts: int, experts_per_token: int, seed: int = 1234
) -> None:
    """Write the Hugging Face folder `output`.

    `model`: a checkpoint, a Hugging Face folder, or a model on the Hub. `seed`: of the routers.
    Raises CheckpointError or ConfigError for a model that cannot be upcycled.
    """
    quiet_torch_distributed()
    final = Path(output).expanduser()
    if final.exists():
        raise CheckpointError(f"{final}: exists already; choose another folder")
    if not 1 <= experts_per_token <= experts or experts < 2:
        raise ConfigError(
            [
                f"--experts {experts}, --experts-per-token {experts_per_token}: there must be two"
                " experts or more, and as many at least as compute a token"
            ]
        )
    dense = open_model(model)
    sparse = _with_experts(dense, experts, experts_per_token)
    shapes = family_of(sparse).shapes(sparse)
    original = dense.config(dense.dtype)
    tokens = {name: original.get(f"{name}_token_id") for name in ("bos", "eos")}
    record = {
        "model": model,
        "experts": experts,
        "experts_per_token": experts_per_token,
        "seed": seed,
    }
    card = upcycled_card(model, dense.files, dense.dtype, experts, experts_per_token)
    export_hugging_face(
        final,
        {name: torch.empty(shape, device="meta") for name, shape in shapes.items()},
        config=family_of(sparse).export_config(None, sparse, dense.dtype, tokens),
        dtype=dense.dtype,
        files={**with_card(dense.files, card), RECORD: _json(record)},
        parameters_per_file=PARAMETERS_PER_FILE,
        step=0,
        part_of=lambda name: _weight(name, dense, sparse, shapes[name], seed),
        family=family_of(sparse),
    )
    before, now = (sum(map(math.prod, one.values())) for one in (dense.shapes, shapes))
    logger.info(
        f"Wrote {final}: {family_of(sparse).title} with {experts} experts, of which"
        f" {experts_per_token} compute each token; {before:,} → {now:,} parameters in"
        f" {dense.dtype}."
    )


def _json(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=2) + "\n").encode()


def _with_experts(dense: StoredModel, experts: int, chosen: int) -> BaseModelConfig:
    """The configuration of the new model. Raises CheckpointError if no family has it."""
    model, family = dense.model, TARGETS.get(dense.model.family)
    if family is None:
        allowed = ", ".join(TARGETS)
        raise CheckpointError(
            f"{dense.path}: its family is {model.family}, which has no counterpart with experts;"
            f" models of these families can be upcycled: {allowed}"
        )
    change = {
        "num_experts": experts,
        "num_experts_per_token": chosen,
        "normalize_expert_weights": True,
    }
    shape = model.transformer.model_copy(update=change)
    sparse = model.model_copy(update={"family": family, "transformer": shape})
    if wrong := contradictions(sparse):
        setting, reason = wrong[0]
        raise CheckpointError(
            f"{dense.path}: cannot become a {family_of(sparse).title} model: {setting}:"
            f" {reason.partition(';')[0]}"
        )
    return sparse


def _weight(
    name: str, dense: StoredModel, sparse: BaseModelConfig, shape: tuple[int, ...], seed: int
) -> Tensor:
    """A parameter of the new model, in fp32."""
    if name.endswith(".mlp.gate.weight"):
        router = torch.empty(shape)
        init_weights({name: router}, sparse, seed)
        return router
    return dense.read(name.replace(".mlp.experts.", ".mlp.")).expand(shape)
