"""`fast-llm inspect --html FILE`: what `--json` has, as one HTML page without any other file.

Colours follow the browser's light or dark mode. Documents of a packed sequence alternate between
two backgrounds, and a token without a loss is marked behind the text that it ends.
"""

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

from fast_llm.data.inspect.text import amount, fim_line, percent

_TEXT = 20_000  # characters of a document that are shown

_STYLE = """
:root { color-scheme: light dark;
  --text: light-dark(#1c2430, #dfe5ee); --dim: light-dark(#5d6878, #95a1b3);
  --back: light-dark(#ffffff, #14181f); --card: light-dark(#f4f6f9, #1d232d);
  --line: light-dark(#d9dfe8, #323b49); --bar: light-dark(#0f8a8a, #2bb3b3);
  --even: light-dark(#e3f1f1, #1a3436); --odd: light-dark(#f7ecdc, #3a2f1f);
  --mark: light-dark(#b3261e, #ff8a80); }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 68rem; color: var(--text);
  background: var(--back); font: 16px/1.5 system-ui, "Segoe UI", sans-serif; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.figures { display: flex; flex-wrap: wrap; gap: .8rem; }
.figures div { background: var(--card); border-radius: .5rem; padding: .6rem 1rem; }
.figures b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.figures span, .dim { color: var(--dim); font-size: .9rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .7rem; border-bottom: 1px solid var(--line); }
th { color: var(--dim); font-weight: 500; } td:first-child, th:first-child { text-align: left;
  overflow-wrap: anywhere; }
td.bar { width: 45%; } td.bar div { background: var(--bar); height: .9rem; border-radius: .15rem;
  min-width: 1px; }
pre { margin: 0; max-height: 30rem; overflow-y: auto; padding: .7rem 1rem; white-space: pre-wrap;
  overflow-wrap: anywhere;
  font: .85rem/1.45 ui-monospace, Menlo, Consolas, monospace; }
details, section.text { background: var(--card); border-radius: .5rem; margin: .7rem 0;
  overflow: hidden; }
summary { cursor: pointer; padding: .6rem 1rem; overflow-wrap: anywhere; }
.part { border-left: 3px solid var(--bar); } .part.even { background: var(--even); }
.part.odd { background: var(--odd); } .part p { margin: 0; padding: .5rem 1rem 0;
  color: var(--dim); font-size: .85rem; overflow-wrap: anywhere; }
.mask { color: var(--mark); font-size: .8rem; padding: 0 1rem .5rem; }
.piece, .left { text-align: left; } .piece span { background: var(--even); }
@media (max-width: 40rem) { body { padding: 1rem .8rem 3rem; }
  table { display: block; overflow-x: auto; } td:first-child { min-width: 8rem; }
  th, td { padding: .3rem .45rem; } }
td.piece { font-family: ui-monospace, Menlo, Consolas, monospace;
  white-space: pre-wrap; }
"""


def page(content: dict[str, Any]) -> str:
    """The HTML of what is inspected."""
    title = escape(", ".join(content.get("paths") or [content["path"]]))
    body = {"dataset": _dataset, "raw": _raw, "tokenizer": _tokenizer}[content["kind"]](content)
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style>\n<h1>{title}</h1>\n{''.join(body)}</html>\n"
    )


def _figures(figures: Iterable[tuple[str, str]]) -> str:
    cells = (
        f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in figures
    )
    return f'<div class="figures">{"".join(cells)}</div>\n'


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], last: str = "") -> str:
    """A table of text. `last`: the class of the last cell of each row, which is HTML."""
    heads = [f"<th>{escape(name)}</th>" for name in headings]
    if last:
        heads[-1] = f'<th class="{last}">{escape(headings[-1])}</th>'
    lines = [f"<tr>{''.join(heads)}</tr>"]
    for row in rows:
        cells = [f"<td>{escape(cell)}</td>" for cell in row]
        if last:
            cells[-1] = f'<td class="{last}">{row[-1]}</td>'
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>\n"


