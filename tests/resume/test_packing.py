"""Runs with best-fit packing: resumed, changed by consent, and killed on 1, 2 and 4 processes.

The second half of the file is what torchrun starts: a `fast-llm train` that logs which documents
each step reads, and kills itself.
"""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fast_llm.cli import main
from fast_llm.config.document import read
from fast_llm.config.train import DataConfig
from fast_llm.data.dataset import Dataset, open_dataset
from fast_llm.data.tokenfile import TokenFileWriter
from fast_llm.errors import ConfigError
from fast_llm.planning.preflight import preflight
from fast_llm.planning.report import describe_run
from fast_llm.training.audit import inspect_step
from tests.helpers import slow, spawn
from tests.training.runs import losses, records, run, settings, write_tokens
from tests.training.test_spikes import spiking

ROOT = Path(__file__).parent.parent.parent
LENGTH, BATCH = 24, 8


def arguments(root: Path, name: str, steps: int, *further: str) -> list[str]:
    return settings(
        root,
        f"training.train_iters={steps}",
        "training.checkpoint.interval=2",
        "data.packing=best_fit",
        "data.split=[1]",
        f"run.experiment_dir={root}/{name}",
        *further,
    )


@pytest.fixture
def documents(tmp_path: Path) -> list[int]:
    """The lengths of the documents of a token file in the test's folder."""
    return [len(document) for document in write_tokens(tmp_path / "tokens", 70)]


def test_a_resumed_run_reads_the_same(tmp_path: Path, documents: list[int]) -> None:
    assert run(arguments(tmp_path, "once", 8)) == 0
    assert run(arguments(tmp_path, "twice", 4)) == 0
    assert run(arguments(tmp_path, "twice", 8)) == 0
    assert losses(tmp_path / "twice") == losses(tmp_path / "once")
    last = records(tmp_path / "once")[8]
    spec = preflight(read(None, arguments(tmp_path, "once", 8)), 1, weights=True)
    given = [spec.dataset.read("training", index).padding for index in range(8 * BATCH)]
    positions = 8 * BATCH * LENGTH
    for name in ("once", "twice"):
        assert records(tmp_path / name)[8]["consumed_tokens"] == positions - sum(map(inputs, given))
    assert last["padding"] == sum(map(inputs, given[-BATCH:])) / (BATCH * LENGTH)
    speed = BATCH * LENGTH * (1 - last["padding"]) / last["step_time_ms"] * 1e3
    assert last["tokens_per_sec_per_gpu"] == pytest.approx(speed)
    padding = spec.dataset.padding("training")
    assert 0 < padding < 0.1
    shown = " ".join(describe_run(spec).split())
    assert f"; {100 * padding:.3g} % of the tokens, {round(padding * positions):,}, are" in shown
    assert "training tokens epochs padding source" in shown


def inputs(padding: int) -> int:
    """Inputs without a token, of a sequence whose tokens end with padding: the last target is no
    input.
    """
    return max(0, padding - 1)


