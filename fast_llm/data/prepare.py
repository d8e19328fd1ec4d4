"""Documents to token files: `fast-llm prepare`.

`output_path: X` gives

    X/shard_<rank>_<i>.bin, .idx   tokens (tokenfile.py)
    X/shard_<rank>_<i>.json        record: rows, number of tokens, digests, settings (shards.py)
    X/rank_<rank>.json             record: this rank has finished
    X/tokenizer/                   the tokenizer's files
    X.json                         the dataset.json that training reads; written last, by the last
                                   rank to finish

Rows are cut into ranges of about a megabyte of text. Worker processes read and tokenize them
(workers.py); this process writes the results in the order of the rows (shards.py). So the bytes
depend on documents, tokenizer and settings, not on the number of workers. An interrupted job
resumes with the token files that have no record. Several nodes each take a contiguous part of the
rows and share only the folder.

A document is [BOS] text [EOS]. Text inside a document never becomes BOS or EOS. A document that
cannot be used is skipped and counted; documents.py lists the reasons.

It costs what tokenizing costs (encode.py).
"""

import contextlib
import errno
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from fast_llm.config.prepare import PrepareConfig
from fast_llm.data import documents, files
from fast_llm.data.documents import REASONS, Corpus
from fast_llm.data.encode import Encoder
from fast_llm.data.job import Job, exclusive_lock, make_job, output_folder
from fast_llm.data.metadata import FORMAT
from fast_llm.data.shards import (
    EXAMPLES,
    check_settings,
    rank_is_done,
    read_json,
    remaining_rows,
    remove_partial_files,
    write_json,
    write_shards,
)
from fast_llm.data.split import HASH
from fast_llm.data.workers import RangeTokenizer
from fast_llm.errors import DataError
from fast_llm.storage import content_digest

logger = logging.getLogger("fast_llm")

_SAMPLE_BYTES = 2**18  # of text, tokenized to estimate the size of all
_LARGE_CORPUS = 2**26  # bytes of text that keep one worker busy for some time
_READING_VERSION = 2  # version 1 guessed the types of JSON columns and did not decompress texts
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def prepare(config: PrepareConfig) -> Path:
    """Write token files and, if this is the last rank to finish, their dataset.json, whose path is
    returned.

    Called again after an interruption, it resumes. Raises DataError for documents, tokenizers,
    disks and folders that cannot be used, MissingPackage if `datasets` or huggingface_hub is needed
    and missing.
    """
    job = make_job(config)
    try:
        with output_folder(job), exclusive_lock(job):
            remove_partial_files(job)
            if _is_finished(job):
                logger.info(
                    f"{job.metadata}: already finished, nothing to do. To prepare it again, delete"
                    f" {job.output}."
                )
                return job.metadata
            corpus = documents.open_documents(files.find(config.dataset), config.loading_workers)
            job.settings.update(_identity(corpus))
            _report(job, corpus)
            for record in [*job.output.glob("shard_*_*.json"), *job.output.glob("rank_*.json")]:
                check_settings(record, job.settings)
            job.metadata.unlink(missing_ok=True)  # it describes token files that are gone
            missing = remaining_rows(job, corpus)
            range_tokenizer = RangeTokenizer(corpus.reader, job.loaded, job.dtype, job.bos, job.eos)
            _check_space(job, corpus, range_tokenizer.encoder)
            write_shards(job, corpus, missing, range_tokenizer)
            _finish(job, corpus)
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise DataError(
                f"{job.output}: the disk is full; free some space and run the same command again to"
                " resume"
            ) from error
        if error.errno in _NOT_WRITABLE:
            raise DataError(
                f"output_path: {job.output}: cannot be written to: {error.strerror}"
            ) from error
        raise
    return job.metadata


def check(config: PrepareConfig) -> str:
    """What `prepare` would do, as lines of text. Opens documents and tokenizer, writes nothing.

    Raises as `prepare` does. Datasets on the Hub are not downloaded.
    """
    job = make_job(config)
    lines: list[tuple[str, str]] = []
    found = files.find(config.dataset)
    if found.kind == "hub":
        text = f"{config.dataset.path} on the Hugging Face Hub, which a check does not download"
        lines.append(("documents", text))
    else:
        lines += _describe(job, documents.open_documents(found, config.loading_workers))
    tokens = [
        f"{place} {name} {token} {job.loaded.tokenizer.id_to_token(token)}"
        if token is not None
        else f"{place} no {name}"
        for place, name, token in (("begins with", "BOS", job.bos), ("ends with", "EOS", job.eos))
    ]
    vocab = f"{job.loaded.vocab_size:,} tokens, stored as {job.dtype}"
    lines.append(("tokenizer", f"{job.loaded.path}: {vocab}"))
    lines.append(("a document", " and ".join(tokens)))
    part = f", of which this is rank {job.rank} of {job.world}" if job.world > 1 else ""
    finished = "; already finished" if job.metadata.exists() else ""
    lines.append(("written to", f"{job.output}/ and {job.metadata}{part}{finished}"))
    return "".join(f"{name:<12}{text}\n" for name, text in lines)


