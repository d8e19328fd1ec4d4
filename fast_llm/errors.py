"""The mistakes a user can make, and how each ends the program.

UserError                 found before or between steps; exit code 2, one message, no traceback
├── ConfigError           the YAML file, an override, or settings that contradict each other; lists them all
├── DataError             a dataset, a token file, a tokenizer
├── CheckpointError       a checkpoint, an export, a folder of weights
├── MissingPackage        an optional package that a setting needs
├── TrainingStopped       training cannot go on (exit code 1); what was saved stays
└── Elsewhere             another process of the run has reported why it ends; nothing is printed

Everything else that is raised is a fault of ours and keeps its traceback.
"""

import errno

# A disk that is full or broken, and not a fault of ours. The places that write most have messages of their own.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.ESTALE}


def disk_problem(error: OSError) -> str | None:
    """What to do about a disk that failed; None if that is not what happened."""
    if error.errno not in _DISK:
        return None
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror}; free space on the disk or repair it, then start the same command again"


class UserError(Exception):
    """A mistake the user can mend. The message says where, what was given, what is allowed and what to do."""

    exit_code = 2
    printed = False  # by a process of the run, so that the command prints nothing more

    def report(self) -> str:
        """What the user reads behind the name of the command."""
        return str(self)


class ConfigError(UserError):
    """All the mistakes of a configuration at once."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(problems))

    def report(self) -> str:
        problems = self.problems
        return (
            problems[0]
            if len(problems) == 1
            else f"{len(problems)} mistakes\n  " + "\n  ".join(problems)
        )


class DataError(UserError):
    """A dataset, token file or tokenizer that is missing, damaged or does not fit."""


class CheckpointError(UserError):
    """A checkpoint, export or folder of weights that is missing, damaged or does not fit."""


class MissingPackage(UserError):
    """A setting needs an optional package that is not installed."""

    def __init__(self, packages: str, why: str):
        """`packages`: what to install, the one that is missing first. By name: fast-llm itself is on no index."""
        super().__init__(f"{why} needs the package {packages.split()[0]}: pip install {packages}")


class TrainingStopped(UserError):
    """Training cannot usefully continue. Nothing that was saved is lost."""

    exit_code = 1

    def __init__(self, message: str, resumable: bool = False):
        """`resumable`: the same command can continue from the newest checkpoint; training adds which one that is."""
        self.resumable = resumable
        super().__init__(message)


class Elsewhere(UserError):
    """Another process of the run prints why it ends; this one leaves with the same exit code."""

    printed = True

    def __init__(self, exit_code: int):
        self.exit_code = exit_code
        super().__init__(f"another process reports why the run ends, with exit code {exit_code}")
