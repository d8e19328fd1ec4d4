"""The history of a run: its batch sizes by step, and its orders of data by sequence.

Sequences are numbered from 0 over the life of a run, including those that were skipped after
spikes. A change by consent (`run.accept_changes`) adds an entry; past entries never change. The
stages of `data.stages` that are still to come are orders too; a resume or rewind computes them
again. Each checkpoint's manifest holds the history: the run resumes from it, and `fast-llm why`
answers from it. Reading it costs nothing; reconstructing one of version 0.1 reads metrics.jsonl.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from fast_llm.config.train import DataConfig, TrainConfig
from fast_llm.data.dataset import Dataset, Split, open_dataset
from fast_llm.data.sampling import UNIT, Drawn, Mixture, add_drawn
from fast_llm.data.source import RandomSource, Source
from fast_llm.errors import DataError, UserError
from fast_llm.planning.stages import StageSpan, remaining_stages

_GONE = "gone"  # the digest of a source that can no longer be read


_Drawn = tuple[PositiveInt, NonNegativeInt, PositiveInt]  # as in sampling.py
_PackedDrawn = tuple[PositiveInt, NonNegativeInt, PositiveInt, Literal["best_fit"]]


class BatchSizeEntry(BaseModel):
    """The batch size of the steps after a step, and the first sequence of these steps."""

    after: NonNegativeInt
    index: NonNegativeInt
    batch_size: PositiveInt


class SourceState(BaseModel):
    """A source when an order of data begins.

    `drawn`: for each sequence length, seed and packing, how many sequences the source has given so
    far. `padding`: share of the inputs of an epoch that hold no token.
    """

    name: str
    digest: str
    key: NonNegativeInt  # of its permutation: no two sources of a run share one
    drawn: list[_Drawn | _PackedDrawn] = []
    padding: NonNegativeFloat = 0.0

    @model_serializer(mode="wrap")
    def _serialize(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without padding if there is none, as earlier versions write it."""
        values: dict[str, Any] = serialize(self)
        return {name: value for name, value in values.items() if name != "padding" or value}


class DataOrder(BaseModel):
    """The order of data from sequence `index` on."""

    index: NonNegativeInt
    sequence_length: PositiveInt
    seed: NonNegativeInt
    data: dict[str, Any]  # format, path, split, to open the sources again; packing if best_fit
    edges: list[NonNegativeInt]  # of the mixture, as sampling.py has them
    sources: list[SourceState]
    left_out: list[SourceState] = []  # sources of earlier orders, should they return

    @model_validator(mode="after")
    def _check(self) -> "DataOrder":
        ascending = all(low <= high for low, high in pairwise(self.edges))
        if not self.sources or len(self.edges) != len(self.sources) + 1:
            raise ValueError("edges and sources do not match")
        if self.edges[0] != 0 or not ascending or self.edges[-1] == 0:
            raise ValueError("edges must ascend from 0")
        return self

    def states_at(self, index: int) -> list[SourceState]:
        """The sources at sequence `index`, with all that they have given."""
        counts = Mixture(self.edges).counts(index - self.index)
        return [
            source.model_copy(update={"drawn": add_drawn(source.drawn, self._drawn(count))})
            for source, count in zip(self.sources, counts, strict=True)
        ]

    def expected_padding(self, sequences: int) -> dict[int, float]:
        """Inputs of the first `sequences` sequences that hold no token, by the key number of their
        source: as many as these sequences have on average over an epoch.
        """
        if not any(source.padding for source in self.sources):
            return {}
        counts = zip(Mixture(self.edges).counts(sequences), self.sources, strict=True)
        return {
            source.key: count * source.padding * self.sequence_length for count, source in counts
        }

    @property
    def best_fit(self) -> bool:
        """Whether documents are packed best-fit."""
        return bool(self.data.get("packing") == "best_fit")

    def _drawn(self, count: int) -> Drawn:
        drawn = self.sequence_length, self.seed, count
        return (*drawn, "best_fit") if self.best_fit else drawn


