"""`fast-llm verify` and `why`: compare files with their digests, show a step's documents.

This module never imports torch.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fast_llm.checkpoint import folder as folders
from fast_llm.config.document import read
from fast_llm.config.train import TrainConfig
from fast_llm.config.validate import adding_locations, validate
from fast_llm.data.dataset import open_dataset
from fast_llm.data.metadata import verify as verify_dataset
from fast_llm.data.origins import add_origins
from fast_llm.data.sampling import Mixture, SourceSampler
from fast_llm.data.source import RandomSource, Source
from fast_llm.errors import DataError, UserError
from fast_llm.planning.branch import branch_point
from fast_llm.planning.disk import format_bytes
from fast_llm.planning.history import (
    DataOrder,
    History,
    data_settings,
    new_history,
    open_sources,
    read_records,
    reconstruct,
)

_SHOWN = 60  # characters of a document


def verify(paths: list[str]) -> tuple[list[str], list[str]]:
    """Read every file under each path and compare it with its digest.

    A path is a dataset.json, a checkpoint, an export, or an experiment folder with all of these.
    Returns a sentence for each intact one, and one for each fault.
    """
    intact, damaged = list[str](), list[str]()
    for path in [part for given in paths for part in _parts(Path(given).expanduser())]:
        try:
            if path.is_file():
                size = verify_dataset(path)
                intact.append(f"{path}: intact, {format_bytes(size)} of token files")
            else:
                manifest = folders.verify(path)
                size = sum(entry["size"] for entry in manifest.files.values())
                intact.append(
                    f"{path}: {manifest.kind} of step {manifest.step}, intact, {format_bytes(size)}"
                )
        except UserError as error:
            damaged += str(error).splitlines()
    return intact, damaged


def _parts(path: Path) -> list[Path]:
    """The datasets, checkpoints and exports under a path. Raises DataError if there are none."""
    if path.is_file() or (path / folders.MANIFEST).is_file():
        return [path]
    every = [*path.glob(f"*/*/{folders.MANIFEST}"), *path.glob(f"*/*/*/{folders.MANIFEST}")]
    published = {manifest.parent for manifest in every if manifest.parent.name[0] != "."}
    for root in (path / "checkpoint", *path.glob("export/*")):
        published.update(folders.missing_manifest(root))
    found = sorted(published, key=lambda part: (part.parent, len(part.name), part.name))  # by step
    if not found:
        raise DataError(
            f"{path}: nothing to verify; give a dataset.json, a checkpoint, an export, or an"
            " experiment folder with some"
        )
    return found


@dataclass(frozen=True)
class StepData:
    """The sequences of a training step."""

    step: int
    length: int
    sequences: list[dict[str, Any]]
    rewinds: list[dict[str, int]]  # those that undid this step
    note: str  # on what is not certain

    def as_json(self) -> str:
        """Step and sequences, for programs."""
        return json.dumps({"step": self.step, "sequences": self.sequences}, ensure_ascii=False)

    def as_text(self) -> list[str]:
        """For people: each token file's share, then a line for each document of each sequence."""
        lines, counts = [], Counter[str]()
        for sequence in self.sequences:
            lines.append(f"sequence {sequence['index']:,}")
            for part in sequence["documents"]:
                text = f": {part['text']!r}" if "text" in part else ""
                begin = part["first_token"]
                lines.append(
                    f"  {part['name']}, tokens {begin:,} to {begin + part['tokens'] - 1:,}{text}"
                )
                counts[part["file"]] += part["tokens"]
        total = sum(counts.values())
        shares = [
            f"  {name}: {100 * n / total:.1f} % of the tokens" for name, n in counts.most_common()
        ]
        rewinds = [
            f"  (steps {one['after'] + 1} to {one['spike']}, a spike, were undone; the run"
            " continued with later data)"
            for one in self.rewinds
        ]
        first = f"step {self.step}: {len(self.sequences)} sequences of {self.length:,} + 1 tokens"
        return [first, *([f"  ({self.note})"] if self.note else []), *rewinds, *shares, *lines]


def inspect_step(run: str, step: int) -> StepData:
    """Find the sequences and documents of a training step, by the settings of that time.

    Raises DataError or ConfigError if the folder is not a run's, the run has no such step, or its
    data is missing.
    """
    folder = Path(run).expanduser()
    if not (folder / "config.yaml").is_file():
        raise DataError(
            f"{folder}: no config.yaml in it; give the experiment folder of a training run"
        )
    document = read(str(folder / "config.yaml"), [])
    config = validate(TrainConfig, document)
    if not 1 <= step <= config.training.train_iters:
        raise DataError(f"step {step}: {folder} has the steps 1 to {config.training.train_iters}")
    with adding_locations(document, TrainConfig, "data.path"):
        history, skipped_ranges, note = _history(folder, config)
    first = history.first_sequence(step, skipped_ranges)
    count = history.batch_entry_at(step).batch_size
    file = folder / "pretrained" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file)) if file.is_file() else None
    order = history.order_at(first)
    sources = _sources(order, config)
    sequences: list[dict[str, Any]] = []
    samplers: dict[int, SourceSampler] = {}
    for index in range(first, first + count):
        place, inside = Mixture(order.edges).find(index - order.index)
        state = order.sources[place]
        source = sources.get(state.digest)
        if source is None:
            raise DataError(
                f"step {step}: sequence {index:,} is of {state.name}, whose files are missing or"
                " are not those that the run was trained on; restore them"
            )
        if place not in samplers:
            samplers[place] = source.sampler(order.seed, state.key, state.drawn)
        stream, number, epoch = samplers[place].find(inside)
        documents = _documents(source.with_stream(stream), number, tokenizer)
        sequences.append(
            {"index": index, "source": state.name, "epoch": epoch, "documents": documents}
        )
    add_origins([part for sequence in sequences for part in sequence["documents"]])
    rewinds = [one for one in skipped_ranges if one["after"] < step <= one["spike"]]
    return StepData(step, order.sequence_length, sequences, rewinds, note)


