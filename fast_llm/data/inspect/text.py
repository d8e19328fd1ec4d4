"""What `fast-llm inspect` prints for people: tables, a histogram, decoded documents."""

from collections.abc import Iterator
from typing import Any

from fast_llm.terminal import BOLD, DIM, short_count, style, table, width

_BAR = 30  # columns of the longest bar
_SHORT = 160  # characters of a text that is shown in part
_ADDED = 12  # added tokens that are shown
_PIECES = 500  # tokens of a text that are shown
_EIGHTHS = " ▏▎▍▌▋▊▉"


def lines(content: dict[str, Any], stream: Any, complete: bool) -> Iterator[str]:
    """The content of `--json` in lines. `complete`: print documents in full."""
    if content["kind"] == "tokenizer":
        yield from _tokenizer(content, stream)
    elif content["kind"] == "raw":
        yield from _raw(content, stream)
    elif "documents" in content:
        yield from _dataset(content, stream)
    for document in content.get("shown_documents", ()):
        yield from _document(document, stream, complete)
    for sequence in content.get("sequences", ()):
        yield from _sequence(sequence, stream, complete)


def amount(size: float) -> str:
    """Bytes in three digits: 12.3 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def percent(share: float) -> str:
    """A share in percent."""
    return f"{100 * share:.1f} %" if share >= 0.0005 or not share else "< 0.1 %"


def _dataset(content: dict[str, Any], stream: Any) -> Iterator[str]:
    yield style(", ".join(content["paths"]), stream, BOLD)
    rows = [
        ("documents", f"{content['documents']:,}"),
        ("tokens", f"{content['tokens']:,} in {_files(content['token_files'])}"),
    ]
    if content["bytes"] is not None:
        ratio = content["bytes"] / max(1, content["tokens"])
        rows.append(("text", f"{amount(content['bytes'])}, {ratio:.2f} bytes per token"))
    lengths = content["lengths"]
    if content["documents"]:
        rows.append(
            (
                "lengths",
                f"median {lengths['median']:,}, 90 % up to {lengths['p90']:,}, 99 % up to"
                f" {lengths['p99']:,}, longest {lengths['longest']:,} tokens",
            )
        )
    if (longer := content["longer"]) is not None:
        rows.append(
            (
                "longer",
                f"than a sequence of {content['sequence_length']:,}: {longer['documents']:,}"
                f" documents ({percent(longer['share_of_documents'])}), with"
                f" {percent(longer['share_of_tokens'])} of the tokens",
            )
        )
    if (found := content["duplicates"]) is None:
        rows.append(("duplicates", "not counted, since all tokens must be read: --duplicates"))
    else:
        share = found["documents"] / max(1, content["documents"])
        several = "s" if found["documents"] > 1 else ""
        text = (
            f"{found['documents']:,} document{several} ({percent(share)}),"
            f" {found['tokens']:,} tokens"
        )
        rows.append(("duplicates", text if found["documents"] else "none"))
    if content["skipped"]:
        counts = (f"{count:,} {reason}" for reason, count in content["skipped"].items())
        rows.append(("skipped", ", ".join(counts)))
    yield from (style(f"{name:<12}", stream, DIM) + text for name, text in rows)
    yield ""
    yield from _sources(content)
    if content["documents"]:
        yield ""
        yield from _histogram(lengths["histogram"])


def _raw(content: dict[str, Any], stream: Any) -> Iterator[str]:
    yield style(content["path"], stream, BOLD)
    size = amount(content["text_bytes"])
    rows = [
        (
            "format",
            "a document per text file" if content["format"] == "file" else content["format"],
        ),
        (
            "documents",
            f"{content['documents']:,} in split {content['split']}, about {size} of text",
        ),
    ]
    if content["columns"]:
        rows.append(("columns", f"{', '.join(content['columns'])}; read: {content['field']}"))
    if content["files"]:
        rows.append(("files", f"{content['files']:,}, {amount(content['file_bytes'])}"))
    rows += [("no text", f"{each['path']}: {each['reason']}") for each in content["unusable"][:10]]
    if content["not_json"]:
        number = content["not_json_lines"]
        rows.append(
            (
                "not JSON",
                f"{number:,} line{'s' if number > 1 else ''}, the first {content['not_json'][0]};"
                f" `prepare` stops there, unless dataset.max_bad_lines is {number} or more",
            )
        )
    rows += [("left out", f"{name} ({why})") for name, why in content["left_out"][:10]]
    yield from (style(f"{name:<12}", stream, DIM) + text for name, text in rows)
    if content["listed_files"]:
        yield ""
        listed = [
            [each["path"], amount(each["bytes"]), f"{each['documents'] or 0:,}"]
            for each in content["listed_files"]
        ]
        yield table(["file", "size", "documents"], listed, (1, 2))
        if (more := content["files"] - len(listed)) > 0:
            yield f"and {more:,} more files"
    for each in content["sample"]:
        yield ""
        yield _rule(each["name"], stream)
        yield _text(each["text"], [], False) if "text" in each else f"skipped: {each['skipped']}"


def _tokenizer(content: dict[str, Any], stream: Any) -> Iterator[str]:
    yield style(content["path"], stream, BOLD)
    bos, eos = (
        "none" if each is None else f"{each['id']} {each['token']}"
        for each in (content["bos"], content["eos"])
    )
    rows = [
        ("vocabulary", f"{content['vocab_size']:,} tokens"),
        ("BOS", bos + (", before each document" if content["adds_bos"] else ", not written")),
        ("EOS", eos),
    ]
    rows += [
        ("special" if each["special"] else "added", f"{each['id']} {each['token']!r}")
        for each in content["added_tokens"][:_ADDED]
    ]
    if (more := content["number_of_added_tokens"] - _ADDED) > 0:
        rows.append(("", f"and {more:,} more added tokens"))
    yield from (style(f"{name:<12}", stream, DIM) + text for name, text in rows)
    if "tokens" not in content:
        return
    tokens = content["tokens"]
    yield ""
    yield f"{content['bytes']:,} bytes of text, {len(tokens):,} tokens"
    shown = []
    for place, each in enumerate(tokens[:_PIECES]):
        data = bytes.fromhex(each["bytes"])
        piece = each["token"] if each["special"] else _quoted(data)
        shown.append([str(place), str(each["id"]), piece, data.hex(" ")])
    yield table(["position", "id", "piece", "bytes"], shown, (0, 1))
    if (more := len(tokens) - _PIECES) > 0:
        yield f"and {more:,} more tokens; --json has all"


def _quoted(data: bytes) -> str:
    """Bytes as quoted text; a byte that is a part of a character only, as hexadecimal digits."""
    text = data.decode(errors="surrogateescape")
    if not any("\udc80" <= one <= "\udcff" for one in text):
        return repr(text)
    shown = (
        f"\\x{ord(one) - 0xDC00:02x}" if "\udc80" <= one <= "\udcff" else repr(one)[1:-1]
        for one in text
    )
    return f"'{''.join(shown)}'"


def _files(count: int) -> str:
    return f"{count:,} token file{'' if count == 1 else 's'}"


def _sources(content: dict[str, Any]) -> Iterator[str]:
    run, splits = content.get("run"), content.get("splits")
    epochs = {each["source"]: each["epochs"] for each in run["epochs"]} if run else {}
    rows = []
    for source in content["sources"]:
        size = "" if source["bytes"] is None else amount(source["bytes"])
        count = f"{epochs[source['name']]:.3g}" if source["name"] in epochs else ""
        rows.append(
            [
                source["name"],
                percent(source["share"]),
                f"{source['documents']:,}",
                f"{source['tokens']:,}",
                size,
                count,
            ]
        )
    headings = ["source", "share", "documents", "tokens", "text", "epochs"]
    kept = [place for place in range(6) if any(row[place] for row in rows)]
    yield table(
        [headings[place] for place in kept],
        [[row[place] for place in kept] for row in rows],
        range(1, len(kept)),
    )
    if splits:
        padded = any(split["padding"] for split in splits.values())
        yield ""
        yield table(
            ["split", "documents", "tokens", "sequences", "padding"][: 4 + padded],
            [
                [
                    name,
                    *(f"{split[key]:,}" for key in ("documents", "tokens", "sequences")),
                    percent(split["padding"]),
                ][: 4 + padded]
                for name, split in splits.items()
            ],
            range(1, 4 + padded),
        )
    if run:
        yield ""
        yield (
            f"{run['steps']:,} steps of {run['batch_size']:,} sequences:"
            f" {short_count(run['tokens'])} tokens"
        )


def _histogram(rows: list[dict[str, int]]) -> Iterator[str]:
    most = max(row["documents"] for row in rows)
    total = sum(row["tokens"] for row in rows)
    shown = []
    for row in rows:
        both = row["from"] == row["to"]
        span = f"{row['from']:,}" if both else f"{row['from']:,} to {row['to']:,}"
        share = percent(row["tokens"] / max(1, total))
        shown.append([span, f"{row['documents']:,}", share, _bar(row["documents"] / most)])
    yield table(["tokens", "documents", "of tokens", ""], shown, (0, 1, 2))


def _bar(share: float) -> str:
    eighths = max(round(share * _BAR * 8), 1 if share else 0)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _rule(text: str, stream: Any) -> str:
    return style(f"── {text} ".ljust(width(stream), "─").rstrip(), stream, DIM)


def _document(document: dict[str, Any], stream: Any, complete: bool) -> Iterator[str]:
    yield ""
    yield _rule(
        f"document {document['number']:,}: {document['name']}, {document['tokens']:,} tokens",
        stream,
    )
    yield _text(document.get("marked", document["text"]), document["ids"], complete)


def _text(text: str | None, ids: list[int], complete: bool) -> str:
    """A text, or its tokens if there is no tokenizer; shortened unless `complete`."""
    shown = " ".join(map(str, ids)) if text is None else text
    if complete or len(shown) <= _SHORT:
        return shown
    return f"{shown[: _SHORT // 2]!r} … {shown[-_SHORT // 2 :]!r}"


def fim_line(fim: dict[str, int]) -> str:
    """What fill-in-the-middle has done to a sequence."""
    return (
        f"fill-in-the-middle: {fim['fim_rearranged']} rearranged ({fim['fim_tokens']:,} tokens),"
        f" {fim['fim_left']} chosen but left as they are"
    )


def _sequence(sequence: dict[str, Any], stream: Any, complete: bool) -> Iterator[str]:
    length, documents = sequence["length"], sequence["documents"]
    yield ""
    heading = f"sequence {sequence['index']:,} of {sequence['split']}"
    yield style(heading, stream, BOLD) + (
        f": {length:,} tokens and a last target from {sequence['source']}, epoch"
        f" {sequence['epoch'] + 1}; {len(documents)} document{'' if len(documents) == 1 else 's'},"
        f" loss on {sequence['targets']:,}"
    )
    if fim := sequence["fim"]:
        yield fim_line(fim)
    for part in documents:
        begin, end = part["position"], part["position"] + part["tokens"]
        where = (
            "from its start" if not part["first_token"] else f"from token {part['first_token']:,}"
        )
        yield _rule(f"tokens {begin:,} to {end - 1:,}: {part['name']}, {where}", stream)
        yield _text(part.get("marked", part["text"]), sequence["ids"][begin:end], complete)
        if reason := part["without_loss"]:
            yield style(f"   no loss here: {reason}", stream, DIM)
    if sequence["padding"]:
        begin = length + 1 - sequence["padding"]
        yield _rule(f"tokens {begin:,} to {length:,}: padding, without a loss", stream)
