"""The interface to a model's weights, on one device or sharded.

Training, checkpoints and checks use it. Two classes implement it: `single.SingleWeights` (one
device) and `fsdp.ShardedWeights` (ZeRO on FSDP2).
Parameters keep their Hugging Face names everywhere, so every mapping here is by such a name.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from fast_llm.tensors import Stored


class Weights(Protocol):
    """The model's weights, their fp32 masters and gradients, on this process."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The fp32 masters: plain tensors, or DTensors when sharded; empty with split masters."""

    @property
    def master_low_bits(self) -> Mapping[str, Tensor]:
        """The low 16 bits of split masters (see rounding.py); empty without split masters."""

    def masters(self, changed: bool = False) -> AbstractContextManager[dict[str, Tensor]]:
        """The fp32 weights as checkpoints and exports hold them: tensors or DTensors.

        `changed`: values written into them inside the context become the masters' values.
        """

    def stored(self) -> dict[str, Stored]:
        """The fp32 weights as checkpoints and exports hold them, without computing them."""

    def local(self) -> dict[str, Tensor]:
        """The part of each weight that this process updates. Some parts may be empty."""

    def local_gradients(self) -> dict[str, Tensor]:
        """The gradient of each of `local`, in fp32.

        Summed over the micro-batches of a step, averaged over data- and context-parallel processes.
        """

    def replication_factor(self) -> dict[str, int]:
        """How many processes hold the same part of each of `local`, this process included."""

    def before_micro_batch(self, first: bool, last: bool) -> None:
        """Prepare one forward and backward pass, the `first` or `last` of a step or neither."""

    def sync_model_weights(self) -> None:
        """After an update of the masters: make the model compute with them."""

    def working_copies(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, the low-precision weight in the model, and its fp32 master, for each pair.

        Yields nothing where the model computes with the masters or with gathered shards.
        """

    def gathered(self) -> dict[str, Tensor]:
        """The full weights, in the training dtype, that FSDP2 keeps from the last pass."""
