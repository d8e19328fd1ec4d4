"""German manual pages, and English prose that is about something else, from Debian's archive.

`apt-get download` fetches `manpages-de` and `jargon-text` (the Jargon File, public domain), 4.3 MB;
nothing is installed. Manual pages are written in roff; `plain` keeps their text.
"""

import gzip
import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from fast_llm.errors import UserError

_SHORTEST = 500  # characters: shorter pages only name another page
_ESCAPES = {"-": "-", "e": "\\", "&": "", "|": "", "^": "", "/": "", ",": "", "c": "", "%": ""}
_GLYPHS = {"aq": "'", "dq": '"', "co": "©", "lq": "“", "rq": "”", "bu": "•", "em": "—", "en": "–"}
_GLYPHS |= {
    "bq": "‚",
    "Bq": "„",
    "Fo": "«",
    "Fc": "»",
    "ti": "~",
    "ha": "^",
    "rs": "\\",
    "ga": "`",
    "cq": "’",
    "oq": "‘",
    "->": "→",
}
# Requests and macros whose arguments are text: with the fonts, all of man(7) and the headings.
_JOINED = ("BR", "RB", "IR", "RI", "BI", "IB")
_TEXT = ("B", "I", "SM", "SB", "IP", "TQ", "UR", "MT", *_JOINED)
_PARAGRAPHS = ("PP", "P", "LP", "TP", "IP", "RS", "RE", "sp", "HP", "YS")
_HEADINGS = ("SH", "SS")
_ENDS = {"TS": "TE", "de": ".", "de1": ".", "ig": "."}
_TRANSLATORS = "ÜBERSETZUNG"  # a section at the end of every page, always the same


def write_german(path: Path, cache: Path) -> int:
    """Write the German manual pages as JSON lines. Returns the characters.

    `cache`: where packages are unpacked. Raises UserError if they cannot be fetched.
    """
    pages = sorted(package("manpages-de", cache).rglob("man/de/man*/*.gz"))
    # A page that is another name of one is a link.
    texts = (plain(_read(page)) for page in pages if not page.is_symlink())
    return write_documents(path, (text for text in texts if len(text) >= _SHORTEST))


def write_jargon(path: Path, cache: Path) -> int:
    """Write the Jargon File, in documents of some 3,000 characters. Returns the characters."""
    (file,) = package("jargon-text", cache).rglob("jargon.txt.gz")
    return write_documents(path, _chunks(_unwrapped(_read(file)), 3000))


def package(name: str, cache: Path) -> Path:
    """The files of a Debian package in a folder. Raises UserError if it cannot be fetched."""
    folder = cache / name
    if not folder.exists():
        if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
            raise UserError(
                f"the texts come from the Debian package {name}, but there is no apt-get here; run"
                f" this on Debian or Ubuntu, or unpack the package into {folder}"
            )
        partial = cache / f".{name}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _run(["apt-get", "-q", "download", name], partial)
        (archive,) = partial.glob("*.deb")
        _run(["dpkg-deb", "-x", archive.name, "files"], partial)
        (partial / "files").rename(folder)
        shutil.rmtree(partial)
    return folder


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(
            f"`{' '.join(command)}` ended with exit code {done.returncode}: {done.stderr.strip()};"
            " it needs a network and current package lists (`apt-get update`)"
        )


def write_documents(path: Path, texts: Iterable[str]) -> int:
    """Write documents as JSON lines. Returns the characters."""
    size = 0
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            size += len(text)
    return size


def _read(path: Path) -> str:
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
        return file.read()


def plain(roff: str) -> str:
    """The text of a manual page: headings, and paragraphs without line breaks."""
    paragraphs: list[str] = []
    words: list[str] = []
    inside = (
        ""  # the request that ends a table or the definition of a macro, whose text is left out
    )
    for line in roff.splitlines():
        name, given = _request(line)
        inside = _ENDS.get(name, inside) if not inside else inside if name != inside else ""
        if name in (*_HEADINGS, *_PARAGRAPHS) or not line.strip():
            paragraphs.append(" ".join(words))
            words = []
        if name in _HEADINGS:
            heading = _clean(" ".join(given))
            if heading == _TRANSLATORS:
                break
            paragraphs.append(f"# {heading}")
        elif name in _TEXT and not inside:
            joined = ("" if name in _JOINED else " ").join(given[: 1 if name == "IP" else None])
            words.append(_clean(joined))
        elif not name and not inside:
            words.append(_clean(line))
    paragraphs.append(" ".join(words))
    return "\n\n".join(text for text in (" ".join(p.split()) for p in paragraphs) if text)


def _request(line: str) -> tuple[str, list[str]]:
    """Name and arguments of a request or macro; "" for a line of text."""
    if line[:1] not in (".", "'"):
        return "", []
    name, _, rest = line[1:].strip().partition(" ")
    if name.startswith("\\"):
        return "comment", []
    return name or "comment", [a or b for a, b in re.findall(r'"([^"]*)"?|(\S+)', rest)]


def _clean(text: str) -> str:
    """Text without roff's escape sequences (groff(7))."""

    def replaced(found: re.Match[str]) -> str:
        glyph = found["two"] or found["long"]
        if glyph is not None:
            if re.fullmatch(r"u[0-9A-F]{4,5}", glyph):
                return chr(int(glyph[1:], 16))
            return _GLYPHS.get(glyph, "")
        one = found["one"]
        return "" if one is None else _ESCAPES.get(one, one)

    text = re.sub(r'\\["#].*', "", text)
    return re.sub(
        r"\\(?:f(?:\[[^]]*\]|\(..|.)|s[-+]?\d+|[mFgYknV](?:\[[^]]*\]|\(..|.)|\((?P<two>..)"
        r"|\[(?P<long>[^]]*)\]|[hvwXo]'[^']*'|(?P<one>.)|$)",
        replaced,
        text,
    )


def _unwrapped(text: str) -> Iterator[str]:
    """The paragraphs of a text whose lines are wrapped and indented."""
    for block in re.split(r"\n\s*\n", text):
        paragraph = " ".join(block.split())
        if len(paragraph) > 2:
            yield paragraph


def _chunks(paragraphs: Iterable[str], size: int) -> Iterator[str]:
    """Consecutive paragraphs, joined to documents of at least `size` characters."""
    held: list[str] = []
    for paragraph in paragraphs:
        held.append(paragraph)
        if sum(map(len, held)) >= size:
            yield "\n\n".join(held)
            held = []
    if held:
        yield "\n\n".join(held)