def _documents(
    source: Source | RandomSource, number: int, tokenizer: Tokenizer | None
) -> list[dict[str, Any]]:
    """The documents of a sequence, its last target included: file, number, tokens, first words."""
    found: list[dict[str, Any]] = []
    tokens, at = source.read(number).tokens, 0
    for part in source.locate(number):
        entry = {
            "file": part.prefix,
            "document": part.document,
            "first_token": part.begin,
            "tokens": part.tokens,
        }
        if tokenizer is not None:
            shown = tokens[at : min(at + part.tokens, at + _SHOWN)].tolist()
            entry["text"] = tokenizer.decode(shown)[:_SHOWN]
        found.append(entry)
        at += part.tokens
    return found


def _sources(order: DataOrder, config: TrainConfig) -> dict[str, Source | RandomSource]:
    """The existing sources of an order by their digests, at their old paths or the current ones."""
    vocabulary = config.model.base_model.vocab_size
    now = data_settings(config.data)
    found = open_sources(order.data, order, vocabulary)
    if any(source.digest not in found for source in order.sources):
        found |= open_sources(now, order, vocabulary)
    return found


def _history(folder: Path, config: TrainConfig) -> tuple[History, list[dict[str, int]], str]:
    """The run's history, its skipped ranges, and a note on what is not certain.

    The newest checkpoint has the history up to its step; config.yaml has the later settings.
    """
    newest = _newest(folder, config)
    seed, vocabulary = config.model.distributed.seed, config.model.base_model.vocab_size
    records = read_records(folder)
    sizes = [one["batch_size"] for one in records if one.get("phase") == "training"]
    size = config.batch.batch_size or (sizes[-1] if sizes else None)
    if size is None:
        raise DataError(f"{folder}: no step in its metrics.jsonl; training has not begun")
    info = folders.read_manifest(newest).info if newest is not None else None
    origin = newest.parent.parent if newest is not None else folder  # a branch's may be another run
    skipped, since = _skipped_ranges(folder, newest)
    moved = since if config.data.stages else []  # later rewinds move the borders of stages
    is_unchanged = info is not None and _is_unchanged(info, config, size)
    if info is not None and info.get("history") is not None and is_unchanged and not moved:
        # Nothing changed since: missing sources matter only to steps with their sequences.
        return History.model_validate(info["history"]), skipped + since, ""
    data = open_dataset(config.data, config.batch.sequence_length, seed, vocabulary)
    if info is None:
        return new_history(config, size, data), skipped + since, ""
    if info.get("history") is not None:
        history, notes = History.model_validate(info["history"]), list[str]()
    else:
        history, notes = reconstruct(info, origin, data, vocabulary)
        notes.append(
            "version 0.1 did not record changes of data: steps before a change are shown with the"
            " data after it"
        )
    training = data.splits["training"]
    history = history.continued(info["step"], info["samples"], config, training, size)
    for number, one in enumerate(moved, 1):
        step = one["after"]
        until = history.first_sequence(step + 1, skipped + since[:number])
        before = [skip for skip in skipped + since if skip["after"] < step]
        samples = history.first_sequence(step + 1, before)
        history = history.continued(step, samples, config, training, size, until - samples)
    return history, skipped + since, "; ".join(notes)


def _newest(folder: Path, config: TrainConfig) -> Path | None:
    """The run's newest checkpoint, or that with which a branch without its own begins."""
    if saved := folders.find(folder / "checkpoint", "checkpoint"):
        return saved[-1][1]
    branch = config.run.branch_from
    return branch_point(branch, content=False) if branch is not None else None


def _is_unchanged(info: Mapping[str, Any], config: TrainConfig, size: int) -> bool:
    """Whether the settings that determine the data order equal those of a checkpoint."""
    now, then = config.model_dump(mode="json"), info["settings"]
    # Checkpoints of earlier versions lack these.
    earlier: dict[str, Any] = {"sources": {}, "stages": [], "packing": "concatenate"}
    data = all(
        now["data"][name] == (earlier | then["data"])[name]
        for name in ("format", "path", "split", *earlier)
    )
    seeds = (now["model"]["distributed"]["seed"], then["model"]["distributed"]["seed"])
    lengths = (now["batch"]["sequence_length"], then["batch"]["sequence_length"])
    same = seeds[0] == seeds[1] and lengths[0] == lengths[1]
    return bool(data and same and info["identity"]["batch.batch_size"] == size)


def _skipped_ranges(
    folder: Path, newest: Path | None
) -> tuple[list[dict[str, int]], list[dict[str, int]]]:
    """The skipped ranges of the newest checkpoint, and those that the newest start logged since."""
    if newest is None:
        return [], []
    manifest = folders.read_manifest(newest)
    step = manifest.step
    found: list[dict[str, int]] = list(manifest.info.get("passed_over", []))
    records = read_records(folder)
    start = max((record["run"] for record in records if "run" in record), default=0)
    since = [
        one
        for one in records
        if one.get("phase") == "rewind" and one["run"] == start and one["after"] >= step
    ]
    return found, [{name: one[name] for name in ("after", "spike", "sequences")} for one in since]
