"""Completion scripts for bash, zsh and fish: `fast-llm completion SHELL`.

Generated from the parsers (commands.py) and the settings. A script holds every word, so that
pressing TAB starts no Python. It completes commands, options, settings as `section.setting=`, and
their values where these are a few words or a file.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from fast_llm.command_texts import GROUPS
from fast_llm.commands import DEVICES, SHELLS, parsers
from fast_llm.config.mistakes import iter_paths, iter_settings
from fast_llm.config.prepare import ConvertConfig, PrepareConfig
from fast_llm.config.train import TrainConfig

_CONFIGS: dict[str, type[BaseModel]] = {
    "train": TrainConfig,
    "plan": TrainConfig,
    "prepare": PrepareConfig,
    "convert": ConvertConfig,
}
_FILES = ("path", "output_path", "experiment_dir")  # the last names of settings that name a file
_FILE_PATTERN = rf"^([\w.]+\.)?({'|'.join(_FILES)})="


@dataclass(frozen=True)
class _Words:
    """What can follow a command."""

    options: list[argparse.Action]
    settings: list[str]
    values: dict[str, tuple[str, ...]]  # of settings that have a few
    arguments: tuple[str, ...]  # other words; without them and settings, files

    @property
    def option_names(self) -> list[str]:
        return [name for action in self.options for name in action.option_strings]


def script(shell: str) -> str:
    """The completion script of a shell: bash, zsh or fish."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](_words())


def _words() -> dict[str, _Words]:
    found = {}
    for name, parser in parsers()[1].items():
        config = _CONFIGS.get(name)
        settings = dict(iter_settings(config)) if config is not None else {}
        values = {path: _values(field.annotation) for path, field in settings.items()}
        arguments: Sequence[str] = SHELLS if name == "completion" else ()
        if name == "settings":
            kinds = (TrainConfig, PrepareConfig, ConvertConfig)
            arguments = sorted({path for kind in kinds for path in iter_paths(kind)})
        found[name] = _Words(
            [action for action in parser._actions if action.option_strings],
            list(settings),
            {path: words for path, words in values.items() if words},
            tuple(arguments),
        )
    return found


def _values(annotation: Any) -> tuple[str, ...]:
    """The words that a setting may be; none if it can be a number or other text."""
    if annotation is bool:
        return ("yes", "no")
    if annotation is type(None):
        return ("null",)
    if get_origin(annotation) is Literal:
        return tuple(map(str, get_args(annotation)))
    parts = [_values(part) for part in get_args(annotation)]
    return tuple(word for part in parts for word in part) if parts and all(parts) else ()


def _by_values(words: dict[str, _Words]) -> Iterator[tuple[list[str], tuple[str, ...]]]:
    """Settings that have the same values, and these; settings that name files have none."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for one in words.values():
        for setting in one.settings:
            is_file = setting.rpartition(".")[2] in _FILES
            if is_file or setting in one.values:
                known = groups.setdefault(() if is_file else one.values[setting], [])
                if setting not in known:
                    known.append(setting)
    for values, settings in groups.items():
        yield settings, values


_BASH = """\
# bash completion of fast-llm
_fast_llm() {
    local line="${COMP_LINE:0:COMP_POINT}" command="${COMP_WORDS[1]}"
    local current="${line##* }" options="" settings="" arguments="" values="" value
    COMPREPLY=()
    if [[ $COMP_CWORD -eq 1 ]]; then
        COMPREPLY=($(compgen -W "@commands@ --help --version" -- "$current"))
        return
    fi
    case "$command" in
@cases@
    esac
    case "${COMP_WORDS[COMP_CWORD-1]}" in
        -c|--config) compopt -o filenames; COMPREPLY=($(compgen -f -- "$current")); return ;;
        --device) COMPREPLY=($(compgen -W "@devices@" -- "$current")); return ;;
    esac
    if [[ $current == -* ]]; then
        COMPREPLY=($(compgen -W "$options" -- "$current"))
    elif [[ $current == *=* && -n $settings ]]; then
        value="${current#*=}"
        case "${current%%=*}" in
