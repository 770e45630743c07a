"""Take some members and steps of a call of torch's own layers and cells."""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["few_members", "trim"]

# Calls up to so many bytes are kept whole: members of a batch may change their places from call to call.
_SMALL_CALL = 2**22


def trim(module: nn.Module, call: Any, num_sequences: int, max_steps: int) -> bool:
    """Cut a recorded call of :class:`torch.nn.RNN`, ``GRU`` or ``LSTM`` down, in place; return whether it was cut.

    Only a call ``(input)`` or ``(input, state)`` of a batch, without packing, whose first result has its time and its
    batch, is cut. Evenly spread members of the batch are kept, and of these the first steps.
    """
    if not isinstance(module, nn.RNNBase) or call.num_bytes <= _SMALL_CALL or call.kept_after:
        return False
    few = few_members(module, call.arguments, call.results, num_sequences)
    if few is None:
        return False
    call.arguments, results = few
    batch_axis = 0 if module.batch_first else 1
    steps = results[0].shape[1 - batch_axis]
    if module.bidirectional:  # the other direction starts at the end
        max_steps = steps
    call.arguments = [
        leaf.narrow(1 - batch_axis, 0, min(steps, max_steps)) if index == 0 else leaf
        for index, leaf in enumerate(call.arguments)
    ]
    # After fewer steps the last state is another one: it is not known.
    call.results = [results[0].narrow(1 - batch_axis, 0, min(steps, max_steps))] + [
        result if steps <= max_steps else torch.full_like(result, torch.nan) for result in results[1:]
    ]
    return True


def few_members(
    module: nn.Module, arguments: list[Any], results: list[Any], count: int
) -> tuple[list[Any], list[Any]] | None:
    """Return arguments and results of up to ``count`` evenly spread members of a batch.

    None unless torch's layer or cell was called as ``(input)`` or ``(input, state)`` with tensors of a batch, and
    returned what it returns.
    """
    tensors = [leaf for leaf in arguments if leaf is not None]
    if not tensors or arguments[0] is not tensors[0] or not all(isinstance(leaf, Tensor) for leaf in tensors + results):
        return None
    is_layer = isinstance(module, nn.RNNBase)
    sequence_axis = 1 if isinstance(module, nn.RNNBase) and not module.batch_first else 0
    state_axis, ndim = (1, 3) if is_layer else (0, 2)
    batch = tensors[0].shape[sequence_axis] if tensors[0].ndim == ndim else 0
    argument_axes = (sequence_axis, *(state_axis for _ in tensors[1:]))
    result_axes = tuple(sequence_axis if is_layer and index == 0 else state_axis for index in range(len(results)))
    pairs = [*zip(tensors, argument_axes, strict=True), *zip(results, result_axes, strict=True)]
    if not batch or any(leaf.ndim != ndim or leaf.shape[axis] != batch for leaf, axis in pairs):
        return None
    if is_layer and results[0].shape[:2] != tensors[0].shape[:2]:
        return None
    count = min(batch, count)
    members = torch.tensor([member * batch // count for member in range(count)], device=tensors[0].device)
    chosen = iter([leaf.index_select(axis, members) for leaf, axis in pairs])
    return [None if leaf is None else next(chosen) for leaf in arguments], list(chosen)
