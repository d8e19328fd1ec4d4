"""Several runs side by side: what each learned and forgot, as a table and as plots.

A run that trains from step 0 is compared with its own first validation. A branch, and a run that
only measures a model (`training.train_iters: 0`), such as a merge or an average, is compared with
the first validation of the first run. A plot has the data that was learned most on one axis, and
other data on the other: the lower left is best.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from fast_llm.report import facts
from fast_llm.report.records import RunRecords

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _MARGIN = 460, 340, 62, 46, 22  # of a plot
_COLOURS = 8  # of page.css
_PLOTS = 4  # at most: one for each further set
_SAME = 0.01  # nats: runs of one model and one validation begin closer than this


@dataclass(frozen=True)
class Comparison:
    """The losses of validation of several runs. `sets`: those that every run has."""

    sets: list[str]
    names: list[str]
    before: list[list[float]]  # by run and set: what the run is compared with
    losses: list[list[float]]  # by run and set, at the last validation of the run

    def change(self, run: int, of: int) -> float:
        """How much a loss changed; negative: learned."""
        return self.losses[run][of] - self.before[run][of]

    @property
    def elsewhere(self) -> list[str]:
        """Runs that begin with another model than the first run, or validate on other data."""
        return [
            name
            for name, before in zip(self.names, self.before, strict=True)
            if any(abs(a - b) > _SAME for a, b in zip(before, self.before[0], strict=True))
        ]

    @property
    def learned(self) -> int:
        """The set whose loss fell most in any run."""
        return min(
            range(len(self.sets)), key=lambda of: min(self.change(r, of) for r in self._runs)
        )

    @property
    def _runs(self) -> range:
        return range(len(self.names))


def compare(runs: Sequence[RunRecords], names: Sequence[str]) -> Comparison | None:
    """Compare runs; None if they have no data of validation in common."""
    found = [{one.name: one for one in facts.changes(run)} for run in runs]
    sets = [name for name in found[0] if all(name in others for others in found)]
    fields = runs[0].columns["validation"].fields
    if any(field.startswith("sources/") for field in fields):
        sets = [name for name in sets if name != facts.TRAINED]  # the mean of the sources
        sets.sort(key=lambda name: f"sources/{name}/loss" not in fields)
    if not sets:
        return None
    before = [
        [
            (theirs if theirs[name].last_step > theirs[name].first_step == 0 else found[0])[
                name
            ].first
            for name in sets
        ]
        for theirs in found
    ]
    losses = [[theirs[name].last for name in sets] for theirs in found]
    return Comparison(sets, list(names), before, losses)


def as_text(found: Comparison) -> str:
    """A Markdown table: the loss before, then the changes of each run."""
    lines = [
        f"| | {' | '.join(found.sets)} |",
        f"|---|{'---|' * len(found.sets)}",
        f"| before: loss | {' | '.join(f'{loss:.3f}' for loss in found.before[0])} |",
    ]
    for run, name in enumerate(found.names):
        cells = [f"{found.change(run, of):+.3f}" for of in range(len(found.sets))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def as_html(found: Comparison) -> str:
    """The section of the page."""
    head = "".join(f"<th>{escape(name)}</th><th>change</th>" for name in found.sets)
    before = "".join(f"<td>{loss:.4f}</td><td></td>" for loss in found.before[0])
    rows = [f"<tr><th></th><th></th>{head}</tr>", f"<tr><td></td><td>before</td>{before}</tr>"]
    for run, name in enumerate(found.names):
        cells = [f'<td><i class="mark c{run % _COLOURS}">{run + 1}</i></td><td>{escape(name)}</td>']
        for of in range(len(found.sets)):
            change = found.change(run, of)
            verdict = "learned" if change < -facts.SMALL else "forgot"
            kind = f' class="{verdict}"' if abs(change) >= facts.SMALL else ""
            cells.append(f"<td>{found.losses[run][of]:.4f}</td><td><b{kind}>{change:+.4f}</b></td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    note = (
        "Losses at the end of each run, in nats per token, and how they changed since step 0. A"
        f" branch or a run without steps is compared with step 0 of {found.names[0]}."
    )
    if found.elsewhere:
        note += (
            f" {', '.join(found.elsewhere)}: other losses at step 0, so another model or other data"
            " of validation."
        )
    others = [of for of in range(len(found.sets)) if of != found.learned][:_PLOTS]
    plots = "".join(_plot(found, found.learned, of) for of in others)
    return (
        "<h2>The runs side by side</h2>\n"
        f'<div class="scroll"><table class="of-runs">{"".join(rows)}</table></div>\n'
        f'<p class="dim">{escape(note)}</p>\n'
        + (f'<div class="plots">{plots}</div>\n' if plots else "")
    )


def _plot(found: Comparison, across: int, up: int) -> str:
    """An SVG: a circle for each run, with its number in the table."""
    runs = range(len(found.names))
    xs, ys = ([found.change(run, of) for run in runs] for of in (across, up))
    left, right, steps_x = _axis([*xs, 0.0])
    low, high, steps_y = _axis([*ys, 0.0])

    def x_of(value: float) -> float:
        return _LEFT + (value - left) / (right - left) * (_WIDTH - _LEFT - _MARGIN)

    def y_of(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _BOTTOM - _MARGIN)

    parts = []
    for value in steps_x:
        x, zero = x_of(value), "zero" if value == 0 else ""
        parts.append(f'<path class="{zero}" d="M{x:.1f} {_MARGIN}V{_HEIGHT - _BOTTOM}"/>')
        label = f"{value:+.{_digits(steps_x)}f}" if value else "0"
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 18}" class="x">{label}</text>')
    for value in steps_y:
        y, zero = y_of(value), "zero" if value == 0 else ""
        parts.append(f'<path class="{zero}" d="M{_LEFT} {y:.1f}H{_WIDTH - _MARGIN}"/>')
        label = f"{value:+.{_digits(steps_y)}f}" if value else "0"
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" class="y">{label}</text>')
    for run, (x, y) in enumerate(zip(xs, ys, strict=True)):
        where = f'transform="translate({x_of(x):.1f} {y_of(y):.1f})"'
        title = f"{found.names[run]}: {found.sets[across]} {x:+.4f}, {found.sets[up]} {y:+.4f}"
        parts.append(
            f'<g {where}><title>{escape(title)}</title><circle r="10" class="c{run % _COLOURS}"/>'
            f"<text y='4' class='x'>{run + 1}</text></g>"
        )
    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    return (
        f'<figure class="chart"><h3>{escape(found.sets[up])} against {escape(found.sets[across])}'
        "<span>change of the loss; left is learned, up is forgotten</span></h3>"
        f'<svg {size} role="img">{"".join(parts)}</svg></figure>'
    )


def _axis(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """The ends of an axis, with room at both, and its round numbers, zero among them."""
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.01
    low, high = low - room, high + room
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return low, high, [round(n * step, 10) for n in range(first, last + 1)]


def _digits(steps: Sequence[float]) -> int:
    """Decimals that tell the numbers of an axis apart."""
    step = steps[1] - steps[0] if len(steps) > 1 else abs(steps[0]) or 1
    return max(0, -math.floor(math.log10(step) + 1e-9))
