"""The page of `fast-llm report`: its content, its size, and a real browser's opinion of it."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fast_llm import cli
from fast_llm.report import LiveReport, Report
from fast_llm.report.page import run_names
from tests.report.test_records import trained, validated, write
from tests.training.runs import run, settings, write_tokens

BROWSER = shutil.which("chromium") or shutil.which("chromium-headless-shell")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run that was stopped and resumed, with a further validation set."""
    root = tmp_path_factory.mktemp("report")
    write_tokens(root / "tokens", 200)
    write_tokens(root / "other")
    words = settings(
        root,
        f"data.validation_sets={{old: {root}/other}}",
        "training.validation.interval=2",
        "training.validation.iterations=1",
        "training.checkpoint.interval=2",
    )
    assert run([*words, "training.train_iters=4"]) == 0
    assert run([*words, "training.train_iters=6"]) == 0
    return root


def data(page: Path) -> dict[str, Any]:
    """The JSON inside a page."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())
    assert found
    content: dict[str, Any] = json.loads(found[1])
    return content


def test_a_run_writes_its_report(folder: Path) -> None:
    text = (folder / "run/report.html").read_text()
    assert "<title>run</title>" in text and "http-equiv" not in text
    assert "data-refresh" not in text  # complete
    assert re.search(r"It (learned|forgot|left) .*, in nats per token\.", text)
    for heading in ("What was learned, what was forgotten", "Where the time went", "The plan"):
        assert f"<h2>{heading}</h2>" in text
    assert "27,400 parameters" in text  # of the plan
    assert "<code>batch.sequence_length</code></td><td>24</td><td>4096</td>" in text
    assert "<b>6 of 6</b><span>steps</span>" in text and "<b>2</b><span>starts</span>" in text
    content = data(folder / "run/report.html")
    assert [event["kind"] for event in content["events"]] == ["restart"]
    loss, *others = content["charts"]
    assert [one["label"] for one in loss["series"]] == [
        "training",
        "validation of the training data",
        "validation of old",
    ]
    assert loss["series"][0]["x"] == [1, 2, 3, 4, 5, 6]
    assert loss["series"][2]["x"] == [0, 2, 4, 6]
    titles = [chart["title"] for chart in others]
    assert titles[:3] == ["Learning rate", "Gradient norm", "Speed"] and "MFU" not in titles


def test_an_unfinished_run_is_loaded_again(tmp_path: Path) -> None:
    write(tmp_path / "run", trained(10), validated(10, language_model_loss=2.0))
    report = LiveReport(tmp_path / "run")
    report.write(wait=True)
    assert '<html lang="en" data-refresh="60">' in (tmp_path / "run/report.html").read_text()
    write(tmp_path / "run", trained(100), mode="a")
    report.write(wait=True)
    assert '<html lang="en">' in (tmp_path / "run/report.html").read_text()


def test_a_report_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "run", trained(10))
    (tmp_path / "run/report.html").mkdir()
    report = LiveReport(tmp_path / "run")
    report.write(wait=True)
    report.write(wait=True)
    assert caplog.text.count("report.html could not be written: ") == 1
    assert "Training continues." in caplog.text


def test_without_validation(tmp_path: Path) -> None:
    write(tmp_path / "run", trained(10))
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    assert (
        "There is no validation yet: training.validation."
        in (tmp_path / "run/report.html").read_text()
    )


def test_several_runs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "run", trained(3), validated(3, language_model_loss=2.0))
    output = tmp_path / "both.html"
    words = ["report", str(folder / "run"), str(tmp_path / "run"), "--output", str(output)]
    assert cli.main(words) == 0
    assert capsys.readouterr().out == f"Wrote {output}.\n"
    names = [f"{folder.name}/run", f"{tmp_path.name}/run"]
    loss = data(output)["charts"][0]
    assert f"{names[0]}: training" in [one["label"] for one in loss["series"]]
    assert {one["colour"] for one in loss["series"]} == {0, 1}
    rate = next(chart for chart in data(output)["charts"] if chart["title"] == "Learning rate")
    assert [one["label"] for one in rate["series"]] == names[:1]  # the only label of that chart


def test_names() -> None:
    assert run_names([Path("/a/b/c")]) == ["c"]
    assert run_names([Path("/a/x/c"), Path("/a/y/c")]) == ["x/c", "y/c"]


def test_text_of_users_is_escaped(tmp_path: Path) -> None:
    found = write(
        tmp_path / "<b>run",
        trained(1, sources={"</script><b>": {"loss": 1.0}, "b": {"loss": 2.0}}),
    )
    page = Report([found.folder])
    page.write(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<b>run" not in text and text.count("</script>") == 3
    labels = [one["label"] for c in data(tmp_path / "page.html")["charts"] for one in c["series"]]
    assert "</script><b>" in labels


def test_empty_lines_of_a_sample_do_not_fill_the_page(tmp_path: Path) -> None:
    pair = {"prompt": "a", "text": "b" + "\n" * 60 + "<c>\n\nd"}
    found = write(tmp_path / "run", trained(1), {"phase": "samples", "step": 1, "samples": [pair]})
    Report([found.folder]).write(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert 'b\n<span class="dim">[59 empty lines]</span>\n&lt;c&gt;\n\nd</dd>' in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["none"],
            "fast-llm report: none: no such folder with metrics.jsonl; give the run.experiment_dir"
            " of a run\n",
        ),
        (["run", "run"], "a run is given twice"),
        (["run", "other"], "--output: missing: with several runs, say which file to write"),
        (["run", "-o", "none/page.html"], "--output: none/page.html: cannot be a file; its folder"),
    ],
)
def test_mistakes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("run", "other"):
        write(tmp_path / name, trained(10))
    assert cli.main(["report", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_hundred_thousand_steps_are_a_small_page(tmp_path: Path) -> None:
    """Below 1 MB, with seven sources and every hundredth step a validation."""

    def sources(step: int) -> dict[str, dict[str, float]]:
        of = {"perplexity": 1.0, "bits_per_byte": step % 89 / 7, "target_tokens": 3, "epochs": step}
        return {f"s{n}": of | {"loss": step % 97 / 9, "consumed_tokens": step} for n in range(7)}

    speed: dict[str, Any] = {
        "tokens_per_sec_per_gpu": 1e4,
        "step_time_ms": 80.0,
        "resident": 500.0,
        "mfu": 0.5,
    }
    write(
        tmp_path / "run",
        *(
            trained(step, sources=sources(step), grad_norm=step % 13 / 7, **speed)
            if step % 100
            else validated(step, language_model_loss=1.0, sources=sources(step))
            for step in range(1, 100_001)
        ),
    )
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run/report.html").stat().st_size < 1e6


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
def test_in_a_browser(folder: Path, tmp_path: Path, width: int, scheme: str) -> None:
    """All curves are drawn, without a network or an error, and nothing is wider than the page."""
    text = (folder / "run/report.html").read_text()
    check = """<script>addEventListener("error", (event) => document.title = event.message);
setTimeout(() => { document.title = [document.querySelectorAll("canvas").length,
  document.documentElement.scrollWidth - document.documentElement.clientWidth,
  matchMedia("(prefers-color-scheme: dark)").matches,
  performance.getEntriesByType("resource").length].join(" "); }, 500);</script>"""
    (tmp_path / "page.html").write_text(text.replace("<main>", check + "<main>"))
    # Chromium's window is at least 500 wide, so a telephone is a frame.
    (tmp_path / "frame.html").write_text(
        f'<title>none</title><iframe id="f" width="{width}" height="900" src="page.html"></iframe>'
        '<script>setTimeout(() => document.title = document.getElementById("f")'
        ".contentDocument.title, 1500)</script>"
    )
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER,
            *("--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"),
            f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
            f"--user-data-dir={tmp_path}/profile",
            *("--virtual-time-budget=4000", "--dump-dom", f"file://{tmp_path}/frame.html"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    charts = len(data(folder / "run/report.html")["charts"])
    assert title and title[1] == f"{charts} 0 {str(scheme == 'dark').lower()} 0", done.stderr[
        -2000:
    ]