class History(BaseModel):
    """Batch sizes and orders of data, the oldest first."""

    batches: list[BatchSizeEntry]
    orders: list[DataOrder]

    @model_validator(mode="after")
    def _check(self) -> "History":
        if not self.batches or not self.orders or self.orders[0].index != 0:
            raise ValueError("batches and orders must begin")
        for entries, name in ((self.batches, "after"), (self.orders, "index")):
            places = [getattr(entry, name) for entry in entries]
            if any(low >= high for low, high in pairwise(places)):
                raise ValueError("batches and orders must ascend")
        return self

    def first_sequence(self, step: int, skipped_ranges: Iterable[Mapping[str, int]]) -> int:
        """The first sequence of a step.

        `skipped_ranges`: for each rewind of the run, the step `after` which it continued and the
        number of `sequences` that it skipped there. Raises DataError if the history of the step is
        unknown.
        """
        entry = self.batch_entry_at(step)
        later = (o["sequences"] for o in skipped_ranges if entry.after <= o["after"] < step)
        return entry.index + (step - 1 - entry.after) * entry.batch_size + sum(later)

    def batch_entry_at(self, step: int) -> BatchSizeEntry:
        """The entry that holds for a step. Raises DataError if none does."""
        found = [entry for entry in self.batches if entry.after < step]
        if not found:
            raise DataError(
                f"step {step}: the batch size changed before checkpoints recorded it, and"
                " metrics.jsonl does not say when; the history is known from step"
                f" {self.batches[0].after + 1} on"
            )
        return found[-1]

    def order_at(self, index: int) -> DataOrder:
        """The order of data that holds for a sequence."""
        return [order for order in self.orders if order.index <= index][-1]

    def inputs(self, samples: int) -> int:
        """Inputs of the first `samples` sequences, padding included."""
        return sum(count * order.sequence_length for order, count in self.counts(samples))

    def stage_of(self, step: int, samples: int, config: TrainConfig, batch_size: int) -> int | None:
        """The stage of `data.stages` that `step`, which `samples` sequences end, is in; None for
        step 0. `batch_size`: as of `continued`.
        """
        if not step or not config.data.stages:
            return None
        before = samples - self.batch_entry_at(step).batch_size
        return remaining_stages(config, step - 1, before, self.inputs(before), batch_size)[0].number

    def expected_padding(self, samples: int) -> dict[int, float]:
        """As of `DataOrder`, over all orders."""
        total: dict[int, float] = {}
        for order, count in self.counts(samples):
            for key, padding in order.expected_padding(count).items():
                total[key] = total.get(key, 0) + padding
        return total

    def counts(self, samples: int) -> list[tuple[DataOrder, int]]:
        """How many of the first `samples` sequences each order has."""
        ends = [*(order.index for order in self.orders), samples][1:]
        pairs = zip(self.orders, ends, strict=True)
        return [(order, max(0, min(end, samples) - order.index)) for order, end in pairs]

    def with_batches(self, step: int, samples: int, batch_size: int) -> "History":
        """Copy the history with this batch size after `step`, which `samples` sequences end."""
        kept = [entry for entry in self.batches if entry.after < step or step == entry.after == 0]
        if not kept or kept[-1].batch_size != batch_size:
            kept = [entry for entry in kept if entry.after < step]
            kept.append(BatchSizeEntry(after=step, index=samples, batch_size=batch_size))
        return History(batches=kept, orders=self.orders)

    def continued(
        self,
        step: int,
        samples: int,
        config: TrainConfig,
        split: Split,
        batch_size: int,
        skipped: int = 0,
    ) -> "History":
        """Copy the history with these settings after `step`, which `samples` sequences end. Then
        `skipped` sequences are skipped. `batch_size`: of sequences of `batch.sequence_length`.
        """
        tokens = self.inputs(samples + skipped)
        now = remaining_stages(config, step, samples + skipped, tokens, batch_size)[0]
        changed = self.with_batches(step, samples, now.batch_size)
        return changed.with_data(step, samples + skipped, config, split, batch_size)

    def with_data(
        self,
        step: int,
        samples: int,
        config: TrainConfig,
        split: Split,
        batch_size: int | None = None,
    ) -> "History":
        """Copy the history with the data of `split` after `step`, which `samples` sequences end:
        the stage that is then in force, and those to come. `batch_size`: as of `continued`, if not
        that of `step`.
        """
        size, tokens = batch_size or self.batches[-1].batch_size, self.inputs(samples)
        kept = [order for order in self.orders if order.index < samples]
        batches = [entry for entry in self.batches if entry.after <= step]
        for span in remaining_stages(config, step, samples, tokens, size):
            if span.after > step and span.batch_size != batches[-1].batch_size:
                entry = {"after": span.after, "index": span.index, "batch_size": span.batch_size}
                batches.append(BatchSizeEntry.model_validate(entry))
            states = list[SourceState]()
            if kept:
                states = [*kept[-1].states_at(span.index), *kept[-1].left_out]
            order = _order(span, config, split, states)
            if kept and _equal(kept[-1], order):
                # Only paths changed, or two stages are alike.
                named = [
                    old.model_copy(update={"name": new.name})
                    for old, new in zip(kept[-1].sources, order.sources, strict=True)
                ]
                kept[-1] = kept[-1].model_copy(update={"data": order.data, "sources": named})
            else:
                kept.append(order)
        return History(batches=batches, orders=kept)

    def describe_sources(self, before: "History", samples: int, split: Split) -> list[str]:
        """For each source, where in its data it continues after `samples` sequences, as text; empty
        if the earlier history `before` has the same order there.
        """
        now = self.order_at(samples)
        if now.index < samples or samples == 0 or _equal(now, before.order_at(samples)):
            return []
        epochs = split.order_at(samples).epochs(samples)
        return [
            f"{source.name}: "
            + (f"continues after {done:.3g} epochs" if source.drawn else "is new")
            for source, done in zip(now.sources, epochs, strict=True)
        ]


