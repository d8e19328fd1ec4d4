"""`fast-llm demo --real` and benchmarks/continue_well.py, each with two steps of tiny batches."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fast_llm import cli
from fast_llm.demo import real
from fast_llm.demo.manpages import package, write_german
from fast_llm.errors import UserError

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent
RUNS = ("replay-0", "trunk", "cooldown", "trunk-mean", "replay-0-merged-0.5")


@pytest.fixture(scope="module")
def packages() -> Path:
    """Where Debian's packages are unpacked; a machine that cannot fetch them skips the tests."""
    try:
        for name in ("manpages-de", "jargon-text"):
            package(name, real.CACHE / "debian")
    except UserError as error:
        pytest.skip(str(error))
    return real.CACHE / "debian"


def test_german_pages_are_german_text(packages: Path, tmp_path: Path) -> None:
    assert write_german(tmp_path / "german.jsonl", packages) > 5e6
    texts = [json.loads(line)["text"] for line in (tmp_path / "german.jsonl").open()]
    assert len(texts) > 500
    whole = "\n".join(texts)
    assert whole.count(" nicht ") > 5000 and whole.count("\\f") < 100
    assert "ÜBERSETZUNG" not in whole.split("\n# ")


def test_the_experiment(model: Path, packages: Path, tmp_path: Path) -> None:
    words = ["--folder", str(tmp_path), "--steps", "2", "batch.sequence_length=64"]
    words += ["training.validation.iterations=1", "--only", *RUNS]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "continue_well.py", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[0] for row in table] == ["|", "| before: loss", *(f"| {name}" for name in RUNS)]
    changes = {row[0][2:]: [float(cell.strip("| ")) for cell in row[1:]] for row in table[2:]}
    assert changes["replay-0"][0] < -0.02  # German is learned already
    half = changes["replay-0-merged-0.5"][0]
    assert half < -0.01 and half != changes["replay-0"][0]
    page = (tmp_path / "report.html").read_text()
    assert page.count("<circle ") == 2 * len(RUNS)


def test_the_demo(
    model: Path,
    packages: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    text = real.CONFIG.read_text()
    for name, long, short in (
        ("train_iters", 40, 2),
        ("interval", 40, 2),
        ("decay_iterations", 40, 2),
        ("warmup_iterations", 4, 1),
        ("iterations", 4, 1),
        ("sequence_length", 512, 64),
    ):
        assert f" {name}: {long}\n" in text
        text = text.replace(f" {name}: {long}\n", f" {name}: {short}\n")
    config = tmp_path / "config.yaml"
    config.write_text(text)
    monkeypatch.setattr(real, "CONFIG", config)
    monkeypatch.setattr(real, "STEPS", 2)
    monkeypatch.setattr(real, "PROMPTS", ("Die Datei",))
    folder = tmp_path / "demo"
    assert cli.main(["demo", "--real", str(folder)]) == 0
    lines = capfd.readouterr().out.splitlines()
    samples = [line.split()[0] for line in lines if "'Die Datei' \N{RIGHTWARDS ARROW} " in line]
    assert samples == ["before", "alone", "replay"]
    table = [line for line in lines if line.startswith("| ")]
    assert table[0] == "| | german | english | jargon |"
    rows = {line.split(" | ")[0][2:]: line.split(" | ")[1] for line in table[2:]}
    assert list(rows) == [
        "german-alone",
        "with-replay",
        "german-alone-half-way",
        "with-replay-average",
    ]
    assert float(rows["german-alone"]) < -0.02
    assert lines[-1] == f"The report, a page for a browser: {folder}/report.html"
    assert re.search(r"The demo took \d+ s\.", lines[-2])
    assert (folder / "report.html").read_text().count("<circle ") == 2 * len(rows)
