"""The command line: commands, options, their help, and the nearest name for a wrong one.

Standard library alone, so that help and mistakes answer at once. What a command does is in cli.py;
completion.py reads the same parsers.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from fast_llm import __version__
from fast_llm.command_texts import GROUPS, MAIN_EXAMPLES, TEXTS
from fast_llm.terminal import BOLD, nearest, style, width

SHELLS = ("bash", "zsh", "fish")
INITIALISATIONS = ("pieces", "mean", "zero")
DEVICES = ("h100", "h200", "b200", "a100")
DTYPES = ("fp32", "bf16", "fp16")


class Parser(argparse.ArgumentParser):
    """One line for a mistake; headings of the help stand out on a terminal."""

    def __init__(self, **more: Any):
        def shaped(prog: str) -> argparse.HelpFormatter:
            columns = width(sys.stdout)
            return argparse.RawDescriptionHelpFormatter(prog, width=columns, max_help_position=28)

        super().__init__(formatter_class=shaped, allow_abbrev=False, **more)
        self.color = False  # Python 3.14 would add its own colours to ours

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        self.exit(2, f"{self.prog}: {message}\n")

    def format_help(self) -> str:
        """The help, with bold headings on a terminal."""
        lines = super().format_help().splitlines(keepends=True)
        return "".join(
            style(line[:-1], sys.stdout, BOLD) + "\n"
            if line.endswith(":\n") and line[0] not in " \n"
            else line
            for line in lines
        )


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; settings may stand on both sides of an option, unlike in argparse.

    Prints help, or a line about a mistake, and raises SystemExit.
    """
    main, commands = parsers()
    first = words[0]
    if first.startswith("-") and first not in ("-h", "--help", "--version"):
        main.error(f"unknown option {first}{_meant(first, main)}; options follow the command")
    if not first.startswith("-") and first not in commands:
        hint = nearest(first, commands) or f"; the commands are {', '.join(commands)}"
        main.error(f"unknown command {first}{hint}")
    parsed, further = main.parse_known_args(words)
    command = commands[parsed.command]
    for word in further:
        if word.startswith("-"):
            command.error(f"unknown option {word}{_meant(word, command)}")
        if not hasattr(parsed, "settings"):
            command.error(f"unexpected argument {word}; `{command.prog} --help` shows the usage")
    if further:
        parsed.settings = [*parsed.settings, *further]
    return parsed


def _meant(word: str, parser: argparse.ArgumentParser) -> str:
    return nearest(word.partition("=")[0], options(parser))


def options(parser: argparse.ArgumentParser) -> list[str]:
    """The long options of a command."""
    return [name for name in parser._option_string_actions if name.startswith("--")]


