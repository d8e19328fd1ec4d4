"""What the documentation site has besides docs/*.md: README.md as its home page, the changelog, the
pages for contributors, the files of examples/, and one API page per package from its docstrings.

These are added while MkDocs builds, so that each text exists once in the repository. Links are
rewritten, because README.md and the site have different roots.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fast_llm"
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "tests/README.md": "tests.md",
}


def packages() -> list[Path]:
    """The folders of the package that have an `__init__.py`, and the package itself."""
    return sorted(path.parent for path in PACKAGE.rglob("__init__.py"))


def name(path: Path) -> str:
    """`fast_llm/config/train.py` → `fast_llm.config.train`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the API pages to the navigation."""
    api = [{name(path): f"api/{name(path)}.md"} for path in packages()]
    config.nav = [*(config.nav or []), {"API": api}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages and files from outside docs/."""
    for source, page in PAGES.items():
        text = re.sub(r"\]\((\.\./)?docs/", "](", (ROOT / source).read_text())
        for other, its_page in PAGES.items():
            text = text.replace(f"]({other}", f"]({its_page}")
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "LICENSE", abs_src_path=str(ROOT / "LICENSE")))
    for path in examples():
        files.append(File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)))
    files.append(File.generated(config, "examples/index.md", content=examples_page()))
    for package in packages():
        files.append(File.generated(config, f"api/{name(package)}.md", content=api(package)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links from docs/ to files outside it lead to their pages on the site."""
    for source, page in PAGES.items():
        markdown = markdown.replace(f"](../{source}", f"]({page}")
    markdown = markdown.replace("](../examples", "](examples")
    return re.sub(r"\]\(examples(/train)?\)", "](examples/index.md)", markdown)


def examples() -> list[Path]:
    """The files of examples/, first those at its top."""
    files = (path for path in (ROOT / "examples").rglob("*") if path.is_file())
    return sorted(files, key=lambda path: (len(path.parts), path.name))


def examples_page() -> str:
    """Each file of examples/ in a block of its own."""
    lines = ["# Examples", "", "Ready files, tested with the project. Copy and adapt them."]
    for path in examples():
        language = "yaml" if path.suffix == ".yaml" else "bash"
        lines += ["", f"## {path.relative_to(ROOT / 'examples')}", "", f"```{language}"]
        lines += [path.read_text().rstrip(), "```"]
    return "\n".join(lines) + "\n"


def api(package: Path) -> str:
    """The page of a package: its own docstring, then those of its modules."""
    modules = sorted(path for path in package.glob("*.py") if not path.name.startswith("__"))
    lines = [f"# {name(package)}", "", f"::: {name(package)}", *_options(3, members=False)]
    for module in modules:
        lines += ["", f"::: {name(module)}", *_options(2)]
    return "\n".join(lines) + "\n"


def _options(level: int, members: bool = True) -> list[str]:
    lines = ["    options:", f"      heading_level: {level}"]
    return lines if members else [*lines, "      members: false", "      show_root_heading: false"]
