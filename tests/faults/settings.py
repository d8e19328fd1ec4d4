"""Configurations with any mistake: mistyped names, values of every kind, misplaced sections.

There are also texts that are hardly YAML, anchors that expand without end, and overrides. Each is
refused within two seconds with exit code 2 and lines that say where, and for a mistyped name what
was meant; or it is a plan. There is never a traceback, and torch is never loaded. Most are read in
this process, some by the command.
"""

import contextlib
import copy
import io
import json
import os
import random
import re
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from fast_llm import cli
from fast_llm.config.document import read
from tests.faults.jobs import command
from tests.training.runs import settings, write_tokens

LIMIT = 2.0  # seconds of a processor
JUNK: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        3,
        10**12,
        10**15 + 1,
        2**63,
        -(2**70),
        0.5,
        -0.1,
        1e-300,
        1e300,
    ),
    *(
        float("nan"),
        float("inf"),
        "",
        "x",
        "yes",
        "auto",
        "null",
        "1e5",
        "0x10",
        "~",
        "é😀",
        "a" * 5000,
        "../../etc/passwd",
    ),
    *(
        "\u202e",
        "a\nb",
        "${HOME}",
        "$(touch canary)",
        "{{7*7}}",
        "!!python/object:os.system",
        "[",
        "linear",
        "fp32",
        "bf16",
    ),
    *(
        [],
        [1],
        [1, 2, 3],
        [None],
        ["a", "b"],
        [[1]],
        {},
        {"a": 1},
        {"interval": 1},
        {"type": "llama3"},
        {1: 2},
    ),
]
TEXTS = [
    *(
        "\t",
        "&a ",
        "*a",
        "<<: *a",
        "---\n",
        "...\n",
        "%YAML 9.9\n",
        "!!python/object/apply:os.system ['touch canary']\n",
        "? ",
    ),
    *(
        ": ",
        "- ",
        "{",
        "[",
        "'",
        '"',
        "|",
        ">",
        "#",
        "\0",
        "\x85",
        "\ufeff",
        "\r",
        "@",
        "`",
        "%",
        "!!binary x",
        "!!set {a}",
    ),
]
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{n}: &{n} [{','.join(['*' + p] * 9)}]\n" for p, n in zip("abcdefgh", "bcdefghi", strict=True)
)


