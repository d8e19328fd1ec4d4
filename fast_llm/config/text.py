"""YAML text to values, with the line of each, and back.

YAML is version 1.1 (`100_000` is a number, `yes` is true) with two changes: `1e-4` is a number too,
and a key that is given twice is refused. Anchors are refused, since a file of a kilobyte could
expand to gigabytes. Dates stay text.
"""

import json
import re
from typing import Any

import yaml

DEEPEST = 50  # levels of nesting


def format_value(value: Any) -> str:
    """A value as YAML, on one line and shortened."""
    if isinstance(value, str):
        text = json.dumps(value, ensure_ascii=not value.isprintable())
    else:
        text = yaml.dump(
            value, Dumper=_Flow, default_flow_style=True, width=10**6, allow_unicode=True
        ).strip()
        # An error message is one line.
        text = re.sub(r"\s*\n\s*", r"\\n", text.removesuffix("...").strip())
    return text if len(text) <= 60 else text[:57] + "…"


_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = {_TAG + name for name in ("null", "bool", "int", "float", "str")}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with these changes; without anchors, and with limited nesting."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            text = (
                "anchors (&) and aliases (*) are not supported; write it out, or quote text that"
                " begins with & or *"
            )
            raise _AnchorFound(text, event.start_mark)
        self.depth += 1
        if self.depth > DEEPEST:
            raise _UnsupportedYaml(f"nested more than {DEEPEST} levels deep", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _UnsupportedYaml(Exception):
    def __init__(self, text: str, mark: yaml.Mark):
        super().__init__(text)
        self.line = mark.line + 1


class _AnchorFound(_UnsupportedYaml):
    pass


# Plain words that are not text. Dates, `=` and `<<` are text; numbers with an exponent need neither
# a dot nor a sign.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _PLAIN_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _TAG + "float",
    re.compile(r"^[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


class _Flow(yaml.SafeDumper):
    """A SafeDumper whose output _Loader reads back."""


_Flow.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


class Dumper(_Flow):
    """Writes lists of plain values on one line."""


def _one_line(dumper: Dumper, value: list[Any]) -> yaml.Node:
    plain = not any(isinstance(item, list | dict) for item in value)
    return dumper.represent_sequence(_TAG + "seq", value, flow_style=plain)


Dumper.add_representer(list, _one_line)

UNREADABLE = object()  # takes the place of a value that could not be read
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


class YamlReader:
    """Reads one YAML text; collects the places of its values, and problems."""

    def __init__(self, name: str, numbered: bool):
        """`numbered`: give line numbers, which overrides do not have."""
        self.name = name
        self.numbered = numbered
        self.places: dict[str, str] = {}
        self.problems: list[str] = []
        self.broken: set[str] = set()
        self.not_yaml = False

    def values(self, text: str, path: str = "") -> Any:
        """The values of the text (None if it is empty), or UNREADABLE."""
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
            return None if node is None else self._value(node, path, loader)
        except _UnsupportedYaml as error:
            self.not_yaml = isinstance(error, _AnchorFound)
            self._problem(error.line, "", str(error))
        except yaml.MarkedYAMLError as error:
            self.not_yaml = True
            mark = error.problem_mark or error.context_mark
            self._problem(mark.line + 1 if mark else None, "", f"not YAML: {_why(error, text)}")
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            self._problem(
                line, "", f"not YAML: the character {_character(error)} may not stand here"
            )
        except (ValueError, OverflowError):  # an escape like "\UFFFFFFFF", on which PyYAML fails
            self._problem(None, "", "not YAML: an escape (\\) that is no character")
        return UNREADABLE

    def override(self, text: str, path: str) -> Any:
        """As `values`, for an argument of the command line, which may be text that YAML refuses.

        `*.jsonl`, `@x`, `%x`, `!x` and `a: b: c` are not YAML, and `run #2` would lose its end as a
        comment. An argument that begins like a list, a mapping or a quotation must be YAML.
        """
        plain = text.strip()
        value = self.values(text, path)
        comment = not isinstance(value, list | dict) and re.search(r"(^|\s)#", plain) is not None
        if plain[0] in "[{\"'":
            if self.not_yaml and not set(text) & set("\"'"):
                quoted = f"""'{path}="{plain}"'"""
                self.problems = [
                    f"{problem}; if it is text, quote it twice: {quoted}"
                    for problem in self.problems
                ]
        elif (comment or self.not_yaml) and plain.isprintable():
            self.places, self.problems, self.broken = {path: self.name}, [], set()
            return plain
        return value

    def _at(self, line: int | None) -> str:
        return f"{self.name}:{line}" if self.numbered and line is not None else self.name

    def _problem(self, line: int | None, path: str, text: str) -> None:
        self.problems.append(f"{self._at(line)}: {path + ': ' if path else ''}{text}")
        if path:
            self.broken.add(path)

    def _value(self, node: yaml.Node, path: str, loader: _Loader) -> Any:
        line = node.start_mark.line + 1
        if path:
            self.places[path] = self._at(line)
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, path, loader)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            items = [self._value(item, f"{path}.{i}", loader) for i, item in enumerate(node.value)]
            return UNREADABLE if any(item is UNREADABLE for item in items) else items
        if node.tag not in _PLAIN_TAGS:
            self.not_yaml = True
            tag = node.tag.replace(_TAG, "!!")
            self._problem(
                line,
                path,
                f"the tag {tag} is not supported; write plain values, or quote text that begins"
                " with !",
            )
            return UNREADABLE
        return self._scalar(node, path, loader)

    def _mapping(self, node: yaml.MappingNode, path: str, loader: _Loader) -> Any:
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or not _is_name(key_node):
                given = (
                    f", not {format_value(key_node.value)}"
                    if isinstance(key_node, yaml.ScalarNode)
                    else ""
                )
                self._problem(line, path, f"the name of a setting must be a plain word{given}")
                continue
            key = key_node.value
            here = f"{path}.{key}" if path else key
            is_empty = isinstance(value_node, yaml.ScalarNode) and not value_node.value
            if is_empty and (meant := with_space(key)):
                self._problem(line, path, f"YAML needs a space after the colon: {meant}")
            elif "." in key:
                above, _, below = key.partition(".")
                self._problem(
                    line,
                    here,
                    f"no dots in the names of a file; write `{above}:` and `{below}:` below it",
                )
            elif key in lines:
                self._problem(line, here, f"given twice, first in line {lines[key]}; keep one")
            else:
                lines[key] = line
                value = self._value(value_node, here, loader)
                self.places[here] = self._at(line)
                if value is not UNREADABLE:
                    values[key] = value
        return values

    def _scalar(self, node: yaml.Node, path: str, loader: _Loader) -> Any:
        line = node.start_mark.line + 1
        try:
            value = loader.construct_object(node)
        except (yaml.YAMLError, ValueError, LookupError, OverflowError):
            self._problem(
                line,
                path,
                f"{format_value(str(node.value))} cannot be read as {node.tag.removeprefix(_TAG)}",
            )
            return UNREADABLE
        if isinstance(value, int) and abs(value) >= 2**63:
            self._problem(line, path, f"the number {str(node.value)[:20]}… is too large")
            return UNREADABLE
        if isinstance(value, str) and (found := _CONTROL.search(value)):
            self._problem(line, path, f"the character {found[0]!r} is not supported in text")
            return UNREADABLE
        return value


def _character(error: yaml.reader.ReaderError) -> str:
    code = error.character
    return repr(chr(code) if isinstance(code, int) else code)


def _is_name(node: yaml.ScalarNode) -> bool:
    return node.tag == _TAG + "str" and bool(node.value) and node.value.isprintable()


def with_space(text: str) -> str:
    """`name:value` with the space that YAML needs after the colon, in backticks; empty for other
    text.
    """
    found = re.fullmatch(r"(\w+):([^\s:/\\][^\s:]*)", text)
    return f"`{found[1]}: {found[2]}`" if found else ""


def _why(error: yaml.MarkedYAMLError, document: str) -> str:
    mark = error.problem_mark
    before = document.split("\n")[mark.line][: mark.column] if mark else ""
    text = error.problem or error.context or "cannot be read"
    if "'\\t'" in text:
        text += " (indent with spaces, not tabs)"
    elif "cannot start any token" in text:
        text += "; quote text that begins with it"
    elif "mapping values are not allowed" in text and re.fullmatch(r"\s*[\w.]+", before):
        text += "; indent it like the settings beside it"
    elif "mapping values are not allowed" in text:
        text += "; quote text that holds ': '"
    elif "expected alphabetic or numeric character" in text:
        text += "; quote text that begins with & or *"
    elif "expected <block end>, but found '<scalar>'" in text:
        text += "; quote text that begins with [, { or a quotation mark"
    elif "expected <block end>, but found '<block mapping start>'" in text:
        text = "the indentation fits no line above; indent it like the settings beside it"
    if "expected a single document" in (error.context or ""):
        text = "a second document begins here (---); keep one"
    return text
