"""Folders that are complete or absent: damage, unknown files, replacement, deletion, flushes."""

import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fast_llm.checkpoint import folder as folders
from fast_llm.config.saving import CheckpointConfig
from fast_llm.errors import CheckpointError
from fast_llm.storage import content_digest


def make(root: Path, step: int, text: str = "", kind: str = "checkpoint") -> Path:
    """A small checkpoint of two files."""
    final = root / str(step)
    partial = folders.begin(final)
    names = ["one.safetensors", "two.safetensors"]
    for name in names:
        (partial / name).write_bytes(f"{name} of step {step} {text}".encode() * 20)
    folders.publish(
        partial, final, kind, step, {"step": step, "text": text}, folders.digests(partial, names)
    )
    return final


def test_what_is_published_is_found_and_whole(tmp_path: Path) -> None:
    root = tmp_path / "new" / "checkpoint"
    path = make(root, 20)
    manifest = folders.verify(path)
    assert (manifest.kind, manifest.step, manifest.info["step"]) == ("checkpoint", 20, 20)
    assert sorted(manifest.files) == ["one.safetensors", "two.safetensors"]
    assert folders.latest(root) == path
    assert folders.is_complete(path)
    assert sorted(p.name for p in root.iterdir()) == ["20"]


def test_info_may_be_anything_that_json_holds(tmp_path: Path) -> None:
    # Keys that are numbers sort otherwise as numbers than as the strings they become.
    info = {"a": {10: (1, 2), 9: None}, "loss": float("nan"), "scale": 2.0**-30, "ü": "\ud800"}
    partial = folders.begin(tmp_path / "1")
    folders.publish(partial, tmp_path / "1", "checkpoint", 1, info, {})
    found = folders.verify(tmp_path / "1").info
    assert found["a"] == {"10": [1, 2], "9": None}
    assert found["scale"] == 2.0**-30


def test_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = make(tmp_path, 1)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o750
    assert {p.stat().st_mode & 0o777 for p in path.iterdir()} == {0o640}


def test_names_mean_nothing(tmp_path: Path) -> None:
    make(tmp_path, 5)
    make(tmp_path, 40).rename(tmp_path / "my backup")
    make(tmp_path, 100, kind="export")
    assert folders.find(tmp_path, "checkpoint") == [
        (5, tmp_path / "5"),
        (40, tmp_path / "my backup"),
    ]
    assert folders.latest(tmp_path) == tmp_path / "my backup"
    assert folders.latest(tmp_path, kind="export") == tmp_path / "100"


def test_strangers_are_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = make(tmp_path, 7)
    (tmp_path / ".DS_Store").write_bytes(b"\0\1")
    (tmp_path / "tmp").mkdir()
    (tmp_path / "step-abc").write_text("")
    (tmp_path / "99").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "up").symlink_to(tmp_path)
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0)
    half = folders.begin(tmp_path / "30")
    (half / "one.safetensors").write_bytes(b"x")
    (tmp_path / "50").mkdir()
    (tmp_path / "50" / folders.MANIFEST).mkdir()
    try:
        assert folders.latest(tmp_path) == good
        assert folders.find(tmp_path) == [(7, good)]
        folders.prune(tmp_path, 1, lambda step: False)
        assert not half.exists()
        assert (tmp_path / "99").exists() and (tmp_path / "up").is_symlink() and good.exists()
    finally:
        locked.chmod(0o755)
    assert not caplog.records
    assert folders.latest(tmp_path / "nowhere") is None
    folders.prune(tmp_path / "nowhere", 1, lambda step: False)


def flip(path: Path, place: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[place.randrange(len(data))] ^= 1 << place.randrange(8)
    path.write_bytes(data)


def cut(path: Path, place: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: place.randrange(len(data))])


def lengthen(path: Path, place: random.Random) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def blank(path: Path, place: random.Random) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def remove(path: Path, place: random.Random) -> None:
    path.unlink()


