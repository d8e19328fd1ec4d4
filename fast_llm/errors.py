"""The mistakes a user can make, and how each ends the program.

UserError                 found before or between steps; exit code 2, one message, no traceback
├── ConfigError           the YAML file, an override, or settings that contradict each other; lists them all
├── DataError             a dataset, a token file, a tokenizer
├── CheckpointError       a checkpoint, an export, a folder of weights
├── MissingPackage        an optional package that a setting needs
└── TrainingStopped       training cannot go on (exit code 1); what was saved stays

Everything else that is raised is a fault of ours and keeps its traceback.
"""


class UserError(Exception):
    """A mistake the user can mend. The message says where, what was given, what is allowed and what to do."""

    exit_code = 2


class ConfigError(UserError):
    """All the mistakes of a configuration at once."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(problems))


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
    """Training cannot usefully go on. Nothing that was saved is lost."""

    exit_code = 1
