"""Take some members and steps of a call of torch's own layers and cells."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_lyapunov.recording.chains import longest

__all__ = ["few_members", "trim"]

# Calls up to so many bytes are kept whole: members of a batch may change their places from call to call.
_SMALL_CALL = 2**22


def trim(module: nn.Module, call: Any, num_sequences: int, max_steps: int) -> bool:
    """Cut a recorded call of :class:`torch.nn.RNN`, ``GRU`` or ``LSTM`` down, in place; return whether it was cut.

    Only a call ``(input)`` or ``(input, state)`` of a batch, whose first result has its time and its batch, is cut.
    Evenly spread members of the batch are kept, of a packed batch the longest, and of these the first steps.
    """
    if not isinstance(module, nn.RNNBase) or call.kept_after:
        return False
    if (packed := _as_packed(call)) is not None:
        return _trim_packed(call, *packed, num_sequences, max_steps, reads_backwards=module.bidirectional)
    if call.num_bytes <= _SMALL_CALL:
        return False
    few = few_members(module, call.arguments, call.results, num_sequences)
    if few is None:
        return False
    call.arguments, results = few
    batch_axis = 0 if module.batch_first else 1
    steps = results[0].shape[1 - batch_axis]
    call.full_lengths = torch.full((results[0].shape[batch_axis],), steps, device="cpu")
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


def _as_packed(call: Any) -> tuple[PackedSequence, PackedSequence] | None:
    """Return the packed input and output of a call; None for any other call."""
    args, kwargs = call.call
    inputs, result = args[0] if args else kwargs.get("input"), call.result
    output = result[0] if isinstance(result, tuple) and len(result) == 2 else None
    if not isinstance(inputs, PackedSequence) or not isinstance(output, PackedSequence):
        return None
    parts = len(inputs)
    states = [*call.arguments[parts:], *call.results[parts:]]
    batch = int(inputs.batch_sizes[0])
    if any(leaf is not None and not _is_state(leaf, batch) for leaf in states):
        return None
    return (inputs, output) if torch.equal(inputs.batch_sizes, output.batch_sizes) else None


def _is_state(leaf: Any, batch: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim == 3 and leaf.shape[1] == batch


def _trim_packed(
    call: Any,
    inputs: PackedSequence,
    output: PackedSequence,
    num_sequences: int,
    max_steps: int,
    *,
    reads_backwards: bool,
) -> bool:
    """Cut a packed call before anything pads it: a long member would make every other as long.

    Of equally long members, evenly spread ones are kept.
    """
    steps, batch = len(inputs.batch_sizes), int(inputs.batch_sizes[0])
    numbers = [packed.data.shape[1] * packed.data.element_size() for packed in (inputs, output)]
    if max(call.num_bytes, steps * batch * sum(numbers)) <= _SMALL_CALL:
        return False
    is_cut, parts = steps > max_steps, len(inputs)
    lengths = _lengths(inputs)
    members = longest(lengths.clamp(max=max_steps).tolist(), num_sequences)
    call.full_lengths = lengths[members]
    index = torch.tensor(members, device=inputs.data.device)

    def unknown_if(unknown: bool, leaf: Any) -> Any:
        return torch.full_like(leaf, torch.nan) if unknown else leaf

    def chosen(leaf: Any) -> Any:
        return None if leaf is None else leaf.index_select(1, index)

    data, *order = _few_packed(output, members, max_steps)
    call.arguments = [*_few_packed(inputs, members, max_steps), *map(chosen, call.arguments[parts:])]
    # After fewer steps the last state is another one, and so is all that the other direction returns.
    call.results = [
        unknown_if(is_cut and reads_backwards, data),
        *order,
        *(unknown_if(is_cut, chosen(leaf)) for leaf in call.results[parts:]),
    ]
    return True


def _lengths(packed: PackedSequence) -> Tensor:
    """Return the steps of each member, ``(batch,)``, on the CPU."""
    # Batch sizes fall: member i, in order of length, has as many steps as there are sizes above i.
    sizes = packed.batch_sizes.flip(0).contiguous()
    lengths = len(sizes) - torch.searchsorted(sizes, torch.arange(int(sizes[-1]), device="cpu"), right=True)
    return lengths if packed.unsorted_indices is None else lengths[packed.unsorted_indices.cpu()]


def _few_packed(packed: PackedSequence, members: list[int], max_steps: int) -> PackedSequence:
    """Return some members of a packed batch, and of these the first steps."""
    sizes = packed.batch_sizes[:max_steps]
    starts = packed.batch_sizes.cumsum(0)[: len(sizes)] - sizes
    places = torch.tensor(members, device="cpu")
    if packed.unsorted_indices is not None:
        places = packed.unsorted_indices.cpu()[places]
    places, order = places.sort()
    runs = places < sizes.unsqueeze(-1)
    rows = (starts.unsqueeze(-1) + places)[runs]
    device = packed.data.device
    orders = (None, None) if packed.unsorted_indices is None else (order.to(device), order.argsort().to(device))
    few_sizes = runs.sum(1)
    return PackedSequence(packed.data.index_select(0, rows.to(device)), few_sizes[few_sizes > 0], *orders)


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
    members = torch.tensor(longest([1] * batch, count), device=tensors[0].device)
    chosen = iter([leaf.index_select(axis, members) for leaf, axis in pairs])
    return [None if leaf is None else next(chosen) for leaf in arguments], list(chosen)
