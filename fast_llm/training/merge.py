"""`fast-llm merge`: one model whose weights are a weighted sum of those of several models.

    without a base:  Σ wᵢ modelᵢ / Σ wᵢ
    with a base:     base + Σ wᵢ (modelᵢ - base)

The first is a weighted average: a soup (Wortsman et al., "Model soups", 2022) of branches, or of
exports of one run. The second with one model interpolates between it and the base (Wortsman et al.,
"Robust fine-tuning of zero-shot models", 2022). With more it adds what each has learned (Ilharco et
al., "Editing models with task arithmetic", 2023): an instruct model of the same base adds the
ability to follow instructions (Huang et al., "Chat Vector", 2024).

Sums are fp32, weight by weight: memory holds one weight of each model, and 256 MiB of the result.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fast_llm.checkpoint import folder as folders
from fast_llm.checkpoint import huggingface, state
from fast_llm.checkpoint.weights import export_hugging_face, load_weights
from fast_llm.config.document import Document
from fast_llm.config.model import BaseModelConfig
from fast_llm.config.text import format_value
from fast_llm.config.validate import validate
from fast_llm.data import tokenizer
from fast_llm.errors import CheckpointError, ConfigError, DataError
from fast_llm.models import family_of, family_of_json
from fast_llm.training.convert import describe_checkpoint
from fast_llm.training.model_card import merged_card, with_card
from fast_llm.training.process import quiet_torch_distributed

logger = logging.getLogger("fast_llm")

RECORD = "merge.json"
PARAMETERS_PER_FILE = 2**32
# Keys of config.json that say how a model is trained.
_OF_TRAINING = (
    "transformer.expert_auxiliary_loss_coefficient",
    "transformer.expert_bias_update_rate",
)


@dataclass(frozen=True)
class StoredModel:
    """A checkpoint or a Hugging Face folder whose weights are read one by one."""

    path: Path
    model: BaseModelConfig
    dtype: str
    config: Callable[[str], dict[str, Any]]  # dtype → config.json
    files: Mapping[str, bytes]  # that an export copies
    fill: Callable[[dict[str, Tensor]], None]  # weights by name
    tokenizer: Path  # its folder

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter, by name."""
        return family_of(self.model).shapes(self.model)

    def read(self, name: str) -> Tensor:
        """A parameter, in fp32."""
        weight = torch.empty(self.shapes[name])
        self.fill({name: weight})
        return weight


def merge(
    output: str,
    models: Sequence[str],
    weights: Sequence[float] | None = None,
    base: str | None = None,
    dtype: str | None = None,
) -> None:
    """Write the Hugging Face folder `output`: the merged weights, and all other files of the first
    model.

    `models`, `base`: checkpoints, Hugging Face folders, or models on the Hub. `weights`: one for
    each model; by default 1. `dtype`: fp32, bf16 or fp16; by default that of the first model.
    Raises CheckpointError, ConfigError or DataError for models that cannot be merged.
    """
    quiet_torch_distributed()
    final = Path(output).expanduser()
    if final.exists():
        raise CheckpointError(f"{final}: exists already; choose another folder")
    factors = _factors(models, weights, base)
    opened = {
        path: open_model(path) for path in dict.fromkeys([*models, *([base] if base else [])])
    }
    first = opened[models[0]]
    for path, other in opened.items():
        if other is not first:
            _check_fit(first, other, path)
    rows = min(model.model.vocab_size for model in opened.values())
    parts = [(opened[path], factor) for path, factor in factors.items()]
    shapes = first.shapes
    dtype = dtype or first.dtype
    weight_of = dict(zip(models, weights or [1.0] * len(models), strict=True))
    card = merged_card(factors, weight_of, base, [m.files for m in opened.values()], dtype)
    export_hugging_face(
        final,
        {name: torch.empty(shape, device="meta") for name, shape in shapes.items()},
        config=first.config(dtype),
        dtype=dtype,
        files={**with_card(first.files, card), RECORD: _record(models, weights, base)},
        parameters_per_file=PARAMETERS_PER_FILE,
        step=0,
        part_of=lambda name: _sum(name, parts, shapes[name], rows),
        family=family_of(first.model),
    )
    total = sum(math.prod(shape) for shape in shapes.values())
    terms = " + ".join(f"{factor:.4g} × {path}" for path, factor in factors.items())
    logger.info(f"Wrote {final}: {terms} ({total:,} parameters in {dtype}).")


def _factors(
    models: Sequence[str], weights: Sequence[float] | None, base: str | None
) -> dict[str, float]:
    """The factor of each model in the sum; the first model comes first.

    Raises ConfigError for weights that do not fit.
    """
    if weights is not None and len(weights) != len(models):
        raise ConfigError(
            [f"--weights: given {len(weights)}, must be one for each model: {len(models)}"]
        )
    given = list(weights) if weights is not None else [1.0] * len(models)
    total = sum(given)
    if base is None and not math.isclose(total, 0, abs_tol=1e-9):
        given = [weight / total for weight in given]
    elif base is None:
        raise ConfigError([f"--weights: their sum is {total:g}, must not be 0 without --base"])
    if len(models) == 1 and base is None:
        raise ConfigError(["one model alone: give another one, or --base"])
    factors: dict[str, float] = {}
    for path, weight in zip(models, given, strict=True):
        if path in factors:
            raise ConfigError([f"{path}: is listed twice; give it a larger weight instead"])
        factors[path] = weight
    if base in factors:
        raise ConfigError([f"{base}: is the base and a model; its difference to itself is 0"])
    if base is not None:
        factors[base] = 1 - sum(given)
    return factors


