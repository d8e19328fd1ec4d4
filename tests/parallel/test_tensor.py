"""A family's tensor plan covers its model, pattern by pattern."""

import os

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor

from fast_llm.config.document import Document
from fast_llm.config.model import BaseModelConfig
from fast_llm.config.validate import validate
from fast_llm.model.decoder import CausalLM
from fast_llm.models.parameters import tensor_plan
from fast_llm.models.tensor_plan import Columns, Rows, find_entry
from fast_llm.parallel.tensor import _local
from fast_llm.tensors import local_part
from tests.helpers import TINY, spawn


def test_each_module_with_weights_has_an_entry_and_each_entry_a_module() -> None:
    config = validate(BaseModelConfig, Document(TINY, {}, ""))
    plan = tensor_plan(config)
    with torch.device("meta"):
        model = CausalLM(config)
    names = dict(model.named_modules())
    for name, module in names.items():
        own = list(module.named_parameters(recurse=False))
        assert not own or find_entry(plan, name) is not None, name
    for pattern, entry in plan.items():
        found = [name for name in names if find_entry({pattern: entry}, name)]
        assert found or pattern == "*.act_fn", pattern  # a module in families with xIELU
    assert find_entry(plan, "model.layers.1.self_attn.o_proj") == Columns()
    assert find_entry(plan, "model.layers.1.mlp.up_proj") == Rows()
    assert find_entry(plan, "model.layers.1") is None


class Replicated(nn.Module):
    """A weight as those of norms: replicated over tensor ranks, with partial gradients."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return _local(self.weight, partial_grad=True) * x


def reduced_gradient(data: int, tensor: int, dtype: torch.dtype) -> float:
    """The gradient after FSDP2's reduction, of ranks whose gradients are 256 and 1."""
    mesh = init_device_mesh("cpu", (data, tensor), mesh_dim_names=("data", "tensor"))
    ones = torch.ones(2)
    weight = distribute_tensor(ones, mesh["tensor"], [Replicate()], src_data_rank=None)
    module = Replicated(weight)
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    fully_shard(module, mesh=mesh["data"], mp_policy=policy)
    own = (256.0, 1.0)[int(os.environ["RANK"])]
    module(torch.full((2,), own, dtype=dtype)).sum().backward()
    assert module.weight.grad is not None
    return float(local_part(module.weight.grad)[0])


@pytest.mark.parametrize(
    ("data", "tensor", "dtype", "expected"),
    [
        (1, 2, torch.float32, 257.0),
        (1, 2, torch.bfloat16, 256.0),  # the sum, rounded to bf16 once
        (2, 1, torch.bfloat16, 128.5),  # the mean, of which bf16 has no 257
    ],
)
def test_where_gradients_of_replicated_weights_are_summed_in_bf16(
    data: int, tensor: int, dtype: torch.dtype, expected: float
) -> None:
    """Over tensor ranks in the training dtype, over data ranks in fp32.

    docs/decisions/norm-gradients-under-tensor-parallelism.md has the consequences.
    """
    assert spawn(2, reduced_gradient, data, tensor, dtype) == [expected] * 2
