"""Malicious files: checkpoints with a valid manifest, models, tokenizers, datasets.

The command reads each file in a separate process with 1 GiB of memory to spare: pickles under other
names, names that lead out of the folder, headers and counts of 2^63, overlapping offsets, links,
pipes, code next to the model, endless nesting. Nothing is executed (a canary would show it), and
nothing is written outside the run. A refusal is one line, not a traceback. Files changed at random
are in fuzz.py.
"""

import json
import os
import pickle
import random
import resource
import shutil
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fast_llm.checkpoint import folder as folders
from fast_llm.data import tokenfile
from fast_llm.storage import content_digest
from tests.faults.jobs import command, fork
from tests.training.runs import settings, write_tokens

MEMORY = 2**30  # bytes that a process may use beyond its start


class Bomb:
    """Unpickling it creates a canary file."""

    def __init__(self, canary: str):
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(begin: int, end: int, shape: Any = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def blobs(canary: Path) -> dict[str, bytes]:
    """Contents that any file may have."""
    bomb = pickle.dumps(Bomb(str(canary)))
    pickled = tensor(0, len(bomb), (len(bomb),), "U8")
    many = {f"t{n}": tensor(0, 8) for n in range(1000)}
    outside = {"a": "../../secret", "b": "/etc/passwd"}
    return {
        "a pickle": bomb,
        "a pickle behind a header": safetensors({"a": pickled}, bomb),
        "nothing": b"",
        "zeros": bytes(4096),
        "a header of 2^63 bytes": (2**63).to_bytes(8, "little") + b"{}",
        "a header of 2^64 - 1 bytes": b"\xff" * 8 + b"{}",
        "overlapping offsets": safetensors({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12)),
        "a thousand tensors in one place": safetensors(many, bytes(8)),
        "offsets from behind": safetensors({"a": tensor(8, 0)}, bytes(8)),
        "offsets beyond the end": safetensors({"a": tensor(0, 2**62)}, bytes(8)),
        "a shape of 2^62": safetensors({"a": tensor(0, 8, (2**62, 2**62))}, bytes(8)),
        "a negative shape": safetensors({"a": tensor(0, 8, (-2, -1))}, bytes(8)),
        "JSON without end": b"[" * 100_000,
        "a number of 100,000 digits": b'{"a": ' + b"9" * 100_000 + b"}",
        "not UTF-8": b"\xff\xfe{}",
        "names that lead out": json.dumps(
            {"weight_map": outside, "datasets": [{"prefix": "../x"}]}
        ).encode(),
        "an index of 2^63 documents": tokenfile.MAGIC
        + struct.pack("<QBQQ", 1, 8, 2**63, 2**63 + 1)
        + bytes(64),
        "an index of negative lengths": tokenfile.MAGIC
        + struct.pack("<QBQQ", 1, 8, 1, 2)
        + struct.pack("<iqqq", -5, 0, 0, 1),
        "an index of 2^31 tokens": tokenfile.MAGIC
        + struct.pack("<QBQQ", 1, 8, 1, 2)
        + struct.pack("<iqqq", 2**31 - 1, 0, 0, 1),
    }  # fmt: skip


def put(path: Path, how: str, content: dict[str, bytes], outside: Path) -> None:
    """Put something hostile in place of a file."""
    path.unlink(missing_ok=True)
    if how == "a link out":
        path.symlink_to(outside / "secret")
    elif how == "a link to itself":
        path.symlink_to(path)
    elif how == "a link to /dev/zero":
        path.symlink_to("/dev/zero")
    elif how == "a pipe":
        os.mkfifo(path)
    elif how == "a folder":
        path.mkdir()
    elif how == "a file of 1 TiB":
        with path.open("wb") as file:
            file.truncate(2**40)
    else:
        path.write_bytes(content[how])


PLACES = (
    "a link out",
    "a link to itself",
    "a link to /dev/zero",
    "a pipe",
    "a folder",
    "a file of 1 TiB",
)


def write_digests(checkpoint: Path) -> None:
    """Make the manifest fit the folder's content: anyone can compute its digest."""
    content = json.loads((checkpoint / folders.MANIFEST).read_bytes())
    for name in content["files"]:
        path = checkpoint / name
        if path.is_file() and path.stat().st_size < 2**30:
            content["files"][name] = folders.digests(checkpoint, [name])[name]
    resealed(checkpoint, content)


def resealed(checkpoint: Path, content: dict[str, Any]) -> None:
    content.pop("sha256", None)
    (checkpoint / folders.MANIFEST).write_text(
        json.dumps(content | {"sha256": content_digest(content)})
    )


FORGED: list[Callable[[dict[str, Any]], Any]] = [
    lambda c: c["files"].update({"../../../secret": {"size": 6, "sha256": "0" * 64}}),
    lambda c: c["files"].update({"/etc/passwd": {"size": 6, "sha256": "0" * 64}}),
    lambda c: c.update(info={}),
    lambda c: c["info"].update(step="12", samples=None),
    lambda c: c["info"].update(step=-1, samples=-8),
    lambda c: c["info"].update(samples=2**70),
    lambda c: c["info"].update(updates="many"),
    lambda c: c["info"].update(loss_scale=[]),
    lambda c: c["info"].update(loss_scale={"value": "x"}),
    lambda c: c["info"].update(identity=None),
    lambda c: c["info"].update(settings=None),
    lambda c: c["info"].update(settings={"optimizer": 3}),
    lambda c: c["info"].update(skipped="x"),
    lambda c: c.update(step=10**30),
    lambda c: c.update(files={}),
    lambda c: c.update(kind="export"),
]


def run(rank: int, given: tuple[str, list[str]]) -> int:
    """Run the command with little memory, and record what it starts, unpickles and writes."""
    import torch

    from fast_llm import cli

    inside, arguments = given
    torch.set_num_threads(1)
    os.chdir(inside)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))

    def watch(event: str, details: tuple[Any, ...]) -> None:
        strange = event in ("os.system", "os.exec", "os.posix_spawn", "pickle.find_class")
        if event == "subprocess.Popen":
            strange = "watcher.py" not in str(details[1])
        if (
            event == "open"
            and isinstance(details[2], int)
            and details[2] & (os.O_WRONLY | os.O_RDWR)
        ):
            path = os.path.realpath(str(details[0]))
            strange = not isinstance(details[0], int) and not path.startswith(
                (inside, "/dev/", "/proc/")
            )
        if strange:
            os.write(2, f"STRANGE {event} {details}\n".encode())

    sys.addaudithook(watch)
    return cli.main(["train", *arguments])


