"""The user's filter: a Python function that keeps, changes or drops each document.

`dataset.filter: module:function` names a function of a text. It returns True to keep the document,
False to drop it, or the text to tokenize instead. Each worker process imports it, from the current
folder, PYTHONPATH or the installed packages.

Which documents are kept must not depend on the process. So filters run in processes that are
started with PYTHONHASHSEED=0 (`hash()` of a text is random otherwise), and the generators of
`random` and NumPy are seeded with the number of the row before each call, which costs 30 us.
"""

import hashlib
import importlib
import os
import random
import sys
from collections.abc import Callable

import numpy as np

from fast_llm.errors import DataError

HASH_SEED = {"PYTHONHASHSEED": "0"}  # in the environment of processes that filter
Filter = Callable[[str], bool | str]


class FilterFailed(Exception):
    """The filter raised an exception, or returned something else, for the document in `row`."""

    def __init__(self, row: int, reason: str):
        super().__init__(row, reason)
        self.row, self.reason = row, reason


def load_filter(name: str) -> Filter:
    """The function `module:function`. Raises DataError if there is none."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise DataError(f"dataset.filter: given {name}, must be module:function")
    if (folder := os.getcwd()) not in sys.path:
        sys.path.insert(0, folder)
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the module does
        raise DataError(
            f"dataset.filter: {name} cannot be imported: {type(error).__name__}: {error}; the"
            " module must be in the current folder, on PYTHONPATH, or installed"
        ) from error
    if not callable(found):
        raise DataError(f"dataset.filter: {name} is {type(found).__name__}, must be a function")
    checked: Filter = found
    return checked


def filter_digest(name: str) -> str:
    """The sha256 of the file of a filter's module; of modules that it imports, nothing is known."""
    load_filter(name)
    path = sys.modules[name.partition(":")[0]].__file__
    if path is None:
        raise DataError(f"dataset.filter: {name}: its module is no file; write it to one")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def apply_filter(keep: Filter, text: str, row: int) -> str | None:
    """The text to tokenize; None to drop the document. Raises FilterFailed."""
    random.seed(row)
    np.random.seed(row % 2**32)
    try:
        answer = keep(text)
    except Exception as error:  # of the user's code
        raise FilterFailed(row, f"{type(error).__name__}: {error}") from error
    if isinstance(answer, str):
        return answer
    if not isinstance(answer, bool):
        kind = type(answer).__name__
        raise FilterFailed(row, f"it returned {kind}, must be True, False or a text")
    return text if answer else None
