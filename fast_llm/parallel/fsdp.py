"""ZeRO on FSDP2: sharded weights, gradients and moments (Rajbhandari et al. 2020; Zhao et al.
2023).

fp32 weights, reduced gradients and the optimizer's moments are always sharded over context × data.
FSDP2 gathers the weights of one unit at a time, in the training dtype: a block, or an untied head.
Gradients are reduced in fp32. `zero_stage` decides which tensors are kept and which are sent:

zero_stage   gathered weights         full gradients        communication
1            kept for the step        kept for the step     weights and gradients once a step
2            kept for the step        one unit at a time    gradients every micro-batch
3            one unit at a time       one unit at a time    weights twice, gradients once,
                                                            every micro-batch

On a mesh of [copies, shard] the table holds within each group of `shard` processes. The sharded
gradients of the groups are summed once a step (hybrid sharding), so that groups exchange only
1 / shard of the gradients.

Frozen parameters are sharded and gathered as all others are, and are left out of reductions.

With expert parallelism the experts of a block are a unit of their own, on their own mesh
(mesh.py). Their gradients are sums over the processes that share them, so they are divided by the
number of all processes, not by that of their mesh.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from fast_llm.model.decoder import CausalLM, Head
from fast_llm.model.experts import Experts
from fast_llm.models import family_of
from fast_llm.tensors import Stored, local_part, replication_factor


def named_weights(model: CausalLM) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a pipeline stage. The head of a tied model has the embedding's name."""
    family = family_of(model.config)
    for name, parameter in model.named_parameters():
        if name == family.head and model.config.tie_word_embeddings:
            name = family.embedding  # in the last stage; its embedding is on another process
        yield name, parameter


class ShardedWeights:
    """The weights of a model, sharded over the processes of a mesh. Implements `Weights`."""

    def __init__(
        self,
        models: Sequence[CausalLM],
        mesh: DeviceMesh,
        zero_stage: int,
        dtype: torch.dtype,
        expert_mesh: DeviceMesh | None = None,
    ):
        """Shard `models`: the model, or this process's pipeline stages.

        They may be on the meta device. The shards are allocated here, with undefined values.
        `expert_mesh`: over which experts are sharded, with expert parallelism.
        """
        policy = MixedPrecisionPolicy(
            param_dtype=dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # rotary angles stay fp32
        )
        # Shards are small, and have no bf16 copy: their masters are not split.
        self.master_low_bits: dict[str, Tensor] = {}
        self.models: list[FSDPModule] = []
        self.zero_stage = zero_stage
        # Collected now: while weights are gathered, the module has these instead of the shards.
        self.parameters: dict[str, nn.Parameter] = {}
        for model in models:
            for block in model.blocks.values():
                for module in block.modules():
                    if expert_mesh is not None and isinstance(module, Experts):
                        unit = fully_shard(
                            module,
                            mesh=expert_mesh,
                            mp_policy=policy,
                            reshard_after_forward=zero_stage == 3,
                        )
                        unit.set_gradient_divide_factor(mesh.size())
                        # gloo has no reduction that also multiplies. Without a reduction, FSDP2
                        # would divide twice.
                        unit.set_force_sum_reduction_for_comms(expert_mesh.size(-1) > 1)
                fully_shard(
                    block, mesh=mesh, mp_policy=policy, reshard_after_forward=zero_stage == 3
                )
            if isinstance(model.head, Head) and not model.config.tie_word_embeddings:
                # A unit of its own: its gradient is reduced while the blocks compute theirs.
                fully_shard(model.head, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
            root = fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
            model.to_empty(device=mesh.device_type)
            assert isinstance(root, FSDPModule)
            self.models.append(root)
            self.parameters |= dict(named_weights(model))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The fp32 masters: DTensors."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    @contextmanager
    def masters(self, changed: bool = False) -> Iterator[dict[str, Tensor]]:
        """The fp32 weights as checkpoints and exports hold them; writing into them changes them."""
        yield self.tensors

    def stored(self) -> dict[str, Stored]:
        """The fp32 weights as checkpoints and exports hold them."""
        return {
            name: Stored.of(tensor, (local_part(tensor),)) for name, tensor in self.tensors.items()
        }

    def local(self) -> dict[str, Tensor]:
        """The shard of each fp32 weight on this process. It may be empty."""
        return {name: local_part(tensor) for name, tensor in self.tensors.items()}

    def local_gradients(self) -> dict[str, Tensor]:
        """The gradient of each of `local`, in fp32, averaged over context × data."""
        return {
            name: local_part(p.grad) for name, p in self.parameters.items() if p.grad is not None
        }

    def replication_factor(self) -> dict[str, int]:
        """How many processes hold the same part of each of `local`, this process included."""
        return {name: replication_factor(tensor) for name, tensor in self.tensors.items()}

    def before_micro_batch(self, first: bool, last: bool) -> None:
        """Prepare one forward and backward pass, as the table above says."""
        if first:
            for parameter in self.parameters.values():
                parameter.grad = None
        for model in self.models:
            model.set_is_last_backward(last)
            model.set_requires_gradient_sync(last or self.zero_stage > 1)
            model.set_requires_all_reduce(last)
            model.set_reshard_after_backward(last or self.zero_stage == 3)

    def sync_model_weights(self) -> None:
        """Free the gathered weights, so that the next pass gathers the updated shards."""
        for model in self.models:
            for module in cast(nn.Module, model).modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def working_copies(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Nothing: the model computes with gathered weights."""
        return iter(())

    def gathered(self) -> dict[str, Tensor]:
        """The full weights, in the training dtype, that FSDP2 keeps from the last pass."""
        shards = {id(parameter) for parameter in self.parameters.values()}
        return {
            name: parameter
            for model in self.models
            for name, parameter in cast(nn.Module, model).named_parameters()
            if id(parameter) not in shards
        }
