"""The share of a run's time that measuring takes, and how long to wait until one more measurement fits in a budget."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch

__all__ = ["Overhead"]

# Warn only above 30 s, two measurements and 10 % of the run: below, nobody would change anything.
_WARN_SECONDS, _WARN_MEASUREMENTS, _WARN_SHARE = 30.0, 2, 0.1
# Say what the next measurement costs if the first one took more than this part of an epoch.
_SAY_SHARE = 0.01
_REMEDY = (
    "Lower `num_exponents`, `max_steps` or `num_sequences`, measure less often with `every_n_train_steps` or "
    "`every_n_epochs`, or keep to a share with `LyapunovMonitor(max_overhead=0.01)`."
)


class Overhead:
    """The time since the first batch, and the part of it that measurements took.

    Args:
        device: where they run. It is synchronised before and after what is timed, because a GPU works on after a call
            has returned.

    Attributes:
        num_batches: how many batches have started.
    """

    def __init__(self, device: torch.device) -> None:
        # Where torch has no module for the kind of device, there is nothing to synchronise.
        self._synchronize = getattr(getattr(torch, device.type, None), "synchronize", lambda: None)
        self.num_batches, self._start = 0, math.nan
        self._measurements, self._spent, self._first, self._last = 0, 0.0, 0.0, 0.0
        self._layers: dict[str, float] = {}
        # When the batch after the first measurement started, and how long it took without measurements.
        self._second_batch, self._batch_seconds = math.nan, math.nan

    def start_batch(self) -> None:
        """Count a batch; the time runs from the first one on."""
        if self.num_batches == 0:
            self._start = perf_counter()
        self.num_batches += 1
        if self._measurements and math.isnan(self._batch_seconds):
            if math.isnan(self._second_batch):
                self._second_batch = self._now()
            else:
                self._batch_seconds = self._now() - self._second_batch - (self._spent - self._first)

    @contextmanager
    def measurement(self) -> Iterator[None]:
        """Time a measurement."""
        start = self._now()
        try:
            yield
        finally:  # one that fails takes its time, too
            self._last = self._now() - start
            self._first = self._first if self._measurements else self._last
            self._spent += self._last
            self._measurements += 1

    @contextmanager
    def layer(self, name: str) -> Iterator[None]:
        """Time the part of a measurement that a layer takes."""
        start = self._now()
        yield
        self._layers[name] = self._layers.get(name, 0.0) + self._now() - start

    def _now(self) -> float:
        self._synchronize()
        return perf_counter()

    def batches_to_wait(self, share: float, done: int) -> int:
        """Return after how many batches, of their mean time so far, one more measurement fits in ``share``.

        The measurement is taken to last as long as the last one. The answer is at most the number of batches so far,
        ``done``.
        """
        elapsed = perf_counter() - self._start
        missing = (self._spent + self._last) / share - self._last - elapsed
        if missing <= 0:
            return 0
        seconds = max(elapsed - self._spent, 1e-9) / done
        return math.ceil(min(missing / seconds, done))  # a tiny share needs infinitely many

    def forecast(self, num_batches: float) -> str | None:
        """Return what the next measurement will cost, if that is more than a hundredth of an epoch, else None.

        It is known when the batch after the first measurement has ended; the very first batch may compile something.

        Args:
            num_batches: the batches of an epoch; infinite if that is not known.
        """
        share = self._first / max(num_batches * self._batch_seconds, 1e-9)
        if math.isnan(self._batch_seconds) or share <= _SAY_SHARE:
            return None
        return (
            f"The first measurement of Lyapunov spectra took {self._first:.2g} s, and the next will take about as "
            f"long: {100 * share:.3g} % of an epoch of {num_batches} batches. {_REMEDY}"
        )

    def warning_message(self) -> str | None:
        """Return the warning to give if measuring takes a large share of the run, else None.

        The first measurement does not count: it may compile something, or load a library.
        """
        count, spent = self._measurements - 1, self._spent - self._first
        elapsed = perf_counter() - self._start - self._first
        if count < _WARN_MEASUREMENTS or spent < _WARN_SECONDS or spent < _WARN_SHARE * elapsed:
            return None
        slowest_layer = max(self._layers, key=self._layers.__getitem__)
        return (
            f"Measuring Lyapunov spectra took {spent / elapsed:.0%} of the time since the first batch: {count} "
            f"measurements after the first one, {spent / count:.1f} s each, most of it for `{slowest_layer}`. {_REMEDY}"
        )
