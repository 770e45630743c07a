"""Keep of a large call of torch's own layers the sequences and steps that are needed."""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["trim"]

# Calls up to so many bytes are kept whole: members of a batch may change their places from call to call.
_SMALL_CALL = 2**22


def trim(module: nn.Module, call: Any, num_sequences: int, max_steps: int) -> bool:
    """Cut a recorded call of :class:`torch.nn.RNN`, ``GRU`` or ``LSTM`` down, in place; return whether it was cut.

    Only a call ``(input)`` or ``(input, state)`` of a batch, without packing, whose first result has its time and its
    batch, is cut. Evenly spread members of the batch are kept, and of these the first steps.
    """
    if not isinstance(module, nn.RNNBase) or call.num_bytes <= _SMALL_CALL or call.kept_after:
        return False
    tensors = [leaf for leaf in call.arguments if isinstance(leaf, Tensor)]
    if not tensors or len(tensors) != len([leaf for leaf in call.arguments if leaf is not None]):
        return False
    inputs, output = tensors[0], call.results[0]
    batch_axis = 0 if module.batch_first else 1
    if inputs.ndim != 3 or output.ndim != 3 or inputs.shape[:2] != output.shape[:2]:
        return False
    batch, steps = inputs.shape[batch_axis], inputs.shape[1 - batch_axis]
    states = [*tensors[1:], *call.results[1:]]
    if any(not isinstance(state, Tensor) or state.ndim != 3 or state.shape[1] != batch for state in states):
        return False
    count = min(batch, num_sequences)
    members = torch.tensor([member * batch // count for member in range(count)], device=inputs.device)

    def cut(leaf: Any) -> Any:
        if leaf is inputs or leaf is output:
            return leaf.narrow(1 - batch_axis, 0, min(steps, max_steps)).index_select(batch_axis, members)
        return leaf.index_select(1, members) if isinstance(leaf, Tensor) else leaf

    call.arguments = [cut(leaf) for leaf in call.arguments]
    results = [cut(leaf) for leaf in call.results]
    # After fewer steps the last state is another one: it is not known.
    call.results = (
        results if steps <= max_steps else [results[0], *(torch.full_like(r, torch.nan) for r in results[1:])]
    )
    return True