def be_a_folder(path: Path, place: random.Random) -> None:
    path.unlink()
    path.mkdir()


def be_a_pipe(path: Path, place: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)  # reading it would block


@pytest.mark.parametrize("damage", [flip, cut, lengthen, blank, remove, be_a_folder, be_a_pipe])
def test_every_damage_is_found_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    place = random.Random(0)
    make(tmp_path, 10)
    for trial in range(20 if damage in (flip, cut) else 1):
        for name in ("one.safetensors", "two.safetensors"):
            path = make(tmp_path, 20, f"trial {trial}")
            damage(path / name, place)
            with pytest.raises(CheckpointError, match="checkpoint 20 is damaged") as caught:
                folders.verify(path)
            assert str(path / name) in str(caught.value)
            caplog.clear()
            assert folders.latest(tmp_path) == tmp_path / "10"
            assert str(path / name) in caplog.text and "checkpoint 20" in caplog.text


@pytest.mark.parametrize("damage", [flip, cut, blank, remove])
def test_damage_of_the_manifest_is_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    place = random.Random(1)
    make(tmp_path, 10)
    for trial in range(60 if damage in (flip, cut) else 1):
        path = make(tmp_path, 20, f"trial {trial}")
        before = json.loads((path / folders.MANIFEST).read_bytes())
        damage(path / folders.MANIFEST, place)
        try:
            if json.loads((path / folders.MANIFEST).read_bytes()) == before:
                continue  # other white space
        except (OSError, ValueError):
            pass
        with pytest.raises(CheckpointError, match=r"20"):
            folders.verify(path)
        assert folders.latest(tmp_path) == tmp_path / "10"
        assert not folders.is_complete(path)
    assert damage is remove or f"20/{folders.MANIFEST}: damaged" in caplog.text


def test_weights_without_a_manifest_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, unlisted = make(tmp_path, 10), make(tmp_path, 20)
    (unlisted / folders.MANIFEST).unlink()
    assert folders.latest(tmp_path) == good
    assert (
        f"Skipped: {unlisted}: holds weights but no fast_llm_manifest.json; it is not a"
        " complete" in caplog.text
    )


def test_swapped_files_are_found(tmp_path: Path) -> None:
    path = make(tmp_path, 3)
    one, two = path / "one.safetensors", path / "two.safetensors"
    one.rename(path / "x")
    two.rename(one)
    (path / "x").rename(two)
    with pytest.raises(CheckpointError, match="sha256 differs"):
        folders.verify(path)


def test_files_of_another_step_are_found(tmp_path: Path) -> None:
    old, new = make(tmp_path, 3), make(tmp_path, 4)
    (new / "one.safetensors").write_bytes((old / "one.safetensors").read_bytes())
    with pytest.raises(
        CheckpointError, match=r"one.safetensors: its content has changed since it was saved"
    ):
        folders.verify(new)


def forge(path: Path, **changes: Any) -> None:
    """Make a manifest whose digest fits its content."""
    content = json.loads((path / folders.MANIFEST).read_bytes())
    content.pop("sha256")
    content |= changes
    (path / folders.MANIFEST).write_text(json.dumps(content | {"sha256": content_digest(content)}))


