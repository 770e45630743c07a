"""Arithmetic that no setting of the process changes."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import Lock
from typing import Any

import torch

__all__ = ["plain_arithmetic", "widest_dtype"]


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of trajectories, factorisations and sums: float64, or float32 on a device without float64.

    It costs little beside the products with the frame. A rounding error of a trajectory grows by ``exp(lambda_1 t)``.
    """
    return torch.float32 if device.type == "mps" else torch.float64


@contextmanager
def plain_arithmetic(*, keep_graph: bool = False) -> Iterator[None]:
    """Compute without autocast, with full float32 products and without gradients, and restore every setting.

    With ``keep_graph`` the mode of the caller decides on gradients.

    Products in TF32 keep 10 bits, too few for the log-conditions that are accepted in float32. Tensors that are made
    without a device or a dtype come as torch makes them by default: on the CPU, in float32.
    """
    with ExitStack() as stack:
        if not keep_graph:
            stack.enter_context(torch.no_grad())
        for device in filter(torch.amp.is_autocast_available, ("cpu", "cuda", "mps")):
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_full_float32)
        yield


class _FullFloat32:
    """Forbids TF32 and bfloat16 in products of float32 matrices, until the last of several threads leaves."""

    def __init__(self) -> None:
        self._lock, self._inside = Lock(), 0
        self._settings: list[tuple[Callable[[Any], Any], Any]] = []

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._set()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                for restore, value in self._settings:
                    restore(value)
                self._settings = []

    def _set(self) -> None:
        try:
            if (before := torch.get_float32_matmul_precision()) != "highest":
                self._settings.append((torch.set_float32_matmul_precision, before))
                torch.set_float32_matmul_precision("highest")
        except RuntimeError:  # set by torch's newer names, which the older ones refuse to read
            for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):  # type: ignore[attr-defined]
                self._settings.append((partial(setattr, backend, "fp32_precision"), backend.fp32_precision))
                backend.fp32_precision = "ieee"


_full_float32 = _FullFloat32()
