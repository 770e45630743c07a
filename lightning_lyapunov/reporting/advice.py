"""What a measurement means and what to do about it, in words. The conditions are one table.

They come from the runs of ``examples/remedies.py``: networks that did not learn a memory of 60 steps had gains below
-11 decades or above 5, those that learned had -0.1 to 1.2.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lightning_lyapunov.confidence import Estimate
from lightning_lyapunov.reporting.overview import UNSTABLE_DECADES

__all__ = ["advice_for", "headline"]

_FORGETTING_DECADES = -5.0
# Nats per step: nearly nothing of a change is left after one step.
_WIPED_OUT = -5.0


class _Trouble(NamedTuple):
    """A row of the table.

    Attributes:
        holds: whether both ends of the 95 % confidence interval say so.
        tone: ``"grows"`` or ``"forgets"``.
        brief: a few words for the overview.
        meaning: one sentence, with ``{decades}``, ``{length}`` and ``{memory}``.
        remedies: what to do, by the kind of layer; "" for any other.
    """

    holds: Callable[[Estimate, Estimate], bool]
    tone: str
    brief: str
    meaning: str
    remedies: Mapping[str, str]


_FORGETS = (
    "If the loss falls, there is nothing to do. If the task needs what lies further back and the loss stays where it "
    "started, {}."
)
# It did not help the LSTM with torch's biases: see `examples/flossing.py`.
_FLOSS = ", or add the callback `GradientFlossing()`"
_OPEN_GATE = "set the bias of the {} gate to 3 (the second block of `bias_ih_l0`)"
_TABLE = (
    _Trouble(
        lambda low, _: not math.isfinite(low.value),
        "grows",
        "not finite",
        "The network is not finite.",
        {"": "Lower the learning rate, or clip the gradient."},
    ),
    _Trouble(
        lambda low, _: low.log10_gradient_gain > UNSTABLE_DECADES,
        "grows",
        "grows {decades:+.1f} decades in {length:.0f} steps",
        "A gradient grows by {decades:.1f} decades over the {length:.0f} steps of a sequence: it is unstable.",
        {
            "": "If it was so from the start, scale the recurrent weights down, make them orthogonal, or add "
            "the callback `GradientFlossing()`; if the loss jumps, lower the learning rate or clip the gradient."
        },
    ),
    _Trouble(
        lambda _, high: high.value < _WIPED_OUT,
        "forgets",
        "wipes out its state in each step",
        "Nearly nothing of a change of the state is left after one step: units are saturated, or dead ReLUs.",
        {"": "If the loss stays where it started, start again with a lower learning rate or smaller weights."},
    ),
    _Trouble(
        lambda _, high: high.log10_gradient_gain < _FORGETTING_DECADES,
        "forgets",
        "remembers {memory:.2g} of {length:.0f} steps",
        "A change of the state lasts {memory:.2g} of the {length:.0f} steps of a sequence.",
        {
            "RNN": _FORGETS.format(f"make the recurrent weights orthogonal (`torch.nn.init.orthogonal_`){_FLOSS}"),
            "LSTM": _FORGETS.format(_OPEN_GATE.format("forget")),
            "GRU": _FORGETS.format(_OPEN_GATE.format("update") + _FLOSS),
            "": _FORGETS.format(f"choose weights that keep the state for longer{_FLOSS}"),
        },
    ),
)


def advice_for(estimate: Estimate, kind: str = "", first: Estimate | None = None) -> str | None:
    """Return what is wrong with a cell and what to do, or None where nothing is.

    Nothing is said on thin evidence: the whole 95 % confidence interval must be beyond the limit. Nor is it said of a
    network that it forgets when its exponent has risen since the first measurement: one that learns does so.

    Args:
        estimate: the largest exponent of the cell.
        kind: ``"RNN"``, ``"LSTM"``, ``"GRU"``, or anything else.
        first: the first measurement of the run; None if this is it.
    """
    trouble = _trouble(estimate)
    if trouble is None or (trouble.tone == "forgets" and first is not None and _has_risen(first, estimate)):
        return None
    remedy = trouble.remedies.get(kind, trouble.remedies[""])
    measured = f"`{estimate.layer}`: λ1 = {estimate.value:+.3f} ± {estimate.stderr:.3f} nats per step."
    return f"{measured} {_filled(trouble.meaning, estimate)} {remedy}"


def headline(estimate: Estimate) -> tuple[str, str]:
    """Return what a measurement of the worst cell means in a few words, and whether that ``"grows"`` or ``"forgets"``.

    Where nothing is wrong, the second is "".
    """
    trouble = _trouble(estimate)
    if trouble is not None:
        return f"{estimate.layer} {_filled(trouble.brief, estimate)}", trouble.tone
    if math.isnan(estimate.stderr) or math.isnan(estimate.length):
        return f"{estimate.layer}: {estimate.value:+.3g} nats per step", ""
    return f"stable: {estimate.log10_gradient_gain:+.1f} decades in {estimate.length:.0f} steps", ""


def _trouble(estimate: Estimate) -> _Trouble | None:
    # NaN is what a network that is not finite has; an error of NaN is one sequence alone, whose error nobody knows.
    if math.isfinite(estimate.value) and math.isnan(estimate.margin()):
        return None
    low, high = estimate.bounds()
    return next((trouble for trouble in _TABLE if trouble.holds(low, high)), None)


def _has_risen(first: Estimate, last: Estimate) -> bool:
    """Return whether an exponent is larger than at first, beyond the errors of both."""
    return last.value - first.value > math.hypot(first.margin(), last.margin())


def _filled(text: str, estimate: Estimate) -> str:
    values: dict[str, Any] = {
        "decades": estimate.log10_gradient_gain,
        "length": estimate.length,
        "memory": -1 / estimate.value if estimate.value < 0 else math.inf,
    }
    return text.format(**values)
