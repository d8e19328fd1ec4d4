"""Reading and validating YAML files and overrides: their values, and the messages for mistakes."""

import re
from pathlib import Path
from typing import Any

import pytest

from fast_llm.config.document import read
from fast_llm.config.mixture import DataSourceConfig
from fast_llm.config.section import Interval, Section, dump
from fast_llm.config.train import TrainConfig
from fast_llm.config.types import Positive, Text
from fast_llm.config.validate import validate
from fast_llm.errors import ConfigError


class Inner(Section):
    """A section."""

    size: Positive = 1
    """Size."""
    name: Text | None = None
    """Name."""
    share: float = 0.5
    """Share."""
    active: bool = False
    """Switch."""
    names: list[str] = []
    """Names."""


class Outer(Section):
    """A file."""

    inner: Inner = Inner()
    other: Inner = Inner()


@pytest.fixture
def yaml(tmp_path: Path) -> Any:
    """Write a text (or bytes) to c.yaml and read it."""

    def write(text: str | bytes, *overrides: str) -> Any:
        path = tmp_path / "c.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read(path, overrides)

    return write


def wrong(yaml: Any, text: str | bytes, *overrides: str, **more: Any) -> list[str]:
    """All mistakes of a text, read as an Outer."""
    with pytest.raises(ConfigError) as caught:
        validate(Outer, yaml(text, *overrides), **more)
    return [re.sub(r"/\S*/c\.yaml", "c.yaml", problem) for problem in caught.value.problems]


QUOTE_TAG = " quote text that begins with !"

# Values.


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("100_000", 100_000),
        ("0x10", 16),
        ("0b11", 3),
        ("010", 8),  # octal in YAML 1.1
        ("1:30", 90),  # and this is base 60
        ("1e-4", 1e-4),
        ("1E4", 1e4),
        ("-1e-4", -1e-4),
        ("+2e3", 2000.0),
        ("1.e-4", 1e-4),
        (".5e-3", 5e-4),
        ("1.0e-04", 1e-4),
        ("1_0e-1", 1.0),
        ("1.5", 1.5),
        ("yes", True),
        ("Yes", True),
        ("on", True),
        ("no", False),
        ("OFF", False),
        ("true", True),
        ("~", None),
        ("null", None),
        ("", None),
        ("y", "y"),
        ("e4", "e4"),
        ("1e", "1e"),
        ("'1e-4'", "1e-4"),
        ('"yes"', "yes"),
        ("2024-01-01", "2024-01-01"),
        ("=", "="),
        ("a b", "a b"),
        ("[1, no, 1e-1]", [1, False, 0.1]),
        ("{a: 1}", {"a": 1}),
        ("größe", "größe"),
        ("!!str 5", "5"),
        ("!!float 5", 5.0),
    ],
)
def test_values_have_their_yaml_meaning(yaml: Any, written: str, meant: Any) -> None:
    value = yaml(f"a: {written}\n").get("a")
    assert value == meant
    assert type(value) is type(meant)
    if written:
        assert read(None, [f"x.a={written}"]).get("x.a") == meant


def test_not_a_number_is_reported_by_the_setting(yaml: Any) -> None:
    assert wrong(yaml, "inner:\n  share: .nan\n  size: 1.0\n") == [
        "c.yaml:2: inner.share: given .nan, must be a number",
        "c.yaml:3: inner.size: given 1.0, must be an integer above 0; write 1",
    ]


def test_a_byte_order_mark_and_windows_line_ends_are_read(yaml: Any) -> None:
    document = yaml(b"\xef\xbb\xbfinner:\r\n  size: 3\r\n")
    assert document.values == {"inner": {"size": 3}}
    assert document.where("inner.size").endswith("c.yaml:2")


def test_an_empty_section_is_all_defaults(yaml: Any) -> None:
    assert validate(Outer, yaml("inner:\nother: {}\n")) == Outer()


