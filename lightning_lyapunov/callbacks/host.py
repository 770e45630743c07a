"""Names of Lightning that some of the supported releases lack."""

from enum import Enum
from importlib import metadata
from typing import Any

from lightning.pytorch.callbacks import Callback

__all__ = ["AnyCallback", "EarlyStoppingReason"]

try:
    from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
except ImportError:  # before 2.6

    class EarlyStoppingReason(Enum):  # type: ignore[no-redef]
        """The reasons of Lightning 2.6 that are given here, with their numbers."""

        NOT_STOPPED = 0
        DIVERGENCE_THRESHOLD = 2
        NON_FINITE_METRIC = 4


def _bases() -> tuple[Any, ...]:
    """Return the classes of a callback. Before 2.6 a trainer of ``pytorch_lightning`` accepts its own class only."""
    try:
        release = tuple(int(part) for part in metadata.version("pytorch_lightning").split(".")[:2])
    except (metadata.PackageNotFoundError, ValueError):
        return (Callback,)
    if release >= (2, 6):
        return (Callback,)
    from pytorch_lightning.callbacks import Callback as OtherCallback

    return Callback, OtherCallback


AnyCallback: Any = type("AnyCallback", _bases(), {"__doc__": "A callback for trainers of both packages of Lightning."})
"""A callback for the trainers of ``lightning.pytorch`` and of ``pytorch_lightning``."""
