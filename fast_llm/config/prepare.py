"""The configuration of `prepare` and of `convert`.

As in train.py the text under a setting is its documentation, and what Fast-LLM 0.2 had besides is refused by name.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from fast_llm.config.mistakes import Allowed, unsupported
from fast_llm.config.section import Count, PathText, Positive, Section, Text
from fast_llm.config.train import DType

Processes = Annotated[int, Field(ge=1, le=1024), Allowed("an integer from 1 to 1024")]


class SourceConfig(Section):
    """Documents: files, or a dataset on the Hugging Face Hub."""

    path: PathText
    """A local file, folder or pattern, or a dataset on the Hub (`hf://datasets/NAME` if a folder here has its name):
    parquet, jsonl, json, arrow, plain text and source files (a file is a document); also .gz, .zst, .bz2, .xz."""
    config_name: Text | None = None
    """Which configuration of a Hub dataset."""
    data_directory: Text | None = None
    """Which folder of a Hub dataset, or of a local one."""
    data_files: Annotated[Text | list[Text], Allowed("a pattern, or a list of patterns")] | None = (
        None
    )
    """Which files, by name or pattern."""
    split: Text = "train"
    """Which split, or parts: `train[:1000]`, `train[10%:]+test`."""
    field: Text = "text"
    """The column that holds the document."""
    max_document_bytes: Annotated[
        int, Field(ge=1, le=2**40), Allowed("a number of bytes above 0")
    ] = 2**26
    """A text of more bytes than this (64 MiB) is left out, counted and named. Tokenizing takes 110 times as much
    memory as the text, in each worker."""
    data_type: Literal["uint8", "uint16", "int16", "int32", "int64"] | None = None
    """Integer type of the tokens; null is the smallest that holds the vocabulary."""
    trust_remote_code: Annotated[
        bool,
        unsupported(
            {
                True: "`datasets` runs no code from datasets any more; convert such a dataset to parquet"
            }
        ),
    ] = False
    """Only no: `datasets` runs no code from datasets any more; convert such a dataset to parquet."""
    disable_disk_space_check: bool = False
    """Start even if the result may not fit on the disk."""


def _auto(value: Any) -> Any:
    return ("yes" if value else "no") if isinstance(value, bool) else value


Choice = Annotated[Literal["auto", "yes", "no"], BeforeValidator(_auto), Allowed("auto, yes or no")]


class TokenizerConfig(Section):
    """The tokenizer: the model's own."""

    path: PathText
    """Folder with tokenizer.json, that file, or a model on the Hub."""
    bos: Choice = "auto"
    """Whether a document begins with the BOS token; auto is: as the tokenizer does it, hence as the model was trained."""
    eos: Choice = "auto"
    """Whether a document ends with the EOS token; auto is yes, so that documents never run together."""


class WorldConfig(Section):
    """Several nodes, each of which prepares a part on a shared file system."""

    world_size: Positive | None = None
    """How many; null is WORLD_SIZE of the environment, or 1."""
    rank: Count | None = None
    """Which of them this is, from 0; null is RANK of the environment, or 0."""

    @field_validator("rank")
    @classmethod
    def _one_of_them(cls, value: int | None, info: ValidationInfo) -> int | None:
        world = info.data.get("world_size")
        if value is not None and world is not None and value >= world:
            raise ValueError(
                f"given {value}, must be below distributed.world_size {world}: ranks count from 0"
            )
        return value


class PrepareConfig(Section):
    """The YAML file of `fast-llm prepare`."""

    output_path: PathText
    """Folder of the token files; their metadata is written beside it, with `.json` behind its name."""
    loading_workers: Processes = 1
    """Threads that count rows of local files; processes that `datasets` reads the Hub's with."""
    tokenize_workers: Processes = 1
    """Processes that tokenize."""
    tokens_per_shard: Annotated[
        int, Field(ge=100_000, le=2**62), Allowed("an integer of 100000 or more")
    ] = 10**9
    """A token file is closed by the document that brings it to this many tokens."""
    dataset: SourceConfig
    tokenizer: TokenizerConfig
    distributed: WorldConfig = WorldConfig()


PREPARE_REFUSED: dict[str, str] = {
    "saving_workers": "token files are written while tokenizing; set tokenize_workers",
    "splits": "split when training, with data.split",
    "dataset.loss_masking_spans": "every token of a document is a target; leave it out",
    "distributed.backend": "nodes meet in the shared folder alone; leave it out",
}


class ConvertInput(Section):
    """What is converted."""

    format: Literal["llama", "distributed"] = "distributed"
    """`distributed`: a checkpoint of training. `llama`: a Hugging Face folder."""
    path: PathText
    """The folder of the checkpoint (`<experiment_dir>/checkpoint/<step>`) or model; a model may be on the Hub."""


class ConvertOutput(Section):
    """What it becomes."""

    format: Literal["llama", "distributed"] = "llama"
    """`llama`: a Hugging Face folder. `distributed`: a checkpoint without moments, to start training from."""
    path: PathText
    """The folder to write."""
    data_type: DType | None = None
    """Of a Hugging Face folder's weights; null is what a checkpoint was trained in, or what a model's weights have."""
    parameters_per_file: Annotated[
        int, Field(ge=2**20, le=2**62), Allowed("an integer of 2^20 (1048576) or more")
    ] = 2**32
    """The most parameters in one file of a Hugging Face folder."""


class ConvertConfig(Section):
    """The settings of `fast-llm convert`."""

    input: ConvertInput
    output: ConvertOutput
    exist_ok: bool = False
    """Do nothing, successfully, if the output is already there and whole."""

    @field_validator("output")
    @classmethod
    def _fits_input(cls, value: ConvertOutput, info: ValidationInfo) -> ConvertOutput:
        source = info.data.get("input")
        if value.format == "distributed":
            if source is not None and source.format == "distributed":
                raise ValueError(
                    "format: distributed of a checkpoint is what it is already; copy the folder"
                )
            for name in ("data_type", "parameters_per_file"):
                if name in value.model_fields_set:
                    raise ValueError(
                        f"{name} belongs to format: llama; a checkpoint holds fp32 weights"
                    )
        return value


CONVERT_REFUSED: dict[str, str] = {
    "use_cpu": "conversion always runs on the CPU; leave it out",
    "layers_per_step": "all weights are converted at once, which takes 4 bytes of memory for each; leave it out",
    "input.model_weights": "weights are always converted; leave it out",
    "input.optimizer_state": "moments are not converted; copy the checkpoint's folder to keep them",
    "input.load_config": "the model's shape comes from its configuration; leave it out",
    "output.model_weights": "weights are always converted; leave it out",
    "output.optimizer_state": "moments are not converted; copy the checkpoint's folder to keep them",
}