def _dataset(content: dict[str, Any]) -> Iterator[str]:
    if "documents" in content:
        yield from _statistics(content)
    if shown := content.get("sequences"):
        yield "<h2>Sequences as a training step reads them</h2>\n"
        yield from map(_sequence, shown)
    if shown := content.get("shown_documents"):
        yield "<h2>Documents</h2>\n"
        for each in shown:
            heading = f"{each['number']:,}: {each['name']}, {each['tokens']:,} tokens"
            yield _folded(heading, each["text"], each["ids"])


def _statistics(content: dict[str, Any]) -> Iterator[str]:
    lengths, longer, found = content["lengths"], content["longer"], content["duplicates"]
    figures = [
        (f"{content['documents']:,}", "documents"),
        (f"{content['tokens']:,}", "tokens"),
    ]
    if content["bytes"] is not None:
        ratio = content["bytes"] / max(1, content["tokens"])
        figures += [(amount(content["bytes"]), "of text"), (f"{ratio:.2f}", "bytes per token")]
    if content["documents"]:
        figures += [
            (f"{lengths[key]:,}", f"tokens, {name}")
            for key, name in (
                ("median", "median"),
                ("p90", "90 % up to"),
                ("p99", "99 % up to"),
                ("longest", "longest"),
            )
        ]
    if longer is not None:
        name = f"of documents are longer than {content['sequence_length']:,}"
        figures.append((percent(longer["share_of_documents"]), name))
    if found is not None:
        figures.append((f"{found['documents']:,}", "exact duplicates"))
    figures += [
        (f"{count:,}", f"skipped: {reason}") for reason, count in content["skipped"].items()
    ]
    yield _figures(figures)
    yield "<h2>Sources</h2>\n"
    run, splits = content.get("run"), content.get("splits")
    epochs = {each["source"]: f"{each['epochs']:.3g}" for each in run["epochs"]} if run else {}
    yield _table(
        ["source", "share", "documents", "tokens", *(["epochs"] if run else [])],
        [
            [
                source["name"],
                percent(source["share"]),
                f"{source['documents']:,}",
                f"{source['tokens']:,}",
                *([epochs.get(source["name"], "")] if run else []),
            ]
            for source in content["sources"]
        ],
    )
    if splits:
        keys = ("documents", "tokens", "sequences")
        padded = any(split["padding"] for split in splits.values())
        rows = [
            [name, *(f"{split[key]:,}" for key in keys), *[percent(split["padding"])] * padded]
            for name, split in splits.items()
        ]
        yield "<h2>Splits</h2>\n" + _table(["split", *keys, *["padding"] * padded], rows)
    if run:
        text = (
            f"{run['steps']:,} steps of {run['batch_size']:,} sequences: {run['tokens']:,} tokens"
        )
        yield f'<p class="dim">{text}</p>\n'
    yield "<h2>Lengths of documents</h2>\n" + _histogram(lengths["histogram"])


def _histogram(rows: list[dict[str, int]]) -> str:
    most = max((row["documents"] for row in rows), default=1)
    total = sum(row["tokens"] for row in rows)
    shown = [
        [
            f"{row['from']:,}" + (f" to {row['to']:,}" if row["to"] > row["from"] else ""),
            f"{row['documents']:,}",
            percent(row["tokens"] / max(1, total)),
            f'<div style="width:{100 * row["documents"] / most:.2f}%"></div>'
            if row["documents"]
            else "",
        ]
        for row in rows
    ]
    return _table(["tokens", "documents", "of tokens", ""], shown, "bar")


