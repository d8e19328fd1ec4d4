"""`fast-llm COMMAND`: read the YAML, call one function, print errors.

Nothing heavy is imported before it is needed: help, mistakes and `--validate` never load torch. Of
several processes that torchrun started, only the first reports a mistake that all of them see.
"""

import argparse
import gc
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from fast_llm import commands
from fast_llm.errors import ConfigError, UserError, disk_problem
from fast_llm.launcher import (
    is_first_process,
    only_first_prints,
    process_count,
    wait_for_first,
)
from fast_llm.terminal import print_error, width, wrap_width
from fast_llm.training.interrupt import Interrupt, StopSignal, stop_signals


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns the exit code: 0, 1 if training cannot continue, 2 for a user's mistake, 128 + n after
    signal n.
    """
    if hasattr(sys.stdout, "reconfigure"):  # a terminal that is not UTF-8 shows × as an escape
        sys.stdout.reconfigure(errors="backslashreplace")
    words = sys.argv[1:] if arguments is None else arguments
    if not words:
        commands.parsers()[0].print_help()
        return 2
    with only_first_prints():
        parsed = commands.parse(words)
    own_process = arguments is None
    training = parsed.command == "train" and not parsed.validate
    exiting = training and own_process
    try:
        with stop_signals(parsed.command == "train", own_process):
            code = _run(parsed)
            sys.stdout.flush()
    except Exception as error:
        if (failed := _failure(parsed, error, training)) is None:
            if not exiting:
                raise
            if not getattr(error, "printed", False):
                sys.excepthook(type(error), error, error.__traceback__)
            failed = 1
        code = failed
    except StopSignal as stop:
        if is_first_process():
            resume = "; the same command resumes it" if parsed.command == "prepare" else ""
            print_error(f"fast-llm {parsed.command}", f"stopped by {stop.signal.name}{resume}")
        return 128 + stop.signal
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if exiting:
        _exit(code)
    return code


def _run(parsed: argparse.Namespace) -> int:
    functions: dict[str, Callable[[argparse.Namespace], int]] = {
        "train": _train,
        "plan": _plan,
        "prepare": _prepare,
        "convert": _convert,
        "verify": _verify,
        "why": _why,
        "demo": _demo,
        "settings": _settings,
        "completion": _completion,
    }
    return functions[parsed.command](parsed)


def _failure(parsed: argparse.Namespace, error: Exception, training: bool) -> int | None:
    """Report an error that is not a bug. Returns the exit code; None for a bug."""
    command = f"fast-llm {parsed.command}"
    if isinstance(error, BrokenPipeError):  # the reader, for example `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # Output alone can be cut short without harm; work that was broken off ends as by SIGPIPE.
        prints = ("plan", "why", "settings", "completion")
        only_prints = parsed.command in prints or getattr(parsed, "validate", False)
        return 0 if only_prints else 128 + signal.SIGPIPE
    if isinstance(error, UserError):
        if error.printed:
            pass
        elif training or is_first_process():  # in training the processes have agreed who prints
            print_error(command, error.report())
        else:
            wait_for_first()
        return error.exit_code
    if isinstance(error, OSError) and (problem := disk_problem(error)) is not None:
        print_error(command, problem)
        return 1
    return None


def _exit(code: int) -> None:
    """End a process that has trained.

    At Python's normal exit, libraries would report leaks, wait for other processes after an error,
    or warn that process groups were not destroyed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _read(parsed: argparse.Namespace, kind: Any, example: str) -> Any:
    """The Document of the file and the settings. Raises ConfigError if neither is given."""
    from fast_llm.config.document import read

    settings = list(parsed.settings)
    if settings and "=" not in settings[0]:
        word = settings.pop(0)
        if word != parsed.kind:
            is_file = word.endswith((".yaml", ".yml"))
            hint = f"; a file is given as --config {word}" if is_file else ""
            raise ConfigError([f"{word}: must be {parsed.kind} or a setting a.b=c{hint}"])
    if parsed.config is None and not settings:
        raise ConfigError(
            [f"no settings: give --config FILE, or section.setting=value; for example `{example}`"]
        )
    return read(parsed.config, settings, kind)


