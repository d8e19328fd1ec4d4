"""How the parts of the suite report.

A check is a generator of (what, measured, bound); a row passes if measured <= bound. A part is a
module with a list of checks. It runs in its own process, because an illegal access in a kernel
makes the GPU unusable for its process: such an error ends one part, not the suite. A part prints a
line of JSON for each row.
"""

import json
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

Rows = Iterator[tuple[str, Any, float | None]]


def report(*checks: Callable[[], Rows]) -> None:
    """Run checks one after the other and print their rows."""
    for check in checks:
        began = time.perf_counter()
        try:
            for what, measured, bound in check():
                seconds, began = time.perf_counter() - began, time.perf_counter()
                holds = bound is None or bool(measured <= bound)
                print_row(what=what, measured=measured, bound=bound, seconds=seconds, holds=holds)
        except Exception as error:
            seconds, name = time.perf_counter() - began, check.__name__.replace("_", " ")
            reason = (str(error).strip() or repr(error)).splitlines()[0][:300]
            print_row(
                what=name,
                measured=reason,
                bound=None,
                seconds=seconds,
                holds=False,
                details=traceback.format_exc(),
            )


def print_row(**values: Any) -> None:
    """As the suite reads it."""
    print("row " + json.dumps(values, default=float), flush=True)


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The norm of the difference, relative to that of the exact one."""
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).norm() / exact.norm())


def farthest(found: Any, exact: Any) -> float:
    """The greatest distance of several tensors; infinite if one is not a number."""
    distances = [distance(one, other) for one, other in zip(found, exact, strict=True)]
    return max(distances) if all(value == value for value in distances) else float("inf")