# Files that cannot be read.


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "a: 1\nb: &x 2\n",
            "c.yaml:2: anchors (&) and aliases (*) are not supported; write it out, or quote text"
            " that begins with & or *",
        ),
        (
            "a: &a [1]\nb: *a\n",
            "c.yaml:1: anchors (&) and aliases (*) are not supported; write it out, or quote text"
            " that begins with & or *",
        ),
        (
            "a: *a\n",
            "c.yaml:1: anchors (&) and aliases (*) are not supported; write it out, or quote text"
            " that begins with & or *",
        ),
        (
            "a: 1\n\tb: 2\n",
            "c.yaml:2: not YAML: found character '\\t' that cannot start any token (indent with"
            " spaces, not tabs)",
        ),
        (
            "a:\n  b: 1\n c: 2\n",
            "c.yaml:3: not YAML: the indentation fits no line above; indent it like the settings"
            " beside it",
        ),
        (
            "a: 1\n  b: 2\n",
            "c.yaml:2: not YAML: mapping values are not allowed here; indent it like the settings"
            " beside it",
        ),
        ("a: [1\nb: 2\n", "c.yaml:2: not YAML: expected ',' or ']', but got ':'"),
        ("a: 'x\n", "c.yaml:2: not YAML: found unexpected end of stream"),
        ("a: 1\n---\nb: 1\n", "c.yaml:2: not YAML: a second document begins here (---); keep one"),
        ("a: 1\nb: \x00\n", "c.yaml:2: not YAML: the character '\\x00' may not stand here"),
        ('a: "\\UFFFFFFFF"\n', "c.yaml: not YAML: an escape (\\) that is no character"),
        ("- a\n", "c.yaml: must hold settings (name: value), not [a]"),
        ("just words\n", 'c.yaml: must hold settings (name: value), not "just words"'),
        ("5\n", "c.yaml: must hold settings (name: value), not 5"),
        ("", "c.yaml: holds no settings; leave it out if all of them are given as a.b=c"),
        (
            "# nothing\n",
            "c.yaml: holds no settings; leave it out if all of them are given as a.b=c",
        ),
        (b"a: 1\nb: \xff\n", "c.yaml: not UTF-8 at byte 8; save it as UTF-8"),
        ("a: 1\n".encode("utf-16"), "c.yaml: not UTF-8 at byte 0; save it as UTF-8"),
        ("a: " + "[" * 60, "c.yaml:1: nested more than 50 levels deep"),
        ("a: " + "[" * 100_000, "c.yaml:1: nested more than 50 levels deep"),
        ("#" * (2**20 + 1), "c.yaml: larger than 1 MiB; is this a configuration?"),
    ],
)
def test_what_is_not_settings(yaml: Any, text: str | bytes, problem: str) -> None:
    assert wrong(yaml, text) == [problem]


def test_a_file_of_a_mebibyte_is_read(yaml: Any) -> None:
    assert yaml("a: 1\n" + "#" * (2**20 - 5)).values == {"a": 1}


def test_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("a: 1")
    for name, problem in (
        ("trian.yaml", f"no such file; did you mean {tmp_path}/train.yaml?"),
        ("else", "no such file"),
        ("no/such.yaml", "no such file"),
        ("train.yaml/x", "cannot be read: Not a directory"),
        ("x" * 300, "cannot be read: File name too long"),
        (".", "a folder; give the YAML file in it"),
    ):
        with pytest.raises(ConfigError) as caught:
            read(tmp_path / name)
        assert caught.value.problems == [f"{tmp_path / name}: {problem}"]
    with pytest.raises(ConfigError, match="not the name of a file"):
        read("a\0b")


def test_a_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # root may read every file
    with pytest.raises(ConfigError, match=r"c\.yaml: cannot be read: Permission denied"):
        read(tmp_path / "c.yaml")


