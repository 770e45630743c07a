"""Names of Lightning that some of the supported releases lack."""

from enum import Enum
from importlib import metadata
from typing import Any

from lightning.pytorch.callbacks import Callback, early_stopping

__all__ = ["AnyCallback", "EarlyStoppingReason"]


class _Reason(Enum):
    """The reasons of Lightning 2.6 that are given here, with their numbers."""

    NOT_STOPPED = 0
    DIVERGENCE_THRESHOLD = 2
    NON_FINITE_METRIC = 4


EarlyStoppingReason = vars(early_stopping).get("EarlyStoppingReason", _Reason)
"""Why a rule stopped a run. Lightning has it from 2.6 on."""


def _any_callback() -> Any:
    bases: list[Any] = [Callback]
    try:
        release = tuple(int(part) for part in metadata.version("pytorch_lightning").split(".")[:2])
    except (metadata.PackageNotFoundError, ValueError):
        release = (2, 6)
    if release < (2, 6):  # its trainer accepts callbacks of its own class only
        from pytorch_lightning.callbacks import Callback as OtherCallback

        bases.append(OtherCallback)
    return type("AnyCallback", tuple(bases), {"__doc__": "A callback for the trainers of both packages of Lightning."})


AnyCallback = _any_callback()
"""A callback for the trainers of ``lightning.pytorch`` and of ``pytorch_lightning``."""