def parsers() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the command line, and that of each command."""
    main = Parser(
        prog="fast-llm",
        usage="fast-llm COMMAND [OPTIONS] [SETTINGS]",
        description="Continued pretraining of Hugging Face models from one YAML file.\n\n"
        + "\n\n".join(
            f"{group}:\n" + "\n".join(f"  {name:<18} {text}" for name, text in commands.items())
            for group, commands in GROUPS.items()
        ),
        epilog=MAIN_EXAMPLES,
    )
    main.add_argument("--version", action="version", version=f"fast-llm {__version__}")
    below = main.add_subparsers(
        dest="command", required=True, help=argparse.SUPPRESS, parser_class=Parser
    )
    commands: dict[str, Parser] = {}
    for group in GROUPS.values():
        for name in group:
            description, epilog = TEXTS[name]
            commands[name] = below.add_parser(
                name, prog=f"fast-llm {name}", description=description, epilog=epilog
            )
    _add_settings(commands)
    _add_others(commands)
    return main, commands


def _add_settings(commands: dict[str, Parser]) -> None:
    """The options and settings of commands that read a YAML file."""
    for name, kind in (
        ("train", "gpt"),
        ("plan", "gpt"),
        ("prepare", "gpt_memmap"),
        ("convert", "gpt"),
    ):
        command = commands[name]
        command.add_argument(
            "settings",
            nargs="*",
            metavar=f"[{kind}] SETTING=VALUE",
            help="settings that win over the file",
        )
        command.add_argument("-c", "--config", metavar="FILE", help="the YAML file")
        command.set_defaults(kind=kind)
        if name != "plan":
            what = "check" if name == "convert" else "check everything, print the plan"
            command.add_argument("-v", "--validate", action="store_true", help=f"{what}, and stop")


def _add_others(commands: dict[str, Parser]) -> None:
    """The options and arguments that one command has."""
    commands["plan"].add_argument(
        "-n", "--gpus", type=_positive, default=8, metavar="N", help="how many (default: 8)"
    )
    commands["plan"].add_argument(
        "--device",
        type=_one_of(DEVICES),
        choices=DEVICES,
        default="h100",
        help="which (default: h100)",
    )
    _add_extend(commands["extend-vocabulary"])
    _add_merge(commands["merge"])
    _add_upcycle(commands["upcycle"])
    _add_inspect(commands["inspect"])
    _add_evaluate(commands["evaluate"])
    commands["verify"].add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="a dataset.json, checkpoint, export or experiment folder",
    )
    commands["report"].add_argument("runs", nargs="+", metavar="RUN", help="an experiment folder")
    commands["report"].add_argument(
        "-o", "--output", metavar="FILE", help="the page (default: RUN/report.html)"
    )
    commands["why"].add_argument("experiment", metavar="RUN", help="the experiment folder")
    commands["why"].add_argument("step", type=_integer, metavar="STEP", help="counted from 1")
    commands["why"].add_argument(
        "--json", action="store_true", help="print JSON alone, for programs"
    )
    commands["demo"].add_argument(
        "folder", nargs="?", help="default: fast-llm-demo, or fast-llm-demo-real"
    )
    commands["demo"].add_argument(
        "--real", action="store_true", help="continue SmolLM2-135M on German manual pages"
    )
    commands["models"].add_argument(
        "--json", action="store_true", help="print JSON alone, for programs"
    )
    commands["settings"].add_argument(
        "path", nargs="?", default="", metavar="PATH", help="a section or a setting"
    )
    commands["settings"].add_argument(
        "--schema", action="store_true", help="the JSON schema of train, prepare or convert"
    )
    commands["completion"].add_argument(
        "shell", type=_one_of(SHELLS), choices=SHELLS, help="which shell"
    )


def _add_inspect(command: Parser) -> None:
    command.add_argument("settings", nargs="*", metavar="[PATH] SETTING=VALUE", help="what to show")
    command.add_argument("-c", "--config", metavar="FILE", help="a YAML file")
    command.add_argument(
        "--sequence-length", type=_positive, metavar="N", help="instead of the YAML's"
    )
    shown = command.add_mutually_exclusive_group()
    shown.add_argument("--document", type=_count, metavar="N", help="decode one, counted from 0")
    shown.add_argument("--sample", type=_positive, metavar="K", help="decode K, evenly spread")
    shown.add_argument("--sequence", type=_count, metavar="N", help="decode one, counted from 0")
    shown.add_argument("--step", type=_positive, metavar="N", help="its sequences, from step 1")
    command.add_argument("--split", default="training", metavar="NAME", help="of --sequence")
    command.add_argument("--text", metavar="TEXT", help="to tokenize")
    command.add_argument("--text-file", metavar="FILE", help="to tokenize; - means stdin")
    command.add_argument("--duplicates", action="store_true", help="count them in large data too")
    output = command.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON alone, for programs")
    output.add_argument("--html", metavar="FILE", help="write a page for a browser")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"given {text}, must be an integer of 0 or more")
    return int(text)


def _add_extend(command: Parser) -> None:
    command.add_argument("model", metavar="MODEL", help="a Hugging Face folder, or a Hub name")
    command.add_argument("output", metavar="OUT", help="the folder to write")
    for option, what in (
        ("--tokens", "text files with a token in each line; text yields these"),
        ("--special-tokens", "the same for special tokens, which text yields only if listed"),
    ):
        command.add_argument(option, nargs="+", default=[], metavar="FILE", help=what)
    command.add_argument(
        "--initialisation",
        type=_one_of(INITIALISATIONS),
        choices=INITIALISATIONS,
        default="pieces",
        help="of new rows (default: pieces)",
    )
    command.add_argument(
        "--multiple-of",
        type=_positive,
        default=1,
        metavar="N",
        help="round vocab_size up to a multiple (default: 1)",
    )


def _add_merge(command: Parser) -> None:
    command.add_argument("output", metavar="OUT", help="the folder to write")
    command.add_argument("models", nargs="+", metavar="MODEL", help="what to merge")
    command.add_argument("--base", metavar="MODEL", help="what the models were trained from")
    command.add_argument(
        "--weights",
        nargs="+",
        type=_finite,
        metavar="W",
        help="one for each model (default: 1); divided by their sum without --base",
    )
    command.add_argument(
        "--dtype",
        type=_one_of(DTYPES),
        choices=DTYPES,
        help="of the weights (default: that of the first model)",
    )


def _add_upcycle(command: Parser) -> None:
    command.add_argument("model", metavar="MODEL", help="the dense model")
    command.add_argument("output", metavar="OUT", help="the folder to write")
    for option, default, what in (
        ("--experts", 8, "in each block"),
        ("--experts-per-token", 2, "that compute each token"),
    ):
        command.add_argument(
            option, type=_positive, default=default, metavar="N", help=f"{what} ({default})"
        )
    command.add_argument(
        "--seed", type=_integer, default=1234, metavar="N", help="of the routers (1234)"
    )


def _add_evaluate(command: Parser) -> None:
    command.add_argument("models", nargs="+", metavar="MODEL", help="what to score")
    command.add_argument(
        "--tasks", nargs="+", required=True, metavar="TASK", help="names of lm-eval, or YAML files"
    )
    command.add_argument("--include-path", metavar="FOLDER", help="more tasks")
    command.add_argument(
        "--num-fewshot", type=_count, metavar="N", help="examples in a prompt (default: the task's)"
    )
    command.add_argument(
        "--limit", type=_positive, metavar="N", help="examples of each task (default: all)"
    )
    command.add_argument(
        "--data", nargs="+", default=[], metavar="DATA", help="look for the tasks' texts in it"
    )
    command.add_argument(
        "--batch-size", type=_positive, default=8, metavar="N", help="sequences (default: 8)"
    )
    command.add_argument(
        "--max-length", type=_positive, metavar="N", help="tokens (default: the model's)"
    )
    command.add_argument(
        "--dtype",
        type=_one_of(DTYPES),
        choices=DTYPES,
        help="of the weights (default: that of the files)",
    )
    command.add_argument("-o", "--output", metavar="FILE", help="write the scores as JSON")
    command.add_argument("--json", action="store_true", help="print JSON alone, for programs")


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"given {text}, must be a number")
    return value


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"given {text}, must be an integer") from error


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"given {text}, must be an integer above 0")
    return int(text)


def _one_of(names: Sequence[str]) -> Any:
    def check(text: str) -> str:
        if text not in names:
            hint = nearest(text, names)
            raise argparse.ArgumentTypeError(
                f"given {text}, must be one of {', '.join(names)}{hint}"
            )
        return text

    return check
