"""Small helpers for process groups; a group of None means that there is one process.

`all_gather_object` pickles its values: it is for decisions and small reports, not for tensors.
"""

from typing import Any, TypeVar

import torch.distributed as dist

_Value = TypeVar("_Value")


def all_gather_object(value: _Value, group: dist.ProcessGroup | None) -> list[_Value]:
    """The value of each process of `group`, on every process; without a group a list of one."""
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def is_main(group: dist.ProcessGroup | None) -> bool:
    """Whether this is the first process, which writes shared files."""
    return group is None or dist.get_rank(group) == 0


def or_default_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """`group`, or the default group, or None with one process."""
    return dist.group.WORLD if group is None and dist.is_initialized() else group
