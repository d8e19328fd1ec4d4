"""The start of `fast-llm train`: read and check everything, then load torch and train.

Modules are imported when they are needed: a mistake in the YAML file is reported before the imports
of the data and the tokenizer, and a mistake that these find before torch is loaded.
"""

import gc
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from fast_llm.errors import UserError
from fast_llm.launcher import is_first_process, process_count
from fast_llm.terminal import print_error, wrap_width
from fast_llm.training.interrupt import Interrupt

if TYPE_CHECKING:
    from fast_llm.planning.run_spec import RunSpec


def start(path: str | None, settings: Sequence[str], word: str, validate_only: bool) -> int:
    """Train as a YAML file and settings say, or only check them. Returns the exit code.

    `word`: may precede the settings. Raises UserError; in training the processes agree which of
    them prints it.
    """
    interrupt = Interrupt()
    processes = process_count(training=not validate_only)
    if processes > 1:
        # PyTorch's C++ warns of closed sockets and process groups, which errors of Python follow.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    early: Any = nullcontext()
    try:
        from fast_llm.config.compat import REFUSED, RENAMED
        from fast_llm.config.document import read_arguments
        from fast_llm.config.train import TrainConfig
        from fast_llm.config.validate import adding_locations, validate

        example = "fast-llm train gpt --config train.yaml"
        document = read_arguments(path, settings, TrainConfig, word, example)
        if document.get("pretrained.path") is None:
            validate(TrainConfig, document, REFUSED, RENAMED)  # before imports that take 0.15 s
        from fast_llm.planning.preflight import preflight
        from fast_llm.training.run import EarlyLog

        if not validate_only:
            timestamps = document.get("run.log_timestamps", True) is not False
            early = EarlyLog(int(os.environ.get("RANK", "0")), timestamps)
        with early:
            spec = preflight(document, processes, weights=not validate_only)
    except UserError as error:
        if processes == 1 or validate_only:
            raise
        raise _agreed(error) from error
    if validate_only:
        if is_first_process():
            _print_plan(spec)
        return 0
    from fast_llm.training.job import train

    gc.freeze()  # the objects of 2,000 modules stay; a full collection would take 0.2 s for them
    with early:
        return train(spec, interrupt, adding_locations(document, TrainConfig))


def _print_plan(spec: "RunSpec") -> None:
    """Print what `--validate` found."""
    from fast_llm.planning.comparison import describe_gpus
    from fast_llm.planning.report import describe_run, describe_warnings

    columns = wrap_width(sys.stdout)
    print(describe_run(spec, columns))
    print(describe_gpus(spec.config, spec.processes, columns))
    print(describe_warnings(spec, columns), end="")


def _agreed(error: UserError) -> UserError:
    """The error to raise for a mistake in the settings, agreed with the other processes."""
    if is_first_process():
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            return error  # torchrun ends the others
        print_error("fast-llm train", error.report())
    from fast_llm.parallel.failures import report_before_start

    return report_before_start(error, printed=is_first_process())
