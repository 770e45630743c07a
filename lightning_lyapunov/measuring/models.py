"""The spectra of the recurrent layers of a model, from one call of it."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_lyapunov.functional import is_count
from lightning_lyapunov.layers.discovery import FoundLayer, find_layers
from lightning_lyapunov.layers.outer_state import undisturbed
from lightning_lyapunov.layers.registry import is_recurrent
from lightning_lyapunov.layers.sharding import gathered
from lightning_lyapunov.measuring.layers import MeasuredLayer, Options, full_name, measure_layer, no_samples
from lightning_lyapunov.measuring.summaries import CellSamples, summarised
from lightning_lyapunov.recording.calls import RecordedCalls
from lightning_lyapunov.recording.cells import NotFollowedError
from lightning_lyapunov.recording.hooks import beside_modes
from lightning_lyapunov.recording.reading import follow
from lightning_lyapunov.recording.recorder import Recorder

__all__ = ["CellSpectrum", "model_spectra"]


@dataclass(frozen=True, eq=False)
class CellSpectrum:
    """What :func:`model_spectra` measured of a cell; all is NaN if it could not be measured.

    Attributes:
        spectrum: the largest exponents, ``(num_exponents,)``, in nats per step, largest first.
        stderr: their standard errors over the sequences.
        num_sequences: how many sequences the values are from, or segments of a single one.
        num_steps: how many steps of them were averaged, all sequences together.
        metrics: what :class:`~lightning_lyapunov.LyapunovMonitor` logs of the cell, by the last part of its key, such
            as ``"memory_steps"``.
    """

    spectrum: Tensor
    stderr: Tensor
    num_sequences: int
    num_steps: int
    metrics: dict[str, float]

    def __repr__(self) -> str:
        largest = f"{self.metrics['max']:+.4f} ± {self.metrics['max_stderr']:.4f}"
        return f"CellSpectrum({largest}, {self.num_sequences} sequences, {self.num_steps} steps)"


def model_spectra(
    model: nn.Module,
    *args: Any,
    modules: str | Sequence[str] | None = None,
    num_sequences: int = 16,
    max_steps: int = 100,
    num_exponents: int | None = 16,
    warmup: int | None = None,
    qr_interval: int | Literal["auto"] = "auto",
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> dict[str, CellSpectrum]:
    """Compute the spectra of the recurrent layers of a model from one call of it, ``model(*args, **kwargs)``.

    The model is called once, in evaluation mode, and its layers are followed along what they were called with, by the
    same recording, checks and options as in :class:`~lightning_lyapunov.LyapunovMonitor`. So a model takes what it
    takes in training, such as token ids. Afterwards its mode, buffers, attributes and gradients are as before, and so
    are the random states.

    Args:
        model: the model that holds the layers.
        args: what it is called with.
        modules: as in :class:`~lightning_lyapunov.LyapunovMonitor`, and so are the other options.
        num_sequences: the most sequences of the batch to follow.
        max_steps: the number of steps of a sequence that are used, from its start.
        num_exponents: how many of the largest exponents to compute for each cell; None for all.
        warmup: steps at the start of each sequence that are not averaged, at most half of it; None for 50.
        qr_interval: see :func:`~lightning_lyapunov.lyapunov_spectrum`.
        dtype: see :func:`~lightning_lyapunov.lyapunov_spectrum`.
        kwargs: what it is called with by keyword. A keyword that is an option here has to be given by position.

    Returns:
        The spectrum of each cell by its name, as in the keys of the monitor: the dotted name of the layer, followed by
        ``.l0``, ``.l1``, ``.l0_reverse`` ... if it holds several. A layer that was not called, or cannot be followed,
        is NaN, with a warning that says what to write.

    Raises:
        ValueError: if an option is out of range, or the model has no recurrent layer, or no layer of a name.
        TypeError: if ``model`` is no module.

    Example::

        >>> import torch
        >>> embedding, gru = torch.nn.Embedding(10, 3), torch.nn.GRU(3, 8, batch_first=True)
        >>> spectra = model_spectra(torch.nn.Sequential(embedding, gru), torch.randint(10, (4, 100)))
        >>> spectra["1"].spectrum.shape, spectra["1"].num_sequences, spectra["1"].num_steps
        (torch.Size([8]), 4, 200)
    """
    options = Options(num_sequences, max_steps, num_exponents, warmup, qr_interval, dtype)
    _check(model, options)
    layers = find_layers(model, [modules] if isinstance(modules, str) else modules)
    recorder = Recorder(layers, num_sequences, max_steps)
    with _evaluated(model):
        args, kwargs = pytree.tree_map_only(Tensor, _usable, (args, kwargs))
        try:
            recorder.start()
            model(*args, **kwargs)
        finally:
            recorder.stop()
        with beside_modes():
            samples = _all_samples(layers, recorder.take(), recorder.errors, options)
    return {name: _read(values) for name, values in summarised(samples).items()}


def _check(model: Any, options: Options) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a module, not {type(model).__name__}.")
    if is_recurrent(model):
        raise ValueError(
            f"`model` is itself a recurrent layer, {type(model).__name__}. Write `lyapunov_spectrum(model, ...)`, or "
            "`model_spectra(torch.nn.Sequential(model), ...)`."
        )
    for name, least in (("num_sequences", 1), ("max_steps", 1), ("num_exponents", 1), ("warmup", 0)):
        value = getattr(options, name)
        if not (value is None and name in ("num_exponents", "warmup")) and not is_count(value, least):
            raise ValueError(f"`{name}={value!r}` must be a whole number, {least} or more.")
    if options.warmup is not None and options.warmup >= options.max_steps:
        raise ValueError(f"`warmup={options.warmup}` leaves nothing to average: `max_steps` is {options.max_steps}.")
    if options.qr_interval != "auto" and not is_count(options.qr_interval, 1):
        raise ValueError(f'`qr_interval={options.qr_interval!r}` must be "auto" or a number of steps, 1 or more.')
    if options.dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"`dtype` must be torch.float32, torch.float64 or None, not {options.dtype}.")


def _usable(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, with graphs to its weights; give everything back that a call of it changes."""
    parts = list(model.modules())
    attributes = [(dict(vars(part)), dict(part._buffers)) for part in parts]
    leaves = pytree.tree_leaves(attributes)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter)]
    values = [tensor.detach().clone() for tensor in tensors]
    frozen = [p for p in model.parameters() if not p.requires_grad and (p.is_floating_point() or p.is_complex())]
    with torch.inference_mode(False), torch.enable_grad(), undisturbed(model):
        try:
            model.eval()
            # It is told by its graph whether a state was computed from an earlier one.
            for parameter in frozen:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
            for part, (kept, buffers) in zip(parts, attributes, strict=True):
                vars(part).clear()
                vars(part).update(kept)
                part._buffers.clear()
                part._buffers.update(buffers)
            with torch.no_grad():
                for tensor, value in zip(tensors, values, strict=True):
                    if not torch.equal(tensor, value):
                        tensor.copy_(value)


