"""`fast-llm train|plan|prepare|convert|verify|why|demo`: read the YAML, call one function, print errors.

Nothing heavy is imported before it is needed: help, mistakes and `--validate` never load torch. Of several
processes that torchrun started, only the first tells a mistake that all of them see.
"""

import argparse
import atexit
import gc
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from types import FrameType
from typing import Any

from fast_llm import __version__
from fast_llm.errors import ConfigError, UserError, disk_problem

# Seconds: torchrun ends all processes as soon as it sees that one has ended, and the first must have spoken; how long the
# processes wait for each other when one of them has no run to do.
_FIRST, _MEETING = 1.0, 60.0

_SETTINGS = """Settings stand in the YAML file, or on the command line as section.setting=value, which wins; the last of a
name wins. Values are YAML: training.train_iters=1_000 data.split=[9,1,0] run.experiment_dir=null
All settings: docs/settings.md, or `python -m fast_llm.config.reference`."""

_EXAMPLES = """examples:
  fast-llm demo                                                     see everything once, on this machine
  fast-llm prepare gpt_memmap --config prepare.yaml                 documents → token files
  fast-llm train gpt --config train.yaml --validate                 check everything, print the plan
  fast-llm train gpt --config train.yaml training.train_iters=50    train; settings given here win
  fast-llm plan --config train.yaml --gpus 64 --device h100         will it fit, how fast, which layout is best
  torchrun --nproc_per_node 8 --no-python fast-llm train gpt --config train.yaml
  fast-llm convert gpt input.path=RUN/checkpoint/1000 output.path=MODEL
  fast-llm verify RUN data/code.json                                is every byte what was written?
  fast-llm why RUN 1000                                             which documents were in step 1000?

The words gpt and gpt_memmap may be left out. `fast-llm COMMAND --help` tells more of each."""

_TRAIN = f"""Train a model, or go on with it: the same command goes on from the newest checkpoint of
run.experiment_dir, and does nothing when training is finished.

{_SETTINGS}"""

_TRAIN_EXAMPLES = """examples:
  fast-llm train gpt --config train.yaml --validate                 check everything, print the plan, stop
  fast-llm train gpt --config train.yaml                            train on this machine's GPU, or its CPU
  fast-llm train gpt --config train.yaml training.train_iters=50 optimizer.learning_rate.base=3e-5
  torchrun --nproc_per_node 8 --no-python fast-llm train gpt --config train.yaml
                                                                    on 8 GPUs of this machine

exit codes: 0 done, or stopped by SIGUSR1; 1 training could not go on; 2 a mistake to mend; 128 + n stopped by signal n"""

_PLAN = f"""Say before there is a cluster whether a layout fits, what a step takes and what limits it, and which layouts are
the fastest, from a model of memory, compute and communication (docs/planning.md). It needs the YAML file and the
pretrained model's config.json: no data, no weights, no GPU.

{_SETTINGS}"""

_PLAN_EXAMPLES = """examples:
  fast-llm plan --config train.yaml --gpus 8
  fast-llm plan --config train.yaml --gpus 64 --device h200 model.multi_stage.shard_size=8
  fast-llm plan --config train.yaml --gpus 16 batch.sequence_length=131072 batch.micro_batch_size=1"""

_PREPARE = f"""Turn documents into token files: `output_path: data/code` gives data/code/ and data/code.json, which is what
data.path of `train` names. A run that was interrupted goes on where it stopped.

{_SETTINGS}"""

_PREPARE_EXAMPLES = """examples:
  fast-llm prepare gpt_memmap --config prepare.yaml
  fast-llm prepare output_path=data/code dataset.path=code/*.jsonl.gz dataset.field=content tokenizer.path=Llama-3.1-8B
  fast-llm prepare --config prepare.yaml tokenize_workers=32

exit codes: 0 done, 1 the disk failed, 2 a mistake to mend, 128 + n stopped by signal n"""

_CONVERT = f"""Turn a checkpoint of training into a Hugging Face folder, or a Hugging Face folder into a checkpoint.

{_SETTINGS}"""

