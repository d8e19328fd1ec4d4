"""The command line: commands, options, their help, and the nearest name for a wrong one.

Standard library alone, so that help and mistakes answer at once. What a command does is in cli.py;
completion.py reads the same parsers.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from fast_llm import __version__
from fast_llm.terminal import BOLD, nearest, style, width

GROUPS = {
    "train": {
        "train": "train a model; the same command resumes a run",
        "plan": "predict memory, speed and the fastest layout",
        "convert": "checkpoint to Hugging Face model, or back",
    },
    "data": {"prepare": "tokenize documents into token files"},
    "inspect": {
        "verify": "compare files with their digests",
        "why": "show the documents of a training step",
    },
    "learn": {
        "demo": "see everything once, on this machine",
        "settings": "explain a setting: default, allowed values, meaning",
        "completion": "print the completion script of a shell",
    },
}
SHELLS = ("bash", "zsh", "fish")
DEVICES = ("h100", "h200", "b200", "a100")

_SETTINGS = """\
Settings come from the YAML file or the command line, as section.setting=value.
The command line wins; of a setting given twice the last one wins. Values are
YAML: training.train_iters=1_000 data.split=[9,1,0] run.experiment_dir=null
`fast-llm settings` lists all settings, and docs/settings.md explains them."""

_MAIN_EXAMPLES = """\
examples:
  fast-llm demo
  fast-llm prepare gpt_memmap --config prepare.yaml
  fast-llm train gpt --config train.yaml --validate
  fast-llm train gpt --config train.yaml training.train_iters=50
  torchrun --nproc_per_node 8 --no-python fast-llm train gpt --config train.yaml
  fast-llm settings training.checkpoint

The words gpt and gpt_memmap may be left out.
`fast-llm COMMAND --help` explains a command."""

# Command → its description, and what follows the options.
_TEXTS = {
    "train": (
        f"""\
Train a model. If run.experiment_dir has a checkpoint, training resumes from the
newest one; if training is complete, nothing is done.

{_SETTINGS}""",
        """\
examples:
  # check everything, print the plan, stop
  fast-llm train gpt --config train.yaml --validate
  # train on this machine's GPU, or its CPU
  fast-llm train gpt --config train.yaml
  fast-llm train gpt --config train.yaml optimizer.learning_rate.base=3e-5
  # on 8 GPUs of this machine
  torchrun --nproc_per_node 8 --no-python fast-llm train gpt --config train.yaml

exit codes:
  0        complete, or stopped by SIGUSR1
  1        training cannot continue
  2        a mistake in the settings, the data or a file
  128 + n  stopped by signal n""",
    ),
    "plan": (
        f"""\
Predict, without a cluster, whether a layout fits, how long a step takes, what
limits it, and which layouts are the fastest (docs/planning.md). Needs the YAML
file and the pretrained model's config.json; no data, weights or GPU.

{_SETTINGS}""",
        """\
examples:
  fast-llm plan --config train.yaml --gpus 8
  fast-llm plan --config train.yaml --gpus 64 --device h200
  fast-llm plan --config train.yaml --gpus 16 batch.sequence_length=131072""",
    ),
    "prepare": (
        f"""\
Tokenize documents into token files. `output_path: data/code` writes data/code/
and data/code.json, which data.path of `train` names. An interrupted run resumes
where it stopped.

{_SETTINGS}""",
        """\
examples:
  fast-llm prepare gpt_memmap --config prepare.yaml
  fast-llm prepare --config prepare.yaml tokenize_workers=32
  fast-llm prepare output_path=data/code dataset.path=code/*.jsonl.gz \\
      dataset.field=content tokenizer.path=Llama-3.1-8B

exit codes:
  0        complete
  1        the disk failed
  2        a mistake in the settings, the data or a file
  128 + n  stopped by signal n""",
    ),
    "convert": (
        f"""\
Convert a training checkpoint to a Hugging Face folder, or a Hugging Face folder
to a checkpoint.

{_SETTINGS}""",
        """\
examples:
  fast-llm convert gpt input.path=RUN/checkpoint/1000 output.path=MODEL
  fast-llm convert gpt input.path=RUN/checkpoint/1000 output.path=MODEL \\
      output.data_type=fp32
  fast-llm convert gpt input.format=llama input.path=MODEL \\
      output.format=distributed output.path=START/checkpoint/0""",
    ),
    "verify": (
        """\
Read checkpoints, exports and datasets completely, and compare them with the
digests that were written with them. An experiment folder stands for everything
in it.""",
        """\
examples:
  fast-llm verify RUN
  fast-llm verify RUN/checkpoint/1000 data/code.json""",
    ),
    "why": (
        """\
Print the documents of each sequence of a training step, and how they begin; for
a loss that looks odd.""",
        """\
examples:
  fast-llm why RUN 1000
  fast-llm why RUN 1000 --json | jq .""",
    ),
    "demo": (
        """\
Make a tokenizer, a corpus of prose and one of code from Python's own files,
pretrain a small Llama on prose and continue on code with the recipe's YAML;
then compare, kill and resume. Takes minutes on two cores, and no network.""",
        """\
examples:
  fast-llm demo
  fast-llm demo /tmp/demo""",
    ),
    "settings": (
        """\
Print the reference of a section or a setting (docs/settings.md), or a list of
all settings.""",
        """\
examples:
  fast-llm settings
  fast-llm settings training.checkpoint
  fast-llm settings optimizer.learning_rate.base
  fast-llm settings | grep warmup""",
    ),
    "completion": (
        """\
Print a script that completes commands, options and settings in a shell. It
knows the settings of this version: print it again after an update.""",
        """\
examples:
  # this session of bash or zsh
  eval "$(fast-llm completion bash)"
  # for good: bash with the package bash-completion; zsh in a folder of $fpath
  fast-llm completion bash > ~/.local/share/bash-completion/completions/fast-llm
  fast-llm completion zsh > ~/.zfunc/_fast-llm
  fast-llm completion fish > ~/.config/fish/completions/fast-llm.fish""",
    ),
}


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
        description="Continued pretraining of Llama models from one YAML file.\n\n"
        + "\n\n".join(
            f"{group}:\n" + "\n".join(f"  {name:<12}{text}" for name, text in commands.items())
            for group, commands in GROUPS.items()
        ),
        epilog=_MAIN_EXAMPLES,
    )
    main.add_argument("--version", action="version", version=f"fast-llm {__version__}")
    below = main.add_subparsers(
        dest="command", required=True, help=argparse.SUPPRESS, parser_class=Parser
    )
    commands: dict[str, Parser] = {}
    for group in GROUPS.values():
        for name in group:
            description, epilog = _TEXTS[name]
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
    commands["verify"].add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="a dataset.json, checkpoint, export or experiment folder",
    )
    commands["why"].add_argument("experiment", metavar="RUN", help="the experiment folder")
    commands["why"].add_argument("step", type=_integer, metavar="STEP", help="counted from 1")
    commands["why"].add_argument(
        "--json", action="store_true", help="print JSON alone, for programs"
    )
    commands["demo"].add_argument(
        "folder", nargs="?", default="fast-llm-demo", help="default: fast-llm-demo"
    )
    commands["settings"].add_argument(
        "path", nargs="?", default="", metavar="PATH", help="a section or a setting"
    )
    commands["completion"].add_argument(
        "shell", type=_one_of(SHELLS), choices=SHELLS, help="which shell"
    )


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
