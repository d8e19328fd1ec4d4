"""`fast-llm report`: what runs have done, as one HTML page without any other file. No torch."""

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

from fast_llm.errors import ConfigError
from fast_llm.report.page import Report as Report

logger = logging.getLogger("fast_llm")

NAME = "report.html"  # in the experiment folder


class LiveReport:
    """The report that a run writes of itself. A problem with it never stops training."""

    def __init__(self, folder: Path):
        """`folder`: of the experiment."""
        self.place = folder / NAME
        self.report = Report([folder])
        self.failed = False
        self.thread: threading.Thread | None = None

    def write(self, wait: bool = False) -> None:
        """Write the page as of now, in a thread: other processes wait for this one.

        Does nothing while the page is being written. `wait`: write it in any case before returning.
        """
        if self.thread is not None and (wait or not self.thread.is_alive()):
            self.thread.join()
            self.thread = None
        if self.thread is None and not self.failed:
            self.thread = threading.Thread(target=self._write, name="report", daemon=True)
            self.thread.start()
            if wait:
                self.thread.join()

    def _write(self) -> None:
        """Write the page. The first problem is logged, and ends the report."""
        try:
            self.report.write(self.place)
        except Exception as error:
            self.failed = True
            logger.warning(f"{self.place} could not be written: {error}. Training continues.")


def write_report(runs: Sequence[str], output: str | None = None) -> Path:
    """Write the page of one or more experiment folders. Returns where.

    Raises ConfigError for a folder without metrics, and for several runs without `output`.
    """
    folders = [Path(run).expanduser() for run in runs]
    problems = [
        f"{folder}: no such folder with metrics.jsonl; give the run.experiment_dir of a run"
        for folder in folders
        if not (folder / "metrics.jsonl").is_file()
    ]
    if len(set(folders)) < len(folders):
        problems.append("a run is given twice")
    if len(folders) > 1 and output is None:
        problems.append("--output: missing: with several runs, say which file to write")
    place = Path(output).expanduser() if output is not None else folders[0] / NAME
    if place.is_dir() or (output is not None and not place.parent.is_dir()):
        problems.append(f"--output: {place}: cannot be a file; its folder must exist")
    if problems:
        raise ConfigError(problems)
    Report(folders).write(place)
    return place
