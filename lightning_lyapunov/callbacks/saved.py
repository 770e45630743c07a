"""What a monitor saves in a checkpoint beside its history."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning_lyapunov.confidence import Estimate

__all__ = ["Saved"]


class Saved(NamedTuple):
    """Where a run was when it was saved.

    Attributes:
        estimates: the last estimate of each exponent.
        measured_step: the optimizer step of the last measurement; None before the first.
    """

    estimates: dict[str, Estimate]
    measured_step: int | None

    @classmethod
    def of(cls, monitor: Any) -> "Saved":
        """Return where the run of a monitor is, or where its last one ended."""
        run = monitor._run
        return cls(monitor.estimates, run.last_step if run else monitor._measured_step)

    def state_dict(self) -> dict[str, Any]:
        """Return what :meth:`read` takes: numbers and strings in dictionaries."""
        estimates = {key: estimate._asdict() for key, estimate in self.estimates.items()}
        return {"estimates": estimates, "measured_step": self.measured_step}

    @classmethod
    def read(cls, state: Any) -> "Saved":
        """Read the state of a monitor. What it lacks, or what cannot be read, is as before the first measurement."""
        state = state if isinstance(state, Mapping) else {}
        try:
            estimates = {str(key): _read_estimate(fields) for key, fields in state["estimates"].items()}
            return cls(estimates, int(state["measured_step"]))
        except Exception:  # an older layout, or a damaged one
            return cls({}, None)


def _read_estimate(fields: Mapping[str, Any]) -> Estimate:
    """Return a saved estimate.

    Raises:
        Exception: of any kind, if it is none.
    """
    value, stderr, length = (float(fields[name]) for name in ("value", "stderr", "length"))
    count, layer, step, is_extra = (fields[name] for name in ("num_sequences", "layer", "step", "is_extra"))
    return Estimate(value, stderr, int(count), str(layer), int(step), length, bool(is_extra))
