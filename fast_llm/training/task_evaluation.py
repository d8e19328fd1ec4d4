"""`training.evaluations` with tasks of lm-eval, on the weights in memory.

The first process runs lm-eval and looks for the tasks' texts in the training data, in a process of
its own; all processes compute (scoring.py). Tasks are loaded when the run starts, so that a missing
file or network is found then. A problem of an evaluation later is logged, and training continues.
"""

import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fast_llm.collectives import all_gather_object
from fast_llm.config.evaluation import EvaluationConfig
from fast_llm.data.source import RandomSource
from fast_llm.errors import ConfigError
from fast_llm.evaluation import contamination
from fast_llm.evaluation.contamination import Ngrams, Overlap
from fast_llm.evaluation.tasks import quiet
from fast_llm.parallel.mesh import Mesh
from fast_llm.planning.evaluations import wanted
from fast_llm.planning.run_spec import RunSpec
from fast_llm.training.metrics import Metrics
from fast_llm.training.run import Run
from fast_llm.training.scoring import Interrupted, Scorer

logger = logging.getLogger("fast_llm")


@dataclass
class _Evaluation:
    """An evaluation on the first process."""

    config: EvaluationConfig
    loaded: Mapping[str, Any]  # tasks of lm-eval
    search: "Search | None" = None


class TaskEvaluator:
    """Runs the evaluations of a run that have tasks. Every process calls each method."""

    def __init__(
        self,
        spec: RunSpec,
        mesh: Mesh,
        run: Run,
        scorer: Scorer,
        metrics: Metrics,
        heartbeat: Callable[..., None],
    ):
        """`heartbeat`: called at the start of each phase, as `Watchdog.heartbeat`."""
        self.spec, self.mesh, self.experiment = spec, mesh, run
        self.scorer, self.metrics, self.heartbeat = scorer, metrics, heartbeat
        given = spec.config.training.evaluations.items()
        self.configs = {name: one for name, one in given if one.tasks and one.interval is not None}
        self.evaluations: dict[str, _Evaluation] = {}
        self.model: Any = None

    def load(self) -> None:
        """Load tasks with their data. Raises ConfigError on every process if that fails."""
        if not self.configs:
            return
        self.heartbeat("loading evaluations", slow=True)
        problems: list[str] = []
        if self.mesh.rank == 0:
            try:
                self._load()
            except ConfigError as error:
                problems = error.problems
        if problems := self.mesh.broadcast(problems):
            raise ConfigError(problems)

    def _load(self) -> None:
        from transformers import AutoTokenizer

        from fast_llm.evaluation import harness
        from fast_llm.training.task_model import TaskModel

        with tempfile.TemporaryDirectory() as temporary:
            for name, content in self.spec.extra_files.items():
                path = Path(temporary) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            try:
                with quiet():
                    tokenizer = AutoTokenizer.from_pretrained(temporary)
                own = Tokenizer.from_file(str(Path(temporary) / "tokenizer.json"))
            except Exception as error:  # transformers and tokenizers each raise their own
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise ConfigError(
                    [
                        "training.evaluations: transformers cannot load the model's tokenizer:"
                        f" {first.rstrip('. ')}"
                    ]
                ) from error
        own.no_truncation()
        own.no_padding()
        self.model = TaskModel(tokenizer, self.scorer.length, self.scorer.score)
        for name, config in self.configs.items():
            try:
                loaded = harness.load(wanted(config))
            except ConfigError as error:
                setting = f"training.evaluations.{name}.tasks"
                raise ConfigError([f"{setting}: {text}" for text in error.problems]) from error
            evaluation = self.evaluations[name] = _Evaluation(config, loaded)
            if config.contamination:
                folder = self.experiment.folder
                others = [one.search for one in self.evaluations.values() if one.search is not None]
                evaluation.search = Search.start(
                    name, self.spec, folder, loaded, config.limit, own, others
                )

    def run(self, name: str, step: int) -> bool:
        """Evaluate. Returns False if a signal interrupted it."""
        started = time.perf_counter()
        self.heartbeat("evaluation", step=step, slow=True)
        try:
            values = None
            if self.mesh.rank == 0:
                values = self._scores(name, step)
            else:
                self.scorer.serve()
            if step >= self.spec.config.training.train_iters:
                self._wait_for_search(name if values is not None else None)
        except Interrupted:
            logger.info(f"Evaluation {name} at step {step} was interrupted by a signal.")
            return False
        if values is not None:
            self._add_contamination(name, values)
            self.metrics.write_scores(step, name, values, time.perf_counter() - started)
        return True

    def _scores(self, name: str, step: int) -> dict[str, dict[str, Any]] | None:
        """The scores of each task; None if lm-eval failed."""
        from fast_llm.evaluation import harness

        evaluation = self.evaluations[name]
        self.model.cut, self.scorer.error = 0, None
        try:
            found = harness.run(self.model, evaluation.loaded, evaluation.config.limit)
        except Exception as error:
            if self.scorer.error is not None:  # of the model or of other processes, not of lm-eval
                raise
            self.scorer.finish()
            first = (str(error).strip().splitlines() or [""])[0]
            logger.warning(
                f"Evaluation {name} at step {step} failed, and training continues:"
                f" {type(error).__name__}: {first}"
            )
            return None
        self.scorer.finish()
        if self.model.cut:
            logger.info(
                f"Evaluation {name}: {self.model.cut:,} texts were longer than a sequence"
                f" ({self.scorer.length} tokens), and were cut from the left."
            )
        values: dict[str, dict[str, Any]] = {}
        for score in found:
            task = values.setdefault(score.task, {})
            task[score.metric] = score.value if math.isfinite(score.value) else None
            if score.error is not None and math.isfinite(score.error):
                task[f"{score.metric}_stderr"] = score.error
            task["examples"] = score.examples
        return values

    def _wait_for_search(self, name: str | None) -> None:
        """Wait until the search for an evaluation has ended, on the first process; None: for none.

        It may take hours. All processes wait here, so that no phase reaches its timeout, and the
        signal to stop that any of them gets ends the wait. Raises Interrupted.
        """
        evaluation = None if name is None else self.evaluations[name]
        search = None if evaluation is None else evaluation.search
        logged = False
        while True:
            waits = search is not None and not search.ended(seconds=1.0)
            states = all_gather_object((waits, self.scorer.stop()), self.mesh.slow_group)
            if not any(waiting for waiting, _ in states):
                return
            if any(stopped for _, stopped in states):
                raise Interrupted
            if waits and not logged:
                logger.info(f"Evaluation {name} waits for the search in the training data.")
                logged = True
            self.heartbeat("evaluation", slow=True)

    def _add_contamination(self, name: str, values: dict[str, dict[str, Any]]) -> None:
        """Add the examples that the training data holds, once they are known."""
        search = self.evaluations[name].search
        if search is None:
            return
        for task, overlap in search.result().items():
            if task in values:
                values[task]["contamination"] = overlap.as_dict()

    def close(self) -> None:
        """End searches that still run; the next start begins them again."""
        for evaluation in self.evaluations.values():
            if evaluation.search is not None:
                evaluation.search.close()


