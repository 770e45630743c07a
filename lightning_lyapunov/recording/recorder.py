"""Record what recurrent layers of a running model are called with and what they return, as it passes by."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lyapunov.layers.copies import (
    aliased_copy,
    assign,
    has_made_weights,
    is_sharded,
    kept_tensors,
    private_copy,
    same,
)
from lightning_lyapunov.layers.discovery import FoundLayer
from lightning_lyapunov.layers.outer_state import OuterState
from lightning_lyapunov.layers.registry import registered
from lightning_lyapunov.layers.sharding import full_tensor
from lightning_lyapunov.layers.trees import Structure, flatten, unflatten
from lightning_lyapunov.recording.graph import Ancestry
from lightning_lyapunov.recording.hooks import Hook, add_hooks, beside_modes, has_numbers, remove_hooks
from lightning_lyapunov.recording.replay import difference, nudged, slack
from lightning_lyapunov.recording.trimming import few_members, trim

__all__ = ["RecordedCall", "RecordedCalls", "Recorder"]

# Calls without end would fill the memory: recording stops after so many bytes of a layer, and the first call.
_MAX_BYTES = 2**28
# Members of a batch with which a call of torch's own layers is repeated: they are independent.
_NUM_REPEATED = 2
# Calls of torch's cells are repeated together at the end, with a copy of weights up to this size.
_MAX_COPIED_BYTES = 2**26
_TORCHS_OWN = (nn.RNN, nn.GRU, nn.LSTM, nn.RNNCell, nn.GRUCell, nn.LSTMCell)
_SKIPPED = (
    "It was called under `torch.func` only (`vmap`, `grad`), while it was traced, or after it was scripted. Call it "
    "once without."
)


@dataclass
class RecordedCall:
    """One call of a module: detached copies of its arguments and results.

    Attributes:
        arguments: the leaves of ``(args, kwargs)``.
        argument_structure: their structure.
        results: the leaves of what it returned.
        result_structure: their structure.
        kept_before: the tensors that the module keeps and that calls so far replaced or wrote over, before it.
        kept_after: the same after it.
        derived: for each argument whether its graph reaches what an earlier call returned.
        has_graph: whether the call was recorded with a graph, so that ``derived`` can be known.
        stepped: the states after it by the step of a registered class, ``(batch, state)``.
        full_lengths: the steps of each member before the call was cut, ``(batch,)``, on the CPU; None: it was not cut.
    """

    arguments: list[Any]
    argument_structure: Structure
    results: list[Any] = field(default_factory=list)
    result_structure: Structure = field(default_factory=lambda: Structure(None))
    kept_before: dict[str, Any] = field(default_factory=dict)
    kept_after: dict[str, Any] = field(default_factory=dict)
    derived: list[bool] = field(default_factory=list)
    has_graph: bool = False
    stepped: Tensor | None = None
    full_lengths: Tensor | None = None

    @property
    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as the module was called with them."""
        args, kwargs = unflatten(self.argument_structure, self.arguments)
        return args, kwargs

    @property
    def result(self) -> Any:
        """What the module returned."""
        return unflatten(self.result_structure, self.results)

    def is_derived(self, part: Any) -> bool:
        """Return whether a part of the arguments was computed from the results of an earlier call."""
        leaves = flatten(part)[0]
        pairs = zip(self.arguments, self.derived, strict=True)
        return any(flag and any(leaf is other for other in leaves) for leaf, flag in pairs)

    @property
    def is_empty(self) -> bool:
        """Whether it has no members or no steps."""
        return any(isinstance(leaf, Tensor) and leaf.numel() == 0 for leaf in (*self.arguments, *self.results))

    @property
    def num_bytes(self) -> int:
        """The memory of its tensors."""
        leaves = flatten((self.arguments, self.results, self.kept_before, self.kept_after))[0]
        return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))


@dataclass
class RecordedCalls:
    """The calls of one layer in one batch, in order.

    Attributes:
        calls: the calls.
        mismatch: how a second run of a call differed from what the layer returned; None if none did.
        wrapper: the module that makes the weights of the layer, the layer's name there, and its first call.
        is_sharded: whether its weights are spread over processes; then no copy of it can be called.
        num_missed: how many calls came after the last one, when the memory for them was full.
    """

    calls: list[RecordedCall] = field(default_factory=list)
    mismatch: str | None = None
    wrapper: tuple[nn.Module, str, RecordedCall] | None = None
    is_sharded: bool = False
    num_missed: int = 0


