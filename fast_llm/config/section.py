"""Sections: the pydantic models that every configuration consists of."""

from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, model_validator

from fast_llm.config.text import Dumper
from fast_llm.config.types import Count, Positive


class Section(BaseModel):
    """A mapping in the YAML file. Unknown keys are refused; values cannot be changed."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, values: Any) -> Any:
        """An empty section means all defaults; null means the default for a setting that is derived
        from others.
        """
        if values is None:
            return {}
        if not isinstance(values, dict):
            return values
        derived = {
            name for name, field in cls.model_fields.items() if field.default_factory is not None
        }
        return {
            key: value for key, value in values.items() if value is not None or key not in derived
        }


class Interval(Section):
    """Something that happens at regular steps."""

    interval: Positive | None = None
    """Do it every this many steps. null means never."""
    offset: Count = 0
    """Shift these steps: do it after steps whose number minus `offset` is a multiple of
    `interval`."""

    def due(self, step: int) -> bool:
        """Whether it happens after this step."""
        return self.interval is not None and (step - self.offset) % self.interval == 0

    def within(self, other: "Interval") -> bool:
        """Whether the other happens every time this does."""
        if self.interval is None:
            return True
        if other.interval is None:
            return False
        return (
            self.interval % other.interval == 0
            and (self.offset - other.offset) % other.interval == 0
        )


def dump(section: Section) -> str:
    """A resolved configuration as YAML, which is valid input again."""
    values = section.model_dump(mode="json")
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)
