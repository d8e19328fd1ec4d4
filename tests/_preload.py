"""Imported once by the server that test processes are forked from.

It loads the modules of a run, and those that DTensor imports late, which saves 0.6 s a process. It
must not compute with torch.
"""

import gc

import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor  # noqa: F401

import fast_llm.training.job  # noqa: F401

# Otherwise each fork would collect garbage among these objects, and copy their pages.
gc.freeze()