def _describe(job: Job, corpus: Corpus) -> list[tuple[str, str]]:
    """How many documents and tokens there are, and what is left out."""
    config = job.config
    number = len(corpus) - corpus.blank_rows
    size = f"about {corpus.bytes / 1e6:,.3g} MB of text"
    lines = [("documents", f"{number:,} in {config.dataset.path}, {size}")]
    if number:
        needed = _estimate(corpus, Encoder(job.loaded.tokenizer, job.dtype))
        folder = job.output.resolve()
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        tokens = int(float(f"{needed / job.dtype.itemsize:.3g}"))
        space = f"{needed / 1e6:,.3g} MB, {free / 1e9:,.4g} GB free"
        lines.append(("tokens", f"about {tokens:,} with BOS and EOS: {space}"))
    if corpus.left_out:
        lines.append(("left out", _files(corpus.left_out)))
    lines += [
        ("left out", f"{table.rows - table.blank_rows:,} rows of {table.path}, which {reason}")
        for table in corpus.tables_without_field[:EXAMPLES]
        if (reason := table.missing_field)
    ]
    return lines


def _identity(corpus: Corpus) -> dict[str, Any]:
    """Which documents these are. Local ones may move; their names and sizes may not change."""
    reading = {"reading": _READING_VERSION} if corpus.reading_changed else {}
    return {"documents": len(corpus), "digest of the documents": corpus.digest, **reading}


def _is_finished(job: Job) -> bool:
    """Whether there is nothing left to do. Raises DataError if it was finished with other
    settings.
    """
    if not job.metadata.exists():
        return False
    if read_json(job.metadata).get("format") != FORMAT:
        raise DataError(
            f"output_path: {job.output}: its metadata would overwrite {job.metadata}; choose"
            " another output_path"
        )
    if not (job.output / "tokenizer").is_dir() or not all(
        job.rank_record(rank).exists() for rank in range(job.world)
    ):
        return False
    settings = dict(job.settings)
    with contextlib.suppress(DataError):  # the documents may have been deleted since
        found = files.find(job.config.dataset)
        if found.digest is not None:
            settings["digest of the documents"] = found.digest
        record = read_json(job.rank_record(job.rank))
        if found.kind == "json" and "reading" not in record["settings"]:
            logger.warning(
                f"{job.metadata}: was written by an earlier version, which could change texts that"
                " look like dates or numbers, and could leave files out because of their names"
                " (CHANGELOG.md)."
            )
    for rank in range(job.world):
        check_settings(job.rank_record(rank), settings)
    return all(rank_is_done(job, rank) for rank in range(job.world))


def _report(job: Job, corpus: Corpus) -> None:
    """Log what is left out, and what would be faster."""
    if corpus.left_out:
        logger.warning(f"{job.config.dataset.path}: left out {_files(corpus.left_out)}.")
    for table in corpus.tables_without_field[:EXAMPLES]:
        logger.warning(
            f"{table.path} {table.missing_field}: its {table.rows - table.blank_rows:,} rows are"
            " left out."
        )
    if (more := len(corpus.tables_without_field) - EXAMPLES) > 0:
        logger.warning(f"The rows of {more:,} more such files are left out too.")
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    if job.config.tokenize_workers == 1 and cores > 1 and corpus.bytes >= _LARGE_CORPUS:
        logger.info(
            f"tokenize_workers is 1, and this machine has {cores} cores: tokenize_workers={cores}"
            f" is up to {cores} times as fast."
        )


def _files(left_out: list[tuple[str, str]]) -> str:
    return f"{len(left_out):,} file{'s' if len(left_out) > 1 else ''}: {files.describe(left_out)}"


def _estimate(corpus: Corpus, encoder: Encoder) -> float:
    """Bytes that the token files will take, estimated from a sample of the documents."""
    texts: list[str] = []
    size = 0
    for text in corpus.sample(64):
        texts.append(text[:_SAMPLE_BYTES])
        size += len(texts[-1].encode())
        if size >= _SAMPLE_BYTES:
            break
    sample = sum(len(content or b"") for content in encoder.encode(texts))
    # An index has 20 bytes a document (tokenfile.py); BOS and EOS are two tokens.
    return sample / max(size, 1) * corpus.bytes + (20 + 2 * encoder.dtype.itemsize) * len(corpus)