_CONVERT_EXAMPLES = """examples:
  fast-llm convert gpt input.path=RUN/checkpoint/1000 output.path=MODEL
  fast-llm convert gpt input.path=RUN/checkpoint/1000 output.path=MODEL output.data_type=fp32
  fast-llm convert gpt input.format=llama input.path=MODEL output.format=distributed output.path=START/checkpoint/0"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0, 1 if training could not go on, 2 for a user's mistake, 128 + n after signal n."""
    if hasattr(sys.stdout, "reconfigure"):  # a terminal that is not UTF-8 shows × as an escape
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = _parser()
    words = sys.argv[1:] if arguments is None else arguments
    if not words:
        parser.print_help()
        return 2
    with _only_the_first_speaks():
        # argparse does not take settings on both sides of an option by itself.
        parsed, further = parser.parse_known_args(words)
        if unknown := [
            word for word in further if word.startswith("-") or not hasattr(parsed, "settings")
        ]:
            parser.error(
                f"unknown: {' '.join(unknown)}; settings have the form section.setting=value"
            )
    if further:
        parsed.settings = [*parsed.settings, *further]
    shared = parsed.command == "train" and not parsed.validate
    try:
        with _signals(parsed.command, own_process=arguments is None):
            code: int = parsed.run(parsed)
            sys.stdout.flush()
            if shared and arguments is None:
                _leave(code)
            return code
    except BrokenPipeError:  # whoever reads, `head` for one, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # Of what is there to be read that is no fault; other work was broken off, as by the signal that Python turns into this error.
        only_said = parsed.command in ("plan", "why") or getattr(parsed, "validate", False)
        return 0 if only_said else 128 + signal.SIGPIPE
    except UserError as error:
        if error.printed:
            pass
        elif shared or _first():  # the processes of training have agreed which of them says what
            print(f"fast-llm {parsed.command}: {error.report()}", file=sys.stderr)
        else:
            time.sleep(_FIRST)
        if shared and arguments is None:
            _leave(error.exit_code)
        return error.exit_code
    except OSError as error:
        if (problem := disk_problem(error)) is None:
            raise
        print(f"fast-llm {parsed.command}: {problem}", file=sys.stderr)
        return 1
    except _Told as told:
        if _first():
            hint = (
                "; the same command goes on where it stopped" if parsed.command == "prepare" else ""
            )
            print(
                f"fast-llm {parsed.command}: stopped by {told.signal.name}{hint}", file=sys.stderr
            )
        return 128 + told.signal
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not shared or arguments is not None:
            raise
        if not getattr(error, "printed", False):
            sys.excepthook(type(error), error, error.__traceback__)
        _leave(1)
        return 1


def _leave(exit_code: int) -> None:
    """End a process that has trained, or failed to, with everything closed that is ours. On Python's way out libraries would report
    what they leak, and after an error wait for other processes or warn that their groups were not left."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


class _Told(KeyboardInterrupt):
    """SIGTERM or SIGINT."""

    def __init__(self, number: int):
        self.signal = signal.Signals(number)


@contextmanager
def _signals(command: str, own_process: bool) -> Iterator[None]:
    """What SIGTERM and SIGINT do: the command is left with a line; a second one ends it at once. Training has a way of its own
    (training.interrupt): until it has begun they end the process as any other, also in the middle of what is no Python.

    In a process of ours this holds until it has ended, so that no signal meets the interpreter while it is leaving.
    """
    numbers = (signal.SIGTERM, signal.SIGINT)

    def tell(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, leave)
        raise _Told(number)

    def leave(number: int, frame: FrameType | None) -> None:
        os._exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ignore() -> None:
        for number in before:
            signal.signal(number, signal.SIG_IGN)

    before = {
        number: signal.signal(number, signal.SIG_DFL if command == "train" else tell)
        for number in numbers
    }
    before[signal.SIGUSR1] = signal.getsignal(signal.SIGUSR1)
    if own_process:
        # Python gives up its handlers before it has ended, and one signal more would end it as if work were left.
        atexit.register(ignore)
    try:
        yield
    finally:
        if not own_process:
            for number, handler in before.items():
                signal.signal(number, handler)
        elif command != "train":
            ignore()


def _first() -> bool:
    """Whether this is the only process, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _only_the_first_speaks() -> Iterator[None]:
    """Mistakes in the words of a command are the same for all processes of a run."""
    if _first():
        yield
        return
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield
    except SystemExit:
        time.sleep(_FIRST)
        raise


def _processes(training: bool) -> int:
    """How many processes torchrun started. Raises ConfigError if the environment does not say it; `training`: nor how they find
    each other."""
    given = os.environ.get("WORLD_SIZE", "1")
    if not given.isdecimal() or int(given) == 0:
        raise ConfigError(
            [
                f"WORLD_SIZE: given {given!r} in the environment, must be the number of processes; unset it"
            ]
        )
    size = int(given)
    if training and size > 1:
        rank = os.environ.get("RANK")
        if rank is None or not rank.isdecimal() or int(rank) >= size:
            found = "missing" if rank is None else f"given {rank!r}"
            raise ConfigError(
                [
                    f"RANK: {found} in the environment, must be from 0 to {size - 1}, as WORLD_SIZE is {size}; start the processes"
                    " with torchrun, or unset both"
                ]
            )
    return size