# Smaller mistakes, which are reported together.


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("inner:\n  size: 1\n  size: 2\n", "c.yaml:3: inner.size: given twice, first in line 2;"
            " keep one"),
        (
            "inner: {}\ninner:\n  size: 2\n",
            "c.yaml:2: inner: given twice, first in line 1; keep one",
        ),
        (
            "inner:\n  1: 2\n",
            'c.yaml:2: inner: the name of a setting must be a plain word, not "1"',
        ),
        ("inner:\n  yes: 2\n", 'c.yaml:2: inner: the name of a setting must be a plain word, not'
            ' "yes"'),
        ("inner:\n  [a]: 2\n", "c.yaml:2: inner: the name of a setting must be a plain word"),
        (
            "inner:\n  '': 2\n",
            'c.yaml:2: inner: the name of a setting must be a plain word, not ""',
        ),
        ("inner.size: 2\n", "c.yaml:1: inner.size: no dots in the names of a file; write `inner:`"
            " and `size:` below it"),
        ("inner: {size:2}\n", "c.yaml:1: inner: YAML needs a space after the colon: `size: 2`"),
        ("inner: {share:0.2}\n", "c.yaml:1: inner: YAML needs a space after the colon:"
            " `share: 0.2`"),
        ("inner:\n  size:2\n", 'c.yaml:1: inner: given "size:2", must be a section of settings;'
            " YAML needs a space after the colon: `size: 2`"),
        ("inner:\n  size: !!int x\n", 'c.yaml:2: inner.size: "x" cannot be read as int'),
        ("inner:\n  size: 0b\n", 'c.yaml:2: inner.size: given "0b", must be an integer above 0'),
        (f"inner:\n  size: {2**63}\n", "c.yaml:2: inner.size: the number 9223372036854775808… is"
            " too large"),
        ("inner:\n  name: !x y\n", "c.yaml:2: inner.name: the tag !x is not supported; write plain"
            " values, or" + QUOTE_TAG),
        (
            "inner:\n  name: !!python/name:os.system x\n",
            "c.yaml:2: inner.name: the tag !!python/name:os.system is not supported; write plain"
            " values, or" + QUOTE_TAG,
        ),
        ("inner:\n  name: !!binary aGk=\n", "c.yaml:2: inner.name: the tag !!binary is not"
            " supported; write plain values, or" + QUOTE_TAG),
        ('inner:\n  name: "\\x07"\n', "c.yaml:2: inner.name: the character '\\x07' is not"
            " supported in text"),
        ("inner:\n  name: ''\n", "c.yaml:2: inner.name: given empty text; write null, or leave it"
            " out, for none"),
        ("inner:\n  names: [a, 1]\n", "c.yaml:2: inner.names: given [a, 1], must be a list, each"
            " item text (numbers and dates in quotes)"),
        ("inner:\n  names: a\n", 'c.yaml:2: inner.names: given "a", must be a list, each item text'
            ' (numbers and dates in quotes)'),
        ("inner:\n  active: 1\n", "c.yaml:2: inner.active: given 1, must be yes or no"),
        ("inner:\n  size: yes\n", "c.yaml:2: inner.size: given true, must be an integer above 0"),
        ("inner:\n  name: 2024\n", "c.yaml:2: inner.name: given 2024, must be text (numbers and"
            " dates in quotes) or null"),
        ("inner:\n  name: {a: 1}\n", "c.yaml:2: inner.name: given {a: 1}, must be text (numbers"
            " and dates in quotes) or null"),
        ("inner: 3\n", "c.yaml:1: inner: given 3, must be a section of settings with size, name,"
            " share, active or names"),
        ("inner: [1]\n", "c.yaml:1: inner: given [1], must be a section of settings"),
        (
            "inner:\n  szie: 1\n",
            "c.yaml:2: inner.szie: no such setting; did you mean inner.size? (allowed: size, name,"
            " share, active, names)",
        ),
        ("iner:\n  size: 1\n", "c.yaml:1: iner: no such setting; did you mean inner? (allowed:"
            " inner, other)"),
        ("size: 1\n", "c.yaml:1: size: no such setting; did you mean inner.size? (allowed: inner,"
            " other)"),
        ("quite: 1\n", "c.yaml:1: quite: no such setting (allowed: inner, other)"),
    ],
)  # fmt: skip
def test_one_mistake(yaml: Any, text: str, problem: str) -> None:
    assert wrong(yaml, text) == [problem]
    # Together with a second mistake, whose line is right too.
    assert wrong(yaml, text + "other:\n  size: 0\n") == [
        problem,
        f"c.yaml:{text.count(chr(10)) + 2}: other.size: given 0, must be an integer above 0",
    ]


def test_a_long_value_is_shortened(yaml: Any) -> None:
    (problem,) = wrong(yaml, f"inner:\n  active: {'x' * 10_000}\n")
    assert len(problem) < 150 and "…" in problem


def test_a_value_of_several_lines_is_reported_in_one(yaml: Any) -> None:
    (problem,) = wrong(yaml, 'inner:\n  size: {a: "b\\nc"}\n')
    assert problem.startswith("c.yaml:2: inner.size: given {a: 'b\\nc'}, must be")


def test_a_number_of_thousands_of_digits(yaml: Any) -> None:
    (problem,) = wrong(yaml, f"inner:\n  size: {'9' * 10_000}\n")
    assert problem.startswith("c.yaml:2: inner.size: ") and len(problem) < 150


