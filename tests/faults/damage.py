"""Damaged checkpoints and datasets: flipped bits, truncated, swapped or deleted files, blank pages.

All damage of checkpoints is found before a weight is used. The newest intact checkpoint is used
instead, and the log names the file, with the step in its path. Some of these runs are resumed, and
end with the bits of the undisturbed run.

All damage of datasets is found by `fast-llm verify`. Training finds it before the first step in
datasets of up to 1 GiB. Of larger ones, a first start finds what shows without reading all tokens;
a later start also finds changes in the first and last MiB of a file. A damaged dataset that is
deleted and prepared again has the original bytes.
"""

import json
import logging
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fast_llm.checkpoint import folder as folders
from fast_llm.config.document import read
from fast_llm.config.prepare import PrepareConfig
from fast_llm.config.train import TrainConfig
from fast_llm.config.validate import validate
from fast_llm.data.dataset import open_dataset
from fast_llm.data.metadata import verify
from fast_llm.data.prepare import prepare
from fast_llm.errors import DataError
from tests.data import synthetic
from tests.faults.jobs import Job, command
from tests.training.runs import losses, settings, weights, write_tokens

STEPS = 12
PAGE = 4096


# Kinds of damage.


def flip(path: Path, chance: random.Random) -> None:
    """Flip one bit."""
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def cut(path: Path, chance: random.Random) -> None:
    """Cut off the end."""
    data = path.read_bytes()
    path.write_bytes(data[: chance.randrange(len(data))])


def lengthen(path: Path, chance: random.Random) -> None:
    """Append bytes."""
    path.write_bytes(path.read_bytes() + chance.randbytes(chance.randrange(1, 9)))


