"""`fast-llm train|prepare|convert|demo`: read the YAML, call one function, print errors.

Nothing heavy is imported before it is needed: help, mistakes and `--validate` never load torch.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from fast_llm import __version__
from fast_llm.errors import DataError, UserError

_EXAMPLES = """examples:
  fast-llm demo                                                     see everything once, on this machine
  fast-llm prepare gpt_memmap --config prepare.yaml                 documents → token files
  fast-llm train gpt --config train.yaml --validate                 check everything, print the plan
  fast-llm train gpt --config train.yaml training.train_iters=50    train; settings given here win
  torchrun --nproc_per_node 8 --no-python fast-llm train gpt --config train.yaml
  fast-llm convert gpt input.path=RUN/checkpoint/1000 output.path=MODEL

The same command goes on with a run that was stopped. All settings: docs/settings.md"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0, 1 if training could not go on, 2 for a user's mistake."""
    parser = _parser()
    # argparse does not take settings on both sides of an option by itself.
    parsed, further = parser.parse_known_args(arguments)
    if unknown := [word for word in further if word.startswith("-") or not hasattr(parsed, "settings")]:
        parser.error(f"unknown: {' '.join(unknown)}")
    if further:
        parsed.settings = [*parsed.settings, *further]
    try:
        code: int = parsed.run(parsed)
        return code
    except UserError as error:
        # Before training all processes say the same; in it, data can fail on one of them.
        if os.environ.get("RANK", "0") == "0" or isinstance(error, DataError):
            print(f"fast-llm {parsed.command}: {_report(error)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _report(error: UserError) -> str:
    lines = str(error).splitlines()
    return lines[0] if len(lines) == 1 else f"{len(lines)} mistakes\n" + "\n".join(f"  {line}" for line in lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fast-llm",
        description="Continued pretraining of Llama models from one YAML file.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fast-llm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, kind, function, text in (
        ("train", "gpt", _train, "train a model, or go on with it"),
        ("prepare", "gpt_memmap", _prepare, "turn documents into token files"),
        ("convert", "gpt", _convert, "turn a checkpoint into a Hugging Face model, or back"),
    ):
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=_EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument(
            "settings",
            nargs="*",
            metavar=f"[{kind}] a.b=c",
            help="settings that win over the file; the last of a name wins",
        )
        command.add_argument("-c", "--config", metavar="FILE", help="the YAML file")
        if name == "train":
            command.add_argument(
                "-v",
                "--validate",
                action="store_true",
                help="check all that can be checked, print the plan, and stop",
            )
        command.set_defaults(run=function, kind=kind)
    demo = commands.add_parser("demo", help="see everything once, on this machine")
    demo.add_argument("folder", nargs="?", default="fast-llm-demo", help="where to (default: fast-llm-demo)")
    demo.set_defaults(run=_demo)
    return parser


def _read(parsed: argparse.Namespace) -> Any:
    from fast_llm.config.section import read
    from fast_llm.errors import ConfigError

    settings = list(parsed.settings)
    if settings and "=" not in settings[0]:
        kind = settings.pop(0)
        if kind != parsed.kind:
            raise ConfigError([f"{kind}: must be {parsed.kind} or a setting a.b=c"])
    return read(parsed.config, settings)


def _train(parsed: argparse.Namespace) -> int:
    from fast_llm.errors import ConfigError

    if parsed.config is None and not parsed.settings:
        raise ConfigError(["--config FILE is missing: the YAML file that says what to train"])
    document = _read(parsed)
    from fast_llm.training.plan import describe, make_plan

    plan = make_plan(document, int(os.environ.get("WORLD_SIZE", "1")), weights=not parsed.validate)
    if parsed.validate:
        if os.environ.get("RANK", "0") == "0":
            print(describe(plan))
        return 0
    from fast_llm.training.build import train

    return train(plan)


def _prepare(parsed: argparse.Namespace) -> int:
    import logging

    from fast_llm.config.prepare import PREPARE_REFUSED, PrepareConfig
    from fast_llm.config.section import validate

    config = validate(PrepareConfig, _read(parsed), PREPARE_REFUSED)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fast_llm").setLevel(logging.INFO)
    from fast_llm.data.prepare import prepare

    prepare(config)
    return 0


def _convert(parsed: argparse.Namespace) -> int:
    from fast_llm.config.prepare import ConvertConfig
    from fast_llm.config.section import validate

    config = validate(ConvertConfig, _read(parsed))
    from fast_llm.training.convert import convert

    convert(config)
    return 0


def _demo(parsed: argparse.Namespace) -> int:
    from fast_llm.demo import demo

    demo(parsed.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
