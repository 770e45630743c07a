"""Weights that are spread over processes: gathered where they can be, and found out where they cannot."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["full_tensor", "gathered", "missing_weight"]


def full_tensor(value: Any) -> Any:
    """Return a ``DTensor`` as the plain tensor that it is over all of its processes, anything else as it is.

    All of these processes must call it.
    """
    return value.detach().full_tensor() if hasattr(value, "full_tensor") else value


@contextmanager
def gathered(module: nn.Module | None) -> Iterator[None]:
    """Let a module hold plain tensors in place of each ``DTensor``: of ``fully_shard``, of ``parallelize_module``.

    All processes of these must enter it. It touches nothing, and waits for nobody, where there is no ``DTensor``.
    """
    parts = [] if module is None else module.modules()
    tables: list[dict[str, Any]] = [table for part in parts for table in (part._parameters, part._buffers)]
    spread = [
        (table, name, value) for table in tables for name, value in table.items() if hasattr(value, "full_tensor")
    ]
    try:
        for table, name, value in spread:
            table[name] = full_tensor(value)
        yield
    finally:
        for table, name, value in spread:
            table[name] = value


def missing_weight(module: nn.Module) -> str | None:
    """Return the name of a weight that this process does not hold and cannot gather; None if there is none.

    The answer is the same in all processes for the shards of DeepSpeed and of ``FullyShardedDataParallel``.
    """
    flat = [(name, weight) for name, weight in module.named_parameters() if hasattr(weight, "_fsdp_flattened")]
    # A process may hold all of one weight, and nothing of another, but in no case as a matrix.
    if flat and all(weight.ndim == 1 for _, weight in flat):
        return flat[0][0]
    for name, weight in module.named_parameters():
        if hasattr(weight, "ds_id") or (weight.ndim == 1 and weight.numel() == 0):
            return name
    return next((name for part in module.modules() for name, value in vars(part).items() if _is_freed(value)), None)


def _is_freed(value: Any) -> bool:
    """Return whether a tensor has lost its memory: reading it would end the process.

    With ``use_orig_params=False``, ``FullyShardedDataParallel`` leaves such tensors in the place of the parameters.
    """
    plain = type(value) is Tensor and value.layout is torch.strided
    return plain and value.numel() > 0 and value.untyped_storage().nbytes() == 0
