"""Imported once by the server that test processes are forked from: load, but run nothing.

All that a run imports, and what DTensors import late: 0.6 s a process.
"""

import gc

import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor  # noqa: F401

import fast_llm.training.build  # noqa: F401

# who is forked would look through it all for garbage, and copy the pages that it lies on
gc.freeze()
