"""Any call to the disk may fail: what is found then is the previous folder or the new one.

The same with real kills and power cuts is in tests/faults/crashes.py.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fast_llm.checkpoint import folder
from fast_llm.errors import CheckpointError

NAMES = ["a.safetensors", "b.safetensors"]


def write(root: Path, step: int, text: str) -> None:
    final = root / str(step)
    partial = folder.begin(final)
    for name in NAMES:
        (partial / name).write_bytes(f"{name} {step} {text}".encode())
    folder.publish(
        partial, final, "checkpoint", step, {"text": text}, folder.digests(partial, NAMES)
    )


def content(path: Path | None) -> str:
    """The text that a folder was written with. Fails if its files come from several writes."""
    assert path is not None, "nothing is left"
    manifest = folder.verify(path)
    text: str = manifest.info["text"]
    assert sorted(manifest.files) == NAMES
    for name in NAMES:
        assert (path / name).read_bytes() == f"{name} {manifest.step} {text}".encode()
    return text


class Stop(BaseException):
    """Stands for a kill: no code of the package catches it."""


def break_call(monkeypatch: pytest.MonkeyPatch, number: int, stop: BaseException) -> list[str]:
    """Make call `number` (from 0) to the disk fail; the returned list collects the calls."""
    made: list[str] = []

    def failing(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            if len(made) == number + 1:
                raise stop
            return real(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "open", "mkdir", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, failing(name, getattr(os, name)))
    monkeypatch.setattr(Path, "open", failing("Path.open", Path.open))
    monkeypatch.setattr(folder, "THREADS", 1)
    return made


@pytest.mark.parametrize(
    "stop", [Stop(), OSError(28, "No space left on device")], ids=["kill", "disk full"]
)
@pytest.mark.parametrize("replace", [False, True])
def test_every_call_may_be_the_last(tmp_path: Path, stop: BaseException, replace: bool) -> None:
    """The disk fails before and after the clean-up; a new folder survives every later failure."""
    seen = []
    for number in range(80):
        root = tmp_path / str(number)
        write(root, 1, "previous")
        with pytest.MonkeyPatch.context() as monkeypatch:
            made = break_call(monkeypatch, number, stop)
            try:
                write(root, 1 if replace else 2, "new")
                returned = True
            except type(stop):
                returned = False
        text = content(folder.latest(root))
        assert text == "new" or not returned
        folder.prune(root, keep=5, is_permanent=lambda step: False)
        assert content(folder.latest(root)) == text
        assert sorted(os.listdir(root)) in (["1"], ["1", "2"]), "leftovers stay"
        seen.append(text)
        if len(made) <= number:  # nothing failed
            break
    else:
        raise AssertionError("more calls than expected")
    assert seen == sorted(seen, reverse=True) and set(seen) == {"previous", "new"}
    assert {"fsync", "rename", "open", "mkdir", "Path.open"} <= set(made)


def test_unreadable_as_nobody(tmp_path: Path) -> None:
    """An unreadable folder counts as absent. Checked without root, which may read everything."""
    for step in (1, 2, 3):
        write(tmp_path, step, "")
    tmp_path.chmod(0o755)
    (tmp_path / "2" / "a.safetensors").chmod(0)
    (tmp_path / "3").chmod(0)
    child = os.fork()
    if child == 0:
        result = 2
        try:
            os.chdir(tmp_path)  # paths from here, since the folders above are their owner's alone
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            with pytest.raises(
                CheckpointError, match=r"a\.safetensors: Permission denied; checkpoint 2"
            ):
                folder.verify(Path("2"))
            assert folder.latest(Path(".")) == Path("1")
            result = 0
        finally:
            os._exit(result)
    status = os.waitpid(child, 0)[1]
    (tmp_path / "3").chmod(0o755)
    assert os.waitstatus_to_exitcode(status) == 0


def test_damaged_replacement_falls_back_to_what_it_replaces(tmp_path: Path) -> None:
    write(tmp_path, 5, "old")
    (tmp_path / "5").rename(tmp_path / "5.replaced-0123abcd")
    write(tmp_path, 5, "new")
    (tmp_path / "5" / NAMES[0]).write_bytes((tmp_path / "5" / NAMES[1]).read_bytes())
    assert content(folder.latest(tmp_path)) == "old"
