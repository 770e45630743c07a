"""The Lyapunov spectrum and the Jacobians of a recurrent module or a callable, without Lightning."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_lyapunov.kernel.autodiff import AutodiffRecurrence
from lightning_lyapunov.kernel.differentiable import differentiable_growth
from lightning_lyapunov.kernel.precision import plain_arithmetic
from lightning_lyapunov.kernel.propagation import EXPONENT_FLOOR, Growth, log_growth
from lightning_lyapunov.kernel.recurrence import NoGraphError
from lightning_lyapunov.layers.base import DrivenCell, RecurrentLayer, Sequences
from lightning_lyapunov.layers.copies import frozen_copy
from lightning_lyapunov.layers.custom import CallableLayer, CustomLayer
from lightning_lyapunov.layers.registry import as_layer, has_own_forward
from lightning_lyapunov.layers.sharding import gathered
from lightning_lyapunov.layers.torch_nn import CellLayer, StackedLayer
from lightning_lyapunov.recording.reading import check_closed_form

__all__ = [
    "as_one_cell",
    "differentiable_layer_growth",
    "is_count",
    "jacobians",
    "layer_growth",
    "layer_of",
    "lyapunov_spectrum",
    "read_arguments",
    "working_dtype",
]


def lyapunov_spectrum(
    dynamics: nn.Module | Callable[[Tensor, Tensor], Tensor],
    inputs: Any,
    state: Any = None,
    *,
    num_exponents: int | None = None,
    warmup: int = 0,
    qr_interval: int | Literal["auto"] = "auto",
    dtype: torch.dtype | None = None,
    differentiable: bool = False,
) -> Tensor:
    r"""Compute the Lyapunov exponents of a recurrent network along input sequences.

    .. math:: \lambda_j = \frac1T \sum_{t=1}^{T} \log |R_t|_{jj}, \qquad J_t Q_{t-1} = Q_t R_t,

    where ``J_t`` is the derivative of the state after step ``t`` by the whole state before it (``(h, c)`` for an LSTM).
    The frame starts in general position, so that the exponents are those of the sequence after a transient of O(1/T),
    which ``warmup`` shortens. The spectrum of a stack of layers, or of two directions, is the union of its cells'
    spectra, because the Jacobian of the whole is block-triangular.

    Args:
        dynamics: a :class:`torch.nn.RNN`, ``GRU`` or ``LSTM``, one of their cells, a module called as
            ``(input, state)`` that returns the next state or ``(output, state)``, one of a class that
            :func:`~lightning_lyapunov.register_layer` knows, or a callable ``step(state, input) -> state`` on tensors
            ``(batch, state)`` and ``(batch, input)``. The members of a batch must be independent of one another. A
            module is measured in evaluation mode, so without dropout. Where its weights are ``DTensor``, all of their
            processes must make this call.
        inputs: what the module would be called with (``batch_first``, packed, unbatched: as the module takes it);
            for a callable and for a cell ``(time, batch, input)``. A map without input takes ``(time, batch, 0)``.
        state: what the module would be called with, zeros by default for those of torch; for a callable
            ``(batch, state)``. A complex state of ``n`` numbers has ``2 n`` exponents.
        num_exponents: how many of the largest exponents to compute; None for all.
        warmup: steps that move the state and the frame and are not averaged.
        qr_interval: steps between two re-orthonormalisations; ``"auto"`` takes as many as the spread of the spectrum
            allows. It changes the cost, not the result: an interval that is too long is repeated in shorter ones.
        dtype: dtype of the products with the frame. None: float32, or float64 for float64 weights; for a callable, that
            of ``state``. Trajectories, factorisations and sums are float64 where the device has it, and so are steps
            that float32 cannot resolve. A callable is called in ``dtype``: give it a float64 ``state`` where one step
            drives directions further apart than e^8, of which float32 holds few digits.
        differentiable: keep the graph, so that gradients of any order reach the parameters, ``inputs`` and ``state``.
            The numbers are the same; all is computed in float64, and a longer ``qr_interval`` is cheaper. The graph
            holds the frames of all steps. A direction at the floor has a gradient of zero; so have those that one step
            shrinks by more than e^16 beside the fastest, because float64 does not resolve their derivatives.

    Returns:
        The exponents in nats per step, largest first, ``(batch, num_exponents)``. A direction that is wiped out (its
        exponent is minus infinity, or cannot be told from it) has :data:`~lightning_lyapunov.EXPONENT_FLOOR`, -87.3;
        so has any exponent below. A network that is not finite has NaN.

    Raises:
        ValueError: if an argument has the wrong size or value, or a callable has no derivative; the message says what
            to write. With ``differentiable`` also if the network is not finite, or no graph reaches its parameters.
        TypeError: if an argument is of the wrong type.

    Source: Benettin et al. (1980); Vogt et al., arXiv 2006.14123, Algorithm 1; the derivative: Engelken, arXiv
    2312.17306.

    Example::

        >>> import torch
        >>> rotation = torch.tensor([[0.0, -0.5], [2.0, 0.0]], dtype=torch.float64)
        >>> inputs, state = torch.zeros(100, 1, 0), torch.ones(1, 2, dtype=torch.float64)
        >>> lyapunov_spectrum(lambda s, x: s @ rotation.T, inputs, state).abs().round(decimals=6)
        tensor([[0., 0.]], dtype=torch.float64)
    """
    with plain_arithmetic(keep_graph=differentiable), gathered(layer_of(dynamics).module):
        options: dict[str, Any] = {"num_exponents": num_exponents, "warmup": warmup, "qr_interval": qr_interval}
        layer, sequences, dtype, count = read_arguments(dynamics, inputs, state, dtype=dtype, **options)
        options["num_exponents"] = count
        if differentiable:
            growths = differentiable_layer_growth(layer, sequences, **options)
        else:
            growths = layer_growth(layer, sequences, dtype=dtype, **options)
        total = torch.cat([growth.total.sum(0) for _, growth in growths], -1)
        spectrum = (total / growths[0][1].steps.sum(0).unsqueeze(-1)).clamp(min=EXPONENT_FLOOR)
        return spectrum.sort(dim=-1, descending=True).values[:, :count].to(dtype)


def differentiable_layer_growth(
    layer: RecurrentLayer,
    sequences: Sequences,
    *,
    num_exponents: int | None,
    warmup: int,
    qr_interval: int | Literal["auto"],
) -> list[tuple[str, Growth]]:
    """Return what :func:`layer_growth` does, with a graph to the parameters of the layer and to the sequences.

    Raises:
        ValueError: if the graph does not reach the parameters, or the network is not finite.
    """
    with plain_arithmetic(keep_graph=True):
        growths = _growth_of_each(
            differentiable_growth, layer, sequences, num_exponents, warmup=warmup, qr_interval=qr_interval
        )
    trainable = layer.module is not None and any(parameter.requires_grad for parameter in layer.module.parameters())
    if trainable and torch.is_grad_enabled() and not any(growth.total.requires_grad for _, growth in growths):
        raise NoGraphError(
            f"`dynamics`, {type(layer.module).__name__}, is not differentiable: no graph leads from its state to its "
            "parameters. Write its step without `detach`, `no_grad` and numpy."
        )
    return growths


def layer_growth(
    layer: RecurrentLayer,
    sequences: Sequences,
    *,
    num_exponents: int | None,
    warmup: int,
    qr_interval: int | Literal["auto"],
    dtype: torch.dtype,
    segments: int = 1,
) -> list[tuple[str, Growth]]:
    """Return the growth of the leading directions of each cell of a layer, with the cell's name."""
    options: dict[str, Any] = {"warmup": warmup, "qr_interval": qr_interval, "dtype": dtype, "segments": segments}
    with plain_arithmetic():
        return _growth_of_each(log_growth, layer, sequences, num_exponents, **options)