def new_history(config: TrainConfig, batch_size: int, dataset: Dataset) -> History:
    """The history of a new run. `batch_size`: of sequences of `batch.sequence_length`."""
    first = remaining_stages(config, 0, 0, 0, batch_size)[0]
    batches = [BatchSizeEntry(after=0, index=0, batch_size=first.batch_size)]
    empty = History.model_construct(batches=batches, orders=[])
    return empty.with_data(0, 0, config, dataset.splits["training"], batch_size)


def apply_orders(split: Split, history: History, samples: int) -> None:
    """Make the training data continue after `samples` sequences as the history says."""
    now = history.order_at(samples)
    split.orders = [
        split.order(
            order.index,
            order.edges,
            [source.key for source in order.sources],
            [source.drawn for source in order.sources],
            order.sequence_length,
        )
        for order in history.orders
        if order.index >= now.index
    ]


def _order(
    span: StageSpan, config: TrainConfig, split: Split, states: Sequence[SourceState]
) -> DataOrder:
    """The order of data that the configuration asks for in a stage.

    Sources with known states keep their keys and counts.
    """
    states, sources = list(states), []
    unused = max((state.key for state in states), default=-1) + 1
    for source in (source.with_length(span.length) for source in split.sources):
        known = next((state for state in states if state.digest == source.digest), None)
        if known is not None:
            states.remove(known)
            values = {"name": source.name, "padding": source.padding}
            sources.append(known.model_copy(update=values))
            continue
        sources.append(
            SourceState(name=source.name, digest=source.digest, key=unused, padding=source.padding)
        )
        unused += 1
    return DataOrder(
        index=span.index,
        sequence_length=span.length,
        seed=config.model.distributed.seed,
        data=data_settings(config.data),
        edges=split.edges(span.weights),
        sources=sources,
        left_out=states,
    )


def data_settings(config: DataConfig) -> dict[str, Any]:
    """The settings from which the sources can be opened again."""
    values: dict[str, Any] = config.model_dump(mode="json", include={"format", "path", "split"})
    if config.packing == "best_fit":
        values["packing"] = config.packing
    if config.format == "mixture":
        values["sources"] = {name: source.path for name, source in config.sources.items()}
    return values


def _equal(one: DataOrder, other: DataOrder) -> bool:
    """Whether two orders give the same sequences."""

    def essence(order: DataOrder) -> Any:
        digests = [source.digest for source in order.sources]
        return (order.sequence_length, order.seed, order.best_fit, order.edges, digests)

    return bool(essence(one) == essence(other))


def open_sources(
    data: Mapping[str, Any], order: DataOrder, vocab_size: int
) -> dict[str, Source | RandomSource]:
    """The training sources of a `data` section by digest, packed as in `order`, without those that
    cannot be opened.
    """
    data = {**data, "packing": "best_fit" if order.best_fit else "concatenate"}
    paths = data["path"][1::2] if len(data["path"]) > 1 else data["path"]
    if "sources" in data:
        paths = data["sources"].values()
        data = {name: value for name, value in data.items() if name != "sources"}
        data["format"] = "list"
    found: dict[str, Source | RandomSource] = {}
    for path in paths or [None]:
        values = {**data, "path": [] if path is None else [path]}
        try:
            config = DataConfig.model_validate(values)
            dataset = open_dataset(config, order.sequence_length, order.seed, vocab_size)
        except UserError:
            continue
        if "training" in dataset.splits:
            found |= {source.digest: source for source in dataset.splits["training"].sources}
    return found


