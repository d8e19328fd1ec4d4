"""Documents to token files: `fast-llm prepare`.

`output_path: X` gives

    X/shard_0_<i>.bin, .idx   tokens (tokenfile.py)
    X/shard_0_<i>.rows.npy    the row of each document (origins.py)
    X/shard_0_<i>.masks.npy   masked tokens, with dataset.loss_masking_spans (masks.py)
    X/shard_0_<i>.json        record: rows, number of tokens, digests, settings (shards.py)
    X/files.jsonl.gz          the file of each row (origins.py)
    X/rank_0.json             record: all token files are written
    X/tokenizer/              the tokenizer's files
    X/units/, X/counts/       results of several ranks, until the token files are written (units.py,
                              counting.py)
    X.json                    the dataset.json that training reads; written last

Rows are cut into ranges of about a megabyte of text. Worker processes read and tokenize them
(workers.py); this process writes the results in the order of the rows (shards.py). Several ranks
instead share units of work (ranks.py) and write the same files. So the bytes depend on documents,
tokenizer and settings, not on the number of workers or ranks. An interrupted job resumes with the
token files that have no record.

A document is [BOS] text [EOS]. Text inside a document never becomes BOS or EOS. A document that
cannot be used is skipped and counted; documents.py lists the reasons.

It costs what tokenizing costs (encode.py).
"""

import contextlib
import errno
import logging
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from fast_llm.config.prepare import PrepareConfig
from fast_llm.data import documents, files
from fast_llm.data.choose_engine import choose_engine, delete_refused, refuse_engine
from fast_llm.data.counting import open_shared
from fast_llm.data.documents import REASONS, Corpus
from fast_llm.data.encode import Encoder
from fast_llm.data.engine import REFERENCE, DifferentTokens
from fast_llm.data.filtering import FilterFailed
from fast_llm.data.inspect.raw import estimate, summary
from fast_llm.data.job import Job, exclusive_lock, make_job, output_folder
from fast_llm.data.metadata import FORMAT
from fast_llm.data.on_ray import prepare_on_ray
from fast_llm.data.origins import write_files
from fast_llm.data.ranks import EngineRefused, prepare_units
from fast_llm.data.reading import NOT_JSON, too_many_bad_lines
from fast_llm.data.shards import (
    BAD_LINES,
    EXAMPLES,
    check_settings,
    is_complete,
    read_json,
    remaining_rows,
    remove_partial_files,
    remove_shared_work,
    write_json,
    write_shards,
)
from fast_llm.data.split import HASH
from fast_llm.errors import DataError
from fast_llm.storage import content_digest

logger = logging.getLogger("fast_llm")