KINDS = (
    "checkpoint",
    "checkpoint",
    "manifest",
    "manifest",
    "model",
    "model",
    "code",
    "data",
    "data",
)


def files(folder: Path, budget: int, seed: int) -> "Counter[str]":
    """Test `budget` hostile files."""
    chance = random.Random(seed)
    figures: Counter[str] = Counter()
    outside, inside = folder / "outside", folder / "inside"
    outside.mkdir()
    inside.mkdir()
    canary = outside / "canary"
    (outside / "secret").write_text("secret")
    content = blobs(canary)
    again, model = good(folder, inside)
    before = {path: path.stat().st_mtime_ns for path in sorted(outside.rglob("*"))}
    while figures["hostile files"] < budget:
        kind = chance.choice(KINDS)
        how = chance.choice((*PLACES, *content, *content))
        place = plant(kind, how, inside, outside, content, chance)
        arguments = model if kind in ("model", "code") else again
        story = f"seed {seed}, number {figures['hostile files']}: {place} ({kind})"
        began = time.monotonic()
        try:
            code, said = fork(folder, run, (str(inside), arguments), stuck=20)
        except AssertionError as error:
            raise AssertionError(f"{story}: {error}") from error
        figures["hostile files"] += 1
        story += f", exit code {code}\n{said}"
        assert time.monotonic() - began < 30, f"slow: {story}"
        assert "Traceback" not in said and code in (0, 1, 2), story
        assert "STRANGE" not in said, story
        assert not canary.exists(), f"executed: {story}"
        now = {path: path.stat().st_mtime_ns for path in sorted(outside.rglob("*"))}
        assert before == now, story
        for harmless in ("/secret", "outside", "looks like a secret"):
            said = said.replace(harmless, "")
        assert "secret" not in said, story
        figures["refused with a line"] += code != 0
        figures["passed over or of no effect"] += code == 0
        shutil.rmtree(inside)
        shutil.copytree(folder / "good", inside, symlinks=True)
    return figures


