"""Push exports to the Hugging Face Hub in the background (`training.export.push_to_hub`).

The first process has a thread, which starts a process for each upload (push_process.py). A failed
upload is logged and retried, until a newer export replaces it. Nothing here ends a run.
`pushed.json` in the experiment folder says which exports were pushed, so that a resumed run pushes
what an interrupted one did not.
"""

import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fast_llm.checkpoint import folder as folders
from fast_llm.config.saving import PushConfig
from fast_llm.config.train import TrainConfig
from fast_llm.parallel.mesh import Mesh
from fast_llm.planning.disk import export_folders
from fast_llm.storage import write_atomically
from fast_llm.training.run import Run

logger = logging.getLogger("fast_llm")

RECORD = "pushed.json"
_PAUSE, _LONGEST_PAUSE = 5.0, 300.0  # seconds between attempts, doubled each time
_LAST_PAUSE, _LAST_ATTEMPTS = 5.0, 3  # when training has ended
_LOOK_SECONDS = 2.0  # between looks at signals, at the end


@dataclass(frozen=True, eq=False)
class _Export:
    """An export that is to be pushed."""

    step: int
    path: Path


class Pusher:
    """Uploads the newest export of a run. Its thread ends with the process."""

    def __init__(self, settings: PushConfig, exports: Path, folder: Path, logs: Path):
        """`exports`: the folder of those that are pushed; `folder`: the experiment's; `logs`: of
        this start.
        """
        self.settings = settings
        self.exports = exports
        self.record = folder / RECORD
        self.errors = logs / "push.txt"  # what the Hub's client prints
        self.changed = threading.Condition()
        self.pending: _Export | None = None  # the newest export that is to be pushed
        self.pushing_step = -1  # of the export that is being read
        self.ending = False  # training has ended: the thread gives up after some attempts
        self.process: subprocess.Popen[str] | None = None
        self.thread: threading.Thread | None = None

    def begin(self, step: int) -> None:
        """Make the repository, so that a wrong name shows now; push what an earlier start left.

        `step`: of the checkpoint that this start resumed from.
        """
        found = folders.find(self.exports)
        complete = [(s, path) for s, path in found if s <= step and folders.is_complete(path)]
        if complete and not self._is_pushed(*complete[-1]):
            self.pending = _Export(*complete[-1])
        self.thread = threading.Thread(target=self._run, name="push", daemon=True)
        self.thread.start()

    def push(self, step: int, path: Path) -> None:
        """Upload this export next, if it is one of those that are pushed. An older one that waits
        is left out.
        """
        if path.parent != self.exports:
            return
        with self.changed:
            self.pending = _Export(step, path)
            self.changed.notify()

    def finish(self) -> None:
        """Training has ended: give up after some more attempts."""
        with self.changed:
            self.ending = True
            self.changed.notify()

    def wait(self, seconds: float) -> bool:
        """Wait a while. Returns whether nothing is left to do."""
        if self.thread is not None:
            self.thread.join(seconds)
        return self.thread is None or not self.thread.is_alive()

    def stop(self) -> None:
        """End what is being uploaded; the next start of the run pushes it."""
        with self.changed:
            left, self.pending, self.ending = self.pending, None, True
            process = self.process
            self.changed.notify()
        if process is not None:
            process.kill()
        if left is not None:
            logger.info(f"{left.path} was not pushed yet; the next start of this run pushes it.")

    def _run(self) -> None:
        try:
            if self.pending is None and (problem := self._upload()[1]):
                logger.warning(f"{self._problem(problem)}. Training continues.")
            while (waiting := self._next()) is not None:
                self._push(waiting)
        except Exception as error:
            logger.warning(f"Exports are no longer pushed to the Hub: {error}. Training continues.")

    def _next(self) -> _Export | None:
        """Wait for an export; None at the end."""
        with self.changed:
            self.changed.wait_for(lambda: self.pending is not None or self.ending)
            return self.pending

    def _push(self, export: _Export) -> None:
        """Upload one export, with retries."""
        pause, last_attempts = _PAUSE, 0
        while self.pending is export:
            problem = self._attempt(export)
            with self.changed:
                if self.pending is not export:
                    return  # a newer export, or the end
                last_attempts += self.ending
                if not problem or last_attempts == _LAST_ATTEMPTS:
                    self.pending = None
                if not problem:
                    return
                if self.pending is None:
                    logger.warning(
                        f"{self._problem(problem)}. {export.path} is not on the Hub; the same"
                        f" command tries again, or `hf upload {self.settings.repo} {export.path}`."
                    )
                    return
                seconds, ending = _LAST_PAUSE if self.ending else pause, self.ending
                logger.warning(
                    f"{self._problem(problem)}. Training continues; the next attempt to push"
                    f" {export.path} is in {seconds:g} s."
                )
                self._wait_for_change(export, ending, seconds)
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _wait_for_change(self, export: _Export, ending: bool, seconds: float) -> None:
        self.changed.wait_for(
            lambda: self.pending is not export or self.ending != ending, timeout=seconds
        )

    def _attempt(self, export: _Export) -> str:
        """Upload an export. Returns the problem."""
        began, self.pushing_step = time.perf_counter(), export.step
        try:
            digest = _digest(export.path)
            commit, problem = self._upload(export.path, f"Step {export.step}")
        except FileNotFoundError:  # the run was rewound
            return ""
        except OSError as error:
            return f"{error}"
        finally:
            self.pushing_step = -1
        if not problem:
            self._note(export.step, digest, commit)
            seconds = time.perf_counter() - began
            logger.info(f"Pushed {export.path} to {commit} in {seconds:.1f} s.")
        return problem

    def _problem(self, problem: str) -> str:
        return f"training.export.push_to_hub: {self.settings.repo}: {problem}"

    def _upload(self, path: Path | None = None, message: str = "") -> tuple[str, str]:
        """The address of the commit, and the problem."""
        arguments: dict[str, Any] = {"repo": self.settings.repo, "private": self.settings.private}
        if path is not None:
            arguments |= {"folder": str(path), "message": message}
        script = str(Path(__file__).with_name("push_process.py"))
        with self.errors.open("ab") as errors:
            process = subprocess.Popen(
                [sys.executable, "-P", script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"},
                start_new_session=True,  # no Ctrl-C from the terminal
            )
        self.process = process
        assert process.stdin is not None and process.stdout is not None
        with process:
            process.stdin.write(json.dumps(arguments) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()  # stdin stays open: its end would end the process
        self.process = None
        try:
            found = json.loads(answer)
        except ValueError:
            return "", f"the upload ended with exit code {process.returncode}; see {self.errors}"
        return found.get("commit", ""), found.get("problem", "")

    # What was pushed.

    def _pushed(self) -> list[dict[str, Any]]:
        """What was pushed to this repository."""
        try:
            content = json.loads(self.record.read_bytes())
            return [one for one in content["pushed"] if one["repo"] == self.settings.repo]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def _is_pushed(self, step: int, path: Path) -> bool:
        newest = self._pushed()[-1:]
        return [(one["step"], one["manifest"]) for one in newest] == [(step, _digest(path))]

    def _note(self, step: int, digest: str, commit: str) -> None:
        one = {"repo": self.settings.repo, "step": step, "manifest": digest, "commit": commit}
        content = {"pushed": [*self._pushed(), one]}
        try:
            write_atomically(self.record, json.dumps(content, indent=1) + "\n")
        except OSError as error:
            logger.warning(
                f"{self.record} cannot be written: {error.strerror}. The next start of this run"
                " pushes the newest export again."
            )


def make_pusher(config: TrainConfig, run: Run) -> Pusher | None:
    """What pushes the exports of a run, on its first process."""
    push = config.training.export.push_to_hub
    if push.repo is None or not run.is_main or run.folder is None or run.logs is None:
        return None
    exports = export_folders(config, run.folder)[push.average or ""]
    return Pusher(push, exports, run.folder, run.logs)


def wait_for_push(
    pusher: Pusher | None,
    mesh: Mesh,
    stopped: bool,
    should_stop: Callable[[], bool],
    heartbeat: Callable[..., None],
) -> None:
    """At the end of a run, wait for the last upload. Every process calls it.

    Not if the run `stopped` before its end. Returns early once `should_stop` says so.
    """
    if pusher is not None and not stopped:
        pusher.finish()
    done = stopped
    while not done:
        heartbeat("pushing", slow=True)  # an upload may take hours
        done = mesh.broadcast(pusher is None or pusher.wait(_LOOK_SECONDS))
        stopped = not done and should_stop()
        done |= stopped
    if pusher is not None and stopped:
        pusher.stop()


def _digest(path: Path) -> str:
    """The digest of an export: that of its manifest, which has those of all files."""
    return hashlib.sha256((path / folders.MANIFEST).read_bytes()).hexdigest()
