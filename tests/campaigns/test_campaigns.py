"""Each campaign with a small budget; the large ones and their figures are in docs/reliability.md."""

from pathlib import Path

from tests.campaigns import kills


def test_kills(tmp_path: Path) -> None:
    assert kills.campaign(tmp_path, 6, 0)["kills"] == 6
