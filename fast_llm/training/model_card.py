"""The model card of an export: README.md, which the Hugging Face Hub shows.

It is made from a checkpoint's manifest and metrics.jsonl, and holds no time and no path: an export
and a later `fast-llm convert` of the same step have the same bytes, and so has an export of a run
that was interrupted. Only losses of validations are in it; training losses are means since the
last record, which an interruption moves.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fast_llm.data.sampling import Mixture
from fast_llm.data.source import short_names
from fast_llm.planning.history import History
from fast_llm.planning.pretrained import in_force
from fast_llm.report.facts import Change, changes
from fast_llm.report.records import RunRecords
from fast_llm.terminal import counted, short_count

logger = logging.getLogger("fast_llm")

CARD, BASE_CARD = "README.md", "BASE_README.md"
_ON_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_IN_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)")  # a folder of the Hub's cache
_LICENCE = ("license", "license_name", "license_link")
_COPIED = ("language", *_LICENCE)  # from the base's card
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def with_card(files: Mapping[str, bytes], card: str) -> dict[str, bytes]:
    """The small files of an export with its card. That of the base is kept as BASE_README.md."""
    found = dict(files)
    if CARD in found:
        found[BASE_CARD] = found[CARD]
    return found | {CARD: card.encode()}


def trained_card(
    info: Mapping[str, Any],
    files: Mapping[str, bytes],
    dtype: str,
    losses: Sequence[Change],
    average: str | None = None,
) -> str:
    """The card of a model that was trained.

    `info`: of a checkpoint's manifest; `files`: small files of the base; `dtype`: of the weights;
    `losses`: of validations, as `losses_at`; `average`: the name of a running average of the
    weights.
    """
    settings = info.get("settings", {})
    base = _Base(settings.get("pretrained", {}), files.get(CARD))
    step, tokens = info.get("step", 0), _tokens(info)
    title = settings.get("run", {}).get("experiment_name")
    if not title:
        title = f"{base.name}, continued" if base.trained else "A model trained from random weights"
    trained = counted(step, "step")
    if tokens:
        trained += f" on {short_count(sum(tokens.values()))} tokens"
    start = f"continues {base.link}" if base.trained else "was trained from random weights"
    parts = [
        _front_matter(base.front_matter(), "continued-pretraining" * base.trained),
        f"# {title}\n",
        f"This model {start}: {trained}, with Fast-LLM."
        + _describe_average(settings, average)
        + "\n",
        _usage(dtype, in_force(info)[0] or None),
        _sources(tokens),
        _losses(losses, average),
        _schedule(settings, info),
        base.licence(),
    ]
    return "\n".join(part for part in parts if part)


def with_trained_card(
    info: Mapping[str, Any],
    files: dict[str, bytes],
    dtype: str,
    records: RunRecords,
    average: str | None,
) -> dict[str, bytes]:
    """The small files of an export of a run with its card, a problem of which ends no run."""
    try:
        losses = losses_at(records, info["step"])
        return with_card(files, trained_card(info, files, dtype, losses, average))
    except Exception as error:
        logger.warning(f"The export of step {info['step']} has no model card: {error}.")
        return files


def losses_at(records: RunRecords, step: int) -> list[Change]:
    """The validation losses of a run up to a step, without those of steps that were undone.

    `records` keeps those of later steps: an export is written while training continues.
    """
    records.update()
    return changes(records, step)


def merged_card(
    models: Mapping[str, float],
    given: Mapping[str, float],
    base: str | None,
    files: Sequence[Mapping[str, bytes]],
    dtype: str,
) -> str:
    """The card of a merged model.

    `models`: the factor of each model in the sum, the base's included; `given`: the weight of each
    model; `files`: small files of each model, the first being the one whose files are kept.
    """
    bases = {name: _Base({"path": name}, None) for name in models}
    cards = [read_front_matter(each.get(CARD)) for each in files]
    first = _copied(cards[0])
    licences = [{key: card.get(key) for key in _LICENCE} for card in cards if card]
    same = len(licences) == len(cards) and all(one == licences[0] for one in licences)
    if not same:
        first = {key: value for key, value in first.items() if key not in _LICENCE}
    names = [one.hub_name for one in bases.values() if one.hub_name]
    values = {"base_model": names, "base_model_relation": "merge"} if names else {}
    sum_of = " + ".join(f"{factor:.4g} × {bases[name].name}" for name, factor in models.items())
    formula = "Σ wᵢ modelᵢ / Σ wᵢ" if base is None else "base + Σ wᵢ (modelᵢ - base)"
    rows = [[bases[name].link, f"{weight:g}"] for name, weight in given.items()]
    rows += [[bases[base].link, "base"]] if base is not None else []
    licence = (
        f"The licence of all of them: {_licence_of(first)}."
        if same and first.get("license")
        else "The licences of the merged models apply; compare them before you share this model."
    )
    return "\n".join(
        [
            _front_matter(values | first, "merge"),
            f"# A merge of {', '.join(one.name for one in bases.values())}\n",
            f"The weights of this model are `{formula}`, computed in fp32 with Fast-LLM:\n",
            f"    {sum_of}\n",
            _table(["Model", "Weight w"], rows),
            _usage(dtype, None),
            f"## Licence\n\n{licence}\n",
        ]
    )


def upcycled_card(
    model: str, files: Mapping[str, bytes], dtype: str, experts: int, experts_per_token: int
) -> str:
    """The card of a mixture of experts that was made of a dense `model` and is not yet trained.

    `files`: small files of the dense model; `dtype`: of the weights.
    """
    base = _Base({"path": model}, files.get(CARD))
    return "\n".join(
        [
            _front_matter(base.front_matter(), "moe"),
            f"# {base.name} with experts\n",
            f"Each MLP of {base.link} is now {experts} experts, which are copies of it, and a"
            f" random router, which chooses {experts_per_token} of them for each token. The model"
            " computes what the dense one does. It was made with Fast-LLM, to be trained.\n",
            _usage(dtype, None),
            base.licence(),
        ]
    )


def read_front_matter(card: bytes | None) -> dict[str, Any]:
    """The YAML between `---` at the start of a card; empty if there is none, or a damaged one."""
    found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", (card or b"").decode("utf-8", "replace"), re.S)
    try:
        values = yaml.safe_load(found[1]) if found else {}
    except (yaml.YAMLError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


class _Base:
    """The model that a run began with."""

    def __init__(self, settings: Mapping[str, Any], card: bytes | None):
        """`settings`: the section `pretrained`; `card`: the README.md of the model."""
        path = settings.get("path")
        self.trained = path is not None and settings.get("model_weights", True)
        self.card_file, self.card = card is not None, read_front_matter(card)
        self.hub_name = _hub_name(path or "")
        self.name = self.hub_name.rpartition("/")[2] or _folder_name(path or "")

    @property
    def link(self) -> str:
        """The name, with its page on the Hub if it is there."""
        if self.hub_name:
            return f"[{self.hub_name}](https://huggingface.co/{self.hub_name})"
        return self.name

    def front_matter(self) -> dict[str, Any]:
        """What the Hub reads about the base, and what is copied from its card."""
        if not self.trained:
            return {}
        named: dict[str, Any] = {}
        if self.hub_name:
            named = {"base_model": self.hub_name, "base_model_relation": "finetune"}
        return named | _copied(self.card)

    def licence(self) -> str:
        """The section about the licence."""
        if not self.trained:
            return ""
        if self.card.get("license"):
            text = f"That of the base model: {_licence_of(self.card)}."
        else:
            text = (
                "That of the base model, whose folder had no card that names it. Look it up before"
                " you share this model."
            )
        if self.card_file:
            text += f" [{BASE_CARD}]({BASE_CARD}) is the card of the base model."
        return f"## Licence\n\n{text}\n"


def _hub_name(path: str) -> str:
    """organisation/name of a model on the Hub, or in its cache; "" for another folder."""
    name = path.partition("@")[0]
    if found := _IN_CACHE.search(path):
        return f"{found[1]}/{found[2]}"
    return name if _ON_HUB.fullmatch(name) and not Path(path).is_dir() else ""


def _folder_name(path: str) -> str:
    """The name of a model's folder; of a checkpoint or export, that of its run with the step."""
    parts = Path(path).parts
    for at, place in ((-2, "checkpoint"), (-3, "export")):
        if len(parts) > -at and parts[at] == place and parts[-1].isdigit():
            return f"{parts[at - 1]}, step {parts[-1]}"
    return Path(path).name


