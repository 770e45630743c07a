"""Which pictures of a run are drawn: so few that their size is bounded, however long the run and large the model."""

import math
from collections.abc import Iterable, Mapping

__all__ = ["MAX_PICTURED_CELLS", "NUM_WORST_CELLS", "PictureBudget", "worst_cells"]

MAX_PICTURED_CELLS = 8
"""The most cells of a model whose cells are all drawn."""

NUM_WORST_CELLS = 4
"""How many cells of a model of more are drawn at a measurement: those with the largest exponents."""

# The part of the run so far that may pass until pictures are drawn again.
_MAX_AGE = 0.25


class PictureBudget:
    """Draw at the first measurement, and then whenever a run is a quarter longer than at the last drawing.

    So pictures are never older than a fifth of the run, and their number grows with the logarithm of its length: 28
    drawings in 1,000 measurements, 49 in 100,000. The last measurement of a run is drawn in addition, if it was not.
    """

    def __init__(self) -> None:
        self._next = -math.inf

    def is_due(self, step: int) -> bool:
        """Return whether to draw at a step, and count it as drawn."""
        if step < self._next:
            return False
        self._next = step + max(1.0, _MAX_AGE * step)
        return True


def worst_cells(cells: Iterable[str], largest: Mapping[str, float]) -> list[str]:
    """Return the cells to draw, in their order: all of a small model, or the worst :data:`NUM_WORST_CELLS`.

    Args:
        cells: the names of all cells.
        largest: the largest exponent of each that was measured; NaN, of a network that is not finite, is the worst.
    """

    def badness(cell: str) -> float:
        value = largest.get(cell, -math.inf)
        return math.inf if math.isnan(value) else value

    names = list(cells)
    if len(names) <= MAX_PICTURED_CELLS:
        return names
    chosen = set(sorted(names, key=badness, reverse=True)[:NUM_WORST_CELLS])
    return [name for name in names if name in chosen]
