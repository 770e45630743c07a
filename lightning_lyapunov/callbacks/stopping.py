"""``InstabilityStopping``: end a run whose gradients explode over the sequences that it is trained on."""

import math
import re
import warnings
from typing import Any

from lightning.pytorch.callbacks import EarlyStopping

from lightning_lyapunov.callbacks.host import AnyCallback, EarlyStoppingReason
from lightning_lyapunov.callbacks.monitor import LyapunovMonitor
from lightning_lyapunov.callbacks.publish import metrics_of
from lightning_lyapunov.confidence import Estimate
from lightning_lyapunov.reporting.overview import UNSTABLE_DECADES

__all__ = ["InstabilityStopping"]

# The keys that can be watched: those of a largest exponent, and of the gain that it makes of one layer.
_ALL, _GAIN = "lyapunov/max", "log10_gradient_gain"
_SMALLEST = "lyapunov/smallest_max"
_WATCHABLE = rf"lyapunov/(max|smallest_max|.+/(max|{_GAIN}))"
# After so many due measurements that `max_overhead` postponed, the rule says that it has nothing to judge.
_MANY_POSTPONED = 10


class InstabilityStopping(EarlyStopping, AnyCallback):  # type: ignore[misc]
    r"""Stop training when gradients grow by more than two decades over the sequences that are trained on.

    The rule reads the measurements of a :class:`LyapunovMonitor` among the callbacks. It counts measurements, not
    epochs. The gain of a layer is :math:`\lambda_1 L / \ln 10` decades, where ``L`` is the length of the sequences that
    the layer was called with. What counts is the lower confidence bound, with Student's quantile for the number of
    sequences. A network that is not finite is stopped at once. The class is a subclass of Lightning's
    ``EarlyStopping``, so that Lightning orders it as one.

    It is a check beside a rule on the loss, and not in its place. Replayed on 504 small runs (six tasks, RNN, LSTM and
    GRU, seven learning rates, four initial gains), the default saved 13 % of the epochs of the worse half of the runs,
    and stopped none of the 126 runs in the best quarter of their task. A check for NaN saves 2 %, ``EarlyStopping`` on
    the validation loss 13 % with a patience of 5 (it stopped 4 of the 126) and 26 % with a patience of 3 (16 of them).
    All that it saved beyond NaN was in plain RNNs, and in runs that were above the limit at their first batch: it ends
    a bad start, and is no early warning.

    Chaos is one side, collapse is the other, and the default watches the first only. A tanh network that is saturated,
    or a ReLU network whose units have died, is above no threshold: its largest exponent is far below 0, down to
    :data:`~lightning_lyapunov.EXPONENT_FLOOR`, -87.3. ``lower_threshold=-1.0`` stops it. Write it for a plain RNN whose
    task needs memory: on these runs the two together saved 24 %, and stopped none of the 126. Where the task needs no
    memory, a collapsed layer may learn.

    Args:
        threshold: the value of ``monitor`` above which the dynamics count as unstable: nats per step for an exponent,
            decades for a gain. None: ``decades``.
        decades: the gain above which they do, in place of a ``threshold``; 2 if neither is given. It was chosen with
            one task left out at a time: twice the gain that no better run of the others exceeded (1.4 to 2.1).
        patience: how many measurements in a row must be above the threshold.
        confidence: the confidence of the bounds, from 0.5 to 1.
        monitor: what to watch: ``"lyapunov/max"``, for the layer that grows most; ``"lyapunov/smallest_max"``, for the
            one of several that forgets most; or of one layer
            ``"lyapunov/<layer>/max"`` or ``"lyapunov/<layer>/log10_gradient_gain"``.
        lower_threshold: stop, too, when the upper confidence bound has been below this value for ``patience``
            measurements, in the unit of ``threshold``; None for no such rule.
        verbose: log the reason in one sentence. It is kept in ``stopping_reason_message`` in any case.

    Raises:
        ValueError: if an argument is out of range; at the start of a fit, if no callback is a ``LyapunovMonitor``; at
            the first measurement, if ``monitor`` is no key that can be watched.

    Example::

        >>> callbacks = [LyapunovMonitor(every_n_train_steps=100), InstabilityStopping(lower_threshold=-1.0)]
    """

    def __init__(
        self,
        threshold: float | None = None,
        *,
        decades: float | None = None,
        patience: int = 2,
        confidence: float = 0.95,
        monitor: str = _ALL,
        lower_threshold: float | None = None,
        verbose: bool = True,
    ) -> None:
        if not isinstance(patience, int) or patience < 1:
            raise ValueError(f"`patience={patience!r}` must be a number of measurements, 1 or more.")
        if not 0.5 <= confidence < 1:
            raise ValueError(f"`confidence={confidence}` must be from 0.5 to 1, such as 0.95.")
        _check_thresholds(threshold, decades, lower_threshold)
        super().__init__(monitor, patience=patience, verbose=verbose)
        self.threshold, self.confidence, self.lower_threshold = threshold, confidence, lower_threshold
        self.decades = UNSTABLE_DECADES if threshold is None and decades is None else decades
        self._is_gain = monitor.endswith(f"/{_GAIN}")
        self._side, self._is_resumed = "", False
        self._start()

    def _start(self) -> None:
        self._seen: tuple[str, int] | None = None
        self._has_warned = False
        self.stopping_reason, self.stopping_reason_message = EarlyStoppingReason.NOT_STOPPED, None

    @property
    def state_key(self) -> str:
        names = ("monitor", "threshold", "decades", "patience", "confidence", "lower_threshold")
        return self._generate_state_key(**{name: getattr(self, name) for name in names})

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "side": self._side, "seen": self._seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._side, self._seen = str(state_dict.get("side", "")), _as_seen(state_dict.get("seen"))
        self._is_resumed = True

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if not any(isinstance(callback, LyapunovMonitor) for callback in trainer.callbacks):
            raise ValueError(
                "`InstabilityStopping` has nothing to read. Add a monitor: `callbacks=[LyapunovMonitor(), "
                "InstabilityStopping()]`."
            )
        seen = self._seen
        self._start()
        if self._is_resumed:
            self._seen = seen
        else:
            self.wait_count, self._side = 0, ""

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._is_resumed = False

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
        if estimate is None or stopped or trainer.fast_dev_run:
            return
        number = estimate.layer, estimate.step
        if self._seen is not None and number == tuple(self._seen):
            self._warn_if_starved(trainer)
            return
        self._seen = number
        if estimate.is_extra:
            return
        side = self._judge(estimate)
        self.wait_count = self.wait_count + 1 if side and side == self._side else int(bool(side))
        self._side = side
        stop = self.wait_count >= self.patience or side == "not finite"
        if trainer.strategy.reduce_boolean_decision(stop, all=False):
            self._stop(trainer, estimate, side)

    def _stop(self, trainer: Any, estimate: Estimate, side: str) -> None:
        trainer.should_stop = True
        self.stopped_epoch = trainer.current_epoch
        not_finite = side == "not finite"
        self.stopping_reason = (
            EarlyStoppingReason.NON_FINITE_METRIC if not_finite else EarlyStoppingReason.DIVERGENCE_THRESHOLD
        )
        self.stopping_reason_message = self._sentence(estimate, side)
        if self.verbose:
            self._log_info(trainer, self.stopping_reason_message, self.log_rank_zero_only)

    def _warn_if_starved(self, trainer: Any) -> None:
        """Say once that the monitor's budget has left nothing new to judge for long."""
        runs = [callback._run for callback in trainer.callbacks if isinstance(callback, LyapunovMonitor)]
        postponed = min((run.num_postponed for run in runs if run), default=0)
        if postponed < _MANY_POSTPONED or self._has_warned or not trainer.is_global_zero:
            return
        self._has_warned = True
        warnings.warn(
            f"`InstabilityStopping` has judged nothing since step {self._seen[1] if self._seen else 0}: `max_overhead` "
            f"has postponed the last {postponed} measurements that were due. Raise `max_overhead`, or lower "
            "`num_exponents`, `max_steps` or `num_sequences` of the `LyapunovMonitor`.",
            stacklevel=2,
        )

    def _newest(self, trainer: Any) -> Estimate | None:
        monitors = [callback for callback in trainer.callbacks if isinstance(callback, LyapunovMonitor)]
        measured = [callback.estimates for callback in monitors if callback.estimates]
        found = [one for estimates in measured if (one := self._watched(estimates)) is not None]
        if measured and not found:
            # A layer that has not been called yet is published, and no estimate; after a resume nothing is yet.
            available = [key for key in metrics_of(trainer) if re.fullmatch(_WATCHABLE, key)]
            if available and self.monitor not in available:
                names = "`, `".join(available)
                raise ValueError(f"`monitor={self.monitor!r}` cannot be watched. Write one of `{names}`.")
        return max(found, key=lambda estimate: estimate.step, default=None)

    def _watched(self, estimates: dict[str, Estimate]) -> Estimate | None:
        """Return what is watched of the estimates of a monitor; None if it has not been measured."""
        if self.monitor != _ALL or self.decades is None:
            return estimates.get(re.sub(f"/{_GAIN}$", "/max", self.monitor))
        # The largest gain need not be that of the largest exponent: layers may be called with unlike lengths.
        layers = [estimate for key, estimate in estimates.items() if key not in (_ALL, _SMALLEST)]
        return max(layers, key=lambda e: (math.isnan(e.value), e.log10_gradient_gain), default=None)

    def _judge(self, estimate: Estimate) -> str:
        """Return the side of the thresholds on which the whole confidence interval lies; "" if on none."""
        if not math.isfinite(estimate.value):
            return "not finite"
        low, high = estimate.bounds(self.confidence)
        if self.decades is not None and low.log10_gradient_gain > self.decades:
            return "above"
        if self.threshold is not None and self._value(low) > self.threshold:
            return "above"
        if self.lower_threshold is not None and self._value(high) < self.lower_threshold:
            return "below"
        return ""

    def _value(self, estimate: Estimate) -> float:
        """Return the value of what is watched, in its unit."""
        return estimate.log10_gradient_gain if self._is_gain else estimate.value

    def _sentence(self, estimate: Estimate, side: str) -> str:
        where = f"Training stops at step {estimate.step}: the largest Lyapunov exponent of `{estimate.layer}`"
        if side == "not finite":
            return f"{where} is not finite, because the network is not."
        value = f"{where} is {estimate.value:+.3f} ± {estimate.stderr:.3f} nats per step"
        sure = f"with {self.confidence:.0%} confidence in {self.wait_count} measurements in a row"
        length, gain = f"{estimate.length:.0f} steps of a sequence", estimate.log10_gradient_gain
        in_decades = f"{value}, {gain:+.1f} decades over the {length}"
        if side == "below":
            low = f"{in_decades if self._is_gain else value}, below {self.lower_threshold:g} {sure}"
            memory = f"; its memory lasts {-1 / estimate.value:.2g} of the {length}" if estimate.value < 0 else ""
            return f"{low}{memory}."
        if self.threshold is None or self._is_gain:
            limit = self.decades if self.threshold is None else self.threshold
            return f"{in_decades}, above {limit:g} {sure}; gradients explode."
        grows = f"perturbations and gradients grow {math.exp(min(10 * estimate.value, 700)):.3g}-fold in 10 steps"
        return f"{value}, above {self.threshold:g} {sure}; {grows}."


def _as_seen(saved: Any) -> tuple[str, int] | None:
    """Return layer and step of the last measurement from a checkpoint; None if there was none, or it is damaged."""
    is_pair = isinstance(saved, list | tuple) and len(saved) == 2
    return (saved[0], saved[1]) if is_pair and isinstance(saved[0], str) and isinstance(saved[1], int) else None


def _check_thresholds(threshold: float | None, decades: float | None, lower_threshold: float | None) -> None:
    if threshold is not None and decades is not None:
        raise ValueError(f"Give `threshold={threshold}` or `decades={decades}`, not both.")
    if threshold is not None and not math.isfinite(threshold):
        raise ValueError(f"`threshold={threshold}` must be a number, such as 0.1 nats per step.")
    if decades is not None and not 0 < decades < math.inf:
        raise ValueError(f"`decades={decades}` must be a number above 0, such as 2.0.")
    upper, name = (0.0, "0") if threshold is None else (threshold, f"`threshold={threshold}`")
    if lower_threshold is not None and not lower_threshold < upper:
        raise ValueError(f"`lower_threshold={lower_threshold}` must be below {name}.")