def good(folder: Path, inside: Path) -> tuple[list[str], list[str]]:
    """Make a run with data and a model, and a copy in `good`; the settings to resume it, and to
    start from the model.
    """
    write_tokens(inside / "tokens", 100)
    entry = {"prefix": "tokens", "num_documents": 100, "dtype": "uint16"}
    (inside / "data.json").write_text(json.dumps({"datasets": [entry]}))
    base = [
        "training.checkpoint.interval=1",
        "training.export.interval=1",
        "training.num_workers=0",
        "data.path=data.json",
    ]
    first = settings(inside, *base, "training.train_iters=1")
    code, said = fork(folder, run, (str(inside), first))
    assert code == 0, said
    shutil.copytree(inside / "run" / "export" / "llama" / "1", inside / "model")
    (inside / "model" / "tokenizer.json").write_text(
        '{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}'
    )
    (inside / "model" / folders.MANIFEST).unlink()
    shutil.copytree(inside, folder / "good", symlinks=True)
    again = settings(inside, *base, "training.train_iters=2")
    new = settings(inside, *base, "training.train_iters=1", f"run.experiment_dir={inside}/new")
    model = [word for word in new if not word.startswith("model.")] + ["pretrained.path=model"]
    return again, model


def plant(
    kind: str,
    how: str,
    inside: Path,
    outside: Path,
    content: dict[str, bytes],
    chance: random.Random,
) -> str:
    """Put a hostile file of a kind where a run reads one. Returns the file and its place."""
    checkpoint, model = inside / "run" / "checkpoint" / "1", inside / "model"
    target = checkpoint / "shard-00001-00001.safetensors"
    if kind == "checkpoint":
        if chance.random() < 0.2:
            target = checkpoint / folders.MANIFEST
        put(target, how, content, outside)
        (checkpoint / ".metadata").write_bytes(content["a pickle"])
        if target.name != folders.MANIFEST:
            write_digests(checkpoint)
    elif kind == "manifest":
        forged = json.loads((checkpoint / folders.MANIFEST).read_bytes())
        number = chance.randrange(len(FORGED))
        FORGED[number](forged)
        how = f"forgery {number}"
        resealed(checkpoint, forged)
    elif kind == "model":
        names = ("model.safetensors", "config.json", "tokenizer.json")
        name = chance.choice((*names, "model.safetensors.index.json", "pytorch_model.bin"))
        target = model / name
        put(target, how, content, outside)
        if name in ("pytorch_model.bin", "model.safetensors.index.json"):
            (model / "model.safetensors").unlink()
    elif kind == "code":
        how = "code next to the model"
        config = json.loads((model / "config.json").read_text())
        config |= {
            "auto_map": {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"},
            "trust_remote_code": True,
        }
        (model / "config.json").write_text(json.dumps(config))
        canary = outside / "canary"
        (model / "evil.py").write_text(
            f"import os\nos.system('touch {canary}')\nclass Evil: pass\n"
        )
    else:
        target = inside / chance.choice(("tokens.idx", "tokens.idx", "tokens.bin", "data.json"))
        put(target, how, content, outside)
    return f"{how} as {target}"


def campaign(folder: Path, budget: int, seed: int) -> dict[str, Any]:
    """`budget`: hostile files."""
    return {**files(folder, budget, seed), "executed": 0, "written outside": 0, "tracebacks": 0}


if __name__ == "__main__":
    command(campaign, 200)
