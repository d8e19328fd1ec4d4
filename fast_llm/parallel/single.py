"""Mixed precision on one device: the model computes in bf16 or fp16, the optimizer works on fp32.

Each weight of the model has an fp32 master and an fp32 gradient. A hook adds each gradient of a
backward pass to the fp32 one and frees it. Low-precision gradients therefore never accumulate,
neither in memory nor in rounding errors. After the update the masters are rounded into the model.
In fp32 the model's weights are the masters.

On a GPU, bf16 weights have split masters (kernels/rounding.py): the model's weight holds the high
16 bits, a second tensor the low 16. This saves two bytes a weight. On a CPU it would cost one more
pass over memory.

A frozen parameter (`requires_grad` is false) has a master, which checkpoints hold, but no gradient.

Bytes per weight: 2 (model) + 4 (master; 2 if split) + 4 (gradient), and the optimizer's moments. In
fp32: 8.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fast_llm.kernels.rounding import join_master, split_master_
from fast_llm.model.experts import GroupedLinear
from fast_llm.model.layers import Linear
from fast_llm.tensors import Stored


class SingleWeights:
    """The weights of a model on one device. Implements `Weights`."""

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        device: torch.device,
        fuse_grad_accumulation: bool = False,
    ):
        """Allocate the weights of `model`, which may be on the meta device, with undefined values.

        `fuse_grad_accumulation`, for GPUs: matmuls add to the fp32 gradients themselves
        (`Linear.main_grad`), and the masters of bf16 weights are split.
        """
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
        self._trained = {name for name, p in self.working.items() if p.requires_grad}
        # Weights whose fp32 gradient has no contribution of this step yet.
        self._fresh = self._trained - self._fused.keys()
        if self.mixed:
            for name in self._trained:
                self.working[name].register_post_accumulate_grad_hook(self._accumulate(name))

    @contextmanager
    def masters(self, changed: bool = False) -> Iterator[dict[str, Tensor]]:
        """The fp32 weights as checkpoints and exports hold them.

        `changed`: values written into them become the masters'. Split masters are joined
        in host memory: 4 bytes per weight there, none on the device.
        """
        if not self.master_low_bits:
            yield self.tensors
            return
        masters = {
            name: join_master(p.detach(), self.master_low_bits[name]).cpu()
            for name, p in self.working.items()
        }
        yield masters
        if changed:
            for name, parameter in self.working.items():
                split_master_(
                    masters.pop(name).to(parameter.device),
                    parameter.detach(),
                    self.master_low_bits[name],
                )

    def stored(self) -> dict[str, Stored]:
        """The fp32 weights as checkpoints and exports hold them; split masters are not joined."""
        if not self.master_low_bits:
            return {name: Stored.of(master, (master,)) for name, master in self.tensors.items()}
        return {
            name: Stored.of(p, (p.detach(), self.master_low_bits[name]), join_master)
            for name, p in self.working.items()
        }

    def local(self) -> dict[str, Tensor]:
        """The weights that this process updates: the masters, or the model's weights if split."""
        return (
            {name: p.detach() for name, p in self.working.items()}
            if self.master_low_bits
            else self.tensors
        )

    def local_gradients(self) -> dict[str, Tensor]:
        """The gradient of each of `local`, in fp32, summed over the micro-batches of a step."""
        if self.mixed:
            return self.gradients
        return {name: p.grad for name, p in self.working.items() if p.grad is not None}

    def replication_factor(self) -> dict[str, int]:
        """1 for each weight: there is one process."""
        return dict.fromkeys(self.working, 1)

    def before_micro_batch(self, first: bool, last: bool) -> None:
        """Reset the gradients before the `first` micro-batch of a step."""
        if first:
            if self._fused:
                torch._foreach_zero_(list(self._fused.values()))
            self._fresh = self._trained - self._fused.keys()
            if not self.mixed:
                for parameter in self.working.values():
                    parameter.grad = None

    @torch.no_grad()
    def sync_model_weights(self) -> None:
        """Round the masters into the model. Split masters need nothing: the kernel has done it."""
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
        """Set `main_grad` of linear layers and head: fp32 gradients, returned by their weights'
        names.
        """
        # A tied head has the embedding's name.
        names = {parameter: name for name, parameter in self.working.items()}
        main_grads: dict[str, Tensor] = {}
        for module in model.modules():
            if not isinstance(module, Linear | GroupedLinear) or module.bias is not None:
                continue
            if module.weight.requires_grad:
                module.main_grad = torch.zeros_like(module.weight, dtype=torch.float32)
                main_grads[names[module.weight]] = module.main_grad
        return main_grads

    def _accumulate(self, name: str):  # type: ignore[no-untyped-def]
        def accumulate(parameter: Tensor) -> None:
            if parameter.grad is None:  # a layer with `main_grad` has added to it already
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
