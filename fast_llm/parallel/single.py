"""Mixed precision on one device: the model computes in bf16 or fp16, the optimizer works on fp32.

Each weight of the model has an fp32 master and an fp32 gradient. As soon as a backward pass has made a
weight's gradient it is added to the fp32 one and freed, so that low-precision gradients never pile up and
rounding never accumulates over micro-batches. After the update the masters are rounded into the model.
In fp32 the model's weights are themselves the masters.

On a GPU in bf16 the master is the model's weight and the 16 bits that it lacks (kernels/rounding.py): the same numbers in two bytes
less. On a CPU, where memory is not what is short, that would be a pass more.

Cost per weight: 2 (model) + 4 or 2 (master) + 4 (gradient) bytes, and the optimizer's moments; 8 in fp32.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fast_llm.kernels.rounding import join_master, split_master_
from fast_llm.model.layers import Linear


class SingleWeights:
    """The weights of a model on one device."""

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        device: torch.device,
        fuse_grad_accumulation: bool = False,
    ):
        """`model` may be on the meta device; its weights are allocated here, with undefined values. `fuse_grad_accumulation`: as suits a
        GPU, keep masters of bf16 weights in halves and let products add to the gradients."""
        model.to(dtype).to_empty(device=device)
        self.working = dict(model.named_parameters())
        self.mixed = dtype != torch.float32
        self.master_low_bits: dict[str, Tensor] = {}
        self.tensors: dict[str, Tensor] = {}
        if dtype == torch.bfloat16 and fuse_grad_accumulation:
            self.master_low_bits = {
                name: torch.zeros_like(p, dtype=torch.int16) for name, p in self.working.items()
            }
        else:
            self.tensors = {
                name: torch.empty_like(p, dtype=torch.float32) if self.mixed else p.detach()
                for name, p in self.working.items()
            }
        self.gradients: dict[str, Tensor] = {}
        self._fused = self._fuse(model) if self.mixed and fuse_grad_accumulation else {}
        self.gradients |= self._fused
        self._fresh = (
            self.working.keys() - self._fused.keys()
        )  # those that hold nothing of this step yet
        if self.mixed:
            for name, parameter in self.working.items():
                parameter.register_post_accumulate_grad_hook(self._accumulate(name))

    @contextmanager
    def masters(self, changed: bool = False) -> Iterator[dict[str, Tensor]]:
        """What checkpoints and exports hold, by name: fp32 weights. `changed`: what is written into them is taken over.

        Those in halves are put together in the host's memory: 4 bytes a weight there, none on the device.
        """
        if not self.master_low_bits:
            yield self.tensors
            return
        whole = {
            name: join_master(p.detach(), self.master_low_bits[name]).cpu()
            for name, p in self.working.items()
        }
        yield whole
        if changed:
            for name, parameter in self.working.items():
                split_master_(
                    whole.pop(name).to(parameter.device),
                    parameter.detach(),
                    self.master_low_bits[name],
                )

    def local(self) -> dict[str, Tensor]:
        """The part of each weight that this process updates: all of it."""
        return (
            {name: p.detach() for name, p in self.working.items()}
            if self.master_low_bits
            else self.tensors
        )

    def local_gradients(self) -> dict[str, Tensor]:
        """The gradient of each of `local`, in fp32, summed over the step's micro-batches."""
        if self.mixed:
            return self.gradients
        return {name: p.grad for name, p in self.working.items() if p.grad is not None}

    def replication_factor(self) -> dict[str, int]:
        """How many processes hold the same part of each of `local`: one."""
        return dict.fromkeys(self.working, 1)

    def before_micro_batch(self, first: bool, last: bool) -> None:
        """Get ready for a forward and a backward pass."""
        if first:
            if self._fused:
                torch._foreach_zero_(list(self._fused.values()))
            self._fresh = self.working.keys() - self._fused.keys()
            if not self.mixed:
                for parameter in self.working.values():
                    parameter.grad = None

    @torch.no_grad()
    def sync_model_weights(self) -> None:
        """Let the model compute with the present masters."""
        if self.tensors and self.mixed:
            torch._foreach_copy_(list(self.working.values()), list(self.tensors.values()))

    def working_copies(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, the weight in the model and its fp32 master, where these are separate tensors."""
        for name, master in self.tensors.items() if self.mixed else ():
            yield name, self.working[name], master

    def gathered(self) -> dict[str, Tensor]:
        """Nothing: no weight is sharded."""
        return {}

    def _fuse(self, model: nn.Module) -> dict[str, Tensor]:
        """Set `main_grad` of linear layers and head: fp32 gradients, returned by their weights' names."""
        # A tied head has the embedding's name.
        names = {parameter: name for name, parameter in self.working.items()}
        main_grads: dict[str, Tensor] = {}
        for module in model.modules():
            if isinstance(module, Linear) and module.bias is None:
                module.main_grad = torch.zeros_like(module.weight, dtype=torch.float32)
                main_grads[names[module.weight]] = module.main_grad
        return main_grads

    def _accumulate(self, name: str):  # type: ignore[no-untyped-def]
        def accumulate(parameter: Tensor) -> None:
            if parameter.grad is None:  # what adds to the sum by itself goes back with nothing
                return
            if name not in self.gradients:
                self.gradients[name] = parameter.grad.float()
            elif name in self._fresh:
                self.gradients[name].copy_(parameter.grad)
            else:
                torch.ops.fast_llm.add(self.gradients[name], parameter.grad)
            self._fresh.discard(name)
            parameter.grad = None

        return accumulate
