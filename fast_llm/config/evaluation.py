"""Settings of evaluations: `training.evaluations`."""

from fast_llm.config.section import Interval
from fast_llm.config.types import Count, PathText, Positive, Text


class EvaluationConfig(Interval):
    """An evaluation on an interval of its own, of validation sets or of tasks of lm-eval. It runs
    before the first step, every `interval` steps, and after the last step.
    """

    validation_sets: list[Text] = []
    """Names of `data.validation_sets` whose losses this evaluation measures.
    `training.validation` then leaves them to it."""
    iterations: Positive | None = None
    """Number of batches (of `batch.batch_size` sequences) of each set. Required with
    `validation_sets`."""
    tasks: list[Text] = []
    """Tasks, groups or tags of lm-eval, or YAML files of tasks, that compare log-probabilities.
    They run on the weights in memory, and all processes share the work. Prompts that are longer
    than `batch.sequence_length` are cut from the left. Tasks that generate text are refused;
    `fast-llm evaluate` runs them on an export. Requires the packages of the extra `evaluate`."""
    include_path: PathText | None = None
    """Folder with YAML files of further tasks."""
    num_fewshot: Count | None = None
    """Examples before each question. null means what each task says."""
    limit: Positive | None = None
    """Number of examples of each task. null means all."""
    contamination: bool = True
    """Look for the tasks' texts in the training data, in the background, and log with the scores
    how many examples it holds."""

    @property
    def problem(self) -> str:
        """What is wrong with these settings together; "" for nothing."""
        if self.interval is None and "interval" not in self.model_fields_set:
            return "missing interval: give the number of steps, e.g. 1000, or null"
        if bool(self.tasks) == bool(self.validation_sets):
            both = "both are given" if self.tasks else "neither is given"
            return f"give tasks or validation_sets; {both}"
        if self.validation_sets and self.iterations is None:
            return "missing iterations: validation_sets require it, e.g. 25"
        if self.tasks and self.iterations is not None:
            return "iterations belong to validation_sets; for tasks, give limit"
        return ""

    def due_at(self, step: int, last: int) -> bool:
        """Whether it runs after a step of a run with `last` steps."""
        at_ends = step == 0 or step >= last
        return self.interval is not None and (at_ends or self.due(step))