def _check_space(job: Job, corpus: Corpus, encoder: Encoder) -> None:
    """Raises DataError if the token files will probably not fit on the disk."""
    if job.config.dataset.disable_disk_space_check or not len(corpus):
        return
    total = _estimate(corpus, encoder)
    written = sum(path.stat().st_size for path in job.output.glob("shard_*.*"))
    free = shutil.disk_usage(job.output).free
    if total - written > free:
        raise DataError(
            f"output_path: {job.output}: the token files will need about"
            f" {(total - written) / 1e9:.3g} GB more, but {free / 1e9:.3g} GB are free; make room,"
            " or set dataset.disable_disk_space_check: yes"
        )


def _finish(job: Job, corpus: Corpus) -> None:
    """Write the dataset.json if all ranks have finished."""
    missing = [rank for rank in range(job.world) if not rank_is_done(job, rank)]
    if missing:
        names = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
        logger.info(
            f"Rank {job.rank} has finished. {job.metadata} is written when rank {names} has too."
        )
        return
    shards: list[tuple[str, dict[str, Any]]] = []
    records: list[dict[str, Any]] = []
    for rank in range(job.world):
        finished = read_json(job.rank_record(rank))
        check_settings(job.rank_record(rank), job.settings)
        found = [
            (job.shard(number, rank).name, read_json(job.record(number, rank)))
            for number in range(finished["shards"])
        ]
        shards += found
        records += [*(record for _, record in found), finished]
    skipped = {
        reason: count
        for reason in REASONS
        if (count := sum(record["skipped"].get(reason, 0) for record in records))
    }
    summary = ", ".join(f"{count:,} {REASONS[reason]}" for reason, count in skipped.items())
    if not shards:
        for rank in range(job.world):  # so that the next start begins anew
            job.rank_record(rank).unlink(missing_ok=True)
        raise DataError(
            f"dataset.path: {job.config.dataset.path} has no document to write:"
            f" {summary or 'there are none'}"
        )
    _copy_tokenizer(job)
    content = _metadata(job, corpus, shards, records, skipped)
    write_json(job.metadata, job.rank, {**content, "sha256": content_digest(content)})
    logger.info(
        f"{job.metadata}: {content['num_documents']:,} documents, {content['num_tokens']:,} tokens"
        f" as {job.dtype} in {len(shards):,} token file{'s' if len(shards) > 1 else ''}"
        + (f"; skipped {summary}" if summary else "")
    )


def _metadata(
    job: Job,
    corpus: Corpus,
    shards: list[tuple[str, dict[str, Any]]],
    records: list[dict[str, Any]],
    skipped: dict[str, int],
) -> dict[str, Any]:
    """The content of the dataset.json. `shards`: the records of token files, by name; `records`:
    those of ranks too.
    """
    config = job.config.dataset
    tokens = sum(record["tokens"] for _, record in shards)
    examples = [example for record in records for example in record["examples"]]
    return {
        "format": FORMAT,
        "split": HASH,
        "datasets": [
            {
                "prefix": f"{job.output.name}/{name}",
                "num_documents": record["documents"],
                "num_tokens": record["tokens"],
                "weight": record["tokens"] / tokens,
                "dtype": str(job.dtype),
                "sha256": record["sha256"],
            }
            for name, record in shards
        ],
        "tokenizer": {
            "fingerprint": job.loaded.fingerprint,
            "vocab_size": job.loaded.vocab_size,
            "bos": job.loaded.bos,
            "eos": job.loaded.eos,
            "writes_bos": job.bos is not None,
            "writes_eos": job.eos is not None,
            "path": f"{job.output.name}/tokenizer",
        },
        "max_token_id": max(record["max_token_id"] for _, record in shards),
        "num_documents": sum(record["documents"] for _, record in shards),
        "num_tokens": tokens,
        "skipped_documents": sum(skipped.values()),
        "skipped": skipped,
        "skipped_examples": examples[:EXAMPLES],
        "source": {
            "path": config.path,
            "config_name": config.config_name,
            "data_directory": config.data_directory,
            "data_files": config.data_files,
            "split": config.split,
            "field": config.field,
            "documents": len(corpus) - corpus.blank_rows,
            "digest": corpus.digest,
            "left_out_files": len(corpus.left_out),
            "left_out_examples": [list(each) for each in corpus.left_out[:EXAMPLES]],
        },
    }


def _copy_tokenizer(job: Job) -> None:
    folder = job.output / "tokenizer"
    folder.mkdir(exist_ok=True)
    for name, file in job.loaded.named_files():
        partial = folder / f"{name}.{job.rank}.partial"
        partial.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, partial)
        partial.replace(folder / name)
