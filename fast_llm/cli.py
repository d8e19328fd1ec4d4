"""`fast-llm COMMAND`: read the YAML, call one function, print errors.

Nothing heavy is imported before it is needed: help, mistakes and `--validate` never load torch. Of
several processes that torchrun started, only the first reports a mistake that all of them see.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from fast_llm import commands
from fast_llm.errors import ConfigError, UserError, disk_problem
from fast_llm.launcher import is_first_process, only_first_prints, wait_for_first
from fast_llm.terminal import print_error, width, wrap_width
from fast_llm.training.interrupt import StopSignal, stop_signals


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
        "merge": _merge,
        "upcycle": _upcycle,
        "extend-vocabulary": _extend_vocabulary,
        "evaluate": _evaluate,
        "report": _report,
        "inspect": _inspect,
        "verify": _verify,
        "why": _why,
        "demo": _demo,
        "models": _models,
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
        prints = ("plan", "inspect", "why", "models", "settings", "completion")
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
    from fast_llm.config.document import read_arguments

    return read_arguments(parsed.config, parsed.settings, kind, parsed.kind, example)


def _train(parsed: argparse.Namespace) -> int:
    from fast_llm.training.start import start

    return start(parsed.config, parsed.settings, parsed.kind, parsed.validate)


def _plan(parsed: argparse.Namespace) -> int:
    from fast_llm.config.train import TrainConfig

    document = _read(parsed, TrainConfig, "fast-llm plan --config train.yaml --gpus 8")
    from fast_llm.planning.comparison import describe_layouts
    from fast_llm.planning.devices import DEVICES
    from fast_llm.planning.preflight import read_config

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

        with adding_locations(document, PrepareConfig):
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


def _extend_vocabulary(parsed: argparse.Namespace) -> int:
    import logging

    logging.basicConfig(format="%(message)s")
    logging.getLogger("fast_llm").setLevel(logging.INFO)
    from fast_llm.training.vocabulary import extend_vocabulary

    extend_vocabulary(
        parsed.model,
        parsed.output,
        parsed.tokens,
        parsed.special_tokens,
        parsed.initialisation,
        parsed.multiple_of,
    )
    return 0


def _merge(parsed: argparse.Namespace) -> int:
    import logging

    logging.basicConfig(format="%(message)s")
    logging.getLogger("fast_llm").setLevel(logging.INFO)
    from fast_llm.training.merge import merge

    merge(parsed.output, parsed.models, parsed.weights, parsed.base, parsed.dtype)
    return 0


def _upcycle(parsed: argparse.Namespace) -> int:
    import logging

    logging.basicConfig(format="%(message)s")
    logging.getLogger("fast_llm").setLevel(logging.INFO)
    from fast_llm.training.upcycle import upcycle

    upcycle(parsed.model, parsed.output, parsed.experts, parsed.experts_per_token, parsed.seed)
    return 0


def _inspect(parsed: argparse.Namespace) -> int:
    from fast_llm.training.inspect import inspect

    for line in inspect(parsed):
        print(line)
    return 0


def _evaluate(parsed: argparse.Namespace) -> int:
    import json
    import logging

    from fast_llm.evaluation.tasks import Wanted, require_packages

    require_packages("`fast-llm evaluate`")
    if not parsed.json:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("fast_llm").setLevel(logging.INFO)
    from fast_llm.training.evaluate_models import describe, evaluate

    wanted = Wanted(tuple(parsed.tasks), parsed.include_path, parsed.num_fewshot, parsed.limit)
    result = evaluate(
        parsed.models,
        wanted,
        data=parsed.data,
        batch_size=parsed.batch_size,
        max_length=parsed.max_length,
        dtype=parsed.dtype,
        output=parsed.output,
    )
    print(json.dumps(result, indent=1) if parsed.json else describe(result))
    return 0


def _report(parsed: argparse.Namespace) -> int:
    from fast_llm.report import write_report

    print(f"Wrote {write_report(parsed.runs, parsed.output)}.")
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
    if parsed.real:
        from fast_llm.demo.real import demo_real

        demo_real(parsed.folder or "fast-llm-demo-real")
    else:
        from fast_llm.demo import demo

        demo(parsed.folder or "fast-llm-demo")
    return 0


def _models(parsed: argparse.Namespace) -> int:
    from fast_llm.planning.support import as_json, as_table

    print(as_json() if parsed.json else as_table(sys.stdout))
    return 0


def _settings(parsed: argparse.Namespace) -> int:
    from fast_llm.config.lookup import describe, describe_for_editors

    if parsed.schema:
        print(describe_for_editors(parsed.path))
        return 0
    print(describe(parsed.path, width(sys.stdout), sys.stdout))
    return 0


def _completion(parsed: argparse.Namespace) -> int:
    from fast_llm.completion import script

    print(script(parsed.shell), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
