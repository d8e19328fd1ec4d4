"""The JSON schema of a YAML file, for editors: `fast-llm settings train --schema`.

Editors read YAML 1.2, in which `100_000` and `yes` are text; this project reads YAML 1.1, as
Fast-LLM 0.2 does. So the schema allows such text where a number, or yes and no, is meant.
"""

import json
from typing import Any

from pydantic import AliasChoices, BaseModel
from pydantic.json_schema import GenerateJsonSchema

from fast_llm.config.mistakes import describe_allowed, item_annotation, nested_sections
from fast_llm.config.mixture import DataSource
from fast_llm.config.reference import doc_text, meaning, plain

_NUMBER = r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?$"
# What YAML 1.1 reads as another type than YAML 1.2 does.
_ALSO: dict[str, dict[str, Any]] = {
    "integer": {"type": "string", "pattern": "^[-+]?[0-9][0-9_]*$"},
    "number": {"type": "string", "pattern": _NUMBER},
    "boolean": {"enum": ["yes", "no", "Yes", "No", "on", "off", "On", "Off"]},
}


def schema(kind: type[BaseModel]) -> str:
    """The schema of the file that has these settings, as JSON."""
    content = kind.model_json_schema(schema_generator=_Generator)
    sections = {kind.__name__: kind} | {section.__name__: section for section in _inside(kind)}
    parts = {kind.__name__: content} | content.get("$defs", {})
    for name, part in parts.items():
        _describe(part, sections[name])
    found = {"$schema": _Generator.schema_dialect, **_lenient(content)}
    return json.dumps(found, indent=1, ensure_ascii=False)


class _Generator(GenerateJsonSchema):
    """Without titles and defaults, which would only repeat names and descriptions."""

    def get_title_from_name(self, name: str) -> str:
        return ""

    def default_schema(self, schema: Any) -> dict[str, Any]:
        return self.generate_inner(schema["schema"])


def _inside(kind: type[BaseModel]) -> set[type[BaseModel]]:
    """All sections of a section."""
    found: set[type[BaseModel]] = set()
    for field in kind.model_fields.values():
        for section in nested_sections(field.annotation):
            found |= {section} | _inside(section)
    return found


def _describe(part: dict[str, Any], section: type[BaseModel]) -> None:
    """Add what the settings mean to a section's schema."""
    part["description"] = plain(" ".join(doc_text(section).split()))
    for name, found in list(part.get("properties", {}).items()):
        field = section.model_fields[name]
        if item_annotation(field.annotation) is DataSource:  # a path alone stands for a section
            section_alone = found["additionalProperties"]
            found["additionalProperties"] = {"anyOf": [{"type": "string"}, section_alone]}
        if not nested_sections(field.annotation):
            text = plain(" ".join(meaning(section, name).split()))
            found["description"] = f"{text} Allowed: {describe_allowed(field)}."
        if isinstance(field.validation_alias, AliasChoices):
            others = {str(other): found for other in field.validation_alias.choices[1:]}
            part["properties"] |= others


def _lenient(part: Any) -> Any:
    """The schema, with the text that YAML 1.1 reads as another type."""
    if isinstance(part, list):
        return [_lenient(inner) for inner in part]
    if not isinstance(part, dict):
        return part
    found = {
        name: {key: _lenient(value) for key, value in inner.items()}
        if name in ("properties", "$defs")
        else _lenient(inner)
        for name, inner in part.items()
    }
    kind = found.get("type")
    if not isinstance(kind, str) or kind not in _ALSO:
        return found
    text = {"description": found.pop("description")} if "description" in found else {}
    return {"anyOf": [found, _ALSO[kind]], **text}
