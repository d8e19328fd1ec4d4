"""The configuration of `prepare` and of `convert`."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from fast_llm.config.section import Section
from fast_llm.config.train import DType, Positive


class SourceConfig(Section):
    """Documents, read through Hugging Face's `datasets`."""

    path: str
    """A dataset on the Hub, or a local file, folder or pattern: parquet, jsonl (also .gz, .zst), arrow, plain text
    and source files (a file is a document)."""
    config_name: str | None = None
    """Which configuration of a Hub dataset."""
    data_directory: str | None = None
    """Which folder of a Hub dataset, or of a local one."""
    data_files: str | list[str] | None = None
    """Which files, as patterns."""
    split: str = "train"
    """Which split."""
    field: str = "text"
    """The column that holds the document."""
    data_type: Literal["uint8", "uint16", "int16", "int32", "int64"] | None = None
    """Integer type of the tokens; null is the smallest that holds the vocabulary."""
    trust_remote_code: Literal[False] = False
    """Only no: `datasets` runs no code from datasets any more; convert such a dataset to parquet."""
    disable_disk_space_check: bool = False
    """Start even if the result may not fit on the disk."""


def _auto(value: Any) -> Any:
    return {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value


Choice = Annotated[Literal["auto", "yes", "no"], BeforeValidator(_auto)]


class TokenizerConfig(Section):
    """The tokenizer: the model's own."""

    path: str
    """Folder with tokenizer.json, that file, or a model on the Hub."""
    bos: Choice = "auto"
    """Whether a document begins with the BOS token; auto is: as the tokenizer does it, hence as the model was trained."""
    eos: Choice = "auto"
    """Whether a document ends with the EOS token; auto is yes, so that documents never run together."""


class WorldConfig(Section):
    """Several nodes, each of which prepares a part on a shared file system."""

    world_size: Positive | None = None
    """How many; null is WORLD_SIZE of the environment, or 1."""
    rank: Annotated[int, Field(ge=0)] | None = None
    """Which of them this is; null is RANK of the environment, or 0."""


class PrepareConfig(Section):
    """The whole file of `prepare`."""

    output_path: str
    """Folder of the token files; their metadata is written beside it, with `.json` behind its name."""
    loading_workers: Positive = 1
    """Processes that `datasets` reads with."""
    tokenize_workers: Positive = 1
    """Processes that tokenize."""
    tokens_per_shard: Annotated[int, Field(ge=100_000)] = 10**9
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
    path: str


class ConvertOutput(Section):
    """What it becomes."""

    format: Literal["llama", "distributed"] = "llama"
    path: str
    data_type: DType | None = None
    """dtype of the weights; null is bf16 for a checkpoint trained in it, else as it is."""
    parameters_per_file: Annotated[int, Field(ge=2**20)] = 2**32


class ConvertConfig(Section):
    """The whole of `convert`."""

    input: ConvertInput
    output: ConvertOutput
    exist_ok: bool = False
    """Do nothing, successfully, if the output is already there and whole."""
