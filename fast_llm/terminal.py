"""What a person at a terminal sees: widths, colours, numbers, tables, and errors as blocks.

A stream that is not a terminal gets plain lines: no colour, no wrapping, so that `grep` finds each
mistake by its place. NO_COLOR turns colour off (https://no-color.org), TERM=dumb turns off colour
and layout. Standard library alone: this is imported before the command is known.

An error message has one form everywhere, `[where: ][setting: ]what is wrong[; what to do]`, where
`given X, must be Y` and `(allowed: …)` name what was given and what is allowed. On a terminal
`error_blocks` shows these parts one below the other.
"""

import os
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

WIDEST = 100  # columns; longer lines are hard to read
NARROWEST = 40  # labels and texts side by side need as many

BOLD, DIM, RED, YELLOW = "1", "2", "31", "33"
_JOINED = "\0"  # a space at which no line ends


def is_terminal(stream: Any) -> bool:
    """Whether a person looks at the stream, and it can move its cursor."""
    return bool(stream.isatty()) and os.environ.get("TERM") != "dumb"


def width(stream: Any) -> int:
    """The columns of the terminal behind the stream, from NARROWEST to WIDEST.

    WIDEST for a stream that is not a terminal.
    """
    given = os.environ.get("COLUMNS", "")
    found = int(given) if given.isdecimal() else 0
    if not found:
        try:
            found = os.get_terminal_size(stream.fileno()).columns
        except (OSError, ValueError, AttributeError):
            found = 0
    return max(min(found or WIDEST, WIDEST), NARROWEST)


def wrap_width(stream: Any) -> int | None:
    """The columns at which text is wrapped; None for a stream that is not a terminal."""
    return width(stream) if is_terminal(stream) else None


def style(text: str, stream: Any, *codes: str) -> str:
    """The text in a style, if the stream is a terminal that shows styles."""
    if not text or not is_terminal(stream) or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{';'.join(codes)}m{text}\x1b[0m"


def counted(count: int, noun: str, plural: str = "") -> str:
    """A number with its noun: 1 step, 2,000 steps. `plural`: of the noun if it is not noun + s."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def nearest(name: str, names: Iterable[str]) -> str:
    """The name that was probably meant, as the end of a sentence; empty if none is near."""
    import difflib

    found = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def wrap(text: str, columns: int, first: str = "", further: str = "") -> str:
    """Paragraphs of at most so many columns.

    Words, and commands in backquotes, are not cut: they can be copied.
    """
    text = re.sub("`[^`]*`", lambda found: found[0].replace(" ", _JOINED), text)
    lines: list[str] = []
    for paragraph in text.split("\n"):
        lines += textwrap.wrap(
            paragraph,
            columns,
            initial_indent=further if lines else first,
            subsequent_indent=further,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]
    return "\n".join(lines).replace(_JOINED, " ")


def fields(
    rows: Iterable[tuple[str, str]], label: int, columns: int | None, stream: Any = None
) -> str:
    """Labels of `label` columns with their texts, which are wrapped to `columns` if given.

    The lines of a table in a text stay.
    """
    lines = []
    for name, text in rows:
        head, indent = f"{name:<{label}}", " " * label
        head = head if stream is None else style(head, stream, DIM)
        if columns is not None:
            text = wrap(text, columns - label)
        lines.append(head + text.replace("\n", f"\n{indent}"))
    return "\n".join(lines)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> str:
    """Columns two spaces apart under their headings; those in `right` are aligned to the right."""
    every = [list(headings), *map(list, rows)]
    widths = [max(len(row[column]) for row in every) for column in range(len(headings))]
    right = set(right)
    return "\n".join(
        "  ".join(
            cell.rjust(size) if column in right else cell.ljust(size)
            for column, (cell, size) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in every
    )


def short_count(count: float) -> str:
    """Three digits of a count: 987, 12.3k, 1.23M."""
    for unit in ("", "k", "M", "G"):
        if count < 999.5:
            return f"{count:.0f}" if not unit else f"{count:#.3g}".rstrip(".") + unit
        count /= 1000
    return f"{count:.0f}T"


def short_duration(seconds: float) -> str:
    """About three digits: 12d, 14h, 3h12m, 12m, 9m05s, 45s."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 600:
        return f"{seconds // 60}m{seconds % 60:02}s"
    if seconds < 3600:
        return f"{seconds // 60}m"
    if seconds < 36_000:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02}m"
    if seconds < 172_800:
        return f"{seconds // 3600}h"
    return f"{seconds // 86_400}d"