def _copied(card: Mapping[str, Any]) -> dict[str, Any]:
    return {key: card[key] for key in _COPIED if card.get(key)}


def _licence_of(card: Mapping[str, Any]) -> str:
    name = card.get("license_name") or card["license"]
    link = card.get("license_link")
    return f"[{name}]({link})" if str(link or "").startswith("https://") else f"{name}"


def _front_matter(values: Mapping[str, Any], *tags: str) -> str:
    content = {
        **values,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fast-llm", *filter(None, tags)],
    }
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}---\n"


def _describe_average(settings: Mapping[str, Any], average: str | None) -> str:
    if average is None:
        return ""
    values = settings.get("training", {}).get("averages", {}).get(average, {})
    interval = values.get("interval", 1)
    every = "every step" if interval == 1 else f"every {interval:,} steps"
    if values.get("decay") is not None:
        kind = f"an exponential moving average with decay {values['decay']:g}, updated {every}"
    else:
        kind = f"a uniform mean, {every}"
    if values.get("length") is not None:
        kind += f", begun anew every {values['length']:,} steps"
    elif values.get("start"):
        kind += f" after step {values['start']:,}"
    return f" The weights are a running average of those in training: {kind}."


def _usage(dtype: str, length: int | None) -> str:
    trained = f"It was trained with sequences of {length:,} tokens.\n" if length else ""
    return f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "..."  # this folder, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype="{_DTYPES[dtype]}")
