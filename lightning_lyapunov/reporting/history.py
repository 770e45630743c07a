"""The measurements so far: bounded in size, read from older and newer checkpoints, written to tables."""

import csv
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

__all__ = ["MAX_MEASUREMENTS", "History", "save_table"]

MAX_MEASUREMENTS = 1_000
"""The most measurements of a cell that are kept: 136 kB in a checkpoint for 16 exponents, 2 MB for 256."""

_MAX_STEP = 2**53
_VERSION = 2  # 1 had no version and kept every measurement


class History:
    """The measurements of each cell, at most :data:`MAX_MEASUREMENTS` of them.

    When there are more, every second one is dropped, and from then on only every second new one stays; so again and
    again, so that what is kept covers the whole run evenly. The first and the last measurement are always kept.
    """

    def __init__(self) -> None:
        self._cells: dict[str, _Cell] = {}

    def append(self, step: int, cells: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add a measurement of some cells: exponents and standard errors, ``(num_exponents,)``, on the CPU.

        It is added in one step: whoever interrupts this, or saves a checkpoint in a handler of a signal, finds all of
        it or nothing.
        """
        added = {name: self._cells.get(name, _Cell()).with_added(_Measurement(step, *m)) for name, m in cells.items()}
        self._cells = {**self._cells, **added}

    def tensors(self, cells: Iterable[str] | None = None, *, last_only: bool = False) -> dict[str, dict[str, Tensor]]:
        """Return for each cell ``"step"``, ``(m,)``, ``"spectrum"`` and ``"stderr"``, ``(m, num_exponents)``.

        NaN fills up what was measured with fewer exponents.

        Args:
            cells: the names of the cells; None for all.
            last_only: return the last measurement only.
        """
        names = self._cells if cells is None else cells
        return {name: self._cells[name].tensors(last_only=last_only) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Return what :meth:`load_state_dict` takes: tensors on the CPU, numbers and strings in dictionaries."""
        return {
            "version": _VERSION,
            "history": self.tensors(),
            "interval": {name: cell.interval for name, cell in self._cells.items()},
            "num_measured": {name: cell.num_measured for name, cell in self._cells.items()},
        }

    def load_state_dict(self, state: Any) -> None:
        """Load a saved history of this, an older or a newer layout; warn of the parts that cannot be read."""
        cells, problems = {}, []
        if not isinstance(state, Mapping):
            state = {"history": state}
        history = state.get("history")
        if not isinstance(history, Mapping):
            problems, history = [f"there is {type(history).__name__} where the cells should be"], {}
        for name, measurements in history.items():
            try:
                cells[str(name)] = _read_cell(name, measurements, state)
            except Exception as error:  # a damaged history must not end a run
                problems.append(f"{name}: {type(error).__name__}: {error}")
        self._cells = cells
        if problems:
            warnings.warn(
                f"A part of the Lyapunov history in the checkpoint (layout {state.get('version', 1)!r:.20}; this "
                f"version writes {_VERSION}) cannot be read and starts anew. {'; '.join(problems):.500}",
                stacklevel=2,
            )


class _Measurement(NamedTuple):
    step: int
    spectrum: Tensor
    stderr: Tensor


@dataclass(frozen=True)
class _Cell:
    """The measurements of one cell: those whose number, from 0, is a multiple of ``interval``, and the last one."""

    kept: tuple[_Measurement, ...] = ()
    interval: int = 1
    num_measured: int = 0

    def with_added(self, measurement: _Measurement) -> "_Cell":
        # The last one was kept only because it was the last, unless its number is a multiple.
        before = self.kept[:-1] if (self.num_measured - 1) % self.interval else self.kept
        return _Cell((*before, measurement), self.interval, self.num_measured + 1).thinned()

    def thinned(self) -> "_Cell":
        kept, interval = self.kept, self.interval
        while len(kept) > MAX_MEASUREMENTS:
            last = kept[-1:] if len(kept) % 2 == 0 else ()
            kept, interval = kept[::2] + last, 2 * interval
        return _Cell(kept, interval, self.num_measured)

    def tensors(self, *, last_only: bool = False) -> dict[str, Tensor]:
        steps, spectra, errors = zip(*self.kept[-1:] if last_only else self.kept, strict=True)
        return {
            "step": torch.tensor(steps, dtype=torch.int64, device="cpu"),
            "spectrum": pad_sequence(list(spectra), batch_first=True, padding_value=math.nan),
            "stderr": pad_sequence(list(errors), batch_first=True, padding_value=math.nan),
        }


def _read_cell(name: Any, measurements: Any, state: Mapping[str, Any]) -> _Cell:
    """Return a cell of a saved history.

    Raises:
        Exception: of any kind, if it is none.
    """
    step, spectrum = _on_cpu(measurements["step"]), _on_cpu(measurements["spectrum"]).float()
    stderr = _on_cpu(measurements["stderr"]).float() if "stderr" in measurements else spectrum * math.nan
    if not (
        step.ndim == 1 and spectrum.ndim == 2 and len(step) == len(spectrum) > 0 and stderr.shape == spectrum.shape
    ):
        raise ValueError(f"the shapes {tuple(step.shape)}, {tuple(spectrum.shape)}, {tuple(stderr.shape)} do not match")
    if not (step.double() == step.long().double()).all() or not (step.double().abs() < _MAX_STEP).all():
        raise ValueError("the steps are no whole numbers, or too large")
    kept = tuple(
        _Measurement(number, *rows) for number, *rows in zip(step.long().tolist(), spectrum, stderr, strict=True)
    )
    interval, count = (_whole_number(state.get(key), name) for key in ("interval", "num_measured"))
    # If the two do not fit, or are missing, the kept measurements count as all of them.
    fits = interval and len(step) == len(range(0, count, interval)) + bool((count - 1) % interval)
    return (_Cell(kept, interval, count) if fits else _Cell(kept, 1, len(step))).thinned()


def _on_cpu(values: Any) -> Tensor:
    numbers = torch.as_tensor(values).detach()
    if numbers.is_complex():
        raise ValueError("the numbers are complex")
    return numbers.to_dense().cpu()


def _whole_number(numbers: Any, name: Any) -> int:
    """Return the number of a cell in a saved dictionary; 0 if there is none."""
    number = numbers.get(name) if isinstance(numbers, Mapping) else None
    return number if isinstance(number, int) and number > 0 else 0


def save_table(history: Mapping[str, Mapping[str, Tensor]], path: str | Path) -> None:
    """Write a history to a table: a row for each cell, step and exponent.

    Args:
        history: as :meth:`History.tensors` returns it.
        path: a ``.csv`` file, with the columns ``layer``, ``step``, ``exponent`` (from 1), ``value``, ``stderr``,
            or a ``.npz`` file, with the arrays ``<layer>/step``, ``<layer>/spectrum`` and ``<layer>/stderr``.

    Raises:
        ValueError: if ``path`` ends in neither.
    """
    path = Path(path)
    if path.suffix == ".npz":
        arrays: dict[str, Any] = {
            f"{layer}/{key}": array.numpy() for layer, m in history.items() for key, array in m.items()
        }
        np.savez(path, **arrays)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(("layer", "step", "exponent", "value", "stderr"))
            for layer, m in history.items():
                for step, values, errors in zip(*(m[key].tolist() for key in m), strict=True):
                    for exponent, (value, stderr) in enumerate(zip(values, errors, strict=True), 1):
                        table.writerow((layer, step, exponent, value, stderr))
    else:
        raise ValueError(f"`path={str(path)!r}` must end in .csv or .npz.")