# Errors.

_SEVERAL = re.compile(r"\d+ mistakes\n")
_PLACED = re.compile(
    r"(?P<where>.+?): (?P<setting>[a-z_]\w*(?:\.[\w-]+)*): (?P<text>.*)", re.DOTALL
)
_NAMED = re.compile(r"(?P<setting>[a-z_]\w*(?:\.[\w-]+)+): (?P<text>.*)", re.DOTALL)
_GIVEN = re.compile(r"given (?P<given>.+?), must be (?P<allowed>.+)", re.DOTALL)
_MISSING = re.compile(r"(?P<what>is missing)[;,] (?:it )?must be (?P<allowed>.+)", re.DOTALL)
_ALLOWED = re.compile(r"(?P<text>.*) \(allowed: (?P<allowed>.*)\)", re.DOTALL)
_QUOTED = re.compile(r'"[^"]*"|`[^`]*`|\[[^\]]*\]|\([^)]*\)')


def print_error(command: str, text: str, stream: TextIO | None = None) -> None:
    """Print the report of an error: blocks on a terminal, else one line for each mistake."""
    stream = sys.stderr if stream is None else stream
    shown = f"{command}: {text}"
    if is_terminal(stream):
        shown = error_blocks(command, text, width(stream), stream)
    print(shown, file=stream, flush=True)


def error_blocks(command: str, text: str, columns: int, stream: Any) -> str:
    """A block for each mistake: what is wrong, where, given, allowed, and how to fix it."""
    several = _SEVERAL.match(text)
    if several is None:
        return _block(f"{command}: ", text, columns, stream)
    mistakes: list[str] = []
    for line in text[several.end() :].split("\n"):
        if line.startswith("  ") or not mistakes:
            mistakes.append(line.removeprefix("  "))
        else:
            mistakes[-1] += f"\n{line}"
    title = style(f"{command}: {several[0].strip()}", stream, BOLD, RED)
    return "\n\n".join([title, *(_block("", mistake, columns, stream) for mistake in mistakes)])


def _block(lead: str, mistake: str, columns: int, stream: Any) -> str:
    heading, rows = parts(mistake)
    head = wrap(heading, columns, lead, "  ")
    lines = [style(lead, stream, BOLD, RED) + style(head[len(lead) :], stream, BOLD)]
    if rows:
        lines.append(fields(((f"  {name}", value) for name, value in rows), 11, columns, stream))
    return "\n".join(lines)


def parts(mistake: str) -> tuple[str, list[tuple[str, str]]]:
    """What is wrong, and the rows below it: where, given, allowed, fix."""
    where = given = allowed = setting = ""
    text = mistake
    if found := _PLACED.fullmatch(text) or _NAMED.fullmatch(text):
        where, setting, text = found.groupdict().get("where", ""), found["setting"], found["text"]
    if found := _ALLOWED.fullmatch(text):
        text, allowed = found["text"], found["allowed"]
    text, fix = _split(text)
    if found := _GIVEN.fullmatch(text):
        text, given, allowed = "", found["given"], found["allowed"]
    elif found := _MISSING.fullmatch(f"{text}; {fix}"):
        text, allowed, fix = found["what"], found["allowed"], ""
    heading = ": ".join(filter(None, (setting, text)))
    rows = (("where", where), ("given", given), ("allowed", allowed), ("fix", fix))
    return heading, [(name, value) for name, value in rows if value]


def _split(text: str) -> tuple[str, str]:
    """What is wrong and how to fix it: split at the first semicolon outside quotes and brackets."""
    inside = [(found.start(), found.end()) for found in _QUOTED.finditer(text)]
    for found in re.finditer("; ", text):
        if not any(start < found.start() < end for start, end in inside):
            return text[: found.start()], text[found.end() :]
    return text, ""