def test_each_stage_has_the_padding_of_its_sources(
    tmp_path: Path, documents: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """`full` has little padding, `short` 9 of 24 inputs: metrics count it by step, over a resume;
    the plan and `inspect` use the shares of the stages.
    """
    writer = TokenFileWriter(tmp_path / "short", np.dtype("uint16"))
    for _ in range(200):
        writer.append(np.arange(15, dtype=np.uint16))
    writer.close()
    given = [one for one in arguments(tmp_path, "run", 6) if not one.startswith("data.path")]
    given += [
        "data.format=mixture",
        f"data.sources={{full: {tmp_path}/tokens, short: {tmp_path}/short}}",
        "data.stages=[{until: 4, weights: {short: 1}}, {weights: {short: 0.5, full: 0.5}}]",
    ]
    spec = preflight(read(None, given), 1, weights=True)
    read_ = [spec.dataset.read("training", index) for index in range(6 * BATCH)]
    assert run([*given, "training.train_iters=3"]) == 0
    assert run(given) == 0
    total, of_short = 0, 0
    for step, record in records(tmp_path / "run").items():
        some = read_[(step - 1) * BATCH : step * BATCH]
        unused = sum(inputs(packed.padding) for packed in some)
        of_short += sum(inputs(packed.padding) for packed in some if packed.source == 1)
        total += unused
        assert record["padding"] == unused / (BATCH * LENGTH)
        assert record["consumed_tokens"] == step * BATCH * LENGTH - total
        speed = (BATCH * LENGTH - unused) / record["step_time_ms"] * 1e3
        assert record["tokens_per_sec_per_gpu"] == pytest.approx(speed)
    last = records(tmp_path / "run")[6]["sources"]
    assert last["short"]["consumed_tokens"] == (4 * 8 + 2 * 4) * LENGTH - of_short
    assert last["full"]["consumed_tokens"] == 2 * 4 * LENGTH - (total - of_short)
    sources = spec.dataset.splits["training"].sources
    expected = (40 * sources[1].padding + 8 * sources[0].padding) / 48
    assert 0.3 < expected < 0.4 and sources[1].padding == 9 / 24
    shown = " ".join(describe_run(spec).split())
    assert f"; {100 * expected:.3g} % of the tokens, " in shown
    capsys.readouterr()
    (tmp_path / "train.yaml").write_text("training: {train_iters: 6}\n")
    assert main(["inspect", "--config", f"{tmp_path}/train.yaml", *given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["share"] for one in found["sources"]] == [8 / 48, 40 / 48]
    assert found["splits"]["training"]["padding"] == pytest.approx(expected)
    assert found["run"]["tokens"] == pytest.approx(6 * BATCH * LENGTH * (1 - expected), abs=1)


def test_a_rewind_and_a_kill_keep_the_count(tmp_path: Path, documents: list[int]) -> None:
    """`consumed_tokens` has the padding of all sequences that were read, as `consumed_samples`."""
    given = arguments(
        tmp_path,
        "run",
        12,
        "training.spikes.policy=rewind",
        "training.spikes.window=5",
        "training.spikes.threshold=8",
        "optimizer.learning_rate.base=1e-3",
        "training.num_workers=0",
    )
    (killed,) = spawn(1, spiking, given, (8,), 10)
    assert killed[0] == ""
    ((code, _),) = spawn(1, spiking, given, (8,))
    assert code == 0
    last = records(tmp_path / "run")[12]
    samples = last["consumed_samples"]
    assert samples > 12 * BATCH
    dataset = preflight(read(None, given), 1, weights=True).dataset
    unused = sum(inputs(dataset.read("training", index).padding) for index in range(samples))
    assert last["consumed_tokens"] == samples * LENGTH - unused


def test_a_change_of_packing_needs_consent(
    tmp_path: Path, documents: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[int, list[int]] = {}
    read_one = Dataset.read

    def recorded(data: Dataset, split: str, index: int) -> Any:
        packed = read_one(data, split, index)
        given[index] = packed.tokens[: len(packed.tokens) - packed.padding].tolist()
        return packed

    monkeypatch.setattr(Dataset, "read", recorded)
    assert run(arguments(tmp_path, "run", 4, "data.packing=concatenate")) == 0
    with pytest.raises(ConfigError) as caught:
        preflight(read(None, arguments(tmp_path, "run", 8)), 1, weights=True)
    first = caught.value.problems[0].replace(f"{tmp_path}/", "")
    assert first == (
        'override data.packing=best_fit: data.packing: given "best_fit", but run/checkpoint/4 was'
        ' trained with "concatenate"; set it back, choose another run.experiment_dir, or consent'
        " with run.accept_changes=[data.packing]"
    )
    accepted = "run.accept_changes=[data.packing]"
    assert run(arguments(tmp_path, "run", 8, accepted)) == 0
    assert run(arguments(tmp_path, "run", 12, "data.packing=concatenate", accepted)) == 0
    for step in (1, 4, 5, 8, 9, 12):  # `why` finds what each step read
        for sequence in inspect_step(str(tmp_path / "run"), step).sequences:
            count = sum(part["tokens"] for part in sequence["documents"])
            assert count == len(given[sequence["index"]])
    assert main(["why", str(tmp_path / "run"), "6"]) == 0


@slow
@pytest.mark.parametrize("attends", ["yes", "no"])
def test_context_parallelism_trains_the_same(
    tmp_path: Path, documents: list[int], attends: str
) -> None:
    """Padding and documents are divided over processes; each step has the same loss."""
    kind = f"batch.cross_document_attention={attends}"
    assert spawn(1, run, arguments(tmp_path, "one", 6, kind)) == [0]
    parallel = "model.distributed.sequence_data_parallel=2"
    assert spawn(2, run, arguments(tmp_path, "two", 6, kind, parallel)) == [0, 0]
    expected, found = losses(tmp_path / "one"), losses(tmp_path / "two")
    targets = [
        {
            step: (one["target_tokens"], one["padding"])
            for step, one in records(tmp_path / name).items()
        }
        for name in ("one", "two")
    ]
    assert targets[0] == targets[1]
    for step, loss in expected.items():
        # fp32 sums in another order; Adam magnifies their differences from step to step.
        assert found[step] == pytest.approx(loss, rel=1e-5), step


@slow
def test_each_document_once_over_kills_and_processes(tmp_path: Path, documents: list[int]) -> None:
    """Two epochs over 1, 2, 4 and 1 processes, each start but the last killed at its sixth step."""
    data = DataConfig(path=[f"{tmp_path}/tokens"], split=[1], packing="best_fit")
    dataset = open_dataset(data, LENGTH, 0, 128)
    count = dataset.sequences("training")
    steps = -(-2 * count // BATCH)
    log = tmp_path / "documents.jsonl"
    shown = arguments(tmp_path, "run", steps, "training.num_workers=0", "batch.micro_batch_size=1")
    for start, world in enumerate((1, 2, 4, 1)):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(world), "-m", "tests.resume.test_packing", *shown]
        environment = {"LOG": str(log), "START": str(start), "OMP_NUM_THREADS": "1"}
        environment["KILL_AT"] = "6" if start < 3 else "-1"
        ended = subprocess.run(
            command, cwd=ROOT, env=os.environ | environment, capture_output=True, timeout=120
        )
        assert (ended.returncode == 0) == (start == 3), ended.stderr.decode()[-4000:]
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert {one["start"] for one in entries} == {0, 1, 2, 3}
    last: dict[int, int] = {}  # the last time that a step was trained counts
    for one in entries:
        last[one["step"]] = max(last.get(one["step"], 0), one["start"])
    kept = [one for one in entries if one["start"] == last[one["step"]]]
    assert sorted(one["index"] for one in kept) == list(range(steps * BATCH))
    for epoch in range(2):
        targets: Counter[tuple[int, int]] = Counter()
        parts: Counter[int] = Counter()
        for one in kept:
            if one["index"] // count == epoch:
                for document, begin, tokens in one["documents"]:
                    parts[document] += 1
                    targets.update((document, at) for at in range(begin + 1, begin + tokens))
        assert targets == Counter(
            (d, at) for d, size in enumerate(documents) for at in range(1, size)
        )
        for document, size in enumerate(documents):
            assert parts[document] == max(1, -(-(size - 1) // LENGTH))


def program() -> None:
    """The program that torchrun starts."""
    from fast_llm.data.loader import Loader

    log, start = Path(os.environ["LOG"]), int(os.environ["START"])
    make, at_step = Loader.step, Loader.micro_batch

    def logged(self: Loader, number: int) -> Any:
        if number == int(os.environ["KILL_AT"]):
            os.kill(os.getpid(), signal.SIGKILL)
        self.now = self.first_sample // BATCH + number  # type: ignore[attr-defined]
        return make(self, number)

    def rows(self: Loader, first: int, count: int) -> Any:
        with log.open("a") as file:
            for index in range(first, first + count):
                spans = self.dataset.locate(self.split, index)
                entry = {
                    "start": start,
                    "step": self.now,  # type: ignore[attr-defined]
                    "index": index,
                    "documents": [[one.document, one.begin, one.tokens] for one in spans],
                }
                file.write(json.dumps(entry) + "\n")
        return at_step(self, first, count)

    Loader.step, Loader.micro_batch = logged, rows  # type: ignore[method-assign, assignment]
    sys.exit(main(["train", "gpt", *sys.argv[1:]]))


if __name__ == "__main__":
    program()
