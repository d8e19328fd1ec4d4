"""docs/families.md has every family, what each supports, and published models."""

import re
from pathlib import Path

from fast_llm.config.document import read
from fast_llm.models import FAMILIES, family_of
from fast_llm.planning.preflight import read_config
from fast_llm.planning.support import as_table
from tests.families.test_published import READ, settings

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def test_every_family_is_in_the_table() -> None:
    assert re.findall(r"^\| `(\w+)`", PAGE.read_text(), re.M)[1:] == list(FAMILIES)


def test_the_page_has_what_the_command_prints() -> None:
    assert f"```\n{as_table()}\n```" in PAGE.read_text()


def published_table() -> str:
    """The models of published.json that are read, with their families and parameters."""
    rows = ["| Model | `model_type` | Parameters |", "|---|---|---:|"]
    for one in READ:
        model = settings(one["config"])
        count = family_of(model).cost(model, 1).parameters
        rows.append(f"| {one['model']} | `{model.family}` | {count:,} |")
    return "\n".join(rows)


def test_the_page_has_the_published_models() -> None:
    assert published_table() in PAGE.read_text()


def test_the_new_model_is_valid(tmp_path: Path) -> None:
    block = PAGE.read_text().partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "new.yaml").write_text(block)
    config = read_config(read(tmp_path / "new.yaml", []), 1)
    assert config.model.base_model.family == "qwen3"
