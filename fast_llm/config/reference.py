"""Makes docs/settings.md from the configuration itself: `python -m fast_llm.config.reference > docs/settings.md`.

What a setting is and means stands under it in train.py and prepare.py, what is refused beside it. Only what
differs from Fast-LLM 0.2 is written here. A test compares the page with this.
"""

import ast
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from fast_llm.config.mistakes import describe_allowed, nested_sections, refused_values
from fast_llm.config.prepare import CONVERT_REFUSED, PREPARE_REFUSED, ConvertConfig, PrepareConfig
from fast_llm.config.text import format_value
from fast_llm.config.train import REFUSED, RENAMED, TrainConfig

# Setting → what Fast-LLM 0.2 did, and why it is different here.
DIFFERENT: dict[str, tuple[str, str]] = {
    "training.num_workers": (
        "processes",
        "Threads: reading tokens holds no lock, and nothing has to be copied.",
    ),
    "training.timeout": (
        "60 seconds, model.distributed.timeout",
        "A save or export of a large model takes minutes; waiting for one is no fault.",
    ),
    "training.validation.interval": (
        "other sequences at every validation, none at step 0",
        "Losses can only be compared on the same sequences; step 0 is what the others are compared with.",
    ),
    "training.checkpoint.keep_every": (
        "9000, 19000, … with interval 1000 and keep_every 10",
        "Multiples of keep_every × interval: 10000, 20000, …",
    ),
    "training.export.keep_every": ("as above", "As above."),
    "training.export.format": (
        "fast_llm",
        "Exports are for use elsewhere; the same state is in checkpoints.",
    ),
    "training.export.data_type": (
        "null is fp32, 32 GB for 8 billion parameters",
        "The dtype that was trained in, as the original has it.",
    ),
    "training.wandb": (
        "off, without a word, as long as entity_name is null",
        "On as soon as one of its settings is given; null is your default entity.",
    ),
    "batch.breadth_first_micro_batches": (
        "any number",
        "Without pipeline parallelism the order changes nothing but memory.",
    ),
    "batch.cross_document_attention": (
        "yes",
        "Llama 3.1 was pretrained with documents kept apart; yes gives 0.2's way.",
    ),
    "data.split": ("exactly three numbers", "What is left out is 0."),
    "optimizer.beta_1": ("1 is allowed", "With 1 nothing is ever learned."),
    "optimizer.beta_2": ("1 is allowed", "With 1 nothing is ever learned."),
    "optimizer.gradient_norm_clipping": ("cannot be turned off", "null turns it off."),
    "optimizer.learning_rate.decay_style": (
        "any word, found wrong after the model was made",
        "Like all settings it is checked first.",
    ),
    "optimizer.gradient_scaler.constant": ("0 is allowed", "A factor of 0 trains nothing."),
    "pretrained.path": (
        "replaces, without a word, what the file says of the model's shape",
        "A contradiction is a mistake; leave the shape out.",
    ),
    "pretrained.format": ("fast_llm", "The models to start from are Hugging Face's."),
    "model.base_model.cross_entropy_impl": (
        "triton, which fails for vocabularies above 65536",
        "auto always works; triton and fused take any vocabulary.",
    ),
    "model.base_model.transformer.gated": ("no", "Llama's."),
    "model.base_model.transformer.activation_type": ("gelu, silu if gated", "Llama's."),
    "model.base_model.transformer.add_linear_biases": ("yes", "Llama's."),
    "model.base_model.transformer.normalization.type": ("layer_norm", "Llama's."),
    "model.base_model.transformer.rotary.type": ("none", "Llama's."),
    "model.base_model.transformer.use_flash_attention": (
        "has no effect in fp32",
        "PyTorch has such kernels for every dtype.",
    ),
    "model.distributed.seed": (
        "the order of the data also follows from train_iters",
        "It follows from the seed alone, so that training longer goes on with the same order.",
    ),
    "model.distributed.reproducible_init": (
        "no: random weights follow from the number of GPUs",
        "The same whatever the number of processes.",
    ),
}


_IN_QUOTES = " (numbers and dates in quotes)"  # said in error messages, where it helps