@values@
            *) return ;;
        esac
        if [[ -n $values ]]; then
            COMPREPLY=($(compgen -W "$values" -- "$value"))
        else
            compopt -o filenames
            COMPREPLY=($(compgen -f -- "$value"))
        fi
        # Without "=" among the word breaks, bash replaces the setting too.
        [[ $COMP_WORDBREAKS == *=* ]] || COMPREPLY=("${COMPREPLY[@]/#/${current%%=*}=}")
    elif [[ -n $settings ]]; then
        compopt -o nospace
        COMPREPLY=($(compgen -W "$settings" -- "$current"))
    elif [[ -n $arguments ]]; then
        COMPREPLY=($(compgen -W "$arguments" -- "$current"))
    else
        compopt -o filenames
        COMPREPLY=($(compgen -f -- "$current"))
    fi
}
complete -F _fast_llm fast-llm
"""

_ZSH = """\
#compdef fast-llm
_fast_llm() {
    local current="$words[CURRENT]" setting
    local -a commands options settings arguments values
    if (( CURRENT == 2 )); then
        commands=(
@commands@
        )
        _describe command commands
        return
    fi
    case "$words[2]" in
@cases@
    esac
    case "$words[CURRENT-1]" in
        -c|--config) _files; return ;;
        --device) compadd -- @devices@; return ;;
    esac
    if [[ $current == -* ]]; then
        compadd -- $options
    elif [[ $current == *=* && -n $settings ]]; then
        setting="${current%%=*}"
        compset -P '*='
        case "$setting" in
@values@
            *) return ;;
        esac
        if [[ -n $values ]]; then compadd -- $values; else _files; fi
    elif [[ -n $settings ]]; then
        compadd -S '' -- $settings
    elif [[ -n $arguments ]]; then
        compadd -- $arguments
    else
        _files
    fi
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _fast_llm "$@"
else
    compdef _fast_llm fast-llm
fi
"""


def _bash(words: dict[str, _Words]) -> str:
    cases = [
        f'        {name}) options="{" ".join(one.option_names)}"'
        f' settings="{" ".join(f"{setting}=" for setting in one.settings)}"'
        f' arguments="{" ".join(one.arguments)}" ;;'
        for name, one in words.items()
    ]
    values = [
        f'            {"|".join(settings)}) values="{" ".join(found)}" ;;'
        for settings, found in _by_values(words)
    ]
    return _filled(_BASH, " ".join(words), cases, values)


def _zsh(words: dict[str, _Words]) -> str:
    cases = [
        f"        {name}) options=({' '.join(one.option_names)})"
        f" settings=({' '.join(f'{setting}=' for setting in one.settings)})"
        f" arguments=({' '.join(one.arguments)}) ;;"
        for name, one in words.items()
    ]
    values = [
        f"            {'|'.join(settings)}) values=({' '.join(found)}) ;;"
        for settings, found in _by_values(words)
    ]
    commands = [f"            {_quoted(f'{name}:{about}')}" for name, about in _summaries()]
    return _filled(_ZSH, "\n".join(commands), cases, values)


def _filled(template: str, commands: str, cases: list[str], values: list[str]) -> str:
    return (
        template.replace("@commands@", commands)
        .replace("@cases@", "\n".join(cases))
        .replace("@values@", "\n".join(values))
        .replace("@devices@", " ".join(DEVICES))
    )


def _fish(words: dict[str, _Words]) -> str:
    lines = ["# fish completion of fast-llm", "complete -c fast-llm -f"]
    for name, about in _summaries():
        lines.append(f"complete -c fast-llm -n __fish_use_subcommand -a {name} -d {_quoted(about)}")
    for name, one in words.items():
        here = f"__fish_seen_subcommand_from {name}"
        start = f"complete -c fast-llm -n {_quoted(here)}"
        for action in one.options:
            names = [
                f"-l {option[2:]}" if option.startswith("--") else f"-s {option[1:]}"
                for option in action.option_strings
            ]
            value = ""
            if action.nargs is None:
                value = " -r -F" if action.dest == "config" else " -x"
                value += f" -a {_quoted(' '.join(action.choices))}" if action.choices else ""
            lines.append(f"{start} {' '.join(names)}{value} -d {_quoted(action.help or '')}")
        if one.settings:
            value_given = f"{here}; and string match -q '*=*' -- (commandline -ct)"
            names_only = f"{here}; and not string match -q '*=*' -- (commandline -ct)"
            settings = " ".join(f"{setting}=" for setting in one.settings)
            values = " ".join(
                f"{path}={word}" for path, found in one.values.items() for word in found
            )
            lines.append(f"complete -c fast-llm -n {_quoted(names_only)} -a {_quoted(settings)}")
            lines.append(f"complete -c fast-llm -n {_quoted(value_given)} -a {_quoted(values)}")
            named = f"{here}; and string match -qr '{_FILE_PATTERN}' -- (commandline -ct)"
            lines.append(f"complete -c fast-llm -n {_quoted(named)} -F")
        elif one.arguments:
            lines.append(f"{start} -a {_quoted(' '.join(one.arguments))}")
        else:
            lines.append(f"{start} -F")
    return "\n".join(lines) + "\n"


def _summaries() -> Iterator[tuple[str, str]]:
    for commands in GROUPS.values():
        yield from commands.items()


def _quoted(text: str) -> str:
    """In single quotes, which the text may have too, for zsh and fish."""
    return "'" + text.replace("\\", "\\\\").replace("'", "'\\''") + "'"
