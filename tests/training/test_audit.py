"""`fast-llm verify` and `fast-llm why`."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fast_llm.checkpoint import folder as folders
from fast_llm.cli import main
from fast_llm.config.document import read
from fast_llm.planning.preflight import preflight
from tests.helpers import spawn
from tests.training import runs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A run's folder, and its documents."""
    place = tmp_path_factory.mktemp("audit")
    documents = runs.write_tokens(place / "tokens")
    spawn(1, runs.run, runs.settings(place, *MORE))
    return place, [document.tolist() for document in documents]


MORE = ("training.train_iters=3", "training.checkpoint.interval=1", "training.export.interval=3")


@pytest.fixture
def copy(made: tuple[Path, list[list[int]]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[0] / "run", tmp_path / "run"))


def test_a_whole_run(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(copy)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1].split(", intact")[0] for line in lines] == [
        *(f"checkpoint of step {step}" for step in (1, 2, 3)),
        "export of step 3",
    ]
    assert main(["verify", str(copy / "checkpoint" / "2")]) == 0


def test_all_damage_is_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = [
        next((copy / "checkpoint" / "2").glob("*.safetensors")),
        next((copy / "export" / "llama" / "3").glob("*.safetensors")),
    ]
    for path in damaged:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    assert main(["verify", str(copy)]) == 2
    out, said = capsys.readouterr()
    assert [line.partition(": ")[2].split(", intact")[0] for line in out.splitlines()] == [
        "checkpoint of step 1",
        "checkpoint of step 3",
    ]
    assert "2 mistakes" in said
    for path, what in zip(damaged, ("checkpoint 2", "export 3"), strict=True):
        assert (
            f"{path}: its content has changed since it was saved (sha256 differs); {what} is"
            " damaged" in said
        )


def test_a_checkpoint_without_a_manifest_is_named(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "checkpoint" / "2" / folders.MANIFEST).unlink()
    assert main(["verify", str(copy)]) == 2
    assert (
        f"{copy}/checkpoint/2: has no {folders.MANIFEST}; it is not a complete"
        in capsys.readouterr().err
    )


def test_nothing_to_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert f"{tmp_path}: nothing to verify; give a dataset.json" in capsys.readouterr().err


def test_why(made: tuple[Path, list[list[int]]], capsys: pytest.CaptureFixture[str]) -> None:
    """The documents that it names hold the tokens that the step was trained on."""
    place, documents = made
    assert main(["why", str(place / "run"), "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "step 2: 8 sequences of 24 + 1 tokens",
        f"  {place}/tokens: 100.0 % of the tokens",
    ]
    data = preflight(read(None, runs.settings(place, *MORE)), 1, weights=False).dataset
    sequences: dict[int, list[int]] = {}
    for line in lines[2:]:
        words = line.replace(",", "").split()
        if words[0] == "sequence":
            tokens = sequences.setdefault(int(words[1]), [])
        else:
            document, first, last = (int(words[at]) for at in (2, 4, 6))
            tokens += documents[document][first : last + 1]
    assert list(sequences) == list(range(8, 16))
    assert all(
        data.read("training", index).tokens.tolist() == tokens
        for index, tokens in sequences.items()
    )


@pytest.mark.parametrize(
    ("where", "step", "said"),
    [
        (".", "1", "no config.yaml in it; give the experiment folder of a training run"),
        ("run", "0", "step 0: "),
        ("run", "4", "has the steps 1 to 3"),
    ],
)
def test_why_not(
    made: tuple[Path, list[list[int]]],
    capsys: pytest.CaptureFixture[str],
    where: str,
    step: str,
    said: str,
) -> None:
    assert main(["why", str(made[0] / where), step]) == 2
    assert said in capsys.readouterr().err


def test_why_without_its_data(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = copy / "config.yaml"
    lines = config.read_text().splitlines()
    number = next(i for i, line in enumerate(lines) if line.startswith("  path: ["))
    lines[number] = f"  path: [{copy}/gone]"
    config.write_text("\n".join(lines))
    assert main(["why", str(copy), "2"]) == 2
    assert capsys.readouterr().err.startswith(
        f"fast-llm why: {config}:{number + 1}: data.path: {copy}/gone.idx: no such file"
    )


def test_a_reader_that_has_enough(made: tuple[Path, list[list[int]]]) -> None:
    command = f"{sys.executable} -m fast_llm.cli why {made[0] / 'run'} 1 | true"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_why_of_a_batch_size_that_follows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the YAML file gives no batch size, metrics.jsonl has it."""
    runs.write_tokens(tmp_path / "tokens")
    how = ["batch.batch_size=null", "training.train_iters=2"]
    assert spawn(1, runs.run, runs.settings(tmp_path, *how)) == [0]
    assert main(["why", str(tmp_path / "run"), "2", "--json"]) == 0
    assert [one["index"] for one in json.loads(capsys.readouterr().out)["sequences"]] == [2, 3]