def paths(values: Any, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The paths of all settings and sections."""
    found = []
    if isinstance(values, dict):
        for key, value in values.items():
            found += [(*above, key), *paths(value, (*above, key))]
    return found


def mistyped(name: str, chance: random.Random) -> str:
    """A word with a letter left out or doubled, or with two letters exchanged."""
    at = chance.randrange(len(name) - 1)
    return chance.choice(
        [
            name[:at] + name[at + 1 :],
            name[:at] + name[at] + name[at:],
            name[:at] + name[at + 1] + name[at] + name[at + 2 :],
        ]
    )


def mutated(
    values: dict[str, Any], chance: random.Random, figures: "Counter[str]"
) -> tuple[str, list[str], tuple[str, str] | None]:
    """A changed file, overrides, and a mistyped name with the correct one."""
    values = yaml.safe_load(yaml.safe_dump(values))
    meant: tuple[str, str] | None = None
    overrides: list[str] = []
    kind = chance.choice(
        ("name", "value", "value", "value", "override", "text", "text", "gone", "strange", "bomb")
    )
    figures[f"mutation: {kind}"] += 1
    for _ in range(chance.choice((1, 1, 2, 4)) if kind == "value" else 1):
        place = chance.choice(paths(values))
        section = values
        for key in place[:-1]:
            section = section[key]
        if kind == "name":
            wrong = mistyped(place[-1], chance)
            if wrong not in section:
                section[wrong] = section.pop(place[-1])
                meant = (wrong, place[-1]) if wrong != place[-1] else None
        elif kind == "value":
            section[place[-1]] = copy.deepcopy(chance.choice(JUNK))
        elif kind == "override":
            overrides = [f"{'.'.join(place)}={chance.choice([*map(str, JUNK), *TEXTS])}"]
            overrides = [word for word in overrides if "\0" not in word]
        elif kind == "gone":
            del section[place[-1]]
        elif kind == "strange":
            section[
                chance.choice(("strange", "interval", "path", "type", "é", "a.b", "", "0", "null"))
            ] = chance.choice(JUNK)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=chance.random() < 0.5)
    if kind == "text":
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(text))
            text = (
                chance.choice(
                    [
                        text[:at] + chance.choice(TEXTS) + text[at:],
                        text[:at],
                        text[:at] + text[at + chance.randrange(1, 30) :],
                        text[:at] + text[max(0, at - 40) :],
                        text[:at] + chr(chance.randrange(1, 0x2FF)) + text[at + 1 :],
                        text.replace("\n", "\r\n"),
                    ]
                )
                or "x"
            )
    elif kind == "bomb":
        text = chance.choice(
            (
                BOMB + text,
                text + "x: " + "[" * 5000,
                text + "x: " + "{a: " * 400,
                text + "a: " * 3000,
                text * 2,
            )
        )
    return text, overrides, meant


def tell(folder: Path, overrides: list[str]) -> tuple[int | None, str, str]:
    """Run the command on a file in this process. Returns the exit code, None for a traceback."""
    out, err = io.StringIO(), io.StringIO()
    code: int | None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(
                ["train", "gpt", "--config", str(folder / "c.yaml"), "--validate", *overrides]
            )
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            code = None
            traceback.print_exc(file=err)
    return code, out.getvalue(), err.getvalue()


def campaign(folder: Path, budget: int, seed: int) -> dict[str, Any]:
    """`budget` configurations; one in a hundred runs in a new process."""
    chance = random.Random(seed)
    figures: Counter[str] = Counter()
    bases = correct(folder)
    before = sorted(folder.rglob("*"))
    here = os.getcwd()
    os.chdir(folder)  # where a canary would be created
    slowest = 0.0
    try:
        while figures["configurations"] < budget:
            text, overrides, meant = mutated(chance.choice(bases), chance, figures)
            (folder / "c.yaml").write_bytes(text.encode(errors="surrogatepass"))
            figures["configurations"] += 1
            if figures["configurations"] % 100:
                began = time.process_time()
                code, out, err = tell(folder, overrides)
                seconds = time.process_time() - began
                slowest = max(slowest, seconds)
            else:
                code, out, err = in_a_process(overrides)
                seconds = 0.0
                figures["in a process of its own"] += 1
            story = (
                f"seed {seed}, number {figures['configurations']}, overrides {overrides},"
                f" exit code {code}\n{text[:3000]}\n{err}"
            )
            assert seconds < LIMIT, f"{seconds:.1f} s: {story}"
            check_answer(code, out, err, meant, story, figures)
        (folder / "c.yaml").unlink()
        assert sorted(folder.rglob("*")) == before, "something was written"
    finally:
        os.chdir(here)
    return {
        **dict(sorted(figures.items())),
        "slowest, s of a processor": round(slowest, 2),
        "tracebacks": 0,
    }


def correct(folder: Path) -> list[dict[str, Any]]:
    """Two correct configurations, and the files that they name."""
    write_tokens(folder / "tokens", 400)
    further = [
        "training.train_iters=10",
        "training.checkpoint.interval=5",
        "training.validation.interval=5",
        "training.validation.iterations=1",
        "training.export.interval=5",
        "training.checkpoint.keep=2",
        "optimizer.learning_rate.decay_style=cosine",
        "optimizer.learning_rate.decay_iterations=10",
    ]
    shape = {
        "hidden_size": 40,
        "intermediate_size": 52,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(
        json.dumps({"model_type": "llama", "vocab_size": 128, "head_dim": 10, **shape})
    )
    bases = [
        read(None, settings(folder, *further)).values,
        read(None, settings(folder, *further)).values,
    ]
    bases[1]["pretrained"] = {"path": f"{folder}/model", "format": "llama", "model_weights": False}
    bases[1]["data"]["validation_sets"] = {"other": f"{folder}/tokens"}
    del bases[1]["model"]
    return bases


def in_a_process(overrides: list[str]) -> tuple[int, str, str]:
    """Validate c.yaml in a new process: exit code, standard output and standard error."""
    words = ["train", "gpt", "--config", "c.yaml", "--validate", *overrides]
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-m", "fast_llm.cli", *words],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def check_answer(
    code: int | None,
    out: str,
    err: str,
    meant: tuple[str, str] | None,
    story: str,
    figures: "Counter[str]",
) -> None:
    """Check that the answer is a plan, or that each line of the message names a place.

    `meant`: the mistyped and the correct name.
    """
    assert code in (0, 2) and "Traceback" not in err, story
    if code == 0:
        assert out.startswith("Model") and not err, story
        figures["plans"] += 1
        return
    assert err.startswith("fast-llm train: ") and not out, story
    lines = err.removeprefix("fast-llm train: ").splitlines()
    figures["refused"] += 1
    places = re.compile(
        r"c\.yaml(:\d+)?: |override |the command line: |^ *[a-z_]+(\.[a-z_0-9]+)+:"
        r" |/|[a-z]+\.[a-z_]+"
        r"|\d+ mistakes|… and"
    )
    assert all(places.search(line) for line in lines), f"{story}: where?"
    if meant is not None:
        figures["names mistyped"] += 1
        assert any(meant[0] in line for line in lines), f"{story}: {meant} not named"
        figures["what was meant is said"] += any(
            "did you mean" in line and meant[1] in line for line in lines
        )


if __name__ == "__main__":
    command(campaign, 2000)
