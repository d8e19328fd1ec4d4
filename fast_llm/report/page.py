"""The page: tables in HTML, and curves that uPlot draws from JSON inside the page.

uPlot (MIT) is part of the package: uPlot.iife.min.js and uPlot.min.css of version 1.6.32.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from fast_llm.report import comparison, facts
from fast_llm.report.records import Columns, RunRecords, thin
from fast_llm.report.samples import samples
from fast_llm.storage import write_atomically
from fast_llm.terminal import short_duration

_HERE = Path(__file__).parent
_POINTS = 24_000  # of all curves together: about half a megabyte
_FEWEST, _MOST = 100, 2000  # points of a curve
_OF_SOURCES = "sources/"
_WITH_POINTS = 60  # fewer points of a curve than this are drawn as circles, too
_COLOURS = 8  # of page.css
_REFRESH = 60  # seconds after which an open page of an unfinished run is loaded again


@dataclass(frozen=True)
class Chart:
    """A plot: its title, and which fields it shows."""

    title: str
    unit: str
    fields: tuple[tuple[str, str, str], ...]  # phase, field (`*`: any source), label
    log: bool = False
    scale: float = 1.0


CHARTS = (
    Chart(
        "Loss",
        "nats per token",
        (
            ("training", "language_model_loss", "training"),
            ("validation", "*_loss", "validation of *"),
            ("validation", "sources/*/loss", "validation of *"),
        ),
    ),
    Chart("Training loss by source", "nats per token", (("training", "sources/*/loss", "*"),)),
    Chart(
        "Bits per byte",
        "bits",
        (
            ("training", "bits_per_byte", "training"),
            ("validation", "bits_per_byte", f"validation of {facts.TRAINED}"),
            ("validation", "*_bits_per_byte", "validation of *"),
            ("validation", "sources/*/bits_per_byte", "validation of *"),
        ),
    ),
    Chart(
        "Accuracy on tasks",
        "",
        (("evaluation", "*/acc", "*"), ("evaluation", "*/acc_norm", "*, by length")),
    ),
    Chart("Learning rate", "", (("training", "learning_rate", "learning rate"),)),
    Chart(
        "Gradient norm", "before clipping", (("training", "grad_norm", "gradient norm"),), log=True
    ),
    Chart("Tokens by source", "tokens so far", (("training", "sources/*/consumed_tokens", "*"),)),
    Chart("Epochs by source", "epochs so far", (("training", "sources/*/epochs", "*"),)),
    Chart(
        "Speed",
        "tokens/s per process",
        (("training", "tokens_per_sec_per_gpu", "tokens/s per process"),),
    ),
    Chart("MFU", "% of the peak", (("training", "mfu", "MFU"),), scale=100),
    Chart(
        "Time of a step",
        "ms",
        (("training", "step_time_ms", "step"), ("training", "data_wait_ms", "waiting for data")),
    ),
    Chart(
        "Memory of the first process",
        "GB",
        (
            ("training", "max_reserved", "reserved"),
            ("training", "max_allocated", "allocated"),
            ("training", "resident", "resident"),
        ),
        scale=2**20 / 1e9,
    ),
    Chart(
        "Load of experts",
        "of the mean",
        (
            ("training", "expert_load_max", "busiest"),
            ("training", "expert_load_min", "idlest"),
        ),
    ),
    Chart(
        "Losses of routers",
        "",
        (
            ("training", "expert_auxiliary_loss", "auxiliary loss"),
            ("training", "expert_z_loss", "z-loss"),
        ),
    ),
    Chart("z-loss", "", (("training", "z_loss", "z-loss"),)),
    Chart("Loss scale", "", (("training", "loss_scale", "loss scale"),), log=True),
)


class Report:
    """The report of one or more runs. `write` may be called again as the runs go on."""

    def __init__(self, folders: Sequence[Path]):
        """`folders`: of the experiments."""
        self.runs = [RunRecords(folder) for folder in folders]
        self.begun = False

    def write(self, output: Path) -> None:
        """Write the page as of now, whole or not at all. Raises OSError."""
        for run in self.runs:
            if not self.begun and (found := facts.parent(run.folder, facts.settings(run.folder))):
                parent = RunRecords(found[0])
                parent.update()
                run.inherit(parent, found[1])
            run.update()
        self.begun = True
        write_atomically(output, self.page())

    def page(self) -> str:
        """The HTML."""
        names = run_names([run.folder for run in self.runs])
        title = " and ".join(names)
        live = "" if all(run.complete for run in self.runs) else f' data-refresh="{_REFRESH}"'
        body = "".join(self._body(names))
        data = json.dumps(
            {"charts": charts(self.runs, names), "events": _events(self.runs, names)},
            separators=(",", ":"),
        ).replace("</", "<\\/")
        return (
            f'<!doctype html>\n<html lang="en"{live}>\n<meta charset="utf-8">\n'
            f"<title>{escape(title)}</title>\n"
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<style>{_text('uPlot.min.css')}\n{_text('page.css')}</style>\n"
            f"<main>\n{body}</main>\n"
            f'<script type="application/json" id="data">{data}</script>\n'
            f"<script>{_text('uPlot.iife.min.js')}</script>\n<script>{_text('page.js')}</script>\n"
            "</html>\n"
        )

    def _body(self, names: Sequence[str]) -> Iterator[str]:
        now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
        several = len(names) > 1
        yield f'<header><p class="dim">Training report, {now}</p>'
        yield f"<h1>{_titles(names)}</h1></header>\n"
        if several and (found := comparison.compare(self.runs, names)):
            yield comparison.as_html(found)
        for run, name in zip(self.runs, names, strict=True):
            if not several or run.train_iters:  # else it only measures a model
                yield _run_figures(run, name if several else "")
        yield _changes(self.runs, names)
        yield _task_scores(self.runs, names)
        yield samples(self.runs, names)
        if several:
            yield _differences(self.runs, names)
        yield '<h2>Curves</h2>\n<div id="charts"></div>\n'
        yield '<noscript><p class="dim">The curves need JavaScript.</p></noscript>\n'
        for run, name in zip(self.runs, names, strict=True):
            yield from _details(run, name if several else "")


def run_names(folders: Sequence[Path]) -> list[str]:
    """The names of folders, with as many folders above as tell them apart."""
    parts = [folder.absolute().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-count:]) for one in parts]
        if len(set(names)) == len(names):
            break
    return names


@dataclass(frozen=True)
class _Curve:
    """A curve of a chart, and where its numbers are."""

    run: int
    label: str
    columns: Columns
    field: str


def charts(runs: Sequence[RunRecords], names: Sequence[str]) -> list[dict[str, Any]]:
    """What the page draws, without charts that have no data."""
    found: list[tuple[Chart, list[_Curve]]] = []
    for chart in CHARTS:
        curves = [
            curve for run, records in enumerate(runs) for curve in _curves(run, records, chart)
        ]
        if curves:
            found.append((chart, curves))
    most = max(_FEWEST, min(_MOST, _POINTS // max(1, sum(len(curves) for _, curves in found))))
    return [_chart(chart, curves, most, names) for chart, curves in found]


def _chart(
    chart: Chart, curves: Sequence[_Curve], most: int, names: Sequence[str]
) -> dict[str, Any]:
    labels = list(dict.fromkeys(curve.label for curve in curves))
    several, drawn, positive = len(names) > 1, [], True
    for curve in curves:
        steps, values = thin(*curve.columns.points(curve.field), most)
        label = labels.index(curve.label)
        shown = [float(f"{value * chart.scale:.5g}") for value in values]
        positive &= min(shown) > 0
        drawn.append(
            {
                "label": _label(names[curve.run], curve.label, len(labels))
                if several
                else curve.label,
                # Several runs differ in colour, and their curves in dashes; else curves in colour.
                "colour": (curve.run if several else label) % _COLOURS,
                "dash": label if several else 0,
                "points": len(steps) < _WITH_POINTS,
                "x": steps,
                "y": shown,
            }
        )
    return {
        "title": chart.title,
        "unit": chart.unit,
        "log": chart.log and positive,
        "series": drawn,
    }


def _label(run: str, label: str, labels: int) -> str:
    return f"{run}: {label}" if labels > 1 else run


def _curves(run: int, records: RunRecords, chart: Chart) -> Iterator[_Curve]:
    """The curves of a chart that have data."""
    for phase, pattern, label in chart.fields:
        columns = records.columns[phase]
        before, star, after = pattern.partition("*")
        of_sources = pattern.startswith(_OF_SOURCES)
        for field in columns.fields:
            inner = field[len(before) : len(field) - len(after)]
            if field != pattern and not (
                star and field.startswith(before) and field.endswith(after)
            ):
                continue
            # A source's name may hold a slash, too.
            if field != pattern and (not inner or field.startswith(_OF_SOURCES) != of_sources):
                continue
            _, values = columns.points(field)
            if not values or (field == "loss_scale" and len(set(values)) == 1):
                continue
            name = facts.TRAINED if inner == "language_model" else inner
            yield _Curve(run, label.replace("*", name), columns, field)


def _events(runs: Sequence[RunRecords], names: Sequence[str]) -> list[dict[str, Any]]:
    """Branches, borders of stages, restarts, rewinds, spikes and skipped updates: the last 500."""
    found = [
        {"x": e.step, "kind": e.kind, "text": f"{name}: {e.text}" if len(runs) > 1 else e.text}
        for run, name in zip(runs, names, strict=True)
        for e in [*run.events, *facts.borders(run, facts.settings(run.folder))]
    ]
    return found[-500:]


def _text(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8").strip()


# Tables.


def _titles(names: Sequence[str]) -> str:
    if len(names) == 1:
        return escape(names[0])
    return " ".join(
        f'<span class="run c{number % _COLOURS}">{escape(name)}</span>'
        for number, name in enumerate(names)
    )


def _heading(level: int, text: str, name: str) -> str:
    of = f' <span class="dim">{escape(name)}</span>' if name else ""
    return f"<h{level}>{escape(text)}{of}</h{level}>\n"


def _run_figures(run: RunRecords, name: str) -> str:
    cells = "".join(
        f"<div><b>{escape(value)}</b><span>{escape(what)}</span></div>"
        for value, what in facts.figures(run)
    )
    heading = f'<h3 class="dim">{escape(name)}</h3>' if name else ""
    return f'{heading}<div class="figures">{cells}</div>\n'


def _changes(runs: Sequence[RunRecords], names: Sequence[str]) -> str:
    """What was learned and forgotten, in a sentence a run and a table."""
    heading = "<h2>What was learned, what was forgotten</h2>\n"
    found = [
        (name, change)
        for run, name in zip(runs, names, strict=True)
        for change in facts.changes(run)
    ]
    if not found:
        return f'{heading}<p class="dim">There is no validation yet: training.validation.</p>\n'
    several = len(runs) > 1
    sentences = [
        (f"{escape(name)} " if several else "It ") + escape(facts.summary(facts.changes(run)))
        for run, name in zip(runs, names, strict=True)
    ]
    largest = max(abs(change.change) for _, change in found) or 1.0
    bits = any(change.bits for _, change in found)
    heads = [*(["run"] if several else []), "", "change", "", "before", "now", "best", "perplexity"]
    rows = [
        [
            *([escape(name)] if several else []),
            escape(change.name),
            *_change(change, largest),
            f'{change.first:.4f} <span class="dim">step {change.first_step:,}</span>',
            f'{change.last:.4f} <span class="dim">step {change.last_step:,}</span>',
            f'{change.best:.4f} <span class="dim">step {change.best_step:,}</span>',
            f"{_perplexity(change.first)} → {_perplexity(change.last)}",
            *([_bits(change)] if bits else []),
        ]
        for name, change in found
    ]
    note = (
        '<p class="dim">Losses in nats per token, on data that was not trained on. Data of the old'
        " domain under data.validation_sets shows what is forgotten.</p>\n"
    )
    return (
        heading
        + "".join(f"<p>{sentence}</p>\n" for sentence in sentences)
        + _table([*heads, *(["bits per byte"] if bits else [])], rows, "of-runs" if several else "")
        + note
    )


def _task_scores(runs: Sequence[RunRecords], names: Sequence[str]) -> str:
    """The scores on tasks, at the first and the last evaluation; empty without any."""
    several = len(runs) > 1
    rows = [
        [
            *([escape(name)] if several else []),
            escape(f"{one.evaluation}: {one.task}"),
            escape(one.metric),
            f'{one.first:.4f} <span class="dim">step {one.first_step:,}</span>',
            f"{one.last:.4f}"
            + (f" ± {one.error:.4f}" if math.isfinite(one.error) else "")
            + f' <span class="dim">step {one.last_step:,}</span>',
            f"<b>{one.last - one.first:+.4f}</b>" if one.last_step > one.first_step else "–",
            one.found,
        ]
        for run, name in zip(runs, names, strict=True)
        for one in facts.task_scores(run)
    ]
    if not rows:
        return ""
    heads = ["task", "metric", "before", "now", "change", "examples in the data"]
    note = (
        '<p class="dim">± is the standard error. Examples in the data share 13 tokens in a row with'
        " the training data.</p>\n"
    )
    table = _table([*(["run"] if several else []), *heads], rows, "of-runs" if several else "")
    return "<h2>Tasks</h2>\n" + table + note


def _differences(runs: Sequence[RunRecords], names: Sequence[str]) -> str:
    """The settings that differ between runs."""
    rows = facts.differences([facts.settings(run.folder) for run in runs])
    shown = [[f"<code>{escape(name)}</code>", *map(escape, values)] for name, *values in rows]
    table = _table(["setting", *names], shown, "settings")
    return _folded(f"{len(rows)} settings differ between the runs", table) if rows else ""


def _change(change: facts.Change, largest: float) -> list[str]:
    """The cells of a change, in numbers and as a bar."""
    if change.first_step == change.last_step:
        return ["–", f'<span class="dim">{change.verdict}</span>']
    return [
        f'<b class="{change.verdict}">{change.change:+.4f}</b>',
        _bar(change, largest),
    ]


def _bar(change: facts.Change, largest: float) -> str:
    side = "learned" if change.change < 0 else "forgot"
    width = 50 * abs(change.change) / largest
    return (
        f'<div class="change {side}"><i style="width:{width:.1f}%"></i>'
        f"<span>{change.verdict}</span></div>"
    )


def _bits(change: facts.Change) -> str:
    return f"{change.bits[0]:.3f} → {change.bits[1]:.3f}" if change.bits else ""


def _perplexity(loss: float) -> str:
    value = math.exp(min(loss, 700))
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.3g}"


def _details(run: RunRecords, name: str) -> Iterator[str]:
    spent = facts.times(run)
    if spent:
        total = sum(seconds for _, seconds in spent)
        rows = [
            [
                escape(what),
                short_duration(seconds),
                f"{seconds / total:.1%}",
                f'<div class="bar"><i style="width:{100 * seconds / total:.1f}%"></i></div>',
            ]
            for what, seconds in spent
        ]
        yield _heading(2, "Where the time went", name) + _table(["", "time", "share", ""], rows)
    if run.events:
        lines = [[f"{e.step:,}", e.kind, escape(e.text)] for e in run.events[-100:]]
        yield _heading(2, "What happened", name)
        count = f"{len(run.events):,} event{'s' * (len(run.events) > 1)}"
        yield _folded(count, _table(["step", "", ""], lines, "words"))
    if text := facts.plan(run.folder):
        yield _heading(2, "The plan", name) + f"<pre>{escape(text)}</pre>\n"
    settings = facts.settings(run.folder)
    if other := facts.other_settings(settings):
        yield _heading(2, "Settings that differ from the recipe", name)
        yield _folded(
            f"{len(other)} settings",
            _table(
                ["setting", "here", "the recipe of Llama-3.1-8B"],
                [[f"<code>{escape(n)}</code>", escape(a), escape(b)] for n, a, b in other],
                "settings",
            ),
        )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table; cells are HTML."""
    lines = ["<tr>" + "".join(f"<th>{escape(head)}</th>" for head in heads) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return f'<div class="scroll"><table class="{kind}">{"".join(lines)}</table></div>\n'


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>\n"
