"""Which library tokenizes the documents of a job, and what happens if the fast one is wrong.

`tokenizer.engine: auto` takes gigatoken if it is installed, the corpus is large enough to gain from
it, and engine.py admits it for the tokenizer. Each token file's record and dataset.json name what
was used.

A difference is found by a sample, so other documents could be wrong too. Therefore all token files
that the engine has written are deleted and written again. `refused_engine.json` in the output
folder tells other ranks and later starts.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from fast_llm.data.documents import Corpus
from fast_llm.data.duplicates import DONE
from fast_llm.data.encode import Encoder
from fast_llm.data.engine import (
    NAME,
    REFERENCE,
    DifferentTokens,
    FastEncoder,
    NotAdmitted,
    installed,
)
from fast_llm.data.job import Job
from fast_llm.data.shards import read_json, write_json
from fast_llm.data.workers import RangeTokenizer
from fast_llm.errors import DataError, MissingPackage

logger = logging.getLogger("fast_llm")

_WORTHWHILE = 2**22  # bytes of text that `tokenizers` encodes in the time that admission takes


def choose_engine(job: Job, corpus: Corpus, sample: Sequence[str]) -> RangeTokenizer:
    """What tokenizes the documents. `sample`: some of them, on which the engine must be right.

    Raises DataError or MissingPackage if the fast engine is asked for and cannot be used.
    """
    plain = RangeTokenizer(corpus.reader, job.loaded, job.dtype, job.bos, job.eos)
    asked, name = job.config.tokenizer.engine, installed()
    if asked == "tokenizers" or (asked == "auto" and corpus.bytes < _WORTHWHILE):
        return plain
    if job.refused_engine.exists():
        refused = read_json(job.refused_engine)
        logger.info(
            f"Tokenizing with {REFERENCE}: {refused['engine']} gave other tokens for"
            f" {refused['document']}."
        )
        return plain
    if name is None:
        if asked == NAME:
            raise MissingPackage(NAME, "tokenizer.engine: gigatoken")
        logger.info(
            f"Tokenizing with {REFERENCE}. With the package {NAME}, the same tokens take a fraction"
            f" of the time: pip install {NAME}"
        )
        return plain
    try:
        fast = admitted(plain.encoder, job.loaded.text, sample)
    except NotAdmitted as error:
        if asked == NAME:
            raise DataError(
                f"tokenizer.engine: {name} cannot be used: {error}; set tokenizer.engine: auto"
            ) from error
        logger.info(f"Tokenizing with {REFERENCE}; {name} is not used: {error}.")
        return plain
    logger.info(f"Tokenizing with {name}, compared with {REFERENCE}.")
    return RangeTokenizer(corpus.reader, job.loaded, job.dtype, job.bos, job.eos, fast)


def admitted(encoder: Encoder, text: str, sample: Sequence[str]) -> FastEncoder:
    """The engine for a tokenizer, whose tokenizer.json is `text`.

    Raises NotAdmitted if it is not right on hard texts and the sample.
    """
    fast = FastEncoder(encoder, text=text)
    fast.admit(sample)
    return fast


def refuse_engine(job: Job, corpus: Corpus, error: DifferentTokens) -> None:
    """Stop using the engine after a difference, and delete what it wrote."""
    place, name = corpus.name(error.row), installed()
    logger.warning(
        f"{place}: {name} gives other tokens than {REFERENCE}; all documents are tokenized again"
        f" with {REFERENCE}."
    )
    write_json(job.refused_engine, job.rank, {"engine": name, "document": place})
    delete_refused(job)


def delete_refused(job: Job) -> None:
    """Delete the token files from the first one on that a refused engine wrote.

    Those behind it go too: with other tokens, the same rows can need more or fewer files. Units of
    the engine are done again (units.py), and duplicates are found again. Several ranks may do this
    at once.
    """
    if not job.refused_engine.exists():
        return
    records = {int(path.stem.rpartition("_")[2]): path for path in job.records()}
    refused = [number for number, path in records.items() if _by_engine(path)]
    for number, path in records.items():
        if refused and number >= min(refused):
            job.rank_record().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            for file in job.output.glob(f"{path.stem}.*"):
                file.unlink(missing_ok=True)
    if refused:
        for path in (job.units / DONE, *job.units.glob("*.copies.npy")):
            path.unlink(missing_ok=True)


def _by_engine(record: Path) -> bool:
    """Whether the engine wrote a token file; not if another rank has deleted its record."""
    try:
        return bool(read_json(record).get("engine", REFERENCE).startswith(NAME))
    except DataError:
        if record.exists():
            raise
        return False
