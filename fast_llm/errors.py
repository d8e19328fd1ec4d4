"""The errors that users see, and how each ends the program.

UserError                 found before or between steps; exit code 2, one message, no traceback
├── ConfigError           the YAML file, an override, or contradicting settings; lists all mistakes
├── DataError             a dataset, a token file, a tokenizer
├── CheckpointError       a checkpoint, an export, a folder of weights
├── MissingPackage        an optional package that a setting needs
├── TrainingStopped       training cannot continue (exit code 1); what was saved stays
└── ReportedElsewhere     another process has reported why the run ends; nothing is printed

Every other exception is a bug and keeps its traceback. `terminal.print_error` prints a report, in
blocks on a terminal.
"""

import errno
from typing import Any

# Errors of the disk, not bugs. The code that writes checkpoints and token files has messages of its
# own.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.ESTALE}


def disk_problem(error: OSError) -> str | None:
    """The message for a full or failing disk; None for any other error."""
    if error.errno not in _DISK:
        return None
    where = f"{error.filename}: " if error.filename else ""
    return (
        f"{where}{error.strerror}; free space on the disk or repair it, then start the same command"
        " again"
    )


def lfs_problem(path: object, start: bytes) -> str | None:
    """The message for a Git LFS pointer, by a file's first bytes (8 or more); else None."""
    pointer = b"version https://git-lfs"
    if len(start) < 8 or not pointer.startswith(start[: len(pointer)]):
        return None
    return (
        f"{path}: a Git LFS pointer, not the file itself; fetch it with `git lfs install` and"
        " `git lfs pull` in its folder"
    )


class UserError(Exception):
    """A mistake that the user can fix: where it is, what was given, what is allowed, what to do."""

    exit_code = 2
    printed = False  # already, by a process of the run

    def report(self) -> str:
        """The message after the name of the command: one line for each mistake."""
        return str(self)


class ConfigError(UserError):
    """All mistakes of a configuration at once."""

    def __init__(self, problems: list[str]):
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(self.problems)

    def report(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        return "\n  ".join([f"{len(self.problems)} mistakes", *self.problems])


class DataError(UserError):
    """A dataset, token file or tokenizer that is missing, damaged or does not fit."""


class CheckpointError(UserError):
    """A checkpoint, export or folder of weights that is missing, damaged or does not fit."""


class MissingPackage(UserError):
    """A setting needs an optional package that is not installed."""

    def __init__(self, packages: str, why: str):
        """`packages`: what to install, the missing one first.

        By name, as fast-llm is not on a package index.
        """
        super().__init__(f"{why} needs the package {packages.split()[0]}: pip install {packages}")

    def __reduce__(self) -> Any:
        return _unpickled, (type(self), self.args)  # not by __init__, which takes other arguments


def _unpickled(kind: type[UserError], arguments: tuple[Any, ...]) -> UserError:
    error = kind.__new__(kind)
    error.args = arguments
    return error


class TrainingStopped(UserError):
    """Training cannot continue. Everything that was saved is kept."""

    exit_code = 1

    def __init__(self, message: str, resumable: bool = False):
        """`resumable`: the same command resumes from the newest checkpoint; training adds which one
        that is.
        """
        self.resumable = resumable
        super().__init__(message)


class ReportedElsewhere(UserError):
    """Another process of the run prints why it ends; this one leaves with the same exit code."""

    printed = True

    def __init__(self, exit_code: int):
        super().__init__(exit_code)
        self.exit_code = exit_code

    def __str__(self) -> str:
        return f"another process reports why the run ends, with exit code {self.exit_code}"