def page() -> str:
    """The whole page, in Markdown."""
    lines = [
        "# Settings",
        "",
        "Made from the source by `python -m fast_llm.config.reference`; do not edit.",
        "",
        "All settings are optional unless their default says *required*. A setting is given in the YAML file or on the"
        " command line as `section.setting=value`, which wins. YAML has its 1.1 meanings (`100_000`, `yes`), and `1e-4`"
        " is a number. On the command line text is taken as it is written (`dataset.data_files=*.jsonl`), and `#` begins no"
        " comment. What is unknown, stands twice or cannot be is refused, all mistakes at once.",
        "",
        "A thing is turned off by one setting, whatever else the file says about it: `training.validation.interval=null`,"
        " `training.checkpoint.interval=null` (no shutdown either), `run.experiment_dir=null` (nothing is written),"
        " `model.distributed.pipeline_parallel=1`, `pretrained.path=null`, `training.wandb=null`.",
        "",
        "1. [train](#train)",
        "2. [prepare](#prepare)",
        "3. [convert](#convert)",
        "4. [What differs from Fast-LLM 0.2](#what-differs-from-fast-llm-02)",
        "5. [What is refused, and what to use instead](#what-is-refused-and-what-to-use-instead)",
        "6. [Older names](#older-names)",
        "",
    ]
    for title, kind in (
        ("train", TrainConfig),
        ("prepare", PrepareConfig),
        ("convert", ConvertConfig),
    ):
        lines += [f"## {title}", "", doc_text(kind), ""]
        for path, section in _sections(kind, ""):
            lines += _table(path, section)
    lines += [
        "## What differs from Fast-LLM 0.2",
        "",
        "| Setting | Fast-LLM 0.2 | Default here | Why |",
    ]
    lines += ["|---|---|---|---|"]
    for path, (before, why) in DIFFERENT.items():
        lines.append(_row(f"`{path}`", before, _default_at(TrainConfig, path), why))
    lines += ["", "## What is refused, and what to use instead", ""]
    for title, kind, table in (
        ("train", TrainConfig, REFUSED),
        ("prepare", PrepareConfig, PREPARE_REFUSED),
        ("convert", ConvertConfig, CONVERT_REFUSED),
    ):
        lines += [f"### In `{title}`", "", "| Setting | Instead |", "|---|---|"]
        lines += [_row(name, sentence) for name, sentence in _refused(kind, table)]
        lines.append("")
    lines += ["## Older names", "", "| Accepted | Is now |", "|---|---|"]
    lines += [_row(f"`{old}`", f"`{new}`") for old, new in RENAMED.items()]
    return "\n".join(lines) + "\n"


def _sections(kind: type[BaseModel], above: str) -> Iterator[tuple[str, type[BaseModel]]]:
    yield above, kind
    for name, field in kind.model_fields.items():
        for section in nested_sections(field.annotation):
            yield from _sections(section, f"{above}.{name}" if above else name)


def _table(path: str, section: type[BaseModel]) -> list[str]:
    rows = [
        _row(
            f"`{name}`",
            describe_allowed(field).replace(_IN_QUOTES, ""),
            default_text(section, name),
            meaning(section, name),
        )
        for name, field in section.model_fields.items()
        if not nested_sections(field.annotation)
    ]
    heading = [f"### `{path}`", "", doc_text(section), ""] if path else []
    return heading + (
        ["| Setting | May be | Default | Meaning |", "|---|---|---|---|", *rows, ""] if rows else []
    )


def default_text(section: type[BaseModel], name: str) -> str:
    """The default of a setting, in Markdown."""
    field = section.model_fields[name]
    if field.default_factory is not None:
        extra = field.json_schema_extra
        return str(extra["default"]) if isinstance(extra, dict) else "from others"
    return (
        "*required*" if field.default is PydanticUndefined else f"`{format_value(field.default)}`"
    )


def _default_at(kind: type[BaseModel], path: str) -> str:
    *above, name = path.split(".")
    for part in above:
        kind = nested_sections(kind.model_fields[part].annotation)[0]
    return default_text(kind, name)


def _refused(kind: type[BaseModel], table: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Names, then single values, each with its sentence; those of a section that share one are in one row."""
    rows: dict[tuple[str, str], list[str]] = {}
    for path, sentence in table.items():
        above, _, name = path.rpartition(".")
        rows.setdefault((above, sentence), []).append(f"`{name}`")
    for above, section in _sections(kind, ""):
        for name, field in section.model_fields.items():
            for value, sentence in refused_values(field).items():
                rows.setdefault((above, sentence), []).append(f"`{name}: {value}`")
    for (above, sentence), names in sorted(rows.items(), key=lambda row: row[0][0]):
        yield (f"`{above}`: " if above else "") + ", ".join(names), sentence


def doc_text(section: type[BaseModel]) -> str:
    """The description of a section, on one line."""
    return " ".join((section.__doc__ or "").split())


def meaning(section: type[BaseModel], name: str) -> str:
    """The docstring of a setting. Read from the source when asked for: pydantic would do so at each start, for 40 ms."""
    for kind in section.__mro__[: section.__mro__.index(BaseModel)]:
        found = _docstrings(kind.__module__).get(kind.__name__, {})
        if name in found:
            return found[name]
    return ""


@cache
def _docstrings(module: str) -> dict[str, dict[str, str]]:
    """Class → setting → the string below its definition."""
    classes = ast.parse(inspect.getsource(sys.modules[module])).body
    return {
        kind.name: {
            setting.target.id: inspect.cleandoc(text.value.value)
            for setting, text in pairwise(kind.body)
            if isinstance(setting, ast.AnnAssign)
            and isinstance(setting.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
            and isinstance(text.value.value, str)
        }
        for kind in classes
        if isinstance(kind, ast.ClassDef)
    }


def plain(text: str) -> str:
    """Text of the reference without the marks of Markdown around code and emphasis."""
    return re.sub(r"[`*]([^`*]+)[`*]", r"\1", text)


def _row(*cells: str) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    print(page(), end="")
