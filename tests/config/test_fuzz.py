"""Random changes to a file: mistakes are reported with their lines; no other error is raised."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fast_llm.config.checks import violations
from fast_llm.config.compat import REFUSED, RENAMED
from fast_llm.config.document import read
from fast_llm.config.section import dump
from fast_llm.config.train import TrainConfig
from fast_llm.config.validate import validate
from fast_llm.errors import ConfigError
from tests.config.common import FIELDS, TEXT, load

VALUES = yaml.safe_load(TEXT)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        [
            "bf16",
            "1e-4",
            "~",
            "llama",
            "2024-01-01",
            "=",
            "<<",
            "[",
            "&a",
            "*a",
            "0x",
            "1:30",
            "",
            -1,
            0,
        ]
    ),
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
)
PLACES = sorted(FIELDS | set(REFUSED) | set(RENAMED))


fuzz = partial(
    settings,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


def survives(text: str | bytes, path: Path, overrides: list[str] = []) -> None:  # noqa: B006
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        document = read(path, overrides)
        config = validate(
            TrainConfig, document, REFUSED, RENAMED, constraints=partial(violations, processes=4)
        )
    except ConfigError as error:
        assert error.problems
        for problem in error.problems:
            assert isinstance(problem, str) and "\n" not in problem and len(problem) < 1000
        return
    path.write_text(dump(config))
    assert load(path=path) == config


@fuzz(max_examples=100)
@given(changes=st.lists(st.tuples(st.sampled_from(PLACES), ANYTHING), min_size=1, max_size=4))
def test_values_put_anywhere(changes: list[tuple[str, Any]], tmp_path: Path) -> None:
    values = copy.deepcopy(VALUES)
    for name, value in changes:
        place = values
        *above, last = name.split(".")
        for key in above:
            if not isinstance(place.get(key), dict):
                place[key] = {}
            place = place[key]
        place[last] = value
    survives(yaml.safe_dump(values, allow_unicode=True), tmp_path / "c.yaml")


@fuzz(max_examples=200)
@given(
    edits=st.lists(
        st.tuples(
            st.integers(0, len(TEXT)),
            st.integers(0, 30),
            st.text(alphabet=":\n -[]{}#&*!|>'\"%@`,?~0aé\t\r\x00\x07\ud800=.", max_size=6)
            | st.text(max_size=4),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_text_cut_and_pasted(edits: list[tuple[int, int, str]], tmp_path: Path) -> None:
    text = TEXT
    for start, length, new in edits:
        text = text[:start] + new + text[start + length :]
    survives(text, tmp_path / "c.yaml")


@fuzz(max_examples=150)
@given(
    lines=st.lists(
        st.tuples(st.integers(0, TEXT.count("\n") - 1), st.integers(0, 3), st.integers(0, 45)),
        max_size=6,
    )
)
def test_lines_moved_repeated_and_dedented(
    lines: list[tuple[int, int, int]], tmp_path: Path
) -> None:
    rows = TEXT.splitlines()
    for row, action, target in lines:
        row %= len(rows)
        line = rows[row]
        if action == 0:
            del rows[row]
        elif action == 1:
            rows.insert(target, line)
        elif action == 2:
            rows[row] = line.lstrip()
        else:
            rows[row] = "  " + line
        rows = rows or [""]
    survives("\n".join(rows), tmp_path / "c.yaml")


@fuzz(max_examples=100)
@given(content=st.binary(max_size=60), at=st.integers(0, len(TEXT)))
def test_bytes_pasted(content: bytes, at: int, tmp_path: Path) -> None:
    raw = TEXT.encode()
    survives(raw[:at] + content + raw[at:], tmp_path / "c.yaml")


@fuzz(max_examples=200)
@given(
    overrides=st.lists(
        st.text(max_size=12)
        | st.builds(
            lambda name, value: f"{name}={value}",
            st.sampled_from(PLACES),
            SCALARS | st.text(max_size=8),
        ),
        max_size=4,
    )
)
def test_overrides_of_any_kind(overrides: list[str], tmp_path: Path) -> None:
    survives(TEXT, tmp_path / "c.yaml", overrides)
