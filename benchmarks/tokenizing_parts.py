"""Where the processor time of `prepare` goes, with one worker.

    PYTHONPATH=. python benchmarks/tokenizing_parts.py --tokenizer FOLDER --corpus FILE [--turns 3]
    PYTHONPATH=. python benchmarks/tokenizing_parts.py convert FILE.jsonl FILE.parquet
    PYTHONPATH=. python benchmarks/tokenizing_parts.py convert FILE.jsonl FILE.jsonl.zst

The first command runs preparations, each a process of its own. It replaces functions of fast_llm by
ones that take the processor time of the process and call the original. A part has the time of its
functions without that of other parts that they call. The table has medians and their shares; what
is in no part is "the rest". Taking the time adds a few percent where functions are called often.

The second command writes the documents of JSON lines to another format.
"""

import argparse
import importlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

IMPORTS = "start Python, import"
PARTS = {
    "read the tokenizer: tokenizers": ["tokenizer:make"],
    "read the tokenizer: its JSON": ["tokenizer:_parse", "tokenizer:_read", "tokenizer:load"],
    "fingerprint of the tokenizer": ["tokenizer:_digests"],
    "read the tokenizer: gigatoken": [
        "engine:FastEncoder.__init__",
        "engine:FastEncoder._start",
        "engine:FastEncoder._token_sizes",
    ],
    "admission: tokenizers": ["engine:FastEncoder.admit"],
    "count the rows": ["documents:open_documents"],
    "read the texts": ["reading:Reader.texts"],
    "encode: gigatoken": ["engine:FastEncoder._tokens"],
    "encode: tokenizers, to compare": ["engine:FastEncoder.encode"],
    "compare new characters": ["engine:FastEncoder._learn"],
    "which texts gigatoken may get": ["engine:FastEncoder.is_safe"],
    "add up the bytes of tokens": ["engine:FastEncoder._checked"],
    "join tokens, count bytes": ["workers:RangeTokenizer.tokenize"],
    "write, flush, digest": ["prepare:write_shards", "prepare:_finish"],
}


class Clock:
    """Processor time of parts that call each other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.inside: list[float] = []  # of each call that has not returned: time of others in it

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time counts for a part; for a generator, that of each step."""
        if inspect.isgeneratorfunction(function):
            return lambda *arguments, **named: self._steps(part, function(*arguments, **named))
        return lambda *arguments, **named: self._call(part, function, *arguments, **named)

    def _call(self, part: str, function: Callable[..., Any], *given: Any, **named: Any) -> Any:
        started = time.process_time()
        self.inside.append(0.0)
        try:
            return function(*given, **named)
        finally:
            seconds = time.process_time() - started
            own = seconds - self.inside.pop()
            self.seconds[part] = self.seconds.get(part, 0.0) + own
            if self.inside:
                self.inside[-1] += seconds

    def _steps(self, part: str, steps: Iterator[Any]) -> Iterator[Any]:
        end = object()
        while (value := self._call(part, next, steps, end)) is not end:
            yield value


def child(arguments: list[str]) -> None:
    """Prepare with replaced functions, and print the seconds of each part."""
    from fast_llm import cli
    from fast_llm.data import prepare  # noqa: F401  (all modules, before the clock is read)

    clock = Clock()
    clock.seconds[IMPORTS] = time.process_time()
    for part, places in PARTS.items():
        for place in places:
            module, _, name = place.partition(":")
            owner = importlib.import_module(f"fast_llm.data.{module}")
            *classes, name = name.split(".")
            for each in classes:
                owner = getattr(owner, each)
            setattr(owner, name, clock.timed(part, getattr(owner, name)))
    if cli.main(["prepare", *arguments]):
        sys.exit(1)
    clock.seconds["the rest"] = time.process_time() - sum(clock.seconds.values())
    print(json.dumps(clock.seconds))


def measure(tokenizer: str, corpus: str, turns: int) -> None:
    """Print a table."""
    found: list[dict[str, float]] = []
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
    }
    with tempfile.TemporaryDirectory() as folder:
        environment["PYTHONPYCACHEPREFIX"] = f"{folder}/bytecode"
        # Bytecode, as an installation writes it.
        command = [sys.executable, "-c", "import fast_llm.cli, fast_llm.data.prepare"]
        subprocess.run(command, check=True, env=environment)
        for turn in range(turns):
            settings = [f"output_path={folder}/{turn}", f"dataset.path={corpus}"]
            settings += [f"tokenizer.path={tokenizer}", "tokenizer.engine=gigatoken"]
            done = subprocess.run(
                [sys.executable, __file__, "child", *settings],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env=environment,
            )
            found.append(json.loads(done.stdout.splitlines()[-1]))
    totals = [sum(each.values()) for each in found]
    total = median(totals)
    size = Path(corpus).stat().st_size / 1e6
    print(
        f"{Path(tokenizer).name}, {Path(corpus).name}, {size:.0f} MB: {total:.2f} s"
        f" ({min(totals):.2f}–{max(totals):.2f})"
    )
    for part in (IMPORTS, *PARTS, "the rest"):
        seconds = median(each.get(part, 0.0) for each in found)
        print(f"{part:32} {seconds:6.2f} {100 * seconds / total:5.1f} %")


def convert(source: str, target: str) -> None:
    """Write the documents of JSON lines as parquet or compressed."""
    if target.endswith(".zst"):
        import zstandard

        with open(source, "rb") as file, open(target, "wb") as output:
            zstandard.ZstdCompressor(level=3).copy_stream(file, output)
        return
    import pyarrow
    from pyarrow import parquet

    with open(source, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    parquet.write_table(pyarrow.table({"text": texts}), target, row_group_size=1000)


def main() -> None:
    """Run one of the commands."""
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2:])
        return
    if sys.argv[1:2] == ["convert"]:
        convert(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    measure(arguments.tokenizer, arguments.corpus, arguments.turns)


if __name__ == "__main__":
    main()
