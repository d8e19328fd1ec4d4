"""Every setting is documented, and docs/settings.md is current."""

import subprocess
import sys
from typing import Any, get_origin

import pytest

from fast_llm.config.compat import CONVERT_REFUSED, DIFFERENT, PREPARE_REFUSED, REFUSED, RENAMED
from fast_llm.config.mistakes import nested_sections
from fast_llm.config.prepare import ConvertConfig, PrepareConfig
from fast_llm.config.reference import meaning, page
from fast_llm.config.section import Section
from fast_llm.config.train import TrainConfig
from tests.config.common import FIELDS, ROOT, leaves, load, wrong


@pytest.mark.parametrize("kind", [TrainConfig, PrepareConfig, ConvertConfig])
def test_every_setting_and_section_is_documented(kind: type[Section]) -> None:
    def inside(section: Any) -> Any:
        yield section
        for field in section.model_fields.values():
            for below in nested_sections(field.annotation):
                yield from inside(below)

    for section in inside(kind):
        assert section.__doc__ and section.__doc__ != Section.__doc__, section
        for name, field in section.model_fields.items():
            assert nested_sections(field.annotation) or meaning(section, name), (section, name)


@pytest.mark.parametrize(("path", "field"), leaves())
def test_every_setting_says_what_it_must_be(path: str, field: Any) -> None:
    if path.endswith(("environment", "data.validation_sets")):  # the user chooses these names
        assert wrong(f"{path}={{zzz: [1]}}")[0].startswith(f"{path}.zzz: given [1], must be text")
        return
    if path.startswith("run.branch_from."):  # all of its settings are required
        found = wrong(f"{path}={{zzz: [1]}}")
        assert any(p.startswith(f"{path}: given {{zzz: [1]}}, must be ") for p in found)
        return
    around, is_item, name = path.partition(".N.")

    def assigned(value: str) -> list[str]:
        if is_item:  # of a list, which the command line gives as one
            required = {"until": "1", "shape": "constant"} if "rate" in around else {}
            above, dot, below = name.partition(".")  # of a section inside of the item
            own = {above: f"{{{below}: {value}}}" if dot else value}
            inside = ", ".join(f"{key}: {one}" for key, one in {**required, **own}.items())
            return [f"{around}=[{{{inside}}}]"]
        needed = "data.sources.NAME.path"  # a source must have it
        return [f"{needed}=x"] * (path.startswith("data.sources.") and path != needed) + [
            f"{path}={value}"
        ]

    (problem,) = wrong(*assigned("{zzz: [1]}"))
    if is_item:
        path = f"{around}.0.{name}"
    if field.annotation and get_origin(field.annotation) is dict and is_item:
        assert problem.startswith(f"{path}.zzz: given [1], must be ")
    else:
        assert problem.startswith(f"{path}: given {{zzz: [1]}}, must be ")
    assert not problem.endswith("must be ") and "something" not in problem and "<" not in problem
    # null is allowed exactly where the message says so.
    if " or null" in problem or field.default_factory is not None:
        load(*assigned("null"))
    else:
        assert wrong(*assigned("null"))[0].startswith(f"{path}: given null, must be ")


def test_the_page_of_settings_is_current() -> None:
    written = (ROOT / "docs/settings.md").read_text()
    assert written == page(), "python -m fast_llm.config.reference > docs/settings.md"


def test_the_page_names_everything() -> None:
    text = " ".join(page().split())
    for kind in (TrainConfig, PrepareConfig, ConvertConfig):
        for path, _ in leaves(kind):
            assert f"- **`{path}`** (" in text
    for said in (*REFUSED.values(), *PREPARE_REFUSED.values(), *CONVERT_REFUSED.values()):
        assert f": {said}" in text
    for old, new in RENAMED.items():
        assert f"- `{old}` is now `{new}`" in text
    assert set(DIFFERENT) <= FIELDS


def test_the_page_is_made_without_torch() -> None:
    code = (
        "import runpy, sys; runpy.run_module('fast_llm.config.reference', run_name='__main__');"
        " assert not {'torch', 'numpy', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (ROOT / "docs/settings.md").read_text()
