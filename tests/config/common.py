"""What tests of the configuration share."""

from pathlib import Path
from typing import Any

import pytest

from fast_llm.config.compat import REFUSED, RENAMED
from fast_llm.config.document import read
from fast_llm.config.mistakes import iter_paths, nested_sections
from fast_llm.config.train import TrainConfig
from fast_llm.config.validate import validate
from fast_llm.errors import ConfigError

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "fast_llm/demo/train-config.yaml"
TEXT = RECIPE.read_text()
FIELDS = set(iter_paths(TrainConfig))


def load(*overrides: str, path: Path | None = None) -> TrainConfig:
    return validate(TrainConfig, read(path, overrides), REFUSED, RENAMED)


def wrong(*overrides: str, kind: Any = TrainConfig, refused: Any = REFUSED) -> list[str]:
    """What is wrong with overrides, without their names in front."""
    with pytest.raises(ConfigError) as caught:
        validate(kind, read(None, overrides), refused, RENAMED)
    return [
        next(
            (p for o in overrides if (p := problem.removeprefix(f"override {o}: ")) != problem),
            problem,
        )
        for problem in caught.value.problems
    ]


def leaves(kind: type[Any] = TrainConfig, above: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, field in kind.model_fields.items():
        inside = nested_sections(field.annotation)
        found += leaves(inside[0], f"{above}{name}.") if inside else [(above + name, field)]
    return found
