"""What the tests of the model share: our kernels for the CPU, and the same without them."""

import pytest

from fast_llm.kernels import cpu as cpu_kernels
from tests.helpers import needs_compiler


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a compiler."""
    monkeypatch.setattr(cpu_kernels._Loaded, "library", None)
    monkeypatch.setattr(cpu_kernels._Loaded, "problem", "switched off by a test")


@pytest.fixture(params=[pytest.param("native", marks=needs_compiler), "plain"])
def ways(request: pytest.FixtureRequest) -> None:
    """Both, one after the other."""
    if request.param == "plain":
        request.getfixturevalue("plain")
    else:
        assert cpu_kernels.load() == ""
