"""The entries of a family's `TENSOR_PLAN`: how tensor parallelism cuts each module. No torch.

A plan maps patterns of module names to entries; the first match counts. Every module that has
weights of its own must match one. `parallel/tensor.py` implements each entry.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Rows:
    """A linear layer cut by its output features: its result is cut in the same way."""


@dataclass(frozen=True)
class Columns:
    """A linear layer cut by its input features: results are summed over processes and scattered."""


@dataclass(frozen=True)
class Gather:
    """A module with cut inner layers, such as attention: its input is gathered."""


@dataclass(frozen=True)
class Norm:
    """A norm on the residual stream, replicated.

    With sequence parallelism each process normalises other tokens, and gradients are summed.
    """


@dataclass(frozen=True)
class ExpertRows:
    """The linear layers of all experts, cut by their output features."""


@dataclass(frozen=True)
class ExpertColumns:
    """The linear layers of all experts, cut by their input features: results are partial sums."""


@dataclass(frozen=True)
class Scatter:
    """The experts of a layer: their result is summed over processes and scattered."""


@dataclass(frozen=True)
class Route:
    """A router, replicated. Each process computes a part of its gradient, from its part of each
    expert.
    """


@dataclass(frozen=True)
class Scalars:
    """An activation with trained numbers, replicated.

    Each process has other columns of the MLP, so gradients are always summed.
    """


@dataclass(frozen=True)
class HeadNorm:
    """A norm of each head of queries or keys, with one weight for all heads: replicated.

    Each process normalises other heads, so gradients are always summed.
    """


@dataclass(frozen=True)
class ProjectionNorm:
    """A norm over all heads of queries or keys, cut with them; squares are summed."""


@dataclass(frozen=True)
class VocabEmbedding:
    """The embedding, cut by vocabulary."""


@dataclass(frozen=True)
class VocabHead:
    """The language-model head and its cross entropy, cut by vocabulary."""


Entry = (
    Rows
    | Columns
    | Gather
    | Norm
    | HeadNorm
    | ProjectionNorm
    | ExpertRows
    | ExpertColumns
    | Scatter
    | Route
    | Scalars
    | VocabEmbedding
    | VocabHead
)
TensorPlan = Mapping[str, Entry]


def find_entry(plan: TensorPlan, name: str) -> Entry | None:
    """The entry of the first pattern that matches a module's name."""
    return next((entry for pattern, entry in plan.items() if fnmatchcase(name, pattern)), None)
