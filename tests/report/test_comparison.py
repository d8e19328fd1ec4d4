"""Several runs side by side: the table, the plots, and what each run is compared with."""

import re
from pathlib import Path
from typing import Any

import pytest

from fast_llm import cli
from fast_llm.report.comparison import Comparison, _axis, as_html, as_text, compare
from fast_llm.report.records import RunRecords
from tests.report.test_records import trained, validated, write


def losses(new: float, old: float) -> dict[str, Any]:
    return {"language_model_loss": new, "old_loss": old}


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two runs from one model, one of another seed, a branch, and a model that is only measured."""
    alone, replay, seed, branch, merged = (
        tmp_path / name for name in ("alone", "replay", "seed", "branch", "merged")
    )
    write(alone, validated(0, **losses(3.0, 2.0)), trained(4), validated(4, **losses(1.0, 2.5)))
    write(replay, validated(0, **losses(3.0, 2.0)), trained(4), validated(4, **losses(1.2, 2.1)))
    write(seed, validated(0, **losses(3.1, 2.2)), trained(4), validated(4, **losses(1.3, 2.3)))
    write(branch, trained(4), validated(4, **losses(0.9, 2.4)))
    write(merged, validated(0, **losses(1.5, 2.0)))
    return [alone, replay, seed, branch, merged]


def compared(folders: list[Path]) -> Comparison:
    runs = [RunRecords(folder) for folder in folders]
    for run in runs:
        run.update()
    found = compare(runs, [folder.name for folder in folders])
    assert found is not None
    return found


def test_the_table(folders: list[Path]) -> None:
    found = compared(folders)
    assert found.elsewhere == ["seed"]
    assert found.learned == 0
    assert as_text(found).splitlines() == [
        "| | the training data | old |",
        "|---|---|---|",
        "| before: loss | 3.000 | 2.000 |",
        "| alone | -2.000 | +0.500 |",
        "| replay | -1.800 | +0.100 |",
        "| seed | -1.800 | +0.100 |",  # against its own step 0
        "| branch | -2.100 | +0.400 |",
        "| merged | -1.500 | +0.000 |",
    ]


def test_sources_stand_for_their_mean(tmp_path: Path) -> None:
    found = write(
        tmp_path / "run",
        validated(0, language_model_loss=2.0, sources={"a": {"loss": 1.0}, "b": {"loss": 3.0}}),
    )
    assert compared([found.folder]).sets == ["a", "b"]


def test_the_page_has_a_circle_for_each_run(folders: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    assert cli.main(["report", *map(str, folders), "--output", str(output)]) == 0
    text = output.read_text()
    assert "<h2>The runs side by side</h2>" in text
    assert text.count("<circle ") == 5
    assert "seed: other losses at step 0, so another model or other data of validation." in text
    assert "<title>merged: the training data -1.5000, old +0.0000</title>" in text
    # The comparison is at the top; models that are only measured have no figures of their own.
    assert text.index("side by side") < text.index('class="figures"')
    assert text.count('class="figures"') == 4
    # The further left, the more was learned; the higher, the more was forgotten.
    found = re.findall(r'translate\(([\d.]+) ([\d.]+)\)"><title>(\w+)', text)
    places = {name: (float(x), float(y)) for x, y, name in found}
    assert places["branch"][0] < places["alone"][0] < places["replay"][0] < places["merged"][0]
    assert places["alone"][1] < places["branch"][1] < places["replay"][1] < places["merged"][1]


def test_one_run_has_no_comparison(folders: list[Path]) -> None:
    assert cli.main(["report", str(folders[0])]) == 0
    assert "side by side" not in (folders[0] / "report.html").read_text()


def test_nothing_in_common(tmp_path: Path) -> None:
    runs = [
        write(tmp_path / "a", validated(0, language_model_loss=2.0)),
        write(tmp_path / "b", trained(1)),
    ]
    assert compare(runs, ["a", "b"]) is None


def test_names_are_escaped(folders: list[Path]) -> None:
    found = compared(folders[:2])
    escaped = as_html(Comparison(["<b>", "old"], ["<i>", "x"], found.before, found.losses))
    assert "<i>" not in escaped.replace("<i class", "") and "&lt;b&gt; against" not in escaped
    assert "old against &lt;b&gt;" in escaped and "&lt;i&gt;" in escaped


@pytest.mark.parametrize(
    ("values", "numbers"),
    [
        ([-1.0, 0.0], [-1.0, -0.5, 0.0]),
        ([0.0, 0.031], [0.0, 0.01, 0.02, 0.03]),
        ([-0.3, 0.0, 1.7], [0.0, 0.5, 1.0, 1.5]),
        ([0.0, 0.0], [-0.01, -0.005, 0.0, 0.005, 0.01]),
    ],
)
def test_numbers_of_an_axis(values: list[float], numbers: list[float]) -> None:
    low, high, found = _axis(values)
    assert low < min(values) and max(values) < high
    assert found == numbers