def _train(parsed: argparse.Namespace) -> int:
    interrupt = Interrupt()
    processes = process_count(training=not parsed.validate)
    if processes > 1:
        # PyTorch's C++ warns of closed sockets and process groups, which errors of Python follow.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    early: Any = nullcontext()
    try:
        from fast_llm.config.compat import REFUSED, RENAMED
        from fast_llm.config.train import TrainConfig
        from fast_llm.config.validate import adding_locations, validate

        document = _read(parsed, TrainConfig, "fast-llm train gpt --config train.yaml")
        if document.get("pretrained.path") is None:
            validate(TrainConfig, document, REFUSED, RENAMED)  # before imports that take 0.15 s
        from fast_llm.planning.preflight import preflight
        from fast_llm.training.run import EarlyLog

        if not parsed.validate:
            timestamps = document.get("run.log_timestamps", True) is not False
            early = EarlyLog(int(os.environ.get("RANK", "0")), timestamps)
        with early:
            spec = preflight(document, processes, weights=not parsed.validate)
    except UserError as error:
        if processes == 1 or parsed.validate:
            raise
        raise _agreed(error) from error
    if parsed.validate:
        if is_first_process():
            from fast_llm.planning.report import describe_gpus, describe_run, describe_warnings

            columns = wrap_width(sys.stdout)
            print(describe_run(spec, columns))
            print(describe_gpus(spec.config, spec.processes, columns))
            print(describe_warnings(spec, columns), end="")
        return 0
    from fast_llm.training.job import train

    gc.freeze()  # the objects of 2,000 modules stay; a full collection would take 0.2 s for them
    with early:
        return train(spec, interrupt, adding_locations(document, TrainConfig))


def _agreed(error: UserError) -> UserError:
    """The error to raise for a mistake in the settings, agreed with the other processes."""
    if is_first_process():
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            return error  # torchrun ends the others
        print_error("fast-llm train", error.report())
    from fast_llm.parallel.failures import report_before_start

    return report_before_start(error, printed=is_first_process())


def _plan(parsed: argparse.Namespace) -> int:
    from fast_llm.config.train import TrainConfig

    document = _read(parsed, TrainConfig, "fast-llm plan --config train.yaml --gpus 8")
    from fast_llm.planning.devices import DEVICES
    from fast_llm.planning.report import describe_layouts
    from fast_llm.planning.search import read_config

    config = read_config(document, parsed.gpus)
    columns = wrap_width(sys.stdout)
    print(describe_layouts(config, parsed.gpus, DEVICES[parsed.device], columns))
    return 0


def _prepare(parsed: argparse.Namespace) -> int:
    import logging

    from fast_llm.config.compat import PREPARE_REFUSED
    from fast_llm.config.prepare import PrepareConfig
    from fast_llm.config.section import dump
    from fast_llm.config.validate import adding_locations, validate

    document = _read(parsed, PrepareConfig, "fast-llm prepare gpt_memmap --config prepare.yaml")
    config = validate(PrepareConfig, document, PREPARE_REFUSED)
    if parsed.validate:
        from fast_llm.data.prepare import check

        print(f"{dump(config)}\n{check(config)}", end="")
        return 0
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fast_llm").setLevel(logging.INFO)
    from fast_llm.data.prepare import prepare

    with adding_locations(document, PrepareConfig):
        prepare(config)
    return 0


def _convert(parsed: argparse.Namespace) -> int:
    from fast_llm.config.compat import CONVERT_REFUSED
    from fast_llm.config.prepare import ConvertConfig
    from fast_llm.config.section import dump
    from fast_llm.config.validate import adding_locations, validate

    example = "fast-llm convert gpt input.path=RUN/checkpoint/1000 output.path=MODEL"
    document = _read(parsed, ConvertConfig, example)
    config = validate(ConvertConfig, document, CONVERT_REFUSED)
    if parsed.validate:
        print(dump(config), end="")
        return 0
    from fast_llm.training.convert import convert

    with adding_locations(document, ConvertConfig, "input.path"):
        convert(config)
    return 0


def _verify(parsed: argparse.Namespace) -> int:
    from fast_llm.training.audit import verify

    intact, damaged = verify(parsed.paths)
    for line in intact:
        print(line)
    if damaged:
        sys.stdout.flush()
        raise ConfigError(damaged)
    return 0


def _why(parsed: argparse.Namespace) -> int:
    from fast_llm.training.audit import inspect_step

    found = inspect_step(parsed.experiment, parsed.step)
    if parsed.json and found.note:
        print(f"fast-llm why: {found.note}", file=sys.stderr)
    print(found.as_json() if parsed.json else "\n".join(found.as_text()))
    return 0


def _demo(parsed: argparse.Namespace) -> int:
    from fast_llm.demo import demo

    demo(parsed.folder)
    return 0


def _settings(parsed: argparse.Namespace) -> int:
    from fast_llm.config.lookup import describe

    print(describe(parsed.path, width(sys.stdout), sys.stdout))
    return 0


def _completion(parsed: argparse.Namespace) -> int:
    from fast_llm.completion import script

    print(script(parsed.shell), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
