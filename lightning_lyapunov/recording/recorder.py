"""Record what recurrent layers of a running model are called with and what they return, as it passes by."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lyapunov.layers.copies import (
    has_made_weights,
    is_sharded,
    kept_tensors,
    same,
)
from lightning_lyapunov.layers.discovery import FoundLayer
from lightning_lyapunov.layers.outer_state import OuterState
from lightning_lyapunov.layers.trees import flatten
from lightning_lyapunov.recording.calls import RecordedCall, RecordedCalls, copied_leaves
from lightning_lyapunov.recording.graph import Ancestry
from lightning_lyapunov.recording.hooks import add_hooks, beside_modes, has_numbers, remove_hooks
from lightning_lyapunov.recording.repeats import Repeats, is_plain
from lightning_lyapunov.recording.trimming import trim

__all__ = ["Recorder"]

# Calls without end would fill the memory: recording stops after so many bytes of a layer, and the first call.
_MAX_BYTES = 2**28
_SKIPPED = (
    "It was called under `torch.func` only (`vmap`, `grad`), while it was traced, or after it was scripted. Call it "
    "once without."
)


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
            recorded.wrapper = (*wrapper, RecordedCall(copied_leaves(leaves), structure))

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
        self._repeats = Repeats(module)
        self._is_plain: bool | None = None
        self._pending: tuple[RecordedCall, _Surroundings | None] | None = None
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
        call = RecordedCall(copied_leaves(leaves), structure, derived=derived)
        call.has_graph = torch.is_grad_enabled()
        self._pending = call, None if self._is_plain else _Surroundings(self._module)

    def after(self, output: Any) -> None:
        if self._pending is None:
            return
        (call, surroundings), self._pending = self._pending, None
        leaves, call.result_structure = flatten(output)
        self._ancestry.add(leaves)
        call.results = copied_leaves(leaves)
        if surroundings is not None:
            call.kept_before, call.kept_after = surroundings.changed(self._module, self._written)
        is_whole = not trim(self._module, call, *self._limits)
        self._num_bytes += call.num_bytes
        self.recorded.calls.append(call)
        outer = None if surroundings is None else surroundings.outer
        # What was drawn for a whole batch cannot be drawn again for a part of it.
        if is_whole or outer is None or not outer.has_drawn():
            self._repeats.add(call, outer)
            self.recorded.mismatch = self._repeats.mismatch

    def repeat_waiting(self) -> None:
        self._repeats.finish()
        self.recorded.mismatch = self._repeats.mismatch


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
