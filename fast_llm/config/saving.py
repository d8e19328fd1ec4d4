"""Settings of checkpoints and exports: `training.checkpoint` and `training.export`."""

import re
import shlex
from typing import Annotated, Literal

from pydantic import field_validator, model_validator

from fast_llm.config.compat import EXPORT_FORMATS
from fast_llm.config.families import FamilyName
from fast_llm.config.mistakes import Allowed, unsupported
from fast_llm.config.section import Interval, Section
from fast_llm.config.types import Count, DType, Fraction, ParametersPerFile, Positive, Text


class CallbackConfig(Section):
    """A program that the first process starts after each checkpoint or export. Training does not
    wait for it.
    """

    script: Annotated[str | list[str], Allowed("a command, or a list of its words")] | None = None
    """The command, as a line for a shell or as a list of words. The environment variable
    FAST_LLM_SAVED holds the folder that was written. null starts nothing."""
    environment: dict[str, str] = {}
    """Further environment variables for the command. They are written to config.yaml and to
    checkpoints, so do not put secrets here: set those where training is started; the command
    inherits them."""

    @field_validator("script")
    @classmethod
    def _begins_with_a_program(cls, value: str | list[str] | None) -> str | list[str] | None:
        try:
            words = shlex.split(value) if isinstance(value, str) else value
        except ValueError as error:
            raise ValueError(
                f"given {value}, which is not a valid command line: {str(error).lower()}"
            ) from error
        if words is not None and not (words and words[0]):
            raise ValueError("given no words, must begin with a program; leave it out for none")
        return value

    @field_validator("environment")
    @classmethod
    def _no_secrets(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(
                    f"{name} cannot be the name of an environment variable; use letters, digits and"
                    " _"
                )
            if re.search("token|key|secret|password|credential", name, re.IGNORECASE):
                raise ValueError(
                    f"{name} looks like a secret, which would be written to config.yaml; set it in"
                    " the environment that training is started in"
                )
        return value


class SavedConfig(Interval):
    """When checkpoints or exports are written, and how many are kept."""

    keep_every: Positive | None = None
    """Keep one in this many saved folders permanently: those of steps that are multiples of
    `keep_every` × `interval`, counted from `offset`. `keep` does not count them. With
    `interval: 10`, `keep_every: 2` and `keep: 2` the steps 20, 40, 60 are permanent. After step 60,
    30 and 50 are kept too, the two newest of the others."""
    callback: CallbackConfig = CallbackConfig()

    def is_permanent(self, step: int) -> bool:
        """Whether what is saved after this step is never deleted."""
        if self.keep_every is None or self.interval is None:
            return False
        return (step - self.offset) % (self.keep_every * self.interval) == 0


class CheckpointConfig(SavedConfig):
    """Checkpoints, from which the same command resumes: fp32 weights and both moments (12 bytes a
    parameter; 8 with bf16 or int8 moments, as int8 is stored as bf16), counters, settings and what
    identifies the data. With `interval` set, one is also saved after the last step. When a signal
    stops training and `run.experiment_dir` is set, one is saved even without `interval`.
    """

    keep: Positive | None = 5
    """Number of newest checkpoints to keep, besides those of `keep_every`. null keeps all."""
    background: bool = True
    """Write checkpoints and exports in the background while training continues. This copies a
    checkpoint's tensors to host memory, once for each group of `model.multi_stage.shard_size`
    processes. If the memory is too small, training waits instead."""


class AverageConfig(Section):
    """A running average of the weights, in fp32. It is kept in host memory (4 bytes a parameter,
    and 4 more while a checkpoint or export is written; on a GPU 4 more for all averages together),
    once for each group of `model.multi_stage.shard_size` processes. It is saved in checkpoints, and
    exported beside the model, to `export/<family>-<name>/<step>/`.
    """

    decay: Annotated[Fraction | None, Allowed("a number from 0 to below 1, or null")] = None
    """Each update moves the average by 1 - decay of the way to the weights (an exponential moving
    average, EMA). The first update makes it equal to them. null means the uniform mean."""
    interval: Positive = 10
    """Steps between two updates of the average. Each copies the weights to host memory."""
    start: Count = 0
    """Step after which the average begins, for example the first step of the decay of the learning
    rate."""
    length: Positive | None = None
    """Steps of a stretch, after which a uniform mean begins anew. Exports at the multiples of it
    are the means of each stretch. null averages all steps after `start`."""

    @model_validator(mode="after")
    def _means_have_stretches(self) -> "AverageConfig":
        if self.length is not None and self.decay is not None:
            raise ValueError("length belongs to a uniform mean; leave out decay or length")
        if self.length is not None and self.length % self.interval:
            raise ValueError(
                f"given length {self.length}, must be a multiple of interval, {self.interval}"
            )
        return self

    def due(self, step: int) -> bool:
        """Whether the average is updated after a step."""
        return step > self.start and (step - self.start) % self.interval == 0

    def begins_anew(self, step: int) -> bool:
        """Whether a step is the first at which the average, or its stretch, is updated.

        A run that resumes or branches may have an average of the same name with another start.
        """
        after_first = step - self.start - self.interval
        return after_first == 0 or (self.length is not None and after_first % self.length == 0)


class PushConfig(Section):
    """Push exports to the Hugging Face Hub, in the background: each is a commit of one repository.
    The first process uploads, with the token of its environment (`HF_TOKEN`, or `hf auth login`).
    A failed upload is logged and retried until the next export; it never stops training. At the
    end, the run waits for its last upload. A resumed run pushes what an interrupted one did not.
    """

    repo: Annotated[Text | None, Allowed("organisation/name or null")] = None
    """Repository, as organisation/name. It is created at the start if it is missing. README.md and
    weights in it are replaced at each push. null pushes nothing."""
    private: bool = True
    """Create a private repository, and push to no public one. `no` accepts both, and creates a
    public one."""
    average: Text | None = None
    """Push the exports of this running average, by its name in `training.averages`, instead of
    those of the weights."""

    @field_validator("repo")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        # https://huggingface.co/docs/huggingface_hub: validate_repo_id
        part = r"[A-Za-z0-9_](?:(?!--|\.\.)[\w.-])*"
        if value is not None and (
            not re.fullmatch(f"{part}/{part}", value, re.ASCII)
            or value.endswith((".git", "-", "."))
            or len(value) > 96
        ):
            raise ValueError(f"given {value}, must be the name of a repository: organisation/name")
        return value


class ExportConfig(SavedConfig):
    """Exports: Hugging Face folders with weights, configuration and tokenizer, in
    `export/<family>/<step>/`. With `interval` set, one is also written after the last step.
    """

    keep: Positive | None = None
    """Number of newest exports to keep, besides those of `keep_every`. null keeps all."""
    format: Annotated[
        Literal["auto", FamilyName],
        unsupported(EXPORT_FORMATS),
    ] = "auto"
    """Family of the model in the folder, as transformers reads it. `auto`: that which is
    trained."""
    model_weights: Annotated[
        bool, unsupported({False: "exports always hold weights; to write none set interval: null"})
    ] = True
    """Only yes is allowed: exports always hold weights."""
    optimizer_state: (
        Annotated[
            bool,
            unsupported({True: "a Hugging Face folder holds no optimizer state; checkpoints do"}),
        ]
        | None
    ) = None
    """Only no is allowed: a Hugging Face folder holds no optimizer state."""
    parameters_per_file: ParametersPerFile = 2**32
    """Maximum number of parameters in one safetensors file."""
    data_type: DType | None = None
    """Dtype of the exported weights. null means `model.distributed.training_dtype`."""
    push_to_hub: PushConfig = PushConfig()
