"""Which of several processes does which work, agreed through locks in the output folder.

A claim is a lock on one byte of a file. The operating system releases it when the process ends, in
whatever way, also on another node of a network file system. So work of a dead process is claimed
again, and work of a living one is not.

File systems without locks have no claims. `available` is then false, each process tokenizes the
share that is dealt to it, and those that find all units done write the token files.

Some mounts keep locks to their own node (`local_locks`), so processes of other nodes may claim the
same work. They then do it twice, and each writes the same bytes under names of its own before
renaming; no result depends on a claim.
"""

import errno
import fcntl
import logging
import os
import re
from pathlib import Path

logger = logging.getLogger("fast_llm")

_HELD = (errno.EACCES, errno.EAGAIN)
# Of each network file system, the mount options that keep POSIX locks to the node.
_LOCAL = {"lustre": ("localflock",), "nfs": ("nolock", "local_lock=all", "local_lock=posix")}


def local_locks(path: Path, mounts: str | None = None) -> str | None:
    """The mount option for which locks on a path hold within this node alone, if there is one.

    `mounts`: the text of /proc/self/mountinfo (man 5 proc), by default of this process.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text()
        except OSError:
            return None
    best, found = "", None
    for line in mounts.splitlines():
        before, _, behind = line.partition(" - ")
        if len(fields := before.split()) < 6 or len(ends := behind.split()) < 3:
            continue
        place = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
        inside = os.path.realpath(path) == place or str(os.path.realpath(path)).startswith(
            place.rstrip("/") + "/"
        )
        if inside and len(place) >= len(best):
            options = {*fields[5].split(","), *ends[2].split(",")}
            local = _LOCAL.get(ends[0].rstrip("4"), ())
            best, found = place, next((each for each in local if each in options), None)
    return found


class Claims:
    """The claims of this process, in a file that all processes share."""

    def __init__(self, path: Path):
        self.path = path
        self.file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self.available = True

    def take(self, number: int) -> bool:
        """Claim a piece of work; False if another process has it, or without locks."""
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
            return True
        except OSError as error:
            if error.errno not in _HELD and self.available:
                self.available = False
                logger.warning(
                    f"{self.path.parent}: the file system has no locks ({error.strerror}); each"
                    " rank tokenizes a fixed share of the documents."
                )
            return False

    def release(self, number: int) -> None:
        """Give up a claim."""
        if self.available:
            fcntl.lockf(self.file, fcntl.LOCK_UN, 1, number)

    def close(self) -> None:
        """Release all claims."""
        os.close(self.file)
