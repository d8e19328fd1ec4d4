"""Samples of text in a report: how each run continued each prompt, before, now and between."""

import re
from collections.abc import Mapping, Sequence
from html import escape

from fast_llm.report.records import RunRecords

_BETWEEN = 6  # steps between the first and the last that are shown, folded
_LONGEST = 2000  # characters of a text
_EMPTY_LINES = re.compile(r"\n(?:[ \t]*\n){3,}")


def samples(runs: Sequence[RunRecords], names: Sequence[str]) -> str:
    """The section about samples; "" if no run has any."""
    prompts = dict.fromkeys(
        prompt for run in runs for texts in run.samples.values() for prompt in texts
    )
    if not prompts:
        return ""
    parts = ["<h2>Text before and after</h2>\n"]
    for prompt in prompts:
        lines, between = [], []
        for run, name in zip(runs, names, strict=True):
            texts = {step: each[prompt] for step, each in run.samples.items() if prompt in each}
            of = name if len(runs) > 1 else ""
            ends = sorted({min(texts, default=0), max(texts, default=0)} & texts.keys())
            lines += [_line(of, step, texts[step]) for step in ends]
            between += [_line(of, step, texts[step]) for step in _between(texts)]
        folded = (
            f"<details><summary>between</summary><dl>{''.join(between)}</dl></details>"
            if between
            else ""
        )
        parts.append(
            f'<div class="sample"><p>{escape(prompt[:_LONGEST])}</p>'
            f"<dl>{''.join(lines)}</dl>{folded}</div>\n"
        )
    note = "Each next token is the most likely one. The prompts are those of training.samples."
    return "".join(parts) + f'<p class="dim">{note}</p>\n'


def _between(texts: Mapping[int, str]) -> list[int]:
    """Some steps between the first and the last, at equal distances in the list of them."""
    inside = sorted(texts)[1:-1]
    count = min(_BETWEEN, len(inside))
    return [inside[(2 * n + 1) * len(inside) // (2 * count)] for n in range(count)]


def _line(name: str, step: int, text: str) -> str:
    of = f"<b>{escape(name)}</b> " if name else ""
    shown = _EMPTY_LINES.sub(_count_empty, escape(text[:_LONGEST]))
    return f"<dt>{of}step {step:,}</dt><dd>{shown}</dd>"


def _count_empty(lines: re.Match[str]) -> str:
    """A note in place of many empty lines, which would fill the page."""
    return f'\n<span class="dim">[{lines[0].count(chr(10)) - 1} empty lines]</span>\n'