_SAMPLE_BYTES = 2**18  # of text, tokenized to estimate the size and the time of all
_LARGE_CORPUS = 2**26  # bytes of text that keep one worker busy for some time
_READING_VERSION = 2  # version 1 guessed the types of JSON columns and did not decompress texts
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def prepare(config: PrepareConfig) -> Path:
    """Write token files and their dataset.json, whose path is returned. Several ranks do so
    together.

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
            corpus = documents.open_documents(
                files.find(config.dataset), config.loading_workers, partial(open_shared, job)
            )
            job.settings.update(_identity(corpus))
            _report(job, corpus)
            names = ("shard_*_*.json", "rank_*.json", "units/settings.json")
            for record in (path for name in names for path in job.output.glob(name)):
                check_settings(record, job.settings)
            if not is_complete(job):
                job.metadata.unlink(missing_ok=True)  # it describes token files that are gone
            if not _write(job, corpus):
                logger.info(
                    f"Rank {job.rank} has finished its share. {job.metadata} is written by the last"
                    " rank to finish."
                )
                return job.metadata
            try:
                _finish(job, corpus)
            except FileNotFoundError:
                if job.world == 1 or not job.metadata.exists():
                    raise
                # Another rank has finished, and removed what this one was writing.
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


def _write(job: Job, corpus: Corpus) -> bool:
    """Write what is missing. False if other ranks have some of it and cannot be waited for."""
    sample = _sample(corpus)
    while True:
        delete_refused(job)
        range_tokenizer = choose_engine(job, corpus, sample)
        _check_space(job, corpus, range_tokenizer.encoder, sample)
        try:
            if job.on_ray:
                prepare_on_ray(job, corpus, range_tokenizer)
                return True
            if job.in_units:
                return prepare_units(job, corpus, range_tokenizer)
            write_shards(job, corpus, remaining_rows(job, corpus), range_tokenizer)
            return True
        except DifferentTokens as error:
            refuse_engine(job, corpus, error)
        except FilterFailed as error:
            raise DataError(
                f"dataset.filter: {job.config.dataset.filter} fails on {corpus.name(error.row)}:"
                f" {error.reason}"
            ) from error
        except EngineRefused:  # by another rank
            pass


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
    part = f", shared by {job.world} ranks, of which this is {job.rank}" if job.world > 1 else ""
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
        texts = _sample(corpus)
        needed = estimate(corpus, Encoder(job.loaded.tokenizer, job.dtype), texts)
        folder = job.output.resolve()
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        space = f"{needed.file_bytes / 1e6:,.3g} MB, {free / 1e9:,.4g} GB free"
        removes = ["dataset.filter"] * (config.dataset.filter is not None)
        removes += ["dataset.deduplicate"] * config.dataset.deduplicate
        before = f", before {' and '.join(removes)}" if removes else ""
        lines.append(("tokens", f"about {needed.tokens:,} with BOS and EOS{before}: {space}"))
        lines += summary(corpus, needed.seconds, config.tokenize_workers)
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
    if not (job.output / "tokenizer").is_dir() or not is_complete(job):
        return False
    settings = dict(job.settings)
    del settings["distributed.world_size"]  # of data that is complete it does not matter
    with contextlib.suppress(DataError):  # the documents may have been deleted since
        found = files.find(job.config.dataset)
        if found.digest is not None:
            settings["digest of the documents"] = found.digest
        record = read_json(job.rank_record())
        if found.kind == "json" and "reading" not in record["settings"]:
            logger.warning(
                f"{job.metadata}: was written by an earlier version, which could change texts that"
                " look like dates or numbers, and could leave files out because of their names"
                " (CHANGELOG.md)."
            )
    check_settings(job.rank_record(), settings)
    remove_shared_work(job)  # if it was stopped in the last moment
    return True


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


def _sample(corpus: Corpus) -> list[str]:
    """Some of the documents, or their beginnings."""
    texts: list[str] = []
    size = 0
    for text in corpus.sample(64):
        texts.append(text[: _SAMPLE_BYTES // 16])
        size += len(texts[-1].encode())
        if size >= _SAMPLE_BYTES:
            break
    return texts


def _bytes_of_documents(corpus: Corpus, encoder: Encoder) -> int:
    """An index has 20 bytes a document (tokenfile.py); BOS and EOS are two tokens."""
    return (20 + 2 * encoder.dtype.itemsize) * len(corpus)


def _check_space(job: Job, corpus: Corpus, encoder: Encoder, sample: list[str]) -> None:
    """Raises DataError if the token files will probably not fit on the disk."""
    if job.config.dataset.disable_disk_space_check or not len(corpus):
        return
    found = [*job.output.glob("shard_*.*"), *job.units.glob("*.bin")]
    written = 0
    for path in found:
        with contextlib.suppress(FileNotFoundError):  # other ranks rename what they write
            written += path.stat().st_size
    free = shutil.disk_usage(job.output).free
    # A token has at least a byte of text. Only if that is too much, tokenize a sample.
    times = 2 if job.in_units else 1
    most = encoder.dtype.itemsize * corpus.bytes + _bytes_of_documents(corpus, encoder)
    if times * most <= free:
        return
    total = times * estimate(corpus, encoder, sample).file_bytes
    if total - written > free:
        raise DataError(
            f"output_path: {job.output}: the token files will need about"
            f" {(total - written) / 1e9:.3g} GB more, but {free / 1e9:.3g} GB are free; make room,"
            " or set dataset.disable_disk_space_check: yes"
        )


def _check_coverage(job: Job, records: list[dict[str, Any]]) -> None:
    """Raises DataError unless each token file begins where the one before ends."""
    row = 0
    for number, record in enumerate(records):
        if record["first_row"] != row:
            raise DataError(
                f"{job.record(number)}: begins with document {record['first_row']}, must begin with"
                f" {row}; delete {job.output} and prepare again"
            )
        row = record["next_row"]


def _finish(job: Job, corpus: Corpus) -> None:
    """Write the dataset.json, and delete what it does not need."""
    finished = read_json(job.rank_record())
    shards: list[tuple[str, dict[str, Any]]] = []
    for number in range(finished["shards"]):
        check_settings(job.record(number), job.settings)
        shards.append((job.shard(number).name, read_json(job.record(number))))
    _check_coverage(job, [record for _, record in shards])
    records = [*(record for _, record in shards), finished]
    skipped = {
        reason: count
        for reason in REASONS
        if (count := sum(record["skipped"].get(reason, 0) for record in records))
    }
    allowed = job.config.dataset.max_bad_lines
    if skipped.get(NOT_JSON, 0) > allowed:  # of all ranks together
        listed = [line for record in records for line in record.get("bad_lines", ())]
        where = listed[allowed] if allowed < BAD_LINES else job.config.dataset.path
        raise too_many_bad_lines(where, allowed)
    summary = ", ".join(f"{count:,} {REASONS[reason]}" for reason, count in skipped.items())
    if not shards:
        job.rank_record().unlink(missing_ok=True)  # so that the next start begins anew
        remove_shared_work(job)
        raise DataError(
            f"dataset.path: {job.config.dataset.path} has no document to write:"
            f" {summary or 'there are none'}"
        )
    if job.config.dataset.loss_masking_spans is not None:
        _check_masked(job, [record for _, record in shards])
    _copy_tokenizer(job)
    content = _metadata(job, corpus, shards, records, skipped)
    content["source"]["files_sha256"] = write_files(job.output, job.rank, corpus)
    write_json(job.metadata, job.rank, {**content, "sha256": content_digest(content)})
    remove_shared_work(job)
    remove_partial_files(job, of_all_ranks=True)
    logger.info(
        f"{job.metadata}: {content['num_documents']:,} documents, {content['num_tokens']:,} tokens"
        f" as {job.dtype} in {len(shards):,} token file{'s' if len(shards) > 1 else ''}"
        + (f"; skipped {summary}" if summary else "")
    )


def _check_masked(job: Job, records: list[dict[str, Any]]) -> None:
    """Raises DataError if no document has a span: the name of the column is then wrong."""
    if not any(record["masked_tokens"] for record in records):
        raise DataError(
            "dataset.loss_masking_spans: no document has spans in column"
            f" {job.config.dataset.loss_masking_spans}; give the right column, or leave it out, and"
            f" delete {job.output}"
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
    spans = config.loss_masking_spans
    tokens = sum(record["tokens"] for _, record in shards)
    # Version 0.1 did not count them.
    counted = all("text_bytes" in record for _, record in shards)
    text_bytes = sum(record["text_bytes"] for _, record in shards) if counted else None
    examples = [example for record in records for example in record["examples"]]
    bad_lines = [line for record in records for line in record.get("bad_lines", ())]
    return {
        "format": FORMAT,
        "split": HASH,
        "datasets": [
            {
                "prefix": f"{job.output.name}/{name}",
                "num_documents": record["documents"],
                "num_tokens": record["tokens"],
                **({"num_bytes": record["text_bytes"]} if counted else {}),
                **({"num_masked_tokens": record["masked_tokens"]} if spans is not None else {}),
                "weight": record["tokens"] / tokens,
                "dtype": str(job.dtype),
                "sha256": record["sha256"],
            }
            for name, record in shards
        ],
        "tokenizer": _tokenizer_entry(job),
        "engines": sorted({record.get("engine", REFERENCE) for _, record in shards}),
        "max_token_id": max(record["max_token_id"] for _, record in shards),
        "num_documents": sum(record["documents"] for _, record in shards),
        "num_tokens": tokens,
        **({} if text_bytes is None else {"num_bytes": text_bytes}),
        "skipped_documents": sum(skipped.values()),
        "skipped": skipped,
        "skipped_examples": examples[:EXAMPLES],
        **({"bad_lines": bad_lines[:BAD_LINES]} if bad_lines else {}),
        "source": {
            "path": config.path,
            "config_name": config.config_name,
            "data_directory": config.data_directory,
            "data_files": config.data_files,
            "split": config.split,
            "field": config.field,
            **_filter_entry(job),
            **({"loss_masking_spans": spans} if spans is not None else {}),
            "documents": len(corpus) - corpus.blank_rows,
            "digest": corpus.digest,
            "left_out_files": len(corpus.left_out),
            "left_out_examples": [list(each) for each in corpus.left_out[:EXAMPLES]],
        },
    }


def _filter_entry(job: Job) -> dict[str, Any]:
    """What the dataset.json says of the filter, if there is one."""
    if job.config.dataset.filter is None:
        return {}
    sha256 = job.settings["dataset.filter_sha256"]
    return {"filter": job.config.dataset.filter, "filter_sha256": sha256}


def _tokenizer_entry(job: Job) -> dict[str, Any]:
    """What the dataset.json says of the tokenizer."""
    special_tokens = job.config.tokenizer.special_tokens
    return {
        "fingerprint": job.loaded.fingerprint(special_tokens, (job.bos, job.eos)),
        "vocab_size": job.loaded.vocab_size,
        "bos": job.loaded.bos,
        "eos": job.loaded.eos,
        "writes_bos": job.bos is not None,
        "writes_eos": job.eos is not None,
        "path": f"{job.output.name}/tokenizer",
    } | ({"special_tokens": special_tokens} if special_tokens else {})


def _copy_tokenizer(job: Job) -> None:
    folder = job.output / "tokenizer"
    folder.mkdir(exist_ok=True)
    for name, content in job.loaded.contents().items():
        partial = folder / f"{name}.{job.rank}.partial"
        partial.parent.mkdir(exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder / name)
