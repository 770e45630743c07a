"""``InstabilityStopping``: end a run whose dynamics have become unstable."""

import math
import re
from typing import Any

from lightning.pytorch.callbacks import EarlyStopping

from lightning_lyapunov.callbacks.host import AnyCallback, EarlyStoppingReason
from lightning_lyapunov.callbacks.monitor import LyapunovMonitor
from lightning_lyapunov.callbacks.publish import Estimate, metrics_of
from lightning_lyapunov.confidence import student_t_quantile

__all__ = ["InstabilityStopping"]


class InstabilityStopping(EarlyStopping, AnyCallback):  # type: ignore[misc]
    """Stop training when the lower confidence bound of a Lyapunov exponent exceeds a threshold.

    The rule reads the measurements of a :class:`LyapunovMonitor` among the callbacks. It counts measurements, not
    epochs. The lower confidence bound is ``value - t * stderr``, with Student's quantile ``t`` for the number of
    sequences. The class is a subclass of Lightning's ``EarlyStopping``, so that Lightning orders it as one.

    Args:
        threshold: the exponent, in nats per step, above which the dynamics count as unstable.
        patience: how many measurements in a row must be above the threshold.
        confidence: the confidence of the bounds, from 0.5 to 1.
        monitor: the exponent to watch: ``"lyapunov/max"`` or ``"lyapunov/<layer>/max"``.
        lower_threshold: stop, too, when the upper confidence bound has been below this exponent for ``patience``
            measurements, because the network has lost its memory; None for no such rule.
        verbose: log the reason in one sentence. It is kept in ``stopping_reason_message`` in any case.

    Raises:
        ValueError: if an argument is out of range; at the start of a fit, if no callback is a ``LyapunovMonitor``; at
            the first measurement, if no layer has the name in ``monitor``.

    Example::

        >>> callbacks = [LyapunovMonitor(every_n_train_steps=100), InstabilityStopping(threshold=0.05)]
    """

    def __init__(
        self,
        threshold: float = 0.0,
        *,
        patience: int = 2,
        confidence: float = 0.95,
        monitor: str = "lyapunov/max",
        lower_threshold: float | None = None,
        verbose: bool = True,
    ) -> None:
        if not isinstance(patience, int) or patience < 1:
            raise ValueError(f"`patience={patience!r}` must be a number of measurements, 1 or more.")
        if not 0.5 <= confidence < 1:
            raise ValueError(f"`confidence={confidence}` must be from 0.5 to 1, such as 0.95.")
        if not math.isfinite(threshold):
            raise ValueError(f"`threshold={threshold}` must be an exponent in nats per step, such as 0.0.")
        if lower_threshold is not None and not lower_threshold < threshold:
            raise ValueError(f"`lower_threshold={lower_threshold}` must be below `threshold={threshold}`.")
        super().__init__(monitor, patience=patience, verbose=verbose)
        self.threshold, self.confidence, self.lower_threshold = threshold, confidence, lower_threshold
        self._side = ""
        self._start()

    def _start(self) -> None:
        self._seen: Estimate | None = None
        self.stopping_reason, self.stopping_reason_message = EarlyStoppingReason.NOT_STOPPED, None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(monitor=self.monitor, threshold=self.threshold)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "side": self._side}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._side = str(state_dict.get("side", ""))

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if not any(isinstance(callback, LyapunovMonitor) for callback in trainer.callbacks):
            raise ValueError(
                "`InstabilityStopping` has nothing to read. Add a monitor: `callbacks=[LyapunovMonitor(), "
                "InstabilityStopping()]`."
            )
        self._start()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._check(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._check(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Do nothing: there is no measurement between two batches."""

    def _check(self, trainer: Any) -> None:
        """Judge the last measurement, once. It is the same on every rank, and so is the number of calls."""
        estimate = self._newest(trainer)
        stopped = self.stopping_reason != EarlyStoppingReason.NOT_STOPPED
        if estimate is None or estimate is self._seen or stopped or trainer.fast_dev_run:
            return
        self._seen = estimate
        side = self._judge(estimate)
        self.wait_count = self.wait_count + 1 if side and side == self._side else int(bool(side))
        self._side = side
        stop = self.wait_count >= self.patience or side == "not finite"
        if trainer.strategy.reduce_boolean_decision(stop, all=False):
            trainer.should_stop = True
            self.stopped_epoch = trainer.current_epoch
            self.stopping_reason = (
                EarlyStoppingReason.NON_FINITE_METRIC
                if side == "not finite"
                else EarlyStoppingReason.DIVERGENCE_THRESHOLD
            )
            self.stopping_reason_message = self._sentence(estimate, side)
            if self.verbose:
                self._log_info(trainer, self.stopping_reason_message, self.log_rank_zero_only)

    def _newest(self, trainer: Any) -> Estimate | None:
        monitors = [callback for callback in trainer.callbacks if isinstance(callback, LyapunovMonitor)]
        measured = [callback.estimates for callback in monitors if callback.estimates]
        found = [estimates[self.monitor] for estimates in measured if self.monitor in estimates]
        if measured and not found:
            # A layer that has not been called yet is published, and no estimate.
            available = [key for key in metrics_of(trainer) if re.fullmatch("lyapunov/(.+/)?max", key)]
            if self.monitor not in available:
                names = "`, `".join(available)
                raise ValueError(f"`monitor={self.monitor!r}` is not measured. Write one of `{names}`.")
        return max(found, key=lambda estimate: estimate.step, default=None)

    def _judge(self, estimate: Estimate) -> str:
        """Return the side of the thresholds on which the whole confidence interval lies; "" if on none."""
        if not math.isfinite(estimate.value):
            return "not finite"
        margin = student_t_quantile(self.confidence, estimate.num_sequences - 1) * estimate.stderr
        if estimate.value - margin > self.threshold:
            return "above"
        if self.lower_threshold is not None and estimate.value + margin < self.lower_threshold:
            return "below"
        return ""

    def _sentence(self, estimate: Estimate, side: str) -> str:
        where = f"Training stops at step {estimate.step}: the largest Lyapunov exponent of `{estimate.layer}`"
        if side == "not finite":
            return f"{where} is not finite, because the network is not."
        value = f"{where} is {estimate.value:+.3f} ± {estimate.stderr:.3f} nats per step"
        sure = f"with {self.confidence:.0%} confidence in {self.wait_count} measurements in a row"
        if side == "below":
            memory = f"; its memory lasts {-1 / estimate.value:.2g} steps" if estimate.value < 0 else ""
            return f"{value}, below {self.lower_threshold:g} {sure}{memory}."
        grows = f"perturbations and gradients grow {math.exp(min(10 * estimate.value, 700)):.3g}-fold in 10 steps"
        return f"{value}, above {self.threshold:g} {sure}; {grows}."
