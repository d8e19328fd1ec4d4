"""The YAML files of `fast-llm prepare` and `fast-llm convert`.

As in train.py, the text under a setting is its documentation. What Fast-LLM 0.2 had is in
compat.py.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from fast_llm.config.families import FamilyName
from fast_llm.config.mistakes import Allowed, unsupported
from fast_llm.config.section import Section
from fast_llm.config.types import (
    Count,
    DType,
    ParametersPerFile,
    PathText,
    Positive,
    Processes,
    Text,
)


class SourceConfig(Section):
    """The documents: local files, objects of a store, or a dataset on the Hugging Face Hub."""

    path: PathText
    """A local file, folder or pattern, an object, prefix or pattern of an object store
    (`s3://bucket/prefix`, `gs://bucket/prefix`), or a dataset on the Hub (`hf://datasets/NAME` if a
    local folder has the same name). Formats: parquet, jsonl, json, arrow, and plain text and source
    files, each of which is a document; JSON and text also compressed as .gz, .zst, .bz2 or .xz."""
    config_name: Text | None = None
    """Configuration of a Hub dataset."""
    data_directory: Text | None = None
    """Folder inside the dataset."""
    data_files: Annotated[Text | list[Text], Allowed("a pattern, or a list of patterns")] | None = (
        None
    )
    """Files of the dataset, by name or pattern. null reads all."""
    split: Text = "train"
    """Split, or slices of splits: `train[:1000]`, `train[10%:]+test`."""
    field: Text = "text"
    """Column that holds the text."""
    loss_masking_spans: Text | None = None
    """Column with spans of characters that are not trained on, such as prompts: a list of `[begin,
    end]` for each document, counted from 0, with both ends inside. A token with a character in a
    span is no target; the model still reads it. Documents whose spans are not in their text are
    skipped and counted. Files of plain text have no columns."""
    max_document_bytes: Annotated[
        int, Field(ge=1, le=2**40), Allowed("a number of bytes above 0")
    ] = 2**26
    """Maximum size of a document in bytes (default 64 MiB). Larger ones are skipped and counted.
    Tokenizing takes up to 12 times the size of a text in memory, in each worker; with `tokenizers`,
    110 times."""
    max_bad_lines: Count = 0
    """How many lines that are not JSON are skipped. One more ends the preparation with its file and
    line; 0 allows none. dataset.json counts the skipped lines under `skipped` and lists them under
    `bad_lines`."""
    filter: Text | None = None
    """`module:function` of Python that is called with the text of each document. It returns True to
    keep it, False to skip it, or another text to tokenize. The module is in the current folder, on
    PYTHONPATH or installed, on every node. `hash()`, `random` and `numpy.random` give the same in
    all processes; dataset.json has the digest of the module's file."""
    deduplicate: bool = False
    """Skip documents whose text equals that of an earlier one, exactly. Needs the disk space of
    several ranks. Near duplicates are for other tools."""
    data_type: Literal["uint8", "uint16", "int16", "int32", "int64"] | None = None
    """Integer type of the stored tokens. null means the smallest one that holds the vocabulary."""
    trust_remote_code: Annotated[
        bool,
        unsupported(
            {True: "`datasets` no longer runs code from datasets; convert the dataset to parquet"}
        ),
    ] = False
    """Only no is allowed: `datasets` no longer runs code from datasets. Convert such a dataset to
    parquet."""
    disable_disk_space_check: bool = False
    """Start even if the token files will probably not fit on the disk."""


def _auto(value: Any) -> Any:
    return ("yes" if value else "no") if isinstance(value, bool) else value


Choice = Annotated[Literal["auto", "yes", "no"], BeforeValidator(_auto), Allowed("auto, yes or no")]


