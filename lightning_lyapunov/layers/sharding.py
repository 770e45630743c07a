"""Weights that are spread over processes: gather those that can be gathered, detect those that cannot."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["full_tensor", "gathered", "missing_weight"]


def full_tensor(value: Any) -> Any:
    """Return the plain tensor of a ``DTensor``, gathered from its processes, and anything else unchanged.

    The call is collective: all processes of the ``DTensor`` must make it.
    """
    return value.detach().full_tensor() if hasattr(value, "full_tensor") else value


@contextmanager
def gathered(module: nn.Module | None) -> Iterator[None]:
    """Replace each ``DTensor`` of a module, of ``fully_shard`` or ``parallelize_module``, by a plain tensor meanwhile.

    The call is collective over the processes of each ``DTensor``. Without a ``DTensor`` it does nothing.
    """
    parts = [] if module is None else module.modules()
    tables: list[dict[str, Any]] = [table for part in parts for table in (part._parameters, part._buffers)]
    spread = [
        (table, name, value) for table in tables for name, value in table.items() if hasattr(value, "full_tensor")
    ]
    try:
        for table, name, value in spread:
            table[name] = value.full_tensor() if torch.is_grad_enabled() else full_tensor(value)
        yield
    finally:
        for table, name, value in spread:
            table[name] = value


def missing_weight(module: nn.Module) -> str | None:
    """Return the name of a weight that this process does not hold and cannot gather; None if there is none.

    The answer is the same in all processes for the shards of DeepSpeed and of ``FullyShardedDataParallel``.
    """
    flat = [(name, weight) for name, weight in module.named_parameters() if hasattr(weight, "_fsdp_flattened")]
    # A process may hold all of one weight and nothing of another, but never a matrix.
    if flat and all(weight.ndim == 1 for _, weight in flat):
        return flat[0][0]
    for name, weight in module.named_parameters():
        if hasattr(weight, "ds_id") or (weight.ndim == 1 and weight.numel() == 0):
            return name
    return next((name for part in module.modules() for name, value in vars(part).items() if _is_freed(value)), None)


def _is_freed(value: Any) -> bool:
    """Return whether a tensor has lost its memory, so that reading it would end the process.

    With ``use_orig_params=False``, ``FullyShardedDataParallel`` leaves such tensors in the place of the parameters.
    """
    plain = type(value) is Tensor and value.layout is torch.strided
    return plain and value.numel() > 0 and value.untyped_storage().nbytes() == 0
