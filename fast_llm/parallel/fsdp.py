"""ZeRO on FSDP2: what each `zero_stage` shards, and when gradients meet.

fp32 weights, their gradients after reduction and the optimizer's moments are always sharded over the data
axis. Each block of the model is a unit whose weights are gathered together, in the training dtype, and so is a head that
is not the embedding; gradients are reduced in fp32 (Rajbhandari et al. 2020, "ZeRO"; Zhao et al. 2023, "PyTorch FSDP").

zero_stage   gathered weights                    full gradients              communication
1            kept from first to last use         fp32, kept over the step    once a step
2            kept from first to last use         of a block at a time        gradients every micro-batch
3            of a block at a time                of a block at a time        weights twice and gradients every micro-batch

On a mesh of [copies, shard] all of this happens within each group of `shard` processes; the sharded gradients of the
groups are summed once a step (hybrid sharding, Zhao et al. 2023), so that between nodes 1 / shard of them is sent.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from fast_llm.model.decoder import CausalLM, Head
from fast_llm.models.llama import EMBEDDING, HEAD
from fast_llm.tensors import local_part, replication_factor


class ShardedWeights:
    """The weights of a model, sharded over the processes of a mesh."""

    def __init__(
        self, models: Sequence[CausalLM], mesh: DeviceMesh, zero_stage: int, dtype: torch.dtype
    ):
        """`models`: the model, or this process's stages of it; they may be on the meta device. Shards are allocated here,
        with undefined values."""
        policy = MixedPrecisionPolicy(
            param_dtype=dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # rotary angles stay fp32
        )
        self.master_low_bits: dict[
            str, Tensor
        ] = {}  # shards are small and have no bf16 weight beside them: fp32 as a whole
        self.models: list[FSDPModule] = []
        self.zero_stage = zero_stage
        # Taken now: while weights are gathered the module shows these instead of the shards.
        self.parameters: dict[str, nn.Parameter] = {}
        for model in models:
            for block in model.blocks.values():
                fully_shard(
                    block, mesh=mesh, mp_policy=policy, reshard_after_forward=zero_stage == 3
                )
            if isinstance(model.head, Head) and not model.config.tie_word_embeddings:
                # Else its gradient would wait for the embedding's, which comes last, with nothing left to do meanwhile.
                fully_shard(model.head, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
            root = fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
            model.to_empty(device=mesh.device_type)
            assert isinstance(root, FSDPModule)
            self.models.append(root)
            for name, parameter in model.named_parameters():
                if name == HEAD and model.config.tie_word_embeddings:
                    name = EMBEDDING  # in the last stage, whose embedding is on another process
                self.parameters[name] = parameter

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The fp32 weights, by name: DTensors."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    @contextmanager
    def masters(self, changed: bool = False) -> Iterator[dict[str, Tensor]]:
        """What checkpoints and exports hold, by name: fp32 DTensors, which may be written into."""
        yield self.tensors

    def local(self) -> dict[str, Tensor]:
        """The part of each fp32 weight that this process updates: its shard, which may be empty."""
        return {name: local_part(tensor) for name, tensor in self.tensors.items()}

    def local_gradients(self) -> dict[str, Tensor]:
        """The gradient of each of `local`, in fp32, averaged over the processes."""
        return {
            name: local_part(p.grad) for name, p in self.parameters.items() if p.grad is not None
        }

    def replication_factor(self) -> dict[str, int]:
        """How many processes hold the same part of each of `local`, this one included."""
        return {name: replication_factor(tensor) for name, tensor in self.tensors.items()}

    def before_micro_batch(self, first: bool, last: bool) -> None:
        """Get ready for a forward and a backward pass."""
        if first:
            for parameter in self.parameters.values():
                parameter.grad = None
        for model in self.models:
            model.set_is_last_backward(last)
            model.set_requires_gradient_sync(last or self.zero_stage > 1)
            model.set_requires_all_reduce(last)
            model.set_reshard_after_backward(last or self.zero_stage == 3)

    def sync_model_weights(self) -> None:
        """Let the model compute with the present shards: drop weights that are still gathered."""
        for model in self.models:
            for module in cast(nn.Module, model).modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def working_copies(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Nothing: the model computes with gathered weights."""
        return iter(())

    def gathered(self) -> dict[str, Tensor]:
        """The full weights, in the training dtype, that are kept from the last pass."""
        shards = {id(parameter) for parameter in self.parameters.values()}
        return {
            name: parameter
            for model in self.models
            for name, parameter in cast(nn.Module, model).named_parameters()
            if id(parameter) not in shards
        }
