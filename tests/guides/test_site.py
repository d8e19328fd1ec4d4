"""The documentation site builds strictly: every link, anchor and API page leads somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    home = (tmp_path / "index.html").read_text()
    assert 'href="training-llama-3.1-8b/"' in home  # README's links lead to pages of the site
    assert (tmp_path / "examples" / "slurm.sbatch").exists()
    api = (tmp_path / "api" / "fast_llm.config" / "index.html").read_text()
    assert "fast_llm.config.train.TrainConfig" in api


def test_every_decision_is_in_the_index() -> None:
    index = (ROOT / "docs" / "decisions" / "index.md").read_text()
    pages = {path.name for path in (ROOT / "docs" / "decisions").glob("*.md")} - {"index.md"}
    assert len(pages) > 70
    assert all(f"]({page})" in index for page in pages)


def test_the_design_pages_name_files_that_exist() -> None:
    files = {str(path.relative_to(ROOT / "fast_llm")) for path in (ROOT / "fast_llm").rglob("*")}
    for page in ("how-it-works.md", "architecture.md"):
        named = re.findall(
            r"`((?!tests)[a-z_]+/[a-z_]+\.(?:py|cpp))`", (ROOT / "docs" / page).read_text()
        )
        assert named and set(named) <= files, f"{page} names {sorted(set(named) - files)}"
    for picture in ("data-path.svg", "step.svg"):
        text = (ROOT / "docs" / "images" / picture).read_text()
        named = re.findall(r">([a-z_]+/[a-z_]+\.(?:py|cpp))<", text)
        assert named and set(named) <= files, f"{picture} names {sorted(set(named) - files)}"
