"""Questions to ask afterwards: is everything whole (`verify`), and what was in a batch (`why`).

Neither imports torch.
"""

from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer

from fast_llm.checkpoint import folder as folders
from fast_llm.config.section import locating, read, validate
from fast_llm.config.train import TrainConfig
from fast_llm.data import dataset
from fast_llm.errors import ConfigError, DataError, UserError
from fast_llm.training.plan import readable_bytes
from fast_llm.training.run import read_records
from fast_llm.training.spikes import first_sequence

_SHOWN = 60  # characters of a document


def verify(paths: list[str]) -> list[str]:
    """Read everything under each path and compare it with its digests; a sentence for each thing that is whole.

    A path is a dataset.json, a checkpoint, an export, or an experiment folder with all it holds. Raises ConfigError that
    names everything damaged, after all of it was read.
    """
    whole, wrong = [], []
    for path in [part for given in paths for part in _parts(Path(given).expanduser())]:
        try:
            if path.is_file():
                size = dataset.verify(path)
                whole.append(f"{path}: whole, {readable_bytes(size)} of token files")
            else:
                manifest = folders.verify(path)
                size = sum(entry["size"] for entry in manifest.files.values())
                whole.append(f"{path}: {manifest.kind} of step {manifest.step}, whole, {readable_bytes(size)}")
        except UserError as error:
            wrong += str(error).splitlines()
    if wrong:
        raise ConfigError(wrong)
    return whole


def _parts(path: Path) -> list[Path]:
    """What is verified under a path. Raises DataError if there is nothing to verify."""
    if path.is_file() or (path / folders.MANIFEST).is_file():
        return [path]
    every = [*path.glob(f"*/*/{folders.MANIFEST}"), *path.glob(f"*/*/*/{folders.MANIFEST}")]
    published = {manifest.parent for manifest in every if manifest.parent.name[0] != "."}
    for root in (path / "checkpoint", *path.glob("export/*")):
        published.update(folders.headless(root))
    found = sorted(published, key=lambda part: (part.parent, len(part.name), part.name))  # by step
    if not found:
        raise DataError(
            f"{path}: nothing to verify; give a dataset.json, a checkpoint, an export, or an experiment folder with some"
        )
    return found


def why(run: str, step: int) -> list[str]:
    """What a training step was made of: a line for each stretch of a document in each sequence.

    Raises DataError or ConfigError for a folder that is no run's, a step that it does not have, or data that is gone.
    """
    folder = Path(run).expanduser()
    if not (folder / "config.yaml").is_file():
        raise DataError(f"{folder}: no config.yaml in it; give the experiment folder of a training run")
    document = read(str(folder / "config.yaml"), [])
    config = validate(TrainConfig, document)
    if not 1 <= step <= config.training.train_iters:
        raise DataError(f"step {step}: {folder} has the steps 1 to {config.training.train_iters}")
    batch, length = config.batch, config.batch.sequence_length
    vocabulary = config.model.base_model.vocab_size
    with locating(document, TrainConfig, "data.path"):
        data = dataset.open_dataset(config.data, length, config.model.distributed.seed, vocabulary)
    file = folder / "pretrained" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file)) if file.is_file() else None
    assert batch.batch_size is not None
    lines, counts = [], Counter[str]()
    passed_over = _passed_over(folder)
    first = first_sequence(step, batch.batch_size, passed_over)
    for index in range(first, first + batch.batch_size):
        tokens, at = data.read("training", index).tokens, 0
        lines.append(f"sequence {index:,}")
        for stretch in data.locate("training", index):
            shown = tokens[at : min(at + stretch.tokens, at + _SHOWN)].tolist()
            text = "" if tokenizer is None else f": {tokenizer.decode(shown)[:_SHOWN]!r}"
            lines.append(
                f"  {stretch.prefix} document {stretch.document:,}, tokens {stretch.begin:,} to"
                f" {stretch.begin + stretch.tokens - 1:,}{text}"
            )
            counts[stretch.prefix] += stretch.tokens
            at += stretch.tokens
    total = sum(counts.values())
    shares = (f"  {name}: {100 * count / total:.1f} % of the tokens" for name, count in counts.most_common())
    undone = [
        f"  (from step {one['after'] + 1} to the spike at step {one['spike']} the run was undone, and went on with later data)"
        for one in passed_over
        if one["after"] < step <= one["spike"]
    ]
    return [f"step {step}: {batch.batch_size} sequences of {length:,} + 1 tokens", *undone, *shares, *lines]


def _passed_over(folder: Path) -> list[dict[str, int]]:
    """The times that a run went back: as its newest checkpoint has them, and those since, as the newest start recorded them."""
    saved = folders.find(folder / "checkpoint", "checkpoint")
    if not saved:
        return []
    step, newest = saved[-1]
    found: list[dict[str, int]] = list(folders.read_manifest(newest).info.get("passed_over", []))
    records = read_records(folder)
    start = max((record["run"] for record in records if "run" in record), default=0)
    since = [one for one in records if one.get("phase") == "rewind" and one["run"] == start and one["after"] >= step]
    return found + [{name: one[name] for name in ("after", "spike", "sequences")} for one in since]
