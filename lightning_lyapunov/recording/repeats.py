"""Repeat recorded calls: what a layer returned must follow from what was recorded of its call."""

from contextlib import AbstractContextManager, nullcontext
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lyapunov.layers.copies import aliased_copy, assign, has_made_weights, is_sharded, private_copy
from lightning_lyapunov.layers.outer_state import OuterState
from lightning_lyapunov.layers.registry import registered
from lightning_lyapunov.layers.trees import Structure, flatten, unflatten
from lightning_lyapunov.recording.calls import RecordedCall, copied_leaves
from lightning_lyapunov.recording.hooks import Hook
from lightning_lyapunov.recording.replay import difference, nudged, slack
from lightning_lyapunov.recording.trimming import few_members

__all__ = ["Repeats", "is_plain"]

# Members of a batch with which a call of torch's own layers is repeated: they are independent.
_NUM_REPEATED = 2
# Calls of torch's cells are repeated together at the end, with a copy of weights up to this size.
_MAX_COPIED_BYTES = 2**26
_TORCHS_OWN = (nn.RNN, nn.GRU, nn.LSTM, nn.RNNCell, nn.GRUCell, nn.LSTMCell)


class Repeats:
    """Repeats the calls of one module on copies of it, in the same mode, autocast and random state.

    A call of one of torch's own layers is repeated with a few members of its batch; calls of one of its cells wait and
    are repeated together. Any other is repeated at once and as a whole.

    Args:
        module: the module, which stays as it is.

    Attributes:
        mismatch: how a second run of a call differed from what the module returned; None if none did.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module, self._is_sharded, self._registered = module, is_sharded(module), registered(module)
        self._copy: nn.Module | None = None
        self._waiting: _Waiting | None = None
        self.mismatch: str | None = None

    def add(self, call: RecordedCall, outer: OuterState | None) -> None:
        """Repeat a call, or let it wait.

        Args:
            call: the call.
            outer: the random states and settings before it; None for a plain one, see :func:`is_plain`.
        """
        if self.mismatch is None and not (outer is None and self._waits(call)):
            self.mismatch = self._compare(call, outer)

    def finish(self) -> None:
        """Repeat the calls that wait, as one."""
        waiting, self._waiting = self._waiting, None
        if waiting is None or self.mismatch is not None:
            return
        with torch.no_grad(), waiting.autocast():
            self.mismatch = _repeat_plain(self._module, waiting.copied, waiting.as_one(), few=None)

    def _waits(self, call: RecordedCall) -> bool:
        """Let a call of one of torch's own cells wait for the others; return False for any other call."""
        if not isinstance(self._module, nn.RNNCellBase) or self._is_sharded:
            return False
        few = few_members(self._module, call.arguments, call.results, _NUM_REPEATED)
        setting = (*_setting(self._module), call.argument_structure, [leaf is None for leaf in call.arguments])
        if few is None or sum(weight.nbytes for weight in self._module.parameters()) > _MAX_COPIED_BYTES:
            return False
        if self._waiting is None or self._waiting.setting != setting:
            self.finish()
            self._waiting = _Waiting(setting, private_copy(self._module), call.argument_structure)
        self._waiting.calls.append(few)
        return True

    def _compare(self, call: RecordedCall, outer: OuterState | None) -> str | None:
        """Repeat a call; return how its results differ, None if they do not."""
        with torch.no_grad(), nullcontext() if outer is None else outer.again():
            if self._copy is None:
                self._copy = aliased_copy(self._module)
            if self._copy is None:  # its weights are spread over processes
                return None
            if outer is None:
                few = few_members(self._module, call.arguments, call.results, _NUM_REPEATED)
                return _repeat_plain(self._module, self._copy, call, few)
            return self._repeat(self._copy, call)

    def _repeat(self, copied: nn.Module, call: RecordedCall) -> str | None:
        """Run the call again on a copy that shares the weights; return how its results differ, None if they do not."""
        for name, value in call.kept_before.items():
            leaves, structure = flatten(value)
            assign(copied, name, unflatten(structure, copied_leaves(leaves)))
        args, kwargs = unflatten(call.argument_structure, copied_leaves(call.arguments))
        leaves, structure = flatten(copied(*args, **kwargs))
        if self._registered is not None:
            read = self._registered.read_call(*call.call, call.result)
            call.stepped = self._registered.after(copied, read.sequences)
        if structure != call.result_structure:
            return "it returned another structure when it was called again"
        return difference(*_known(leaves, call.results))


