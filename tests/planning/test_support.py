"""`fast-llm models`: the table says what configurations are refused, and what tests compare."""

import io
import json

import pytest
import transformers

from fast_llm.config.checks import violations
from fast_llm.config.model_checks import Violations
from fast_llm.config.train import TrainConfig
from fast_llm.models import FAMILIES
from fast_llm.planning.support import CAPABILITIES, as_json, as_table, support


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_every_family_and_capability_has_a_cell() -> None:
    rows = support()
    assert [row.model_type for row in rows] == list(FAMILIES)
    for row in rows:
        assert list(row.capabilities) == [*CAPABILITIES, "export"]
        able = {name for name, able in row.capabilities.items() if able}
        experts = row.model_type in ("qwen3_moe", "mixtral", "gpt_oss")
        assert able == {*CAPABILITIES, "export"} - ({"EP"} if not experts else set())
        assert hasattr(transformers, row.compared_with)


def test_a_new_constraint_changes_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that refuses a layout for one family takes away its "yes"."""

    def stricter(config: TrainConfig, processes: int) -> Violations:
        yield from violations(config, processes)
        model = config.model
        if model.base_model.family == "gemma2" and model.distributed.sequence_data_parallel > 1:
            yield ("model.distributed.sequence_data_parallel",), "is not supported"

    monkeypatch.setattr("fast_llm.planning.support.violations", stricter)
    refused = [
        (row.model_type, name)
        for row in support()
        for name, able in row.capabilities.items()
        if not able and name != "EP"
    ]
    assert refused == [("gemma2", "CP")]


def test_text_and_json_say_the_same() -> None:
    lines = as_table().splitlines()
    assert max(map(len, lines)) <= 100
    for line, one in zip(lines[1:], json.loads(as_json()), strict=True):
        cells = line.split()
        assert cells[0] == one["model_type"] and cells[-1] == one["compared_with"]
        answers = [value for value in one.values() if isinstance(value, bool)]
        assert [cell == "yes" for cell in cells if cell in ("yes", "-")] == answers


def test_headings_are_bold_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    head, _, body = as_table(Terminal()).partition("\n")
    assert head.startswith("\x1b[1mmodel_type") and "\x1b" not in body
    assert as_table(io.StringIO()) == as_table()
