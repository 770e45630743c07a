"""What is recorded of the calls of a layer."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lyapunov.layers.sharding import full_tensor
from lightning_lyapunov.layers.trees import Structure, flatten, unflatten

__all__ = ["RecordedCall", "RecordedCalls", "copied_leaves"]


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


def copied_leaves(leaves: list[Any]) -> list[Any]:
    """Return detached copies of tensors, whole where they are sharded, and what is no tensor as it is."""
    with torch.inference_mode(False), torch.no_grad():
        return [full_tensor(leaf).detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