@pytest.mark.parametrize(
    "name",
    [
        "../../secret",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a/../b",
        "a//b",
        "a/",
        "./a",
        "a\\b",
        "a\0b",
        folders.MANIFEST,
    ],
)
def test_no_file_name_leaves_the_folder(tmp_path: Path, name: str) -> None:
    path = make(tmp_path, 1)
    forge(path, files={name: {"size": 0, "sha256": "0"}})
    with pytest.raises(CheckpointError, match="is not the name of a file in the folder"):
        folders.verify(path)
    assert folders.latest(tmp_path) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"step": -1},
        {"step": "20"},
        {"step": True},
        {"step": 1e400},
        {"kind": None},
        {"info": []},
        {"files": []},
        {"files": {"one.safetensors": 7}},
        {"files": {"one.safetensors": {"size": "7", "sha256": "0"}}},
        {"files": {"one.safetensors": {"size": 7}}},
    ],
)
def test_forged_manifests_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = make(tmp_path, 1)
    forge(path, **changes)
    with pytest.raises(CheckpointError, match=r"fast_llm_manifest.json: damaged"):
        folders.read_manifest(path)
    assert folders.find(tmp_path) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{}",
        '{"sha256": 1}',
        "[" * 100_000,
        '{"step": ' + "9" * 5000 + "}",
        "\xff",
    ],
)
def test_invalid_manifests_are_refused(tmp_path: Path, text: str) -> None:
    path = make(tmp_path, 1)
    (path / folders.MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match="damaged"):
        folders.read_manifest(path)


def test_a_huge_manifest_is_not_read(tmp_path: Path) -> None:
    path = make(tmp_path, 1)
    with (path / folders.MANIFEST).open("wb") as file:
        file.truncate(folders.LARGEST_MANIFEST + 1)
    with pytest.raises(CheckpointError, match="larger than 67108864 bytes; not a manifest"):
        folders.read_manifest(path)


def test_a_later_format_is_named(tmp_path: Path) -> None:
    path = make(tmp_path, 1)
    forge(path, format="fast-llm folder 2")
    with pytest.raises(
        CheckpointError, match="'fast-llm folder 2', which this version does not read"
    ):
        folders.read_manifest(path)


def test_a_folder_without_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"has no fast_llm_manifest.json; it is not a complete checkpoint"
    ):
        folders.verify(tmp_path)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    make(tmp_path, 20, "old")
    make(tmp_path, 20, "new")
    assert folders.verify(tmp_path / "20").info["text"] == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["20"]


@pytest.mark.parametrize("stranger", ["file", "folder", "link"])
def test_foreign_folders_are_moved_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, stranger: str
) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis").write_text("x")
    at = tmp_path / "checkpoint" / "20"
    at.parent.mkdir()
    match stranger:
        case "file":
            at.write_text("x")
        case "folder":
            precious.rename(at)
        case "link":
            at.symlink_to(precious)
    make(at.parent, 20)
    folders.prune(at.parent, 1, lambda step: False)
    folders.verify(at)
    (aside,) = [p for p in at.parent.iterdir() if p.name != "20"]
    assert aside.name.startswith("20.aside-") and "was moved to" in caplog.text
    assert (aside if stranger == "file" else aside / "thesis").read_text() == "x"


def test_a_replacement_that_broke_off_is_undone_or_finished(tmp_path: Path) -> None:
    make(tmp_path, 10)
    # Killed between the two renames: the old folder is there under another name.
    old = make(tmp_path, 20, "old").rename(tmp_path / "20.replaced-01234567")
    assert folders.latest(tmp_path) == old
    folders.clean(tmp_path)
    assert folders.verify(tmp_path / "20").info["text"] == "old"
    # Killed after them: both are there, and the new one counts.
    (tmp_path / "20").rename(old)
    make(tmp_path, 20, "new")
    assert folders.latest(tmp_path) == tmp_path / "20"
    folders.clean(tmp_path)
    assert not old.exists()
    assert folders.verify(tmp_path / "20").info["text"] == "new"


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 100):
        make(tmp_path, step)
    folders.prune(tmp_path, None, lambda step: False)
    assert len(folders.find(tmp_path)) == 5
    folders.prune(tmp_path, 2, lambda step: step == 20)
    assert [step for step, _ in folders.find(tmp_path)] == [20, 40, 100]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["100", "20", "40"]