class _Waiting:
    """Calls of one of torch's own cells in one setting, a few members of each, and a copy with the weights of then."""

    def __init__(self, setting: tuple[Any, ...], copied: nn.Module, structure: Structure) -> None:
        self.setting, self.copied, self._structure = setting, copied, structure
        self.calls: list[tuple[list[Any], list[Any]]] = []

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the autocast context of the calls."""
        kind, enabled, dtype = self.setting[0]
        return torch.autocast(kind, dtype) if enabled else nullcontext()

    def as_one(self) -> RecordedCall:
        """Return a call with the members of all."""
        arguments, results = zip(*self.calls, strict=True)

        def joined(part: tuple[list[Any], ...]) -> list[Any]:
            return [torch.cat(leaves) if leaves[0] is not None else None for leaves in zip(*part, strict=True)]

        return RecordedCall(joined(arguments), self._structure, joined(results))


def _setting(module: nn.Module) -> tuple[Any, ...]:
    """Return what must be the same for calls of a cell to be repeated as one: autocast, and the weights."""
    kind = next(module.parameters()).device.type
    weights = [(weight.data_ptr(), weight._version) for weight in module.parameters() if not weight.is_inference()]
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return (kind, enabled, torch.get_autocast_dtype(kind) if enabled else None), weights


def is_plain(module: nn.Module) -> bool:
    """Return whether a call of a module is torch's own: no subclass, no made weights, no hook but a recorder's.

    Then the members of a batch are independent, and only arguments, weights and inter-layer dropout make a result.
    """
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    is_untouched = "forward" not in vars(module) and module._compiled_call_impl is None
    is_own = type(module) in _TORCHS_OWN and is_untouched and all(isinstance(hook, Hook) for hook in hooks)
    return is_own and not has_made_weights(module)


def _repeat_plain(
    module: nn.Module, copied: nn.Module, call: RecordedCall, few: tuple[list[Any], list[Any]] | None
) -> str | None:
    """Repeat a call of one of torch's own layers or cells, and compare: with a few members, or with all if None.

    Inter-layer dropout is left out: then only the last states of the first layer, below it, are compared.
    """
    arguments, returned = (call.arguments, call.results) if few is None else few
    drops = isinstance(module, nn.RNNBase) and module.training and module.dropout > 0 and module.num_layers > 1

    def comparable(results: list[Any]) -> list[Any]:
        if not isinstance(module, nn.RNNBase) or not drops:
            return results
        return [state[: 1 + module.bidirectional] for state in results[-1 - isinstance(module, nn.LSTM) :]]

    def run(arguments: list[Any]) -> list[Any]:
        args, kwargs = unflatten(call.argument_structure, arguments)
        return flatten(copied(*args, **kwargs))[0]

    if isinstance(copied, nn.RNNBase):
        copied.dropout = 0.0
    known = comparable(returned)
    again, returned = _known(comparable(run(arguments)), known)
    message = difference(again, returned)
    if message is None:
        return None
    # Other sizes of a batch round otherwise, and a chaotic network makes that large: then it does so with a nudge.
    others = _known(comparable(run([nudged(leaf, 1e2) for leaf in arguments])), known)[0]
    time_axis = 1 if isinstance(module, nn.RNNBase) and module.batch_first and again[0].ndim == 3 else 0
    is_layer = isinstance(module, nn.RNNBase) and not drops
    grown = [
        slack(leaf, old, time_axis if is_layer and index == 0 else None)
        if isinstance(old, Tensor) and old.is_floating_point()
        else None
        for index, (leaf, old) in enumerate(zip(others, again, strict=True))
    ]
    return difference(again, returned, grown)


def _known(again: list[Any], returned: list[Any]) -> tuple[list[Any], list[Any]]:
    """Leave out the last state of a call that was cut short: it is not known, and is NaN."""
    known = [not (isinstance(leaf, Tensor) and bool(leaf.isnan().all())) for leaf in returned]
    return list(compress(again, known)), list(compress(returned, known))