def test_all_mistakes_are_reported_at_once_in_the_order_of_the_file(yaml: Any) -> None:
    text = (
        "inner:\n  szie: 1\n  share: x\n  size: 0\n  active: maybe\n  active: no\nother: 5\nmore:"
        " 1\n"
    )
    assert wrong(yaml, text, "inner.name=5", "x", "more.a=1") == [
        "c.yaml:2: inner.szie: no such setting; did you mean inner.size? (allowed: size, name,"
        " share, active, names)",
        'c.yaml:3: inner.share: given "x", must be a number',
        "c.yaml:4: inner.size: given 0, must be an integer above 0",
        'c.yaml:5: inner.active: given "maybe", must be yes or no',
        "c.yaml:6: inner.active: given twice, first in line 5; keep one",
        "c.yaml:7: other: given 5, must be a section of settings with size, name, share, active or"
        " names",
        "c.yaml:8: more: no such setting (allowed: inner, other)",
        "override x: must have the form section.setting=value, e.g. training.train_iters=1000",
        "override more.a=1: more is 1 (c.yaml:8), a value, which has no settings inside",
        "override inner.name=5: inner.name: given 5, must be text (numbers and dates in quotes) or"
        " null",
    ]


# Overrides.


def test_an_override_inside_a_source_that_is_a_path_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "data:\n  format: mixture\n  sources:\n    code: c.json\n    prose: p.json\n"
    file = Path("sources.yaml")
    file.write_text(text)
    given = ["data.sources.code.weight=2", "data.sources.prose.max_epochs=3"]
    sources = validate(TrainConfig, read(file, given, TrainConfig)).data.sources
    assert sources == {
        "code": DataSourceConfig(path="c.json", weight=2),
        "prose": DataSourceConfig(path="p.json", max_epochs=3),
    }
    file.write_text("data:\n  path: d.json\n")
    with pytest.raises(ConfigError) as caught:
        validate(TrainConfig, read(file, ["data.path.weight=2"], TrainConfig))
    assert caught.value.problems == [
        'override data.path.weight=2: data.path is "d.json" (sources.yaml:2), a value, which has no'
        " settings inside"
    ]


def test_a_section_of_overrides_alone_is_where_they_are(yaml: Any) -> None:
    """Not in the line of the section of the file around it."""
    document = yaml("other:\n  size: 3\n", "other.inside.a=1")
    assert document.where("other.inside") == "override other.inside.a=1"
    assert document.where("other.name").endswith("c.yaml:1")


def test_overrides_win_and_the_last_wins(yaml: Any) -> None:
    document = yaml(
        "inner:\n  size: 3\n  name: a\n",
        "inner.size=4",
        "inner.size=5",
        "other.names=[x, y]",
        "other.active=yes",
    )
    assert validate(Outer, document) == Outer(
        inner=Inner(size=5, name="a"), other=Inner(names=["x", "y"], active=True)
    )
    assert document.where("inner.size") == "override inner.size=5"
    assert document.where("inner.name").endswith("c.yaml:3")


def test_overrides_replace_a_whole_section(yaml: Any) -> None:
    document = yaml("inner:\n  size: 3\n  name: a\n", "inner={name: b}", "other=null")
    assert validate(Outer, document) == Outer(inner=Inner(name="b"))
    assert (
        document.where("inner.size") == document.where("inner.name") == "override inner={name: b}"
    )


def test_overrides_go_into_a_section_of_null(yaml: Any) -> None:
    assert validate(Outer, yaml("inner:\n", "inner.size=2")).inner.size == 2