def _all_samples(
    layers: Mapping[str, FoundLayer],
    recorded: Mapping[str, RecordedCalls],
    errors: Mapping[str, Exception],
    options: Options,
) -> dict[str, CellSamples]:
    samples = {}
    for name, found in layers.items():
        measured = _measured(name, found, recorded.get(name), errors.get(name), options)
        for index, cell in enumerate(found.cell_names):
            count = found.state_sizes[index] or 1
            count = count if options.num_exponents is None else min(count, options.num_exponents)
            cell_samples = no_samples(count, failed=True) if measured is None else measured.samples(index)
            samples[full_name(name, cell, found.cell_names)] = cell_samples
    return samples


def _measured(
    name: str, found: FoundLayer, calls: RecordedCalls | None, error: Exception | None, options: Options
) -> MeasuredLayer | None:
    """Return what was measured of a layer; None, with a warning, if nothing was."""
    try:
        with gathered(found.module):
            if error is not None:
                raise error
            followed = None if calls is None else follow(found.module, calls, options.num_sequences, options.max_steps)
            if followed is not None:
                return measure_layer(followed.layer, followed.sequences, options)
        message = f"The recurrent layer `{name}` was not called as a module: its values are NaN. Call it itself."
    except Exception as failure:
        what = str(failure) if isinstance(failure, NotFollowedError) else f"{type(failure).__name__}: {failure}"
        message = f"The Lyapunov spectrum of `{name}` could not be measured; its values are NaN. {what}"
    warnings.warn(message, stacklevel=4)
    return None


def _read(values: Mapping[str, Tensor]) -> CellSpectrum:
    numbers = {name: float(value) for name, value in values.items() if name not in ("spectrum", "stderr")}
    samples, steps = numbers["num_sequences"], numbers["num_steps"]
    spectrum, stderr = values["spectrum"].reshape(-1), values["stderr"].reshape(-1)
    is_measured = samples == samples
    return CellSpectrum(spectrum, stderr, int(samples) if is_measured else 0, int(steps) if is_measured else 0, numbers)