class Recorder:
    """Records what layers are called with between :meth:`start` and :meth:`stop`.

    Two hooks on the layer see what the model's ``forward`` passes on, after embeddings and encoders. They copy
    arguments and results. A copy of the layer that shares its weights then repeats the call, in the same mode, autocast
    and random state, and its results are compared: what a call returned must follow from what was recorded. The layer,
    the random states and the run itself stay as they were.

    Args:
        layers: the layers to record by name, as :func:`~lightning_lyapunov.layers.discovery.find_layers` returns them.
        num_sequences: the sequences of a batch that are needed; of a large batch of torch's layers no more are copied.
        max_steps: the steps of a sequence that are needed; of torch's layers no more are copied.

    Attributes:
        recording: whether its hooks are on the layers.
        errors: what went wrong in recording, by the name of the layer.
    """

    def __init__(self, layers: Mapping[str, FoundLayer], num_sequences: int, max_steps: int) -> None:
        self._layers = layers
        self._num_sequences, self._max_steps = num_sequences, max_steps
        self._watches: dict[str, _Watch] = {}
        self.errors: dict[str, Exception] = {}
        self.recording = False

    def start(self) -> None:
        """Forget what was recorded and record from now on."""
        self.stop()
        self._watches, self.errors = {}, {}
        self.recording = True
        for name, (module, target, wrapper) in self._layers.items():
            self._watches[name] = _Watch(module, self._num_sequences, self._max_steps)
            makes_weights = wrapper is not None and has_made_weights(module)
            add_hooks(self, name, target, wrapper[0] if wrapper and makes_weights else None)

    def stop(self) -> None:
        """Record no more; remove every hook, and repeat the calls that wait for it."""
        for module, target, wrapper in self._layers.values():
            for hooked in (module, target, None if wrapper is None else wrapper[0]):
                if hooked is not None:
                    remove_hooks(hooked, self)
        self.recording = False
        for name in self._watches:
            self.receive(name, "repeat_waiting")

    def take(self) -> dict[str, RecordedCalls]:
        """Return the calls of each layer, and forget them; a layer that was not called is not in it."""
        recorded = {name: watch.recorded for name, watch in self._watches.items() if watch.recorded.calls}
        for name, watch in self._watches.items():
            if watch.skipped and name not in recorded:
                self.errors.setdefault(name, RuntimeError(_SKIPPED))
        self._watches = {}
        return recorded

    def forget(self) -> None:
        """Forget what was recorded."""
        self._watches, self.errors = {}, {}

    def receive(self, name: str, record: str, *arguments: Any) -> None:
        """Pass a call of a layer on to one of the methods below. This guards them all, because they run in its forward.

        An error ends the recording of the layer in this batch; the callback gives the warning, and the forward goes on.
        """
        if name in self.errors or name not in self._watches:
            return
        try:
            with beside_modes():
                getattr(self, record)(name, *arguments)
        except Exception as error:
            # Neither its traceback, whose frames hold the batch, nor what was recorded.
            error.__cause__ = error.__context__ = None
            self.errors[name] = error.with_traceback(None)
            self._watches[name] = _Watch(self._layers[name].module, self._num_sequences, self._max_steps)

    def before_wrapper(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the first call of the module that makes the weights of a layer."""
        recorded, wrapper = self._watches[name].recorded, self._layers[name].wrapper
        leaves, structure = flatten((args, kwargs))
        if recorded.wrapper is None and wrapper is not None and has_numbers(leaves):
            recorded.wrapper = (*wrapper, RecordedCall(_copied_leaves(leaves), structure))

    def before(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the arguments of a call."""
        self._watches[name].before(args, kwargs)

    def after(self, name: str, output: Any) -> None:
        """Record what the call returned, and repeat it."""
        self._watches[name].after(output)

    def repeat_waiting(self, name: str) -> None:
        """Repeat the calls that wait for it."""
        self._watches[name].repeat_waiting()

    def skip(self, name: str) -> None:
        """Take note that calls pass by unseen."""
        self._watches[name].skipped = True


class _Watch:
    """The calls of one module as they come."""

    def __init__(self, module: nn.Module, num_sequences: int, max_steps: int) -> None:
        self._module, self._limits = module, (num_sequences, max_steps)
        self.recorded = RecordedCalls(is_sharded=is_sharded(module))
        self._num_bytes = 0
        self._written: set[str] = set()
        self._ancestry = Ancestry()
        self._registered = registered(module)
        self._is_plain: bool | None = None
        self._copy: nn.Module | None = None
        self._pending: tuple[RecordedCall, _Surroundings | None] | None = None
        self._waiting: _Waiting | None = None
        self.skipped = False

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._pending = None
        if self.recorded.calls and self._num_bytes > _MAX_BYTES:
            self.recorded.num_missed += 1
            return
        if self._is_plain is None:  # not before, because hooks may come with the batch
            self._is_plain = is_plain(self._module)
        leaves, structure = flatten((args, kwargs))
        if not has_numbers(leaves):
            self.skipped = True
            return
        derived = [isinstance(leaf, Tensor) and self._ancestry.reaches(leaf) for leaf in leaves]
        call = RecordedCall(_copied_leaves(leaves), structure, derived=derived)
        call.has_graph = torch.is_grad_enabled()
        self._pending = call, None if self._is_plain else _Surroundings(self._module)

    def after(self, output: Any) -> None:
        if self._pending is None:
            return
        (call, surroundings), self._pending = self._pending, None
        leaves, call.result_structure = flatten(output)
        self._ancestry.add(leaves)
        call.results = _copied_leaves(leaves)
        if surroundings is not None:
            call.kept_before, call.kept_after = surroundings.changed(self._module, self._written)
        is_whole = not trim(self._module, call, *self._limits)
        self._num_bytes += call.num_bytes
        self.recorded.calls.append(call)
        # What was drawn for a whole batch cannot be drawn again for a part of it.
        can_repeat = is_whole or surroundings is None or not surroundings.outer.has_drawn()
        if self.recorded.mismatch is None and can_repeat and not self._waits(call):
            self.recorded.mismatch = self._compare(call, surroundings)

    def _waits(self, call: RecordedCall) -> bool:
        """Let a call of one of torch's own cells wait for the others; return False for any other call."""
        if not self._is_plain or not isinstance(self._module, nn.RNNCellBase) or self.recorded.is_sharded:
            return False
        few = few_members(self._module, call.arguments, call.results, _NUM_REPEATED)
        setting = (*_setting(self._module), call.argument_structure, [leaf is None for leaf in call.arguments])
        if few is None or sum(weight.nbytes for weight in self._module.parameters()) > _MAX_COPIED_BYTES:
            return False
        if self._waiting is None or self._waiting.setting != setting:
            self.repeat_waiting()
            self._waiting = _Waiting(setting, private_copy(self._module), call.argument_structure)
        self._waiting.calls.append(few)
        return True

    def repeat_waiting(self) -> None:
        """Repeat the calls that wait, as one."""
        waiting, self._waiting = self._waiting, None
        if waiting is None or self.recorded.mismatch is not None:
            return
        with torch.no_grad(), waiting.autocast():
            self.recorded.mismatch = _repeat_plain(self._module, waiting.copied, waiting.as_one(), few=None)

    def _compare(self, call: RecordedCall, surroundings: "_Surroundings | None") -> str | None:
        """Repeat a call; return how its results differ, None if they do not."""
        with torch.no_grad(), nullcontext() if surroundings is None else surroundings.outer.again():
            if self._copy is None:
                self._copy = aliased_copy(self._module)
            if self._copy is None:  # its weights are spread over processes
                return None
            if surroundings is None:
                few = few_members(self._module, call.arguments, call.results, _NUM_REPEATED)
                return _repeat_plain(self._module, self._copy, call, few)
            return self._repeat(self._copy, call)

    def _repeat(self, copied: nn.Module, call: RecordedCall) -> str | None:
        """Run the call again on a copy that shares the weights; return how its results differ, None if they do not."""
        for name, value in call.kept_before.items():
            assign(copied, name, _copied_nested(value))
        args, kwargs = unflatten(call.argument_structure, _copied_leaves(call.arguments))
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


def _copied_leaves(leaves: list[Any]) -> list[Any]:
    with torch.inference_mode(False), torch.no_grad():
        return [full_tensor(leaf).detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _copied_nested(value: Any) -> Any:
    leaves, structure = flatten(value)
    return unflatten(structure, _copied_leaves(leaves))


class _Surroundings:
    """What a call may change beside what it returns: tensors that the module keeps, and what lies outside of it."""

    def __init__(self, module: nn.Module) -> None:
        self._kept = kept_tensors(module)
        self.outer = OuterState(module)

    def changed(self, module: nn.Module, written: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the kept tensors that this call or an earlier one has replaced or written over, before and after.

        Args:
            module: the module.
            written: their names so far, which this adds to.
        """
        now = kept_tensors(module)
        written |= {name for name in now if name not in self._kept or not same(now[name], self._kept[name])}
        before, after = ({name: kept[name] for name in kept if name in written} for kept in (self._kept, now))
        return before, after
