"""Fixtures for tests of the model: with our CPU kernels, and without them."""

from collections.abc import Iterator

import pytest

from fast_llm.kernels import cpu as cpu_kernels
from tests.helpers import needs_compiler


@pytest.fixture
def plain() -> Iterator[None]:
    """Switch our CPU kernels off, as on a machine without a C++ compiler."""
    with cpu_kernels.disabled():
        yield


@pytest.fixture(params=[pytest.param("kernels", marks=needs_compiler), "plain"])
def ways(request: pytest.FixtureRequest) -> None:
    """Run a test with our CPU kernels, and again without them."""
    if request.param == "plain":
        request.getfixturevalue("plain")
    else:
        assert cpu_kernels.load() == ""
