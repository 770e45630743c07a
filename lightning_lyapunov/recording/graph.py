"""Which arguments of a call were computed from the results of an earlier call."""

from typing import Any

from torch import Tensor

__all__ = ["Ancestry"]

# Nodes to visit before an argument counts as derived: an argument is a few operations away from the last results.
_MAX_NODES = 2_000


class Ancestry:
    """The graph nodes of results, by number, so that no graph stays alive.

    PyTorch numbers the nodes of a graph in the order in which they are made. A node that was made before the first
    result cannot have been computed from it, so that a search ends there.
    """

    def __init__(self) -> None:
        self._numbers: set[int] = set()
        self._first = 0

    def add(self, results: list[Any]) -> None:
        """Add the results of a call."""
        nodes = [leaf.grad_fn for leaf in results if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
        numbers = {node._sequence_nr() for node in nodes}
        if numbers and not self._numbers:
            self._first = min(numbers)
        self._numbers |= numbers

    def reaches(self, argument: Tensor) -> bool:
        """Return whether an argument was computed from a result, as far as the graph tells."""
        if argument.grad_fn is None or not self._numbers:
            return False
        waiting: list[Any] = [argument.grad_fn]
        seen: set[Any] = set()
        while waiting:
            node = waiting.pop()
            # Leaves accumulate gradients and have no number in this order.
            if node in seen or node.name().endswith("AccumulateGrad"):
                continue
            number = node._sequence_nr()
            if number in self._numbers:
                return True
            seen.add(node)
            if len(seen) > _MAX_NODES:
                return True
            if number > self._first:
                waiting += [next_node for next_node, _ in node.next_functions if next_node is not None]
        return False