def blank_page(path: Path, chance: random.Random) -> None:
    """Write a page of zeros, as a file system may leave it after a crash."""
    data = bytearray(path.read_bytes())
    begin = chance.randrange(-(-len(data) // PAGE)) * PAGE
    end = min(begin + PAGE, len(data))
    data[begin:end] = bytes(end - begin)
    path.write_bytes(data)


def swap_pages(path: Path, chance: random.Random) -> None:
    """Swap two ranges of a file."""
    data = bytearray(path.read_bytes())
    size = min(PAGE, len(data) // 2)
    one, other = (
        chance.randrange(len(data) // 2 - size + 1),
        chance.randrange(len(data) // 2, len(data) - size + 1),
    )
    data[one : one + size], data[other : other + size] = (
        data[other : other + size],
        data[one : one + size],
    )
    path.write_bytes(data)


def blank(path: Path, chance: random.Random) -> None:
    """Replace the content by zeros."""
    path.write_bytes(bytes(path.stat().st_size))


def empty(path: Path, chance: random.Random) -> None:
    """Truncate to zero bytes."""
    path.write_bytes(b"")


def remove(path: Path, chance: random.Random) -> None:
    """Delete the file."""
    path.unlink()


def folder_instead(path: Path, chance: random.Random) -> None:
    """Put a folder in place of the file."""
    path.unlink()
    path.mkdir()


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (
    *(
        flip,
        flip,
        flip,
        cut,
        lengthen,
        blank_page,
        swap_pages,
        blank,
        empty,
        remove,
        folder_instead,
    ),
)


def swapped(paths: list[Path], chance: random.Random) -> list[Path]:
    """Exchange two files. Returns those with a wrong content."""
    one, other = chance.sample(paths, 2)
    before = one.read_bytes(), other.read_bytes()
    one.write_bytes(before[1])
    other.write_bytes(before[0])
    return [one, other] if before[0] != before[1] else []


def replaced(paths: list[Path], others: list[Path], chance: random.Random) -> list[Path]:
    """Replace a file by one of another folder."""
    one, other = chance.choice(paths), chance.choice(others)
    same = one.read_bytes() == other.read_bytes()
    shutil.copyfile(other, one)
    return [] if same else [one]


def damage(
    paths: list[Path], others: list[Path], chance: random.Random, figures: "Counter[str]"
) -> list[Path]:
    """Damage one or two of several files. Returns the names of the damaged files."""
    kind = chance.randrange(len(DAMAGES) + 2)
    if kind == len(DAMAGES):
        name, hit = "swapped", swapped(paths, chance)
    elif kind > len(DAMAGES):
        name, hit = "replaced", replaced(paths, others, chance)
    else:
        path, before = chance.choice(paths), None
        before = path.read_bytes()
        DAMAGES[kind](path, chance)
        name, hit = (
            DAMAGES[kind].__name__,
            [] if path.is_file() and path.read_bytes() == before else [path],
        )
        if (
            hit
            and path.suffix == ".json"
            and path.is_file()
            and _same_json(path.read_bytes(), before)
        ):
            hit = []  # white space that became other white space, or the name of the digest
    figures[name] += bool(hit)
    return hit


def _same_json(now: bytes, before: bytes) -> bool:
    """Whether all is there that was there, but for the digest of a dataset.json, without which it
    is taken as edited.
    """
    try:
        found, expected = json.loads(now), json.loads(before)
        sealed = "datasets" in expected
        return all(
            found[key] == value for key, value in expected.items() if not sealed or key != "sha256"
        )
    except (ValueError, RecursionError, KeyError, TypeError):
        return False


class LogRecorder(logging.Handler):
    """Collects log records."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage() + "\n"

    def __enter__(self) -> "LogRecorder":
        logging.getLogger("fast_llm").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("fast_llm").removeHandler(self)


# Checkpoints.


def checkpoints(folder: Path, budget: int, seed: int) -> "Counter[str]":
    """Damage `budget` checkpoints; every 50th run is resumed."""
    chance = random.Random(seed)
    figures: Counter[str] = Counter()
    write_tokens(folder / "tokens", 400)
    how = [
        f"training.train_iters={STEPS}",
        "training.checkpoint.interval=3",
        "training.checkpoint.keep=4",
    ]
    how += ["model.multi_stage.zero_stage=2", f"optimizer.learning_rate.decay_iterations={STEPS}"]
    with Job(folder, settings(folder, *how, f"run.experiment_dir={folder}/whole"), 2) as job:
        assert job.wait() == 0, job.said()
    whole = folder / "whole"
    expected = losses(whole), weights(whole / "checkpoint" / str(STEPS))
    while figures["checkpoints damaged"] < budget:
        run = folder / "damaged"
        shutil.copytree(whole, run)
        steps = [12, 9, 6][: chance.choice((1, 1, 1, 1, 2, 3))]
        hit = {}
        for step in steps:
            here = run / "checkpoint" / str(step)
            others = [
                path
                for path in sorted(whole.glob("checkpoint/*/*"))
                if path.parent.name != str(step)
            ]
            hit[step] = damage(sorted(here.iterdir()), others, chance, figures)
        story = f"seed {seed}, after {figures['checkpoints damaged']}: {hit}"
        good = max(step for step in (3, 6, 9, 12) if not hit.get(step))
        with LogRecorder() as reported:
            newest = folders.latest(run / "checkpoint")
        assert newest == run / "checkpoint" / str(good), f"{story}: {newest}\n{reported.text}"
        for step, paths in hit.items():
            figures["checkpoints damaged"] += bool(paths)
            if step > good and paths:
                # With the manifest of another step, the folder counts as that step's, and is not
                # looked for.
                there = {path.name: found for found, path in folders.find(run / "checkpoint")}
                stale = there.get(str(step), step) != step
                assert stale or any(_names(reported.text, path) for path in paths), (
                    f"{story}: not named\n{reported.text}"
                )
                figures["named in the log"] += not stale
                figures["passed over as another step's"] += stale
        if good < 12 and figures["checkpoints damaged"] // 50 >= figures["resumed"]:
            figures["resumed"] += 1
            with Job(folder, settings(folder, *how, f"run.experiment_dir={run}"), 2) as job:
                assert job.wait() == 0, f"{story}\n{job.said()}"
                assert f"checkpoint/{good}, after step {good}." in job.said(), (
                    f"{story}\n{job.said()}"
                )
            assert (losses(run), weights(run / "checkpoint" / str(STEPS))) == expected, (
                f"{story}: another result"
            )
        shutil.rmtree(run)
    return figures


def _names(text: str, path: Path) -> bool:
    """Whether a file is named; for the manifest its folder's name will do, or that of a file that
    does not fit it.
    """
    return f"{path}: " in text or (path.name == folders.MANIFEST and str(path.parent) in text)


# Datasets.


def datasets(folder: Path, budget: int, seed: int) -> "Counter[str]":
    """Damage `budget` datasets; every tenth is prepared again."""
    chance = random.Random(seed)
    figures: Counter[str] = Counter()
    folder.mkdir()
    config, metadata = made(folder)
    whole = everything(folder / "made")
    assert len(whole) > 12
    shutil.copytree(folder / "made", folder / "other")
    for path in (folder / "other").rglob("*.bin"):  # another dataset's, of the same sizes
        path.write_bytes(path.read_bytes()[::-1])
    fingerprint = start(metadata, small=True)
    files = sorted(path for path in (folder / "made").rglob("*") if path.suffix in (".bin", ".idx"))
    while figures["datasets damaged"] < budget:
        others = sorted(
            path for path in (folder / "other").rglob("*") if path.suffix in (".bin", ".idx")
        )
        for name, content in whole.items():  # undo the last damage
            path = folder / "made" / name
            if path.is_dir():
                path.rmdir()
            if not path.exists() or path.read_bytes() != content:
                path.write_bytes(content)
        hit = damage([*files, metadata], others, chance, figures)
        if not hit:
            continue
        story = f"seed {seed}, number {figures['datasets damaged']}: {hit}"
        figures["datasets damaged"] += 1
        try:
            verify(metadata)
            raise AssertionError(f"{story}: not found by verify")
        except DataError as error:
            # An index of another pair is found by the tokens, and the tokens by the index.
            assert any(str(path.with_suffix("")) in str(error) for path in hit), f"{story}: {error}"
            figures["found by verify"] += 1
        for small in (True, False):
            size = "up to 1 GiB" if small else "of more"
            try:
                figures[f"found at a later start, data {size}"] += (
                    start(metadata, small) != fingerprint
                )
            except DataError:
                figures[f"found at a later start, data {size}"] += 1
                figures[f"found at a first start, data {size}"] += 1
        if figures["datasets damaged"] % 10 == 1:
            for path in hit:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            metadata.unlink(missing_ok=True)
            prepare(config)
            assert everything(folder / "made") == whole, f"{story}: made again, and different"
            figures["made again"] += 1
    return figures


def made(folder: Path) -> tuple[PrepareConfig, Path]:
    """Prepare a dataset in `made`: its configuration and its metadata."""
    model = synthetic.llama(folder / "model")
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"text": synthetic.text(n, 1000)}) + "\n" for n in range(200))
    )
    config = PrepareConfig.model_validate(
        {
            "output_path": f"{folder}/made/data",
            "tokens_per_shard": 100_000,
            "dataset": {"path": f"{folder}/texts.jsonl"},
            "tokenizer": {"path": str(model)},
        }
    )
    return config, prepare(config)


def start(metadata: Path, small: bool) -> str:
    """Open a dataset as training does, its content checked if it is `small`.

    Returns its fingerprint.
    """
    train = [
        "training.train_iters=1",
        f"data.path={metadata}",
        "batch.batch_size=1",
        "batch.sequence_length=24",
        "model.base_model.vocab_size=320",
        "data.split=[8,1,1]",
    ]
    found = open_dataset(validate(TrainConfig, read(None, train)).data, 24, 0, 320)
    found.check_vocabulary(320, None)
    fingerprint = found.fingerprint()
    if small:
        found.check_digests()
    return fingerprint


def everything(folder: Path) -> dict[str, bytes]:
    """The content of all files but the lock, by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".lock")
    }


def campaign(folder: Path, budget: int, seed: int) -> dict[str, Any]:
    """Damage `budget` checkpoints, and 30 % as many datasets."""
    found = checkpoints(folder, budget, seed)
    data = datasets(folder / "data", budget * 3 // 10, seed)
    assert (
        data["found by verify"]
        == data["found at a first start, data up to 1 GiB"]
        == data["datasets damaged"]
    )
    kinds = {*(kind.__name__ for kind in DAMAGES), "swapped", "replaced"}
    assert budget < 200 or kinds <= found.keys() & data.keys(), "not every kind of damage was done"
    figures = {name: count for name, count in sorted((found | data).items()) if name not in kinds}
    return {**figures, "not found": 0, "another result": 0}


if __name__ == "__main__":
    command(campaign, 1000)