def open_model(path: str) -> StoredModel:
    """A checkpoint or a Hugging Face folder. Raises CheckpointError if it cannot be read."""
    folder = Path(path).expanduser()
    if folder.is_dir() and folders.is_checkpoint(folder):
        found, reader = describe_checkpoint(folder), state.Reader(folder)

        def fill(weights: dict[str, Tensor]) -> None:
            state.load(folder, {f"weight/{n}": w for n, w in weights.items()}, reader=reader)

        kept = folder.parent.parent / "pretrained"
        return StoredModel(folder, found.model, found.dtype, found.config, found.files, fill, kept)
    folder = huggingface.fetch(path, weights=True)
    original = huggingface.read_json(folder / "config.json")
    place = f"{folder}/config.json"
    family = family_of_json(original, place)
    model = _of_config_json(original, place)
    if problems := huggingface.check_weights(folder, model):
        raise ConfigError(problems)
    return StoredModel(
        folder,
        model,
        huggingface.stored_dtype(folder, original),
        lambda dtype: family.export_config(original, model, dtype, {}),
        huggingface.small_files(folder),
        lambda weights: load_weights(weights, folder, family, model=family.shapes(model)),
        folder,
    )


def _of_config_json(config: dict[str, Any], place: str) -> BaseModelConfig:
    values = family_of_json(config, place).architecture(config, place)
    return validate(BaseModelConfig, Document(values, {}, place))


def _check_fit(first: StoredModel, other: StoredModel, path: str) -> None:
    """Raise CheckpointError or DataError unless the weights of two models mean the same.

    The number of tokens may differ. Settings that the weights do not show are only logged.
    """
    one, two = first.model, other.model
    if one.family != two.family:
        raise CheckpointError(
            f"{path}: its family is {two.family}, that of {first.path} is {one.family}; models of"
            " one family can be merged"
        )
    vocabulary = {"vocab_size": min(one.vocab_size, two.vocab_size)}
    shapes = [family_of(m).shapes(m.model_copy(update=vocabulary)) for m in (one, two)]
    for name, shape in shapes[0].items():
        if shapes[1].get(name) != shape:
            theirs = list(shapes[1][name]) if name in shapes[1] else "missing"
            raise CheckpointError(
                f"{path}: {name} is {theirs}, that of {first.path} is {list(shape)}; models of one"
                " architecture can be merged"
            )
    if more := shapes[1].keys() - shapes[0].keys():
        raise CheckpointError(
            f"{path}: has {min(more)}, which {first.path} does not have; models of one architecture"
            " can be merged"
        )
    settings, other_settings = _stored_settings(first), _stored_settings(other)
    for name in sorted(settings.keys() | other_settings.keys()):
        a, b = settings.get(name), other_settings.get(name)
        if a != b and name != "vocab_size":
            logger.warning(
                f"{path}: {name} is {format_value(b)}, that of {first.path} is {format_value(a)}."
                " The merged model has the latter."
            )
    _check_tokenizers(first, other, path, vocabulary["vocab_size"])


def _stored_settings(model: StoredModel) -> dict[str, Any]:
    """The settings of a model that config.json of an export can say, by dotted name.

    The others, such as z-loss and recomputation, say how a model was trained.
    """
    written = model.config(model.dtype)
    settings = _flat(_of_config_json(written, f"{model.path}/config.json").model_dump())
    return {name: value for name, value in settings.items() if name not in _OF_TRAINING}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= (
            _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return found


def _check_tokenizers(first: StoredModel, other: StoredModel, path: str, size: int) -> None:
    """Raise DataError if one of the first `size` tokens differs between two models."""
    vocabularies = []
    for model in (first, other):
        files = (
            [file.name for file in model.tokenizer.iterdir()] if model.tokenizer.is_dir() else []
        )
        if not tokenizer.is_tokenizer(files):
            logger.info(f"{model.path} has no tokenizer, so tokens are not compared.")
            return
        texts = tokenizer.load(str(model.tokenizer)).tokenizer.get_vocab()
        vocabularies.append({token: text for text, token in texts.items() if token < size})
    ours, others = vocabularies
    for token in sorted(ours.keys() | others.keys()):
        if ours.get(token) != others.get(token):
            raise DataError(
                f"{path}: its token {token} is {others.get(token)!r}, that of {first.path} is"
                f" {ours.get(token)!r}; models with one tokenizer can be merged"
            )


def _sum(
    name: str, parts: Sequence[tuple[StoredModel, float]], shape: tuple[int, ...], rows: int
) -> Tensor:
    """A weight of the merged model, in fp32.

    `parts`: the models and their factors. Of an embedding or a head with more than `rows` rows, the
    first model has the others.
    """
    first = parts[0][0]
    by_token = shape[0] == first.model.vocab_size and name in (
        family_of(first.model).embedding,
        family_of(first.model).head,
    )
    total = torch.zeros(rows if by_token else shape[0], *shape[1:])
    own = torch.empty(0)
    for model, factor in parts:
        weight = model.read(name)
        if model is first:
            own = weight[len(total) :].clone()
        total.add_(weight[: len(total)], alpha=factor)
    return torch.cat([total, own]) if len(own) else total


def _record(models: Sequence[str], weights: Sequence[float] | None, base: str | None) -> bytes:
    """What merge.json says."""
    given = weights if weights is not None else [1.0] * len(models)
    content = {
        "base": base,
        "models": [
            {"path": path, "weight": weight} for path, weight in zip(models, given, strict=True)
        ],
    }
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
