"""Mixed precision on one device: the model computes in bf16 or fp16, the optimizer works on fp32.

Each weight of the model has an fp32 master and an fp32 gradient. As soon as a backward pass has made a
weight's gradient it is added to the fp32 one and freed, so that low-precision gradients never pile up and
rounding never accumulates over micro-batches. After the update the masters are rounded into the model.
In fp32 the model's weights are themselves the masters.

Cost per weight: 2 (model) + 4 (master) + 4 (gradient) bytes, and the optimizer's moments; 8 in fp32.
"""

import torch
from torch import Tensor, nn


class SingleWeights:
    """The weights of a model on one device."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device):
        """`model` may be on the meta device; its weights are allocated here, with undefined values."""
        model.to(dtype).to_empty(device=device)
        self.working = dict(model.named_parameters())
        self.mixed = dtype != torch.float32
        # What checkpoints and exports hold, by name.
        self.tensors: dict[str, Tensor] = {
            name: torch.empty_like(p, dtype=torch.float32) if self.mixed else p.detach()
            for name, p in self.working.items()
        }
        self.gradients: dict[str, Tensor] = {}
        self._fresh = dict.fromkeys(self.working, True)
        if self.mixed:
            for name, parameter in self.working.items():
                parameter.register_post_accumulate_grad_hook(self._accumulate(name))

    def local(self) -> dict[str, Tensor]:
        """The part of each fp32 weight that this process updates: all of it."""
        return self.tensors

    def local_gradients(self) -> dict[str, Tensor]:
        """The gradient of each of `local`, in fp32, summed over the step's micro-batches."""
        if self.mixed:
            return self.gradients
        return {name: p.grad for name, p in self.working.items() if p.grad is not None}

    def holders(self) -> dict[str, int]:
        """How many processes hold the same part of each of `local`: one."""
        return dict.fromkeys(self.tensors, 1)

    def before_micro_batch(self, first: bool, last: bool) -> None:
        """Get ready for a forward and a backward pass."""
        if first:
            self._fresh = dict.fromkeys(self.working, True)
            if not self.mixed:
                for parameter in self.working.values():
                    parameter.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Let the model compute with the present masters."""
        if self.mixed:
            torch._foreach_copy_(list(self.working.values()), list(self.tensors.values()))

    def _accumulate(self, name: str):  # type: ignore[no-untyped-def]
        def accumulate(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if name not in self.gradients:
                self.gradients[name] = parameter.grad.float()
            elif self._fresh[name]:
                self.gradients[name].copy_(parameter.grad)
            else:
                self.gradients[name].add_(parameter.grad)
            self._fresh[name] = False
            parameter.grad = None

        return accumulate