def test_a_value_may_hold_an_equals_sign_and_colons() -> None:
    assert read(None, ["inner.name=a=b", "other.name=http://x"]).values == {
        "inner": {"name": "a=b"},
        "other": {"name": "http://x"},
    }


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("inner.size", "must have the form section.setting=value, e.g. training.train_iters=1000"),
        ("=3", "must have the form section.setting=value, e.g. training.train_iters=1000"),
        ("inner.=3", "must have the form section.setting=value, e.g. training.train_iters=1000"),
        (
            "inner..size=3",
            "must have the form section.setting=value, e.g. training.train_iters=1000",
        ),
        (
            "in ner.size=3",
            "must have the form section.setting=value, e.g. training.train_iters=1000",
        ),
        ("inner.size=", "gives no value; write inner.size=null for none"),
        ("inner.size= ", "gives no value; write inner.size=null for none"),
        ("inner.size=[", "not YAML: expected the node content, but found '<stream end>'; if it is"
            " text, quote it twice:"
         """ 'inner.size="["'"""),
        ("inner.size=[a].txt", "not YAML: expected '<document start>', but found '<scalar>'; if it"
            " is text, quote it twice:"
         """ 'inner.size="[a].txt"'"""),
        ("inner.size='a", "not YAML: found unexpected end of stream"),
        ("inner.size=a: b: c", 'inner.size: given "a: b: c", must be an integer above 0'),
        ("inner.size=&a 1", 'inner.size: given "&a 1", must be an integer above 0'),
        ("inner.size=*a", 'inner.size: given "*a", must be an integer above 0'),
        ("inner.size=1 # one", 'inner.size: given "1 # one", must be an integer above 0'),
        ("inner={size: 1, size: 2}", "inner.size: given twice, first in line 1; keep one"),
        ("inner.size=0", "inner.size: given 0, must be an integer above 0"),
        ("inner.siz=1", "inner.siz: no such setting; did you mean inner.size? (allowed: size,"
            " name, share, active, names)"),
        ("inner.size.x=1", 'inner.size: given {x: 1}, must be an integer above 0'),
    ],
)  # fmt: skip
def test_one_mistake_in_an_override(override: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(Outer, read(None, [override, "other.size=0"]))
    assert caught.value.problems == [
        f"override {override}: {problem}",
        "override other.size=0: other.size: given 0, must be an integer above 0",
    ]


AS_IT_IS = (
    "*.jsonl|*|&a|!x y|%x|@x|`x`|#1|a #2|- a|? a|a: b: c|---x|007|0x10|12:30|1e3|1_000|1.50|yes|No"
    "|2020-01-05|x:|a: b|> a"
)


@pytest.mark.parametrize("text", AS_IT_IS.split("|"))
def test_text_of_the_command_line_is_what_it_is(text: str) -> None:
    """A setting that wants text gets the text as typed, however YAML would read it."""
    document = read(None, [f"inner.name={text}", f"other.name= \t{text} "], Outer)
    assert validate(Outer, document).inner.name == validate(Outer, document).other.name == text
    quoted = text.replace("\\", "\\\\")
    assert validate(Outer, read(None, [f'inner.name="{quoted}"'], Outer)).inner.name == text


def test_what_is_no_text_on_the_command_line_keeps_its_meaning() -> None:
    given = [
        "inner.name=null",
        "inner.size=1_000",
        "inner.names=[1e3, '2']",
        "inner.share=0.5",
        "inner.active=no",
    ]
    inner = read(None, given, Outer).values["inner"]
    assert inner == {
        "name": None,
        "size": 1000,
        "names": [1000.0, "2"],
        "share": 0.5,
        "active": False,
    }


def test_text_in_a_file_that_must_be_quoted(yaml: Any) -> None:
    for text, hint in (
        ("*.jsonl", "; quote text that begins with & or *"),
        ("*a", "or quote text that begins with & or *"),
        ("!x", "or quote text that begins with !"),
        ("%x", "; quote text that begins with it"),
        ("@x", "; quote text that begins with it"),
        ("`x`", "; quote text that begins with it"),
        ("a: b", "; quote text that holds ': '"),
        ("[a].txt", "; quote text that begins with [, { or a quotation mark"),
        ("{a}.txt", "; quote text that begins with [, { or a quotation mark"),
        ("'a' b", "; quote text that begins with [, { or a quotation mark"),
    ):
        problems = wrong(yaml, f"inner:\n  name: {text}\n")
        assert (
            len(problems) == 1
            and problems[0].startswith("c.yaml:2: ")
            and problems[0].endswith(hint)
        ), problems
        assert validate(Outer, yaml(f'inner:\n  name: "{text}"\n')).inner.name == text


def test_an_override_inside_a_list(yaml: Any) -> None:
    assert wrong(yaml, "inner:\n  names: [a]\n", "inner.names.0=b") == [
        "override inner.names.0=b: inner.names is [a] (c.yaml:2), a list; give all of it"
    ]


# Older and refused names.


def test_older_names_are_taken_and_reported_by_their_own(yaml: Any) -> None:
    renamed = {"inner.amount": "inner.size", "inner.title": "other.name"}
    assert validate(Outer, yaml("inner:\n  amount: 4\n  title: a\n"), renamed=renamed) == Outer(
        inner=Inner(size=4), other=Inner(name="a")
    )
    assert wrong(yaml, "inner:\n  amount: 4\n  size: 5\n", renamed=renamed) == [
        "c.yaml:2: inner.amount: an older name of inner.size, which is given too (c.yaml:3); keep"
        " that one"
    ]
    assert wrong(yaml, "inner:\n  amount: 0\n", renamed=renamed) == [
        "c.yaml:2: inner.size: given 0, must be an integer above 0"
    ]
    assert wrong(yaml, "inner:\n  title: a\nother: 4\n", renamed=renamed) == [
        "c.yaml:3: other: given 4, must be a section of settings with size, name, share, active or"
        " names"
    ]


def test_refused_names_say_what_to_use(yaml: Any) -> None:
    refused = {
        "inner.rank": "torchrun knows; leave it out",
        "old": "is gone",
        "old.b": "use inner.size",
    }
    text = "inner:\n  rank: 0\n  size: 0\nold:\n  a: 1\n  b: 2\n"
    assert wrong(yaml, text, refused=refused) == [
        "c.yaml:2: inner.rank: not supported: torchrun knows; leave it out",
        "c.yaml:3: inner.size: given 0, must be an integer above 0",
        "c.yaml:5: old.a: not supported: is gone",
        "c.yaml:6: old.b: not supported: use inner.size",
    ]
    for empty in ("old:\n", "old: {}\n", "old: 3\n"):
        assert wrong(yaml, empty, refused=refused) == ["c.yaml:1: old: not supported: is gone"]
    assert wrong(yaml, "inner:\n  size: 1\n", "old.b=1", refused=refused) == [
        "override old.b=1: old.b: not supported: use inner.size"
    ]


# Constraints, and values from other sources.


def test_constraints_are_checked_for_valid_settings(yaml: Any) -> None:
    def constraints(config: Outer) -> Any:
        if config.inner.size > config.other.size:
            yield ("inner.size", "other.size"), "must be at most other.size"
        if not config.inner.active:
            yield ("inner.active",), "must be active"

    both = [
        "c.yaml:2: inner.size: must be at most other.size",
        "c.yaml:1: inner.active: must be active",
    ]
    assert sorted(wrong(yaml, "inner:\n  size: 3\n", constraints=constraints)) == sorted(both)
    # other.size is wrong itself: its relation to inner.size is not reported.
    assert wrong(yaml, "inner:\n  size: 3\nother:\n  size: 0\n", constraints=constraints) == [
        "c.yaml:1: inner.active: must be active",
        "c.yaml:4: other.size: given 0, must be an integer above 0",
    ]


def test_values_laid_underneath(yaml: Any) -> None:
    document = yaml("inner:\n  size: 3\n  active: yes\n  name:\nother: 7\n")
    laid = document.with_defaults({"inner": {"name": "a", "size": 3}}, "config.json")
    assert laid.get("inner.name") == "a" and laid.where("inner.name") == "config.json"
    assert laid.problems == () and laid.get("inner.active") is True
    laid = document.with_defaults({"inner": {"size": 4}, "other": {"size": 1}}, "config.json")
    with pytest.raises(ConfigError) as caught:
        validate(Outer, laid)
    assert [problem.rpartition("/")[2] for problem in caught.value.problems] == [
        "c.yaml:2: inner.size: given 3, but config.json says 4; leave it out, the pretrained model"
        " decides",
        "c.yaml:5: other: given 7, must be a section of settings with size, name, share, active or"
        " names",
    ]
    assert (
        read(None, ["x.add_linear_biases=no"])
        .with_defaults({"x": {"add_linear_biases": "nowhere"}}, "j")
        .problems
        == ()
    )


def test_where() -> None:
    document = read(None, ["inner.size=1"])
    assert document.where("inner.size.deeper") == document.where("inner") == "override inner.size=1"
    assert document.where("other") == "the command line"
    assert document.get("inner.size.x", 5) == 5 and document.get("y") is None


# Writing.


def test_dump_reads_to_an_equal_configuration(yaml: Any) -> None:
    config = Outer(
        inner=Inner(name="1e-4", share=1e-9, names=["yes", "2024-01-01", "=", "a: b", "ü", "0x1"])
    )
    text = dump(config)
    assert "names: ['yes', " in text
    assert validate(Outer, yaml(text)) == config


def test_intervals() -> None:
    assert [step for step in range(12) if Interval(interval=5, offset=2).due(step)] == [2, 7]
    assert not any(Interval().due(step) for step in range(5))
    assert Interval(interval=6, offset=1).within(Interval(interval=3, offset=4))
    assert not Interval(interval=6).within(Interval(interval=3, offset=1))
    assert not Interval(interval=6).within(Interval(interval=4))
    assert not Interval(interval=6).within(Interval())
    assert Interval().within(Interval())
