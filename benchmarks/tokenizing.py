"""Speed of `prepare` from JSON lines to token files, beside libraries that tokenize.

    PYTHONPATH=. python benchmarks/tokenizing.py --tokenizer FOLDER --corpus FILE.jsonl \
        [--turns 3] [--workers 1 2] [--engines gigatoken tokenizers] \
        [--tiktoken] [--candidate PYTHON]
    PYTHONPATH=. python benchmarks/tokenizing.py corpus FILE.jsonl FOLDER SUFFIX… --megabytes 25
    PYTHONPATH=. python benchmarks/tokenizing.py tokenizers FOLDER

The first command runs contenders by turns, each a process of its own, whose start counts:

    library     `encode_batch_fast` of tokenizers on one thread
    tiktoken    made of the same vocabulary, if the tokenizer cuts text with one expression
    candidate   `encode_batch` of tokenizers 1.0, on one core; PYTHON has it installed
    others      `fast-llm prepare`: engine and workers

The first three read the texts and write nothing. Seconds are those of the wall; processor seconds,
which other programs disturb less, include child processes. Ratios are to `library` in the same
turn. All token files must have the same bytes, and all libraries the same number of tokens; others
are marked.

The second command makes a corpus of the files in a folder with these suffixes (`.gz` is
decompressed), in a random order. The third makes the seven tokenizers of tests/real/published.py.
"""

import argparse
import gzip
import hashlib
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

_READ = """
import json, os, sys
def batches(path):
    texts, size = [], 0
    for line in open(path, encoding="utf-8"):
        texts.append(json.loads(line)["text"])
        size += len(texts[-1])
        if size >= 2**20:
            yield texts
            texts, size = [], 0
    yield texts
"""
_LIBRARY = (
    _READ
    + """
os.environ["TOKENIZERS_PARALLELISM"] = "false"
from tokenizers import Tokenizer
made = Tokenizer.from_file(sys.argv[1])
made.encode_special_tokens = True
print(sum(len(each.ids) for texts in batches(sys.argv[2])
          for each in made.encode_batch_fast(texts, add_special_tokens=False)))
"""
)
_CANDIDATE = (
    _READ
    + """
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from tokenizers import Tokenizer
made = Tokenizer.from_file(sys.argv[1])
options = dict(add_special_tokens=False, encode_special_tokens=True)
print(sum(len(each.ids_array) for texts in batches(sys.argv[2])
          for each in made.encode_batch(texts, **options)))
"""
)
_TIKTOKEN = (
    _READ
    + r"""
import tiktoken
content = json.load(open(sys.argv[1], encoding="utf-8"))
cut = content["pre_tokenizer"]
parts = cut.get("pretokenizers", [cut])
split = [part["pattern"]["Regex"] for part in parts if part["type"] == "Split"]
if parts[-1].get("use_regex"):
    split.append(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
(pattern,) = split
own = [*range(33, 127), *range(161, 173), *range(174, 256)]
others = [byte for byte in range(256) if byte not in own]
bytes_of = {chr(byte): byte for byte in own}
bytes_of |= {chr(256 + at): byte for at, byte in enumerate(others)}
ranks = {bytes(map(bytes_of.__getitem__, word)): number
         for word, number in content["model"]["vocab"].items() if not set(word) - set(bytes_of)}
made = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
print(sum(len(made.encode_ordinary(text)) for texts in batches(sys.argv[2]) for text in texts))
"""
)
# Bytecode is kept, as after the first start of an installed package.
_ENVIRONMENT = {
    name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
}