class TokenizerConfig(Section):
    """The tokenizer, which must be that of the model."""

    path: PathText
    """The model's folder, a tokenizer file, or a model on the Hub. Files: tokenizer.json,
    `tokenizer.model` (SentencePiece, or Llama 3 as Meta publishes it), `tekken.json`."""
    bos: Choice = "auto"
    """Begin each document with the BOS token. `auto`: if the tokenizer does, because the model was
    trained that way."""
    eos: Choice = "auto"
    """End each document with the EOS token, which separates documents. `auto` means yes."""
    special_tokens: list[Text] = []
    """Special tokens to recognise in text, such as `[<|fim_prefix|>]`. All others are plain text,
    however they are spelled. BOS and EOS are not allowed."""
    engine: Literal["auto", "tokenizers", "gigatoken"] = "auto"
    """Library that tokenizes. The tokens are the same: gigatoken is many times as fast, and
    `tokenizers` checks it. `auto`: gigatoken if it is installed and passes the comparison, except
    for less than 4 MiB of text."""


class WorldConfig(Section):
    """Ranks on a shared file system that share the documents and write the bytes of one."""

    engine: Literal["ranks", "ray"] = "ranks"
    """`ranks`: this command is started once for each rank. `ray`: started once, it runs as tasks on
    the Ray cluster of the environment variable RAY_ADDRESS, or on this machine; `world_size`,
    `rank` and `tokenize_workers` are not used."""
    world_size: Positive | None = None
    """Number of ranks, such as nodes. null means the environment variable WORLD_SIZE, or 1."""
    rank: Count | None = None
    """Number of this rank, from 0. null means the environment variable RANK, or 0."""

    @field_validator("rank")
    @classmethod
    def _below_world_size(cls, value: int | None, info: ValidationInfo) -> int | None:
        world = info.data.get("world_size")
        if value is not None and world is not None and value >= world:
            raise ValueError(
                f"given {value}, must be below distributed.world_size {world}: ranks count from 0"
            )
        return value


class PrepareConfig(Section):
    """The YAML file of `fast-llm prepare`."""

    output_path: PathText
    """Folder of the token files. Their metadata is written next to it, to `<output_path>.json`."""
    loading_workers: Processes = 1
    """Number of threads that count the rows of local files, or of processes that read a Hub
    dataset."""
    tokenize_workers: Processes = 1
    """Number of processes that tokenize."""
    tokens_per_shard: Annotated[
        int, Field(ge=100_000, le=2**62), Allowed("an integer of 100000 or more")
    ] = 10**9
    """Tokens per token file. The document that reaches this number is the last of its file."""
    dataset: SourceConfig
    tokenizer: TokenizerConfig
    distributed: WorldConfig = WorldConfig()


class ConvertInput(Section):
    """The weights to convert."""

    format: Literal["auto", "distributed", FamilyName] = "distributed"
    """`distributed`: a checkpoint of this project. The name of its family: a Hugging Face folder.
    `auto`: one or the other, as the folder is."""
    path: PathText
    """Folder of the checkpoint (`<experiment_dir>/checkpoint/<step>`) or of the model, which may
    also be on the Hub."""
    average: Text | None = None
    """Convert a running average of the weights that the checkpoint holds, by its name in
    `training.averages`. null converts the weights."""


class ConvertOutput(Section):
    """The converted weights."""

    format: Literal["auto", "distributed", FamilyName] = "auto"
    """`auto`, or the name of its family: a Hugging Face folder. `distributed`: a checkpoint without
    optimizer state, to start training from."""
    path: PathText
    """Folder to write."""
    data_type: DType | None = None
    """Dtype of the weights of a Hugging Face folder. null means the training dtype of a checkpoint,
    or the dtype of the input weights of a model."""
    parameters_per_file: ParametersPerFile = 2**32
    """Maximum number of parameters in one file of a Hugging Face folder."""


class ConvertConfig(Section):
    """The settings of `fast-llm convert`."""

    input: ConvertInput
    output: ConvertOutput
    exist_ok: bool = False
    """Exit successfully, without converting, if the output already exists and is complete."""

    @field_validator("output")
    @classmethod
    def _fits_input(cls, value: ConvertOutput, info: ValidationInfo) -> ConvertOutput:
        source = info.data.get("input")
        if value.format == "distributed":
            if source is not None and source.format == "distributed":
                raise ValueError("the input is already in distributed format; copy the folder")
            for name in ("data_type", "parameters_per_file"):
                if name in value.model_fields_set:
                    raise ValueError(
                        f"{name} belongs to a Hugging Face folder; a checkpoint holds fp32 weights"
                    )
        return value
