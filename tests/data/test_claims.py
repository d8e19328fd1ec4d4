"""Which locks hold on several nodes, and what follows if they do not."""

from pathlib import Path

import pytest

from fast_llm.data import ranks
from fast_llm.data.claims import local_locks
from fast_llm.data.prepare import prepare
from tests.data.preparing import TEXTS, configure, everything, jsonl, start
from tests.helpers import slow

# Lines of /proc/self/mountinfo.
MOUNTS = r"""
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 21 0:40 / /lustre/a rw,flock - lustre 10.0.0.1@tcp:/a rw,flock,lazystatfs
31 21 0:41 / /lustre/b rw,localflock - lustre 10.0.0.1@tcp:/b rw,localflock,lazystatfs
32 31 0:42 / /lustre/b/home rw - nfs4 server:/home rw,vers=4.2,local_lock=none
33 21 0:43 / /with\040space rw - nfs server:/x rw,vers=3,nolock,local_lock=all
34 21 0:44 / /nfs rw - nfs server:/x rw,vers=3,local_lock=flock
"""


@pytest.mark.parametrize(
    ("path", "option"),
    [
        ("/tmp/out", None),
        ("/lustre/a/out", None),
        ("/lustre/b", "localflock"),
        ("/lustre/b/out", "localflock"),
        ("/lustre/bother", None),
        ("/lustre/b/home/out", None),
        ("/with space/out", "nolock"),
        ("/nfs/out", None),  # flock is not what claims use
    ],
)
def test_mounts_whose_locks_are_local(path: str, option: str | None) -> None:
    assert local_locks(Path(path), MOUNTS) == option
    assert local_locks(Path(path)) is None  # of this machine


def test_local_locks_are_warned_of(
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    monkeypatch.setattr(ranks, "local_locks", lambda _: "localflock")
    for world in (1, 2):
        assert "localflock" not in caplog.text
        output = tmp_path / str(world) / "data"
        prepare(
            configure(
                output,
                tmp_path / "a.jsonl",
                model,
                distributed__world_size=world,
                distributed__rank=world - 1,
            )
        )
    assert (
        f"{output}: mounted with localflock, so locks hold within a node alone: ranks on other"
        " nodes may do the same work twice. The result is the same." in caplog.text
    )


@slow
def test_ranks_that_do_not_see_each_others_locks(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They do some work twice, and end with the same bytes."""
    source = tmp_path / "a.jsonl"
    source.write_bytes(jsonl(TEXTS * 40))
    prepare(configure(tmp_path / "one" / "data", source, model))
    monkeypatch.setenv("LOCAL_LOCKS", "1")
    monkeypatch.setenv("SLOWLY", "1")
    for attempt in range(3):
        output = tmp_path / f"three {attempt}" / "data"
        all_ranks = [
            start(
                tmp_path,
                output,
                source,
                model,
                "distributed.world_size=3",
                f"distributed.rank={rank}",
            )
            for rank in range(3)
        ]
        for process in all_ranks:
            _, stderr = process.communicate(timeout=300)
            assert process.returncode == 0, stderr
        assert everything(output.parent) == everything(tmp_path / "one")