def run(command: list[str]) -> tuple[float, float, str]:
    """Seconds, processor seconds and output of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=_ENVIRONMENT)
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, busy, done.stdout


def prepare(folder: Path, corpus: Path, engine: str, workers: int) -> tuple[float, float, str]:
    """Seconds, processor seconds and digest of the token files of one preparation."""
    with tempfile.TemporaryDirectory() as output:
        settings = {
            "output_path": f"{output}/x",
            "dataset.path": corpus,
            "tokenizer.path": folder,
            "tokenizer.engine": engine,
            "tokenize_workers": workers,
        }
        command = [sys.executable, "-m", "fast_llm.cli", "prepare"]
        seconds, busy, _ = run([*command, *(f"{key}={value}" for key, value in settings.items())])
        digest = hashlib.sha256()
        for path in sorted(Path(output).glob("x/shard_*.bin")):
            digest.update(path.read_bytes())
    return seconds, busy, digest.hexdigest()


def measure(arguments: argparse.Namespace) -> None:
    """Run the contenders by turns and print a table."""
    names = ("tokenizers", "gigatoken", "orjson", "tiktoken", "numpy")
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    print(f"Python {platform.python_version()}, {packages}")
    print("median seconds, processor seconds, times as fast by processor time (smallest–largest)")
    with tempfile.TemporaryDirectory() as bytecode:
        _ENVIRONMENT["PYTHONPYCACHEPREFIX"] = bytecode
        run([sys.executable, "-c", "import fast_llm.cli, fast_llm.data.prepare"])
        for corpus in arguments.corpus:
            for folder in arguments.tokenizer:
                measure_one(arguments, Path(folder), Path(corpus))


def measure_one(arguments: argparse.Namespace, folder: Path, corpus: Path) -> None:
    """The contenders on one corpus and one tokenizer."""
    libraries = {"library": (sys.executable, _LIBRARY)}
    if arguments.tiktoken:
        libraries["tiktoken"] = (sys.executable, _TIKTOKEN)
    if arguments.candidate:
        libraries["candidate"] = (arguments.candidate, _CANDIDATE)
    engines = {f"{name}, {n}": (name, n) for name in arguments.engines for n in arguments.workers}
    found: dict[str, list[tuple[float, float, str]]] = {name: [] for name in (*libraries, *engines)}
    for _ in range(arguments.turns):
        for name, (python, program) in libraries.items():
            command = [python, "-c", program, str(folder / "tokenizer.json"), str(corpus)]
            try:
                found[name].append(run(command))
            except subprocess.CalledProcessError:
                found.pop(name, None)
                if name == "library":
                    raise
        libraries = {name: value for name, value in libraries.items() if name in found}
        for name, (engine, count) in engines.items():
            found[name].append(prepare(folder, corpus, engine, count))
    size, tokens = corpus.stat().st_size / 1e6, found["library"][0][2].strip()
    print(f"\n{folder.name}, {corpus.name}, {size:.0f} MB, {int(tokens) / 1e6:.1f} M tokens")
    expected = found[next(iter(engines))][0][2]
    for name, rounds in found.items():
        right = tokens if name in libraries else expected
        wrong = "" if all(result.strip() == right for *_, result in rounds) else "  OTHER TOKENS"
        pairs = zip(found["library"], rounds, strict=True)
        ratios = [reference / used for (_, reference, _), (_, used, _) in pairs]
        wall, busy = median(each[0] for each in rounds), median(each[1] for each in rounds)
        spread = f"{median(ratios):.1f} ({min(ratios):.1f}–{max(ratios):.1f})"
        print(f"{name:16} {wall:8.2f} {busy:8.2f}   {spread}{wrong}", flush=True)


def make_corpus(output: str, folder: str, suffixes: list[str], megabytes: float) -> None:
    """JSON lines of the files of a folder."""
    paths = [
        path
        for path in sorted(Path(folder).rglob("*"))
        if path.suffix in suffixes and path.is_file() and not path.is_symlink()
    ]
    random.Random(0).shuffle(paths)
    size = 0
    with open(output, "w", encoding="utf-8") as file:
        for path in paths:
            data = path.read_bytes()
            data = gzip.decompress(data) if path.suffix == ".gz" else data
            text = data.decode(errors="ignore")
            if text and size < megabytes * 1e6:
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                size += len(data)


def make_tokenizers(folder: str) -> None:
    """Folders with a tokenizer.json each."""
    from fast_llm.data.tokenizer import load
    from tests.real import published

    for name in published.NAMES:
        with tempfile.TemporaryDirectory() as original:
            contents = load(str(published.make(name, Path(original)))).contents()
        target = Path(folder) / name
        target.mkdir(parents=True, exist_ok=True)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (target / file).write_bytes(contents[file])


def main() -> None:
    """Run one of the three commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("make", nargs="*", help="corpus FILE FOLDER SUFFIX…, or tokenizers FOLDER")
    parser.add_argument("--tokenizer", nargs="*", default=[])
    parser.add_argument("--corpus", nargs="*", default=[])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--engines", nargs="*", default=["gigatoken"])
    parser.add_argument("--tiktoken", action="store_true")
    parser.add_argument("--candidate", help="a Python with tokenizers 1.0")
    parser.add_argument("--megabytes", type=float, default=25)
    arguments = parser.parse_args()
    if arguments.make[:1] == ["corpus"]:
        _, output, folder, *suffixes = arguments.make
        make_corpus(output, folder, suffixes, arguments.megabytes)
    elif arguments.make[:1] == ["tokenizers"]:
        make_tokenizers(arguments.make[1])
    else:
        measure(arguments)


if __name__ == "__main__":
    main()