def test_permanent_ones_do_not_count_as_kept(tmp_path: Path) -> None:
    """The example of the documentation of keep_every."""
    saved = CheckpointConfig(interval=10, keep=2, keep_every=2)
    for step in range(10, 70, 10):
        make(tmp_path, step)
        folders.prune(tmp_path, saved.keep, saved.is_permanent)
    assert [step for step, _ in folders.find(tmp_path)] == [20, 30, 40, 50, 60]


def test_damaged_ones_do_not_count_as_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        make(tmp_path, step)
    (tmp_path / "30" / "one.safetensors").unlink()
    folders.prune(tmp_path, 1, lambda step: False)
    assert folders.latest(tmp_path) == tmp_path / "20"
    assert not (tmp_path / "10").exists()


def test_later_steps_that_a_run_could_not_continue_from_do_not_count(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        make(tmp_path, step)
    (tmp_path / "30" / "one.safetensors").write_bytes(
        bytes((tmp_path / "30" / "one.safetensors").stat().st_size)
    )
    assert folders.latest(tmp_path) == tmp_path / "20"
    make(tmp_path, 25)
    folders.prune(tmp_path, 1, lambda step: False, current=25)
    assert [step for step, _ in folders.find(tmp_path)] == [25, 30]
    assert folders.latest(tmp_path) == tmp_path / "25"


def test_links_are_not_deleted(tmp_path: Path) -> None:
    other = make(tmp_path / "other", 5)
    root = tmp_path / "checkpoint"
    make(root, 10)
    make(root, 20)
    (root / "linked").symlink_to(other)
    folders.prune(root, 1, lambda step: False)
    assert [step for step, _ in folders.find(root)] == [5, 20]


def test_a_folder_that_cannot_be_deleted_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folders.delete(tmp_path / "nothing")
    assert "nothing could not be deleted: No such file" in caplog.text


def test_deleting_that_broke_off_is_finished(tmp_path: Path) -> None:
    path = make(tmp_path, 20)
    doomed = path.rename(tmp_path / ".20.deleted-01234567")
    assert folders.latest(tmp_path) is None
    folders.clean(tmp_path)
    assert not doomed.exists()


def test_files_that_do_not_show_are_named(tmp_path: Path) -> None:
    partial = folders.begin(tmp_path / "1")
    files = {"x": {"size": 1, "sha256": ""}}
    with pytest.raises(
        CheckpointError, match=r"x: written by another process .* on a disk that all machines share"
    ):
        folders.publish(partial, tmp_path / "1", "checkpoint", 1, {}, files, visible_within=0.2)


def test_everything_is_flushed_before_it_is_relied_upon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order: files, the folder that holds them, the rename, the parent folder."""
    make(tmp_path, 20, "old")
    log: list[str] = []

    def name(path: Any) -> str:
        parts = Path(path).relative_to(tmp_path).parts
        return "/".join(
            part.split(".")[1] if part.startswith(".") else part.split("-")[0] for part in parts
        )

    fsync, rename = os.fsync, os.rename

    def logged_fsync(handle: int) -> None:
        log.append(f"flush {name(os.readlink(f'/proc/self/fd/{handle}'))}")
        fsync(handle)

    def logged_rename(one: Any, two: Any) -> None:
        log.append(f"rename {name(one)}")
        rename(one, two)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "rename", logged_rename)
    final = tmp_path / "20"
    partial = folders.begin(final)
    (partial / "a").write_text("a")
    folders.publish(partial, final, "checkpoint", 20, {}, folders.digests(partial, ["a"]))
    assert log == [
        "flush 20/a",
        f"flush 20/{folders.MANIFEST}",
        "flush 20",
        "rename 20",  # the old one
        "rename 20",  # the new one
        "flush ",
        "rename 20.replaced",  # the old one again, to be deleted
        "flush ",
    ]


@pytest.mark.parametrize("module", ["folder", "huggingface"])
def test_torch_is_not_needed(module: str) -> None:
    code = f"import sys, fast_llm.checkpoint.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("fast_llm")
    logger.propagate = True
    caplog.set_level(logging.WARNING)