```

{trained}"""


def _tokens(info: Mapping[str, Any]) -> dict[str, int]:
    """Tokens that were read of each source of the training data, over the life of the run."""
    if not info.get("history"):
        return {}
    history, padding = History.model_validate(info["history"]), info.get("padding", {})
    names: dict[int, str] = {}
    found: dict[int, int] = {}
    for order, sequences in history.counts(info.get("samples", 0)):
        counts = Mixture(order.edges).counts(sequences)
        for source, count in zip(order.sources, counts, strict=True):
            names[source.key] = source.name
            found[source.key] = found.get(source.key, 0) + count * order.sequence_length
    short = dict(zip(names, short_names(list(names.values())), strict=True))
    tokens: dict[str, int] = {}
    for key, count in found.items():
        tokens[short[key]] = tokens.get(short[key], 0) + count - padding.get(str(key), 0)
    return tokens


def _sources(tokens: Mapping[str, int]) -> str:
    total = sum(tokens.values())
    if not total:
        return ""
    rows = [[name, f"{count:,}", f"{count / total:.1%}"] for name, count in tokens.items()]
    return "## Training data\n\n" + _table(["Source", "Tokens", "Share"], rows)


def _losses(found: Sequence[Change], average: str | None) -> str:
    if not found:
        return ""
    bits = any(change.bits for change in found)
    apart = len({(change.first_step, change.last_step) for change in found}) > 1
    heads = ["Data", "Before", "After", "Change"]
    heads += ["Bits per byte"] * bits + ["Steps"] * apart
    rows = [
        [
            f"{change.name}",
            f"{change.first:.4f}",
            f"{change.last:.4f}",
            f"{change.change:+.4f}",
            *([f"{change.bits[0]:.3f} → {change.bits[1]:.3f}" if change.bits else ""] * bits),
            *([f"{change.first_step:,} → {change.last_step:,}"] * apart),
        ]
        for change in found
    ]
    steps = f"at step {found[0].first_step:,} and step {found[0].last_step:,}"
    steps = "at the steps named" if apart else steps  # sets with intervals of their own
    of = ", with the weights in training, not their average" * (average is not None)
    return (
        "## Losses\n\n"
        f"Validation losses in nats per token, on data that was not trained on, {steps}{of}.\n\n"
        + _table(heads, rows)
    )


def _schedule(settings: Mapping[str, Any], info: Mapping[str, Any]) -> str:
    """How the model was trained."""
    optimizer, model = settings.get("optimizer", {}), settings.get("model", {})
    if "learning_rate" not in optimizer:
        return ""
    batches = (info.get("history") or {}).get("batches") or [{}]
    # Those of later stages are planned.
    begun = [one for one in batches if one.get("after", 0) < info["step"]] or batches[:1]
    rate = {k: v for k, v in optimizer["learning_rate"].items() if v is not None}
    shown = {
        "steps": f"{info['step']:,} of {settings['training']['train_iters']:,}",
        "sequences a step": begun[-1].get("batch_size"),
        "tokens a sequence": in_force(info)[0] or None,
        "dtype": model.get("distributed", {}).get("training_dtype"),
        **{f"learning rate: {name}": value for name, value in rate.items()},
        **{f"AdamW: {n}": optimizer.get(n) for n in ("beta_1", "beta_2", "epsilon")},
        "learning rate scales": optimizer.get("learning_rate_scales") or None,
        "weight decay": optimizer.get("weight_decay"),
        "gradient norm clipping": optimizer.get("gradient_norm_clipping"),
        "seed": model.get("distributed", {}).get("seed"),
    }
    rows = [[name, str(value)] for name, value in shown.items() if value is not None]
    return "## Training\n\n" + _table(["Setting", "Value"], rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(_cell(cell) for cell in line) + " |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