def _growth_of_each(
    growth_of: Callable[..., Growth],
    layer: RecurrentLayer,
    sequences: Sequences,
    num_exponents: int | None,
    **options: Any,
) -> list[tuple[str, Growth]]:
    """Return the growth of the leading directions of each cell, with its name, by a function of the kernel."""

    def growth(driven: DrivenCell) -> Growth:
        size = driven.recurrence.state_size
        count = size if num_exponents is None else min(num_exponents, size)
        cell = driven.recurrence, driven.inputs, driven.state, sequences.lengths
        return growth_of(*cell, num_exponents=count, **options)

    return [(driven.name, growth(driven)) for driven in layer.drive(sequences)]


def jacobians(
    dynamics: nn.Module | Callable[[Tensor, Tensor], Tensor],
    inputs: Any,
    state: Any = None,
) -> Tensor:
    """Compute the Jacobian of the state after each step by the state before it, by reverse-mode differentiation.

    The state of a stack of layers is that of its cells one after the other, ``(h, c)`` for each cell of an LSTM. The
    Jacobians are computed by ``vmap(jacrev)`` over sequences and time, independently of the closed forms.

    Args:
        dynamics: as in :func:`lyapunov_spectrum`.
        inputs: as in :func:`lyapunov_spectrum`.
        state: as in :func:`lyapunov_spectrum`.

    Returns:
        ``(time, batch, state, state)``, in float64 for a module and in the dtype of ``state`` for a callable. What
        follows the end of a shorter sequence of a packed batch is NaN.

    Raises:
        ValueError: as in :func:`lyapunov_spectrum`, and for a bidirectional module, whose directions share no step.
        TypeError: as in :func:`lyapunov_spectrum`.
    """
    layer = layer_of(dynamics)
    with plain_arithmetic(), gathered(layer.module):
        layer = _checked(layer, inputs, state)
        sequences, _ = _read(layer, inputs, state, None)
        cell = as_one_cell(layer, sequences)
        step, states = cell.recurrence.step, [cell.state]
        for step_inputs in cell.inputs:
            states.append(step(states[-1], step_inputs).clone())
        before = torch.stack(states[:-1])
        try:
            derivative = torch.func.jacrev(lambda s, x: step(s.unsqueeze(0), x.unsqueeze(0)).squeeze(0))
            matrices = torch.func.vmap(torch.func.vmap(derivative))(before, cell.inputs)
        except (RuntimeError, NotImplementedError, ValueError):
            # A part of the step has no batching rule: step by step, in whatever way works.
            plain = AutodiffRecurrence(step, before.shape[-1])
            identity = torch.eye(before.shape[-1], dtype=before.dtype, device=before.device).expand(
                before.shape[1], -1, -1
            )
            matrices = torch.stack(
                [
                    plain.push_forward((state.unsqueeze(0), step_inputs.unsqueeze(0)), identity)
                    for state, step_inputs in zip(before, cell.inputs, strict=True)
                ]
            )
        ended = torch.arange(len(matrices), device="cpu").unsqueeze(-1) >= sequences.lengths
        return matrices.masked_fill(ended.to(matrices.device)[..., None, None], torch.nan)


