"""Each campaign with a small budget; docs/reliability.md has the results of large ones."""

from pathlib import Path

import pytest

from tests.faults import (
    branches,
    crashes,
    damage,
    disk,
    fuzz,
    hostile,
    kills,
    poison,
    preparation,
    preparation_on_ray,
    settings,
    signals,
    soak,
)

pytestmark = pytest.mark.slow


def test_kills(tmp_path: Path) -> None:
    assert kills.campaign(tmp_path, 6, 0)["kills"] == 6


def test_branches(tmp_path: Path) -> None:
    figures = branches.campaign(tmp_path, 3, 0)
    assert figures["kills"] >= 3 and figures["branched again"] >= 1


def test_crashes(tmp_path: Path) -> None:
    figures = crashes.campaign(tmp_path, 60, 0)
    assert figures["kills"] > 15 and figures["power cuts"] == 3 * figures["kills"]


def test_damage(tmp_path: Path) -> None:
    figures = damage.campaign(tmp_path, 40, 0)
    assert figures["checkpoints damaged"] >= 40 and figures["datasets damaged"] == 12


def test_disk(tmp_path: Path) -> None:
    figures = disk.campaign(tmp_path, 10, 0)
    assert figures["ended with a line"] >= 1 and figures["preparations"] == 5


def test_settings(tmp_path: Path) -> None:
    figures = settings.campaign(tmp_path, 200, 0)
    assert figures["refused"] > 100 and figures["plans"] > 10


def test_hostile(tmp_path: Path) -> None:
    assert hostile.campaign(tmp_path, 15, 0)["refused with a line"] >= 8


def test_fuzz(tmp_path: Path) -> None:
    figures = fuzz.campaign(tmp_path, 750, 0)
    assert figures["manifest: refused"] > 300 and figures["manifest: kept for new lines"] > 5


def test_signals(tmp_path: Path) -> None:
    figures = signals.campaign(tmp_path, 7, 0)
    assert figures["signals"] == 7 and figures["stopped"] >= 1


def test_preparation(tmp_path: Path) -> None:
    assert preparation.campaign(tmp_path, 3, 0)["kills"] == 3


def test_preparation_on_ray(tmp_path: Path) -> None:
    assert preparation_on_ray.campaign(tmp_path, 3, 0)["kills"] == 3


def test_poison(tmp_path: Path) -> None:
    figures = poison.campaign(tmp_path, 6, 0)
    assert (
        figures["faults"] >= 6 and figures["steps left out"] and figures["ended with a line"] >= 1
    )


def test_soak(tmp_path: Path) -> None:
    figures = soak.campaign(tmp_path, 240, 0)
    assert figures["steps"] == 240 and figures["starts"] > 3
