"""Samples of text (`training.samples`): fixed prompts that the model in training continues.

Every process runs the same forward passes, whatever its part of the weights, and the same number
of them: an end of text changes no shape. All passes have one shape, so that nothing is compiled
again.
"""

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fast_llm.parallel.mesh import Mesh
from fast_llm.planning.prompts import encode_prompts, read_tokenizer
from fast_llm.planning.run_spec import RunSpec
from fast_llm.terminal import counted
from fast_llm.training.run import Run

logger = logging.getLogger("fast_llm")

PHASE = "samples"
_LENGTHS = 64  # inputs of a pass are a multiple of it, and of the processes that may share them


class Sampler:
    """Continues the prompts of a run. Every process calls each method."""

    def __init__(
        self, spec: RunSpec, mesh: Mesh, run: Run, model: nn.Module, heartbeat: Callable[..., None]
    ):
        """`heartbeat`: called at the start of each phase, as `Watchdog.heartbeat`."""
        self.config = spec.config.training
        self.mesh, self.run, self.model, self.heartbeat = mesh, run, model, heartbeat
        self.eos = spec.special_tokens.get("eos")
        files, tokens = spec.extra_files, spec.special_tokens
        self.prompts = encode_prompts(spec.config, files, tokens, spec.dataset)
        self.tokenizer = read_tokenizer(files) if self.prompts else None

    def due(self, step: int) -> bool:
        """Whether samples are due: before the first step, at the interval, and at the end."""
        settings = self.config.samples
        at_ends = step == 0 or step >= self.config.train_iters
        return settings.interval is not None and (at_ends or settings.due(step))

    def sample(self, step: int) -> None:
        """Continue the prompts, and write the texts to metrics.jsonl."""
        assert self.tokenizer is not None
        began = time.perf_counter()
        self.heartbeat("samples", step=step, slow=True)
        texts = []
        for tokens in greedy(self.model, self.prompts, self.config.samples.max_tokens, self.mesh):
            end = tokens.index(self.eos) if self.eos in tokens else len(tokens)
            texts.append(self.tokenizer.decode(tokens[:end]))
        seconds = time.perf_counter() - began
        prompts = self.config.samples.prompts
        samples: list[dict[str, Any]] = [
            {"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)
        ]
        values = {"run": self.run.number, "step": step, "phase": PHASE, "seconds": seconds}
        self.run.record(values | {"samples": samples})
        logger.info(
            f"Continued {counted(len(prompts), 'prompt')} at step {step} in {seconds:.1f} s."
        )


@torch.no_grad()
def greedy(model: nn.Module, prompts: list[list[int]], count: int, mesh: Mesh) -> list[list[int]]:
    """The most likely `count` tokens after each prompt, one after the other."""
    longest = max(map(len, prompts)) + count
    multiple = math.lcm(_LENGTHS, mesh.tensor.size)
    tokens = torch.zeros(len(prompts), -(-longest // multiple) * multiple, dtype=torch.int64)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    tokens = tokens.to(mesh.device)
    positions = torch.arange(tokens.shape[1], device=mesh.device).expand_as(tokens)
    rows = torch.arange(len(prompts), device=mesh.device)
    ends = torch.tensor([len(prompt) for prompt in prompts], device=mesh.device)
    for _ in range(count):
        logits: Tensor = model(tokens, positions)  # B S V
        # Later inputs are not attended to, so what they are does not matter.
        tokens[rows, ends] = logits[rows, ends - 1].float().argmax(-1)
        ends += 1
    return [
        row[len(prompt) : len(prompt) + count].tolist()
        for row, prompt in zip(tokens.cpu(), prompts, strict=True)
    ]