def as_one_cell(layer: RecurrentLayer, sequences: Sequences) -> DrivenCell:
    """Return a layer as one cell, whose state is that of its cells one after the other.

    Raises:
        ValueError: for a bidirectional layer, whose directions share no step.
    """
    if any(name.endswith("_reverse") for name in layer.cell_names):
        raise ValueError(
            "`dynamics` is bidirectional: its two directions share no step. Pass each direction by itself."
        )
    first, *others = cells = list(layer.drive(sequences))
    if not others:
        return first
    sizes = [driven.recurrence.state_size for driven in cells]

    def step(states: Tensor, step_inputs: Tensor) -> Tensor:
        after: list[Tensor] = []
        for driven, before in zip(cells, states.split(sizes, -1), strict=True):
            after.append(driven.recurrence.step(before, step_inputs))
            step_inputs = driven.recurrence.output(after[-1])
        return torch.cat(after, -1)

    states = torch.cat([driven.state for driven in cells], -1)
    return DrivenCell("", AutodiffRecurrence(step, sum(sizes)), first.inputs, states)


def working_dtype(layer: RecurrentLayer, sequences: Sequences, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of the products with the frame: never below float32, whatever the precision of training."""
    if dtype is None:
        return torch.promote_types(layer.dtype or sequences.states.dtype, torch.float32)
    if not isinstance(dtype, torch.dtype) or dtype not in (torch.float32, torch.float64):
        raise ValueError(f"`dtype` must be torch.float32, torch.float64 or None, not {dtype}.")
    return dtype


def layer_of(dynamics: nn.Module | Callable[[Tensor, Tensor], Tensor]) -> RecurrentLayer:
    """Return the layer that `dynamics` is.

    Raises:
        TypeError: if it is none; the message says what to pass instead.
    """
    try:
        return as_layer(dynamics)
    except TypeError as error:
        raise TypeError(f"`dynamics` cannot be followed. {error}") from error


def read_arguments(
    dynamics: nn.Module | Callable[[Tensor, Tensor], Tensor],
    inputs: Any,
    state: Any,
    *,
    num_exponents: int | None = None,
    warmup: int,
    qr_interval: int | Literal["auto"],
    dtype: torch.dtype | None = None,
) -> tuple[RecurrentLayer, Sequences, torch.dtype, int]:
    """Return the layer, sequences, dtype and number of exponents of the arguments of :func:`lyapunov_spectrum`.

    Raises:
        ValueError: if an argument has the wrong size or value; the message says what to write.
        TypeError: if an argument is of the wrong type.
    """
    layer = _checked(layer_of(dynamics), inputs, state)
    sequences, dtype = _read(layer, inputs, state, dtype)
    return layer, sequences, dtype, _check_options(layer, sequences, num_exponents, warmup, qr_interval)


def _checked(layer: RecurrentLayer, inputs: Any, state: Any) -> RecurrentLayer:
    """Return the layer to follow: torch's formulas only where they give what the module's own forward gives."""
    if not isinstance(layer, CellLayer | StackedLayer) or not has_own_forward(layer.module):
        return layer
    if isinstance(layer, CellLayer):
        return CustomLayer(layer.module)
    layer.read(inputs, state)  # raises an error that names the argument
    arguments = (inputs,) if state is None else (inputs, state)
    try:
        with torch.no_grad():
            check_closed_form(layer, arguments, {}, frozen_copy(layer.module, layer.dtype)(*arguments))
    except Exception as error:
        raise ValueError(
            f"`dynamics` cannot be followed: the forward of {type(layer.module).__name__} is not torch's ({error}). "
            "Register it: `register_layer(cls, step=..., read_call=...)`."
        ) from error
    return layer


def _read(layer: RecurrentLayer, inputs: Any, state: Any, dtype: torch.dtype | None) -> tuple[Sequences, torch.dtype]:
    """Return the sequences as the layer's cells can take them, and the dtype of the products with the frame."""
    sequences = layer.read(inputs, state)
    time, batch = sequences.inputs.shape[:2]
    if time == 0 or batch == 0:
        raise ValueError(f"`inputs` holds no steps or no sequences: (time, batch) is {(time, batch)}.")
    dtype = working_dtype(layer, sequences, dtype)
    if isinstance(layer, CallableLayer):
        sequences = sequences._replace(inputs=sequences.inputs.to(dtype), states=sequences.states.to(dtype))
    return sequences, dtype


def _check_options(
    layer: RecurrentLayer,
    sequences: Sequences,
    num_exponents: int | None,
    warmup: int,
    qr_interval: int | Literal["auto"],
) -> int:
    """Raise a ValueError for options that do not fit the sequences; return the number of exponents."""
    total = sum(layer.state_sizes)
    if num_exponents is not None and not is_count(num_exponents, 1, total):
        raise ValueError(
            f"`num_exponents={num_exponents}` must be from 1 to {total}, the size of the state, or None for all."
        )
    if not is_count(warmup, 0):
        raise ValueError(f"`warmup={warmup}` must be a number of steps, 0 or more.")
    shortest = int(sequences.lengths.min())
    if warmup >= shortest:
        raise ValueError(
            f"`warmup={warmup}` leaves nothing to average: the sequences have {shortest} steps"
            f"{'' if shortest == int(sequences.lengths.max()) else ' at least'}. "
            "Lower `warmup` or pass longer `inputs`."
        )
    if not is_count(qr_interval, 1) and not (isinstance(qr_interval, str) and qr_interval == "auto"):
        raise ValueError(f'`qr_interval={qr_interval!r}` must be "auto" or a number of steps, 1 or more.')
    return total if num_exponents is None else num_exponents


def is_count(value: Any, low: int, high: float = math.inf) -> bool:
    """Return whether a value is an integer in a range, and no boolean."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