def _agreed(error: UserError) -> UserError:
    """What this process raises for a mistake in its settings: others may have none, or the same."""
    from_here = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    if _first():
        if from_here:  # torchrun ends the others
            return error
        print(f"fast-llm train: {error.report()}", file=sys.stderr, flush=True)
    from fast_llm.parallel.failures import Failures

    try:
        failures = Failures.meet(_MEETING)
    except ConfigError:  # there is no launcher either: the first has printed it
        error.printed = True
        return error
    except UserError:
        return error
    if _first():
        failures.spoke()
    try:
        failures.arrive(error, _MEETING)
    except UserError as agreed:
        return agreed
    return error


def _parser() -> argparse.ArgumentParser:
    def shaped(**more: Any) -> dict[str, Any]:
        return {
            "formatter_class": argparse.RawDescriptionHelpFormatter,
            "allow_abbrev": False,
            **more,
        }

    parser = argparse.ArgumentParser(
        prog="fast-llm",
        **shaped(
            description="Continued pretraining of Llama models from one YAML file.",
            epilog=_EXAMPLES,
        ),
    )
    parser.add_argument("--version", action="version", version=f"fast-llm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, kind, function, text, description, examples in (
        ("train", "gpt", _train, "train a model, or go on with it", _TRAIN, _TRAIN_EXAMPLES),
        (
            "prepare",
            "gpt_memmap",
            _prepare,
            "turn documents into token files",
            _PREPARE,
            _PREPARE_EXAMPLES,
        ),
        (
            "convert",
            "gpt",
            _convert,
            "turn a checkpoint into a Hugging Face model, or back",
            _CONVERT,
            _CONVERT_EXAMPLES,
        ),
    ):
        command = commands.add_parser(
            name, help=text, **shaped(description=description, epilog=examples)
        )
        command.add_argument(
            "settings", nargs="*", metavar=f"[{kind}] a.b=c", help="settings that win over the file"
        )
        command.add_argument("-c", "--config", metavar="FILE", help="the YAML file")
        checked = (
            "check, and stop"
            if name == "convert"
            else "check all that can be checked, print the plan, and stop"
        )
        command.add_argument("-v", "--validate", action="store_true", help=checked)
        command.set_defaults(run=function, kind=kind)
    command = commands.add_parser(
        "plan",
        help="will it fit, how fast will it be",
        **shaped(description=_PLAN, epilog=_PLAN_EXAMPLES),
    )
    command.add_argument(
        "settings", nargs="*", metavar="[gpt] a.b=c", help="settings that win over the file"
    )
    command.add_argument("-c", "--config", metavar="FILE", help="the YAML file")
    command.add_argument(
        "-n", "--gpus", type=_positive, default=8, metavar="N", help="how many (default: 8)"
    )
    kinds = ("h100", "h200", "b200", "a100")
    command.add_argument("--device", choices=kinds, default="h100", help="which (default: h100)")
    command.set_defaults(run=_forecast, kind="gpt")
    about = """Read checkpoints, exports and datasets as a whole and compare them with the digests that were written with
them. An experiment folder stands for all that it holds."""
    verify = commands.add_parser(
        "verify", help="compare files with their digests", **shaped(description=about)
    )
    verify.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="a dataset.json, checkpoint, export or experiment folder",
    )
    verify.set_defaults(run=_verify)
    about = """Print which documents each sequence of a training step was made of, and how they begin; for a loss that
looks odd."""
    why = commands.add_parser(
        "why", help="which documents were in a step", **shaped(description=about)
    )
    why.add_argument("experiment", metavar="RUN", help="the experiment folder")
    why.add_argument("step", type=int, metavar="STEP", help="the step, from 1 on")
    why.add_argument("--json", action="store_true", help="print JSON alone, for programs")
    why.set_defaults(run=_why)
    about = """Make a tokenizer, a corpus of prose and one of code from what Python brings, pretrain a small Llama on prose
and continue it on code with the recipe's YAML; compare, kill, resume. A few minutes on two cores, no network."""
    demo = commands.add_parser(
        "demo", help="see everything once, on this machine", **shaped(description=about)
    )
    demo.add_argument(
        "folder", nargs="?", default="fast-llm-demo", help="where to (default: fast-llm-demo)"
    )
    demo.set_defaults(run=_demo)
    return parser


