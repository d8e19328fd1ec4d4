"""Shared by the tests of the configuration."""

from pathlib import Path
from typing import Any

import pytest

from fast_llm.config.compat import REFUSED, RENAMED
from fast_llm.config.document import read
from fast_llm.config.mistakes import iter_paths, iter_settings
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
    """The mistakes in overrides, without the names of the overrides."""
    with pytest.raises(ConfigError) as caught:
        validate(kind, read(None, overrides), refused, RENAMED)
    return [
        next(
            (p for o in overrides if (p := problem.removeprefix(f"override {o}: ")) != problem),
            problem,
        )
        for problem in caught.value.problems
    ]


def leaves(kind: type[Any] = TrainConfig) -> list[tuple[str, Any]]:
    return list(iter_settings(kind))
