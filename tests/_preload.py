"""Imported once by the server that test processes are forked from: load, but run nothing."""

import torch
import torch._dynamo
import torch.distributed
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor  # noqa: F401
