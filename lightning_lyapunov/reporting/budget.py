"""Which pictures of a run are drawn: so few that their size is bounded, however long the run and large the model."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

__all__ = ["MAX_PICTURED_CELLS", "NUM_WORST_CELLS", "PictureBudget", "worst_cells"]

MAX_PICTURED_CELLS = 8
"""The most cells of a model whose cells are all drawn."""

NUM_WORST_CELLS = 4
"""How many cells of a model of more are drawn at a measurement: those with the largest exponents."""

# The part of the run so far that may pass until pictures are drawn again.
_MAX_AGE = 0.25
# The share of a run's time that drawing may take, but for the first and the last pictures.
_MAX_TIME_SHARE = 0.01


class PictureBudget:
    """Draw whenever a run is a quarter longer than at the last drawing, and drawing has taken 1 % of its time at most.

    So the number of pictures grows with the logarithm of the length of the run: at most 28 drawings in 1,000
    measurements, 49 in 100,000. The first measurement is drawn, and the last of a run in addition, if it was not.

    Args:
        clock: tells the time, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next_step = self._next_time = -math.inf

    def is_due(self, step: int) -> bool:
        """Return whether to draw at a step."""
        return step >= self._next_step and self._clock() >= self._next_time

    @contextmanager
    def drawing(self, step: int) -> Iterator[None]:
        """Count what is done in this context as the drawing at a step."""
        start = self._clock()
        yield
        end = self._clock()
        self._next_step = step + max(1.0, _MAX_AGE * step)
        self._next_time = end + (end - start) * (1 - _MAX_TIME_SHARE) / _MAX_TIME_SHARE


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