class Search:
    """Looks for the texts of an evaluation in the training data, in a process of low priority."""

    def __init__(self, name: str, ngrams: Ngrams, place: Path):
        """`place`: of the result, without its suffix."""
        self.name, self.ngrams, self.place = name, ngrams, place
        self.process: subprocess.Popen[bytes] | None = None
        self.found: dict[str, Overlap] = {}
        self.temporary: tempfile.TemporaryDirectory[str] | None = None

    @classmethod
    def start(
        cls,
        name: str,
        spec: RunSpec,
        folder: Path | None,
        loaded: Mapping[str, Any],
        limit: int | None,
        tokenizer: Tokenizer,
        others: "Sequence[Search]" = (),
    ) -> "Search | None":
        """Begin, unless the experiment folder has the result; None without training data.

        One of the `others` may look for the same texts already, such as with other few-shot
        examples: both wait for its process.
        """
        from fast_llm.evaluation.texts import ngrams_of

        training = spec.dataset.splits.get("training")
        sources: Sequence[Any] = training.sources if training is not None else ()
        files = [file for one in sources if not isinstance(one, RandomSource) for file in one.files]
        if not files:
            return None
        ngrams = ngrams_of(loaded, limit, tokenizer)
        temporary = tempfile.TemporaryDirectory() if folder is None else None
        root = Path(temporary.name) if temporary is not None else folder
        assert root is not None
        kept = root / "contamination"
        kept.mkdir(exist_ok=True)
        search = cls(name, ngrams, kept / contamination.fingerprint(ngrams, files))
        search.temporary = temporary
        if search.result():
            return search
        same = (one.process for one in others if one.place == search.place)
        search.process = next(same, None)
        if search.process is None:
            contamination.write_job(search.place.with_suffix(".npz"), ngrams, files)
            search.process = subprocess.Popen(
                [sys.executable, "-m", contamination.__name__, str(search.place) + ".npz"],
                stdin=subprocess.PIPE,  # its end tells the process that this one has ended
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        return search

    def ended(self, seconds: float = 0.0) -> bool:
        """Whether the process has ended, within some seconds."""
        if self.process is not None:
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                return False
        return True

    def result(self) -> dict[str, Overlap]:
        """What was found of each task; nothing while the search runs."""
        if self.found:
            return self.found
        if self.process is not None and self.ended():
            if code := self.process.returncode:
                logger.warning(
                    f"The search for texts of evaluation {self.name} in the training data failed"
                    f" (exit code {code}); `fast-llm evaluate --data` does the same."
                )
            self.close()
        seen = contamination.read_result(self.place.with_suffix(".npy"), self.ngrams)
        if seen is not None:
            self.found = self.ngrams.overlaps(seen)
            for task, overlap in self.found.items():
                short = f"; {overlap.short:,} are too short to be found" if overlap.short else ""
                logger.info(
                    f"Evaluation {self.name}: the training data holds text of {overlap.found:,} of"
                    f" {overlap.examples:,} examples of {task}, most of {overlap.mostly:,}{short}."
                )
        return self.found

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait()
            self.process = None