def reconstruct(
    info: Mapping[str, Any], folder: Path, dataset: Dataset, vocab_size: int
) -> tuple[History, list[str]]:
    """Reconstruct the history of a run of version 0.1, which did not record one.

    `info`: of a checkpoint's manifest; `folder`: of the experiment; `dataset`: of the current
    configuration. Returns the history, and notes about what is unknown.
    """
    identity, notes = info["identity"], []
    length, seed = identity["batch.sequence_length"], identity["model.distributed.seed"]
    data = {name: identity[f"data.{name}"] for name in ("format", "path", "split")}
    content = identity["data (its content)"]
    then: Dataset | None = dataset
    if dataset.fingerprint() != content:
        try:
            then = open_dataset(DataConfig.model_validate(data), length, seed, vocab_size)
        except UserError:
            then = None
        if then is not None and then.fingerprint() != content:
            then = None
    if then is not None:
        edges = then.splits["training"].mixture.edges
        pairs = [(source.name, source.digest) for source in then.splits["training"].sources]
    else:
        edges, pairs = _by_path(data, length, seed, vocab_size)
        notes.append(
            "the data of the checkpoint is gone or was changed, and version 0.1 did not record the"
            " content of each source: sources at the same path are assumed to be unchanged"
        )
    sources = [
        SourceState(name=name, digest=digest, key=key) for key, (name, digest) in enumerate(pairs)
    ]
    order = DataOrder(
        index=0, sequence_length=length, seed=seed, data=data, edges=edges, sources=sources
    )
    batches = _logged_batch_sizes(info, read_records(folder))
    if batches[0].after:
        notes.append(
            "batch.batch_size changed in version 0.1, which did not record when; `fast-llm why` can"
            f" answer from step {batches[0].after + 1} on"
        )
    return History(batches=batches, orders=[order]), notes


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records in metrics.jsonl, the oldest first, without lines that a crash truncated."""
    if not (folder / "metrics.jsonl").exists():
        return []
    records = []
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _by_path(
    data: Mapping[str, Any], length: int, seed: int, vocab_size: int
) -> tuple[list[int], list[tuple[str, str]]]:
    """The mixture, names and digests of a `data` section, some of whose files are gone."""
    paths = data["path"]
    weighted = (
        zip(paths[::2], paths[1::2], strict=True) if len(paths) > 1 else [(1.0, p) for p in paths]
    )
    weights, pairs = list[float](), list[tuple[str, str]]()
    for weight, path in weighted:
        try:
            config = DataConfig.model_validate({**data, "path": [path]})
            split = open_dataset(config, length, seed, vocab_size).splits["training"]
        except UserError:
            weights.append(weight)
            pairs.append((str(path), _GONE))
            continue
        for source, (low, high) in zip(split.sources, pairwise(split.mixture.edges), strict=True):
            weights.append(weight * (high - low) / UNIT)
            pairs.append((source.name, source.digest))
    return Mixture.of(weights).edges, pairs


def _logged_batch_sizes(
    info: Mapping[str, Any], records: Iterable[Mapping[str, Any]]
) -> list[BatchSizeEntry]:
    """Batch sizes of a run of version 0.1, from the consumed sequences in metrics.jsonl."""
    logged = {
        record["step"]: (record["step"], record["batch_size"], record["consumed_samples"])
        for record in records
        if record.get("phase") == "training" and record["step"] < info["step"]
    }
    points = [logged[step] for step in sorted(logged)]
    points.append((info["step"], info["identity"]["batch.batch_size"], info["samples"]))
    skipped_ranges = info.get("passed_over", [])
    found = [BatchSizeEntry(after=0, index=0, batch_size=points[0][1])]
    for step, size, samples in points:
        if step == 0:
            continue
        history = found[-1]
        # The step after which the size changed is the one with which the numbers of sequences come
        # out.
        changes = range(history.after, step) if size != history.batch_size else [history.after]
        for change in changes:
            begun = sum(
                o["sequences"] for o in skipped_ranges if history.after <= o["after"] < change
            )
            index = history.index + (change - history.after) * history.batch_size + begun
            later = sum(o["sequences"] for o in skipped_ranges if change <= o["after"] < step)
            if index + (step - change) * size + later == samples:
                if size != history.batch_size:
                    if change == history.after:
                        found.pop()
                    found.append(BatchSizeEntry(after=change, index=index, batch_size=size))
                break
        else:  # more than one change since, or records that are missing: known from here on
            found = [BatchSizeEntry(after=step, index=samples, batch_size=size)]
    return found
