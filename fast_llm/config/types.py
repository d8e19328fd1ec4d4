"""Types of settings: what pydantic checks, and in words (`Allowed`) what is allowed."""

import os
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from fast_llm.config.mistakes import Allowed, unsupported
from fast_llm.config.text import format_value
from fast_llm.dtypes import DTYPES

LARGEST_NUMBER = 10**15  # no count in this project comes near; larger ones would overflow later on


def _text(value: str) -> str:
    if not value:
        raise ValueError("given empty text; write null, or leave it out, for none")
    return value


def path_text(value: str) -> str:
    """Text that can name a file or folder. Raises ValueError."""
    encoded = os.fsencode(value)
    if any(len(part) > 255 for part in encoded.split(b"/")) or len(encoded) >= 4096:
        raise ValueError(
            f"given {format_value(value)}, which is too long for the name of a file or folder"
        )
    if value.startswith("~") and os.path.expanduser(value) == value:
        user = value.partition("/")[0][1:]
        raise ValueError(f"given {format_value(value)}, but there is no user {user}")
    return value


Positive = Annotated[int, Field(gt=0, le=LARGEST_NUMBER), Allowed("an integer above 0")]
Count = Annotated[int, Field(ge=0, le=LARGEST_NUMBER), Allowed("an integer of 0 or more")]
PositiveFloat = Annotated[float, Field(gt=0), Allowed("a number above 0")]
NonNegativeFloat = Annotated[float, Field(ge=0), Allowed("a number of 0 or more")]
Fraction = Annotated[float, Field(ge=0, lt=1), Allowed("a number from 0 to below 1")]
Probability = Annotated[float, Field(ge=0, le=1), Allowed("a number from 0 to 1")]
Seconds = Annotated[float, Field(gt=0, le=10**9), Allowed("a number of seconds above 0")]
Workers = Annotated[int, Field(ge=0, le=1024), Allowed("an integer from 0 to 1024")]
Processes = Annotated[int, Field(ge=1, le=1024), Allowed("an integer from 1 to 1024")]
ParametersPerFile = Annotated[
    int, Field(ge=2**20, le=2**62), Allowed("an integer of 2^20 (1048576) or more")
]
Text = Annotated[str, AfterValidator(_text)]
PathText = Annotated[Text, AfterValidator(path_text)]

_SPELLINGS = {spelling: dtype.name for dtype in DTYPES for spelling in dtype.spellings}


def _short_dtype(value: Any) -> Any:
    return _SPELLINGS.get(value.removeprefix("torch."), value) if isinstance(value, str) else value


short_dtype = BeforeValidator(_short_dtype)  # float32 or torch.float32 becomes fp32
no_fp64 = unsupported({"fp64": "the highest precision is fp32"})
DType = Annotated[
    Literal["fp32", "bf16", "fp16"],
    no_fp64,  # pydantic calls validators from the last to the first
    short_dtype,
    Allowed("one of fp32, bf16, fp16 (or float32, bfloat16, float16)"),
    WithJsonSchema({"enum": ["fp32", "bf16", "fp16", "float32", "bfloat16", "float16"]}),
]


def _weights_and_paths(value: Any) -> Any:
    """Make a single path a list, and weights given as text ("0.9") numbers."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or len(value) % 2:
        return value
    number = re.compile(r"[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?")
    return [
        float(item) if i % 2 == 0 and isinstance(item, str) and number.fullmatch(item) else item
        for i, item in enumerate(value)
    ]


WeightedPaths = Annotated[
    list[Any],  # text and numbers, which checks.py examines
    BeforeValidator(_weights_and_paths),
    Allowed("a path, or a list of weights and paths in turn"),
    WithJsonSchema({"type": ["string", "array"], "items": {"type": ["string", "number"]}}),
]
Shares = Annotated[
    list[Annotated[float, Field(ge=0, le=10**15)]],
    Field(min_length=1, max_length=3),
    Allowed("a list of one to three numbers of 0 or more"),
]