def _read(parsed: argparse.Namespace, kind: Any, example: str) -> Any:
    """The document that file and settings give. Raises ConfigError if neither is given."""
    from fast_llm.config.section import read

    settings = list(parsed.settings)
    if settings and "=" not in settings[0]:
        word = settings.pop(0)
        if word != parsed.kind:
            hint = (
                f"; a file is given as --config {word}" if word.endswith((".yaml", ".yml")) else ""
            )
            raise ConfigError([f"{word}: must be {parsed.kind} or a setting a.b=c{hint}"])
    if parsed.config is None and not settings:
        raise ConfigError(
            [f"no settings: give --config FILE, or section.setting=value; for example `{example}`"]
        )
    return read(parsed.config, settings, kind)


def _train(parsed: argparse.Namespace) -> int:
    from fast_llm.training.interrupt import Interrupt

    interrupt = Interrupt()
    processes = _processes(training=not parsed.validate)
    if (
        processes > 1
    ):  # warnings of C++ about sockets and groups that are being closed, which errors of Python follow
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    early: Any = nullcontext()
    try:
        from fast_llm.config.train import TrainConfig

        document = _read(parsed, TrainConfig, "fast-llm train gpt --config train.yaml")
        from fast_llm.planning.preflight import describe, preflight
        from fast_llm.training.run import EarlyLog

        if not parsed.validate:
            rank, timestamps = (
                int(os.environ.get("RANK", "0")),
                document.get("run.log_timestamps", True),
            )
            early = EarlyLog(rank, processes, timestamps is not False)
        with early:
            spec = preflight(document, processes, weights=not parsed.validate)
    except UserError as error:
        if processes == 1 or parsed.validate:
            raise
        raise _agreed(error) from error
    if parsed.validate:
        if _first():
            from fast_llm.planning.time import describe_memory

            warnings = "".join(f"\nWarning       {warning}." for warning in spec.warnings)
            print(describe(spec) + "\n" + describe_memory(spec.config, spec.processes) + warnings)
        return 0
    from fast_llm.config.section import locating
    from fast_llm.training.build import train

    gc.freeze()  # two thousand modules are no garbage; looking through them takes 0.2 s, in the midst of training and at the end
    with early:
        return train(spec, interrupt, locating(document, TrainConfig))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"given {text}, must be an integer above 0")
    return int(text)


def _forecast(parsed: argparse.Namespace) -> int:
    from fast_llm.config.train import TrainConfig

    document = _read(parsed, TrainConfig, "fast-llm plan --config train.yaml --gpus 8")
    from fast_llm.planning.time import DEVICES, describe, read_config

    print(describe(read_config(document, parsed.gpus), parsed.gpus, DEVICES[parsed.device]))
    return 0


def _prepare(parsed: argparse.Namespace) -> int:
    import logging

    from fast_llm.config.prepare import PREPARE_REFUSED, PrepareConfig
    from fast_llm.config.section import dump, locating, validate

    document = _read(parsed, PrepareConfig, "fast-llm prepare gpt_memmap --config prepare.yaml")
    config = validate(PrepareConfig, document, PREPARE_REFUSED)
    if parsed.validate:
        from fast_llm.data.prepare import check

        print(f"{dump(config)}\n{check(config)}", end="")
        return 0
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fast_llm").setLevel(logging.INFO)
    from fast_llm.data.prepare import prepare

    with locating(document, PrepareConfig):
        prepare(config)
    return 0


def _convert(parsed: argparse.Namespace) -> int:
    from fast_llm.config.prepare import CONVERT_REFUSED, ConvertConfig
    from fast_llm.config.section import dump, locating, validate

    document = _read(
        parsed,
        ConvertConfig,
        "fast-llm convert gpt input.path=RUN/checkpoint/1000 output.path=MODEL",
    )
    config = validate(ConvertConfig, document, CONVERT_REFUSED)
    if parsed.validate:
        print(dump(config), end="")
        return 0
    from fast_llm.training.convert import convert

    with locating(document, ConvertConfig, "input.path"):
        convert(config)
    return 0


def _verify(parsed: argparse.Namespace) -> int:
    from fast_llm.training.audit import verify

    print("\n".join(verify(parsed.paths)))
    return 0


def _why(parsed: argparse.Namespace) -> int:
    from fast_llm.training.audit import why

    found = why(parsed.experiment, parsed.step)
    if parsed.json and found.note:
        print(f"fast-llm why: {found.note}", file=sys.stderr)
    print(found.as_json() if parsed.json else "\n".join(found.as_text()))
    return 0


def _demo(parsed: argparse.Namespace) -> int:
    from fast_llm.demo import demo

    demo(parsed.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