def _sequence(sequence: dict[str, Any]) -> str:
    parts = []
    for number, part in enumerate(sequence["documents"]):
        begin, end = part["position"], part["position"] + part["tokens"]
        start = (
            "from its start" if not part["first_token"] else f"from token {part['first_token']:,}"
        )
        text = _shown(part.get("marked", part["text"]), sequence["ids"][begin:end])
        reason = part["without_loss"]
        mark = f'<div class="mask">no loss: {reason}</div>' if reason else ""
        parts.append(
            f'<div class="part {"odd" if number % 2 else "even"}"><p>tokens {begin:,} to'
            f" {end - 1:,} · {escape(part['name'])}, {start}</p><pre>{text}</pre>"
            f"{mark}</div>"
        )
    if sequence["padding"]:
        begin = sequence["length"] + 1 - sequence["padding"]
        parts.append(
            f'<div class="part"><p>tokens {begin:,} to {sequence["length"]:,}</p>'
            '<div class="mask">padding, without a loss</div></div>'
        )
    documents = len(sequence["documents"])
    heading = (
        f"{sequence['index']:,} of {sequence['split']} · {sequence['source']} · epoch"
        f" {sequence['epoch'] + 1} · {documents} document{'' if documents == 1 else 's'} · loss"
        f" on {sequence['targets']:,} of {sequence['length']:,} tokens"
    )
    if fim := sequence["fim"]:
        heading += f" · {fim_line(fim)}"
    return f"<details open><summary>{escape(heading)}</summary>{''.join(parts)}</details>\n"


def _shown(text: str | None, ids: list[int]) -> str:
    shown = " ".join(map(str, ids)) if text is None else text
    more = f"\n… and {len(shown) - _TEXT:,} more characters" if len(shown) > _TEXT else ""
    return escape(shown[:_TEXT]) + more


def _folded(heading: str, text: str | None, ids: list[int]) -> str:
    shown = _shown(text, ids)
    return f"<details><summary>{escape(heading)}</summary><pre>{shown}</pre></details>\n"


def _raw(content: dict[str, Any]) -> Iterator[str]:
    yield _figures(
        [
            (f"{content['documents']:,}", "documents"),
            (amount(content["text_bytes"]), "of text, about"),
            (f"{content['files']:,}", f"files, {amount(content['file_bytes'])}"),
            ("text files" if content["format"] == "file" else content["format"], "format"),
        ]
    )
    if content["columns"]:
        columns = ", ".join(content["columns"])
        yield f"<p>Columns: {escape(columns)}; read: <b>{escape(content['field'])}</b></p>\n"
    bad = [[each["path"], each["reason"]] for each in content["unusable"]]
    if bad:
        yield "<h2>Files without usable text at their start</h2>\n" + _table(["file", ""], bad)
    if content["not_json"]:
        yield "<h2>Lines that are not JSON</h2>\n" + _table(
            ["line"], [[place] for place in content["not_json"]]
        )
    if content["left_out"]:
        yield "<h2>Left out</h2>\n" + _table(["file", "reason"], content["left_out"])
    if content["listed_files"]:
        rows = [
            [each["path"], amount(each["bytes"]), f"{each['documents'] or 0:,}"]
            for each in content["listed_files"]
        ]
        yield "<h2>Files</h2>\n" + _table(["file", "size", "documents"], rows)
        if (more := content["files"] - len(rows)) > 0:
            yield f'<p class="dim">and {more:,} more files</p>\n'
    yield "<h2>Documents</h2>\n"
    for each in content["sample"]:
        yield _folded(each["name"], each.get("text", f"skipped: {each.get('skipped')}"), [])


def _tokenizer(content: dict[str, Any]) -> Iterator[str]:
    figures = [(f"{content['vocab_size']:,}", "tokens in the vocabulary")]
    figures += [
        (content[key]["token"], f"{key.upper()}, id {content[key]['id']}")
        for key in ("bos", "eos")
        if content[key] is not None
    ]
    yield _figures(figures)
    if "tokens" in content:
        yield f"<h2>{content['bytes']:,} bytes of text, {len(content['tokens']):,} tokens</h2>\n"
        rows = []
        for place, each in enumerate(content["tokens"]):
            data = bytes.fromhex(each["bytes"])
            piece = each["token"] if each["special"] else data.decode(errors="backslashreplace")
            rows.append(
                [f"{place:,}", f"{each['id']:,}", data.hex(" "), f"<span>{escape(piece)}</span>"]
            )
        yield _table(["position", "id", "bytes", "piece"], rows, "piece")
    rows = [
        [str(each["id"]), "special" if each["special"] else "added", escape(each["token"])]
        for each in content["added_tokens"]
    ]
    yield "<h2>Added tokens</h2>\n" + _table(["id", "kind", "token"], rows, "left")
