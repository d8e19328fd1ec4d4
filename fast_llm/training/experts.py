"""The router losses and biases of a run, and how tokens are spread over experts.

Each router adds the gradient of its own losses in the backward pass (model/experts.py). The step
says before it what these gradients are multiplied by, so that the update is that of

    cross entropy + c · mean load-balancing loss + z · mean z-loss

with c and z from the settings, and means over layers, micro-batches and processes. Cross entropy is
a mean over target tokens, whose number must be known for this before the backward pass: one sum
over processes, for which the host does not wait.

With a bias of each expert (Wang et al. 2024, "Auxiliary-loss-free load balancing"), an update adds
rate · sign(mean - own) of the numbers of tokens in the step, over all processes. These numbers are
integers, equal on all processes that hold a bias: so are the biases, in every layout.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fast_llm.checkpoint import state as tensor_files
from fast_llm.config.model import TransformerConfig
from fast_llm.model.experts import MixtureOfExperts, RouterLosses
from fast_llm.parallel.mesh import Mesh
from fast_llm.tensors import Stored

logger = logging.getLogger("fast_llm")

BIASES = "router_bias"  # before the names of biases in a checkpoint


class RouterMonitor:
    """Scales the router losses of a step, sums them up for the log, and updates biases."""

    def __init__(self, models: Iterable[nn.Module], config: TransformerConfig, mesh: Mesh):
        """`models`: this process's pipeline stages."""
        self.mesh = mesh
        self.layers = config.expert_layers()  # of all stages
        self.num_experts, self.chosen = config.num_experts, config.num_experts_per_token
        self.auxiliary = config.expert_auxiliary_loss_coefficient or 0.0
        self.z = config.expert_z_loss_coefficient
        self.routers: dict[int, RouterLosses] = {}  # layer → router, of this process
        self.bias_rate = config.expert_bias_update_rate
        self.biases: dict[int, Tensor] = {}  # layer → [N] in fp32; empty without a rate
        for model in models:
            for name, module in model.named_modules():
                if isinstance(module, MixtureOfExperts):
                    layer = next(int(part) for part in name.split(".") if part.isdigit())
                    self.routers[layer] = module.gate.losses
                    if self.bias_rate is not None:
                        self.biases[layer] = torch.zeros(self.num_experts, device=mesh.device)
                        module.gate.selection_bias = self.biases[layer]
        # Of every layer, since the last record: rows of each expert, and both losses.
        self.totals = torch.zeros(
            len(self.layers), self.num_experts + 2, dtype=torch.float64, device=mesh.device
        )
        self.micro_batches = 0

    def begin_step(self, micro_batches: int, targets: int, gradient_scale: float) -> None:
        """Set the scales of a step's router losses.

        `targets`: of the micro-batches on this process, 0 on processes whose losses others count.
        `gradient_scale`: of the gradients of summed cross entropy, as in `TrainStep`.
        """
        total = torch.tensor(float(targets), dtype=torch.float64, device=self.mesh.device)
        if self.mesh.size > 1:
            dist.all_reduce(total)
        # Cross entropy is summed over tokens and then divided by `total`; these losses are not.
        replicas = self.mesh.data.size * self.mesh.context.size
        shares = micro_batches * replicas * len(self.layers) * self.mesh.tensor.size
        unit = (total * (gradient_scale / shares)).float()
        for router in self.routers.values():
            router.reset()
            router.auxiliary_scale = unit * self.auxiliary
            router.z_scale = unit * self.z

    def end_step(self) -> None:
        """Add the step to the totals of this process."""
        for layer, router in self.routers.items():
            if router.counts is None or router.sums is None:
                continue
            row = self.totals[self.layers.index(layer)]
            row[: self.num_experts] += router.counts
            row[self.num_experts :] += router.sums
        self.micro_batches += next((r.micro_batches for r in self.routers.values()), 0)

    def update_biases(self) -> None:
        """Move each bias against the load of its expert in the step that has ended."""
        for layer, bias in self.biases.items():
            counts = self.routers[layer].counts
            if counts is not None and self.bias_rate:
                lacking = (counts.sum() - counts * self.num_experts).sign()
                bias.add_(lacking, alpha=self.bias_rate)

    def stored(self) -> dict[str, Stored]:
        """The biases as checkpoints hold them."""
        return {
            f"{BIASES}/layers.{layer}": Stored.of(bias, (bias,))
            for layer, bias in self.biases.items()
        }

    def load_biases(self, path: Path, there: bool) -> None:
        """Restore the biases from a checkpoint; `there`: whether it has any. All processes call it.

        Without them they are 0, which changes no choice.
        """
        for bias in self.biases.values():
            bias.zero_()
        if self.bias_rate is None:
            return
        if not there:
            logger.info(f"Biases of routers begin at 0: {path} does not hold them.")
            return
        named = {f"{BIASES}/layers.{layer}": bias for layer, bias in self.biases.items()}
        tensor_files.load(path, named, self.mesh.slow_group)

    def discard(self) -> None:
        """Forget the steps since the last record, after a rewind."""
        self.totals.zero_()
        self.micro_batches = 0

    def summary(self) -> dict[str, Any]:
        """The metrics since the last call. Every process calls it.

        `expert_load`: for each layer, tokens of each expert, relative to the mean of its layer.
        """
        totals, micro_batches = self.totals, self.micro_batches
        self.totals, self.micro_batches = torch.zeros_like(totals), 0
        count = torch.tensor(
            [float(micro_batches * bool(self.routers))],
            dtype=torch.float64,
            device=self.mesh.device,
        )
        if self.mesh.size > 1:
            dist.all_reduce(totals)
            dist.all_reduce(count, dist.ReduceOp.MAX)
        replicas = self.mesh.data.size * self.mesh.context.size * self.mesh.tensor.size
        rows, losses = totals[:, : self.num_experts], totals[:, self.num_experts :]
        means = (losses.mean(0) / (replicas * count)).tolist()
        load = rows / rows.mean(1, keepdim=True).clamp(min=1)
        return {
            "expert_auxiliary_loss": means[0],
            "expert_z_loss": means[1],
            "expert_load_max": load.max().item(),
            "expert_load_min": load.min().item(),
            "expert_load": [[round(one, 2) for one in layer] for layer in load.tolist()],
        }
