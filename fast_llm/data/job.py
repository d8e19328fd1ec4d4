"""A preparation as one rank sees it: what is written and where, and the rank's exclusive lock."""

import contextlib
import fcntl
import gc
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fast_llm.config.prepare import PrepareConfig
from fast_llm.data import tokenizer
from fast_llm.data.filtering import filter_digest
from fast_llm.errors import DataError

logger = logging.getLogger("fast_llm")


@dataclass(frozen=True)
class Job:
    """A preparation: its settings, its paths, and which of its ranks this process is."""

    config: PrepareConfig
    output: Path
    rank: int
    world: int
    loaded: tokenizer.Loaded
    dtype: np.dtype[Any]
    bos: int | None  # written before each document
    eos: int | None  # written after each document
    settings: dict[str, Any]
    """Everything that decides the bytes of the token files; the identity of the documents is added
    once they are open."""

    @property
    def metadata(self) -> Path:
        """The dataset.json."""
        return self.output.with_name(self.output.name + ".json")

    @property
    def units(self) -> Path:
        """The folder of the units' results, until all token files are written."""
        return self.output / "units"

    @property
    def counts(self) -> Path:
        """The folder of row counts that ranks share (counting.py), until all is written."""
        return self.output / "counts"

    @property
    def in_units(self) -> bool:
        """Whether the work is divided into units; else this process writes all rows in order."""
        return (
            self.on_ray or self.world > 1 or self.config.dataset.deduplicate or self.units.exists()
        )

    @property
    def on_ray(self) -> bool:
        """Whether Ray runs the work."""
        return self.config.distributed.engine == "ray"

    def shard(self, number: int, rank: int = 0) -> Path:
        """The prefix of a token file. Only earlier versions wrote files of ranks above 0."""
        return self.output / f"shard_{rank}_{number}"

    def record(self, number: int, rank: int = 0) -> Path:
        """The record of a token file."""
        prefix = self.shard(number, rank)
        return prefix.with_name(prefix.name + ".json")

    def records(self) -> list[Path]:
        """The records of token files that exist."""
        return list(self.output.glob("shard_0_*.json"))

    def rank_record(self, rank: int = 0) -> Path:
        """The record of a preparation that has finished, in earlier versions of each rank."""
        return self.output / f"rank_{rank}.json"

    @property
    def refused_engine(self) -> Path:
        """Exists if a fast engine gave wrong tokens (choose_engine.py)."""
        return self.output / "refused_engine.json"

    @property
    def lock(self) -> Path:
        return self.output / f".lock_{self.rank}"


def make_job(config: PrepareConfig) -> Job:
    """What is written and where. Raises DataError for settings that do not fit the tokenizer."""
    rank, world = _rank_and_world(config)
    filtering = {}
    if config.dataset.filter is not None:  # now, not in a worker after an hour of counting
        filtering["dataset.filter_sha256"] = filter_digest(config.dataset.filter)
    special_tokens = config.tokenizer.special_tokens
    collects = gc.isenabled()
    gc.disable()  # it would walk the vocabulary again and again
    try:
        loaded = tokenizer.load(config.tokenizer.path, special_tokens, compare=True)
    finally:
        if collects:
            gc.enable()
    dtype = _dtype(config, loaded)
    bos, eos = _bos_and_eos(config, loaded)
    output = Path(config.output_path).expanduser()
    settings = {
        "dataset.split": config.dataset.split,
        "dataset.field": config.dataset.field,
        "tokenizer.bos": bos,
        "tokenizer.eos": eos,
        "tokenizer.special_tokens": special_tokens,
        "tokenizer": _recorded(output, loaded) or loaded.fingerprint(special_tokens, (bos, eos)),
        "dataset.data_type": str(dtype),
        "dataset.filter": config.dataset.filter,
        **filtering,
        "dataset.deduplicate": config.dataset.deduplicate,
        "dataset.max_document_bytes": config.dataset.max_document_bytes,
        "tokens_per_shard": config.tokens_per_shard,
        "distributed.world_size": 1,  # earlier versions divided rows among ranks for good
    }
    if config.dataset.loss_masking_spans is not None:
        settings["dataset.loss_masking_spans"] = config.dataset.loss_masking_spans
    return Job(config, output, rank, world, loaded, dtype, bos, eos, settings)


