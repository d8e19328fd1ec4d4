"""`dataset.filter`: the user's function keeps, changes or drops documents."""

import hashlib
import sys
from pathlib import Path

import pytest

from fast_llm import cli
from fast_llm.data.prepare import prepare
from fast_llm.errors import DataError
from tests.data.preparing import configure, content, everything, jsonl, read, start, tokens
from tests.helpers import slow

MODULE = """
def keep(text):
    if text == "fails":
        raise ValueError("no such text")
    if text == "number":
        return 1
    if text == "surrogate":
        return "\\ud800"
    if "drop" in text:
        return False
    return text.upper() if text == "change" else True

other = keep
constant = 5
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_filter.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("my_filter", None)
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["one", "drop this", "change", "", "drop", "two", "surrogate"]))
    return path


def test_documents_are_kept_changed_and_dropped(source: Path, tmp_path: Path, model: Path) -> None:
    chosen = {"dataset__filter": "my_filter:keep"}
    metadata = prepare(configure(tmp_path / "1" / "data", source, model, **chosen))
    assert read(metadata) == tokens(model, ["one", "CHANGE", "two"])
    assert content(metadata)["skipped"] == {"empty": 1, "not_utf8": 1, "filtered": 2}
    assert content(metadata)["skipped_examples"] == [
        [f"{source}:4", "empty"],
        [f"{source}:7", "not_utf8"],
    ]
    for number, change in ((2, {"tokenize_workers": 2}), (3, {"dataset__deduplicate": True})):
        prepare(configure(tmp_path / str(number) / "data", source, model, **chosen, **change))
        assert read(tmp_path / str(number) / "data.json") == read(metadata)
    assert everything(tmp_path / "2") == everything(tmp_path / "1")
    with pytest.raises(DataError, match=r'dataset.filter "my_filter:keep", now it is null'):
        prepare(configure(tmp_path / "1" / "data", source, model))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_filter_that_fails_is_named_with_file_and_row(
    workers: int, source: Path, tmp_path: Path, model: Path
) -> None:
    for text, reason in (
        ("fails", "ValueError: no such text"),
        ("number", "it returned int, must be True, False or a text"),
    ):
        source.write_bytes(jsonl(["one", text, "two"]))
        with pytest.raises(
            DataError, match=rf"^dataset.filter: my_filter:keep fails on .*a.jsonl:2: {reason}$"
        ):
            prepare(
                configure(
                    tmp_path / "out",
                    source,
                    model,
                    dataset__filter="my_filter:keep",
                    tokenize_workers=workers,
                )
            )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_filter", "given my_filter, must be module:function"),
        ("nowhere:keep", "nowhere:keep cannot be imported: ModuleNotFoundError: No module named"),
        (
            "my_filter:gone",
            "my_filter:gone cannot be imported: AttributeError: .*; the module must",
        ),
        ("my_filter:constant", "my_filter:constant is int, must be a function"),
    ],
)
def test_a_filter_that_is_not_there(
    name: str, message: str, source: Path, tmp_path: Path, model: Path
) -> None:
    with pytest.raises(DataError, match=rf"^dataset.filter: {message}"):
        prepare(configure(tmp_path / "out", source, model, dataset__filter=name))
    assert not (tmp_path / "out").exists()


@slow
def test_a_filter_depends_on_the_document_alone(
    source: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not on the process: with hash() and random, all engines keep the same documents."""
    (tmp_path / "my_filter.py").write_text(
        "import random\nimport numpy\n"
        "def keep(text):\n"
        "    return f'{text} {hash(text)} {random.random()} {numpy.random.rand()}'\n"
    )
    source.write_bytes(jsonl([f"text {number}" for number in range(50)]))
    chosen = ["dataset.filter=my_filter:keep", "dataset.field=text"]
    for name, seed, further in (
        ("one", "1", ()),
        ("two", "2", ("tokenize_workers=2",)),
        ("rank", "random", ("distributed.world_size=2", "distributed.rank=1")),
        ("ray", "3", ("distributed.engine=ray",)),
    ):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        process = start(tmp_path, tmp_path / name / "data", source, model, *chosen, *further)
        _, stderr = process.communicate()
        assert process.returncode == 0, stderr
    for name in ("two", "rank", "ray"):
        assert everything(tmp_path / name) == everything(tmp_path / "one"), name


def test_a_changed_filter_is_refused(source: Path, tmp_path: Path, model: Path) -> None:
    chosen = {"dataset__filter": "my_filter:keep"}
    config = configure(tmp_path / "out", source, model, **chosen)
    recorded = content(prepare(config))["source"]
    module = tmp_path / "my_filter.py"
    assert recorded["filter"] == "my_filter:keep"
    assert recorded["filter_sha256"] == hashlib.sha256(module.read_bytes()).hexdigest()
    module.write_text(MODULE + "\n# changed\n")
    with pytest.raises(
        DataError,
        match=r"out: was started with another version of the module of dataset.filter; restore it,"
        r" choose another output_path, or delete .*out$",
    ):
        prepare(config)
    module.write_text(MODULE)
    other = {"dataset__filter": "my_filter:other"}
    with pytest.raises(DataError) as caught:
        prepare(configure(tmp_path / "out", source, model, dataset__deduplicate=True, **other))
    assert str(caught.value).endswith(
        'out: was started with dataset.filter "my_filter:keep", now it is "my_filter:other", and'
        " with dataset.deduplicate false, now it is true; restore them, choose another"
        f" output_path, or delete {tmp_path}/out"
    )


def test_the_estimate_is_of_all_documents(
    source: Path, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is made before documents are dropped, and says so."""
    given = [f"output_path={tmp_path}/new", f"dataset.path={source}", f"tokenizer.path={model}"]
    given += ["dataset.filter=my_filter:keep", "dataset.deduplicate=yes"]
    assert cli.main(["prepare", "--validate", *given]) == 0
    expected = " with BOS and EOS, before dataset.filter and dataset.deduplicate: "
    assert expected in capsys.readouterr().out