def _recorded(output: Path, loaded: tokenizer.Loaded) -> str | None:
    """The fingerprint of this tokenizer by an earlier version, if that started the preparation."""
    for path in (*output.glob("rank_*.json"), *output.glob("shard_*_*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            recorded = json.loads(path.read_bytes())["settings"]["tokenizer"]
            return loaded.old_fingerprint if recorded == loaded.old_fingerprint else None
    return None


def _rank_and_world(config: PrepareConfig) -> tuple[int, int]:
    """This node's rank, and the number of nodes."""
    if config.distributed.engine == "ray":
        return 0, 1
    found = {}
    for name, given, default in (
        ("rank", config.distributed.rank, None),
        ("world_size", config.distributed.world_size, 1),
    ):
        text = os.environ.get(name.upper(), "")
        if given is None and text and not text.isdecimal():
            raise DataError(
                f"distributed.{name}: {name.upper()} in the environment is {text!r}, must be a"
                " number"
            )
        found[name] = given if given is not None else int(text) if text else default
    rank, world = found["rank"], found["world_size"] or 1
    if rank is None and world > 1:
        raise DataError(
            f"distributed.rank: missing, with distributed.world_size {world}; give each node its"
            f" own, from 0 to {world - 1}"
        )
    if (rank or 0) >= world:
        raise DataError(
            f"distributed.rank: given {rank}, must be below distributed.world_size {world}"
        )
    return rank or 0, world


def _dtype(config: PrepareConfig, loaded: tokenizer.Loaded) -> np.dtype[Any]:
    """The smallest integer type that holds the vocabulary, or the requested one."""
    largest = loaded.vocab_size - 1
    smallest = next(
        name for name in ("uint8", "uint16", "int32", "int64") if largest <= np.iinfo(name).max
    )
    wanted = config.dataset.data_type or smallest
    if largest > np.iinfo(wanted).max:
        raise DataError(
            f"dataset.data_type: given {wanted}, which holds numbers up to {np.iinfo(wanted).max},"
            f" but the tokenizer's largest token is {largest}; {smallest} holds it"
        )
    return np.dtype(wanted)


def _bos_and_eos(config: PrepareConfig, loaded: tokenizer.Loaded) -> tuple[int | None, int | None]:
    """The tokens written before and after each document."""
    wanted, folder = config.tokenizer, loaded.path.parent
    if wanted.bos == "yes" and loaded.bos is None:
        raise DataError(
            f"tokenizer.bos: given yes, but {folder} names no BOS token; add bos_token to its"
            " tokenizer_config.json, or set tokenizer.bos: no"
        )
    if wanted.eos != "no" and loaded.eos is None:
        raise DataError(
            f"tokenizer.eos: {folder} names no EOS token, without which documents run together; add"
            " eos_token to its tokenizer_config.json, or set tokenizer.eos: no"
        )
    writes_bos = wanted.bos == "yes" or (wanted.bos == "auto" and loaded.adds_bos)
    return loaded.bos if writes_bos else None, None if wanted.eos == "no" else loaded.eos


@contextlib.contextmanager
def output_folder(job: Job) -> Iterator[None]:
    """Create the output folder; remove it again if the job fails before anything is in it."""
    created = [folder for folder in (job.output, *job.output.parents) if not folder.exists()]
    job.output.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if job.output in created and not any(
            path for path in job.output.iterdir() if path != job.lock
        ):
            with contextlib.suppress(OSError):
                job.lock.unlink(missing_ok=True)
                for folder in created:
                    folder.rmdir()
        raise


@contextlib.contextmanager
def exclusive_lock(job: Job) -> Iterator[None]:
    """Keep a second process from writing the same files. Raises DataError if one already does."""
    # Another rank that failed may have just removed the folder.
    job.output.mkdir(parents=True, exist_ok=True)
    with job.lock.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{job.output}: another process is preparing rank {job.rank} in this folder; wait"
                " for it"
            ) from error
        except OSError as error:  # some network file systems have no locks
            logger.warning(
                f"{job.output}: cannot be locked ({error.strerror}); never run two preparations at"
                " once."
            )
        yield
