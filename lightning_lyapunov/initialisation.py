"""Gradient flossing: move the leading exponents of a recurrent module to a target, in place.

Engelken, Gradient Flossing: Improving Gradient Descent through Dynamic Control of Jacobians (NeurIPS 2023, arXiv
2312.17306): gradient descent on the squares of the leading exponents, through a differentiable spectrum.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_lyapunov.functional import differentiable_layer_growth, is_count, read_arguments
from lightning_lyapunov.kernel.precision import plain_arithmetic
from lightning_lyapunov.kernel.propagation import EXPONENT_FLOOR
from lightning_lyapunov.kernel.recurrence import NoGraphError
from lightning_lyapunov.layers.base import RecurrentLayer, Sequences
from lightning_lyapunov.layers.copies import has_made_weights, is_sharded
from lightning_lyapunov.layers.registry import as_closed_form
from lightning_lyapunov.recording.reading import Followed

__all__ = ["FlossingResult", "floss_", "lyapunov_init_", "recurrent_parameters", "with_live_weights"]

# Weights are scaled down until no exponent is above the target by more than a factor e over the window; so often at
# most, and by no less than this factor at a time.
_MAX_SCALINGS, _MIN_FACTOR = 30, 0.5


@dataclass(frozen=True, eq=False)
class FlossingResult:
    """What :func:`lyapunov_init_` did.

    Attributes:
        before: the leading exponents of each cell before, ``(cells, num_exponents)``, in nats per step, largest first,
            as the mean over the sequences.
        after: the same with the new weights.
        cell_names: the cells: ``l0``, ``l0_reverse``, ``l1`` ...; one empty name for a single cell.
        parameter_names: the parameters that were changed.
        scale: the factor that the recurrent matrices were multiplied by first; 1 unless the network was chaotic.
    """

    before: Tensor
    after: Tensor
    cell_names: tuple[str, ...]
    parameter_names: tuple[str, ...]
    scale: float


def lyapunov_init_(
    module: nn.Module,
    inputs: Any,
    state: Any = None,
    *,
    target: float = 0.0,
    num_exponents: int = 16,
    steps: int = 60,
    lr: float = 1e-2,
    parameters: Callable[[str], bool] | None = None,
    warmup: int = 0,
    qr_interval: int | Literal["auto"] = "auto",
) -> FlossingResult:
    r"""Move the leading Lyapunov exponents of a recurrent module to a target, in place (gradient flossing).

    Minimises :math:`(\lambda_j - \lambda^*)^2`, as the mean over cells, sequences and the leading exponents,
    by Adam. With the target 0, gradients neither vanish nor explode along as many directions. A chaotic network is
    scaled first: its recurrent matrices are multiplied by a factor below 1 until no exponent is far above the target,
    because derivatives along chaotic trajectories lead nowhere. The weights that are kept are the best of all steps.

    Nothing but the chosen parameters is changed: not the global random state, nor a ``.grad``, nor the mode.

    Args:
        module: a recurrent module: see :func:`~lightning_lyapunov.lyapunov_spectrum`.
        inputs: what the module is called with in training; about 8 sequences, as long as what it is to remember.
        state: as in :func:`~lightning_lyapunov.lyapunov_spectrum`.
        target: where the exponents shall be, in nats per step.
        num_exponents: how many of the largest exponents of each cell to move; all, if there are fewer.
        steps: steps of gradient descent.
        lr: the learning rate of Adam.
        parameters: tells by its name in ``named_parameters()`` whether a parameter may change. None: the recurrent
            weights of torch's layers and cells inside of the module, and the biases of their gates; all parameters of a
            module without such.
        warmup: steps that are not averaged.
        qr_interval: as in :func:`~lightning_lyapunov.lyapunov_spectrum`.

    Returns:
        The exponents before and after, and what was changed.

    Raises:
        ValueError: if an argument has the wrong size or value, the network is not finite, or no parameter may change;
            the module is then as it was.
        TypeError: if an argument is of the wrong type, or the weights are spread over processes.

    Example::

        >>> import torch
        >>> rnn, inputs = torch.nn.RNN(1, 16), torch.randn(20, 4, 1)
        >>> result = lyapunov_init_(rnn, inputs, num_exponents=4, steps=20)
        >>> bool(result.after.abs().mean() < 0.1 * result.before.abs().mean())
        True
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"`module` must be a recurrent module, not {type(module).__name__}.")
    for name, count, least in (("num_exponents", num_exponents, 1), ("steps", steps, 0)):
        if not is_count(count, least):
            raise ValueError(f"`{name}={count!r}` must be a number, {least} or more.")
    if not (math.isfinite(target) and math.isfinite(lr) and lr > 0):
        raise ValueError(f"`target={target}` and `lr={lr}` must be finite, and `lr` above 0.")
    chosen = recurrent_parameters(module, parameters)
    options: dict[str, Any] = {"warmup": warmup, "qr_interval": qr_interval}
    how: dict[str, Any] = {"target": target, "steps": steps, "lr": lr, "num_exponents": num_exponents, **options}
    with _naming("module"):
        with plain_arithmetic():
            layer, sequences, _, _ = read_arguments(module, inputs, state, **options)
        return floss_(layer, sequences, chosen, **how)


@contextmanager
def _naming(argument: str) -> Iterator[None]:
    """Let errors of the plain functions name another argument than ``dynamics``."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("`dynamics`", f"`{argument}`")) from error


def recurrent_parameters(module: nn.Module, chosen: Callable[[str], bool] | None = None) -> dict[str, nn.Parameter]:
    """Return the parameters of a module that flossing may change, by name: see :func:`lyapunov_init_`.

    Raises:
        ValueError: if there are none.
    """
    names = _recurrent_names(module) if chosen is None else None
    found = {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and (chosen(name) if chosen is not None else not names or name in names)
    }
    if not found:
        raise ValueError(
            f"No parameter of {type(module).__name__} may change. Let `parameters` be true for some of the trainable "
            f"ones: {[name for name, parameter in module.named_parameters() if parameter.requires_grad]}."
        )
    return found


def _recurrent_names(module: nn.Module) -> set[str]:
    """Return the names of recurrent weights and gate biases of torch's layers and cells in a module."""
    names = set()
    for path, part in module.named_modules():
        if isinstance(part, nn.RNNBase | nn.RNNCellBase):
            kinds = ("weight_hh", "weight_hr", "bias_hh")[: 2 if isinstance(part, nn.RNN | nn.RNNCell) else 3]
            # A parametrised weight is `parametrizations.weight_hh_l0.original`.
            own = [name for name, _ in part.named_parameters() if any(p.startswith(kinds) for p in name.split("."))]
            names |= {f"{path}.{name}" if path else name for name in own}
    return names


def with_live_weights(followed: Followed, module: nn.Module) -> RecurrentLayer:
    """Return the layer that was followed, computed from the parameters of its module, so that flossing reaches them.

    Raises:
        NoGraphError: if the forward of the module makes the weights that it uses.
    """
    if followed.layer.module is module:
        return followed.layer
    layer = as_closed_form(module)
    if layer is None or has_made_weights(module):
        raise NoGraphError(
            f"The forward of {type(module).__name__} makes the weights that it uses: no graph leads to its parameters. "
            "Make them by `torch.nn.utils.parametrize.register_parametrization(module, name, ...)`."
        )
    return layer


def floss_(
    layer: RecurrentLayer,
    sequences: Sequences,
    parameters: dict[str, nn.Parameter],
    *,
    target: float,
    steps: int,
    lr: float,
    **options: Any,
) -> FlossingResult:
    """Floss a layer along sequences: see :func:`lyapunov_init_`.

    Args:
        layer: the layer.
        sequences: its sequences.
        parameters: what may change, by name.
        target: where the exponents shall be.
        steps: steps of gradient descent.
        lr: the learning rate.
        options: those of :func:`~lightning_lyapunov.functional.differentiable_layer_growth`.
    """
    if layer.module is not None and is_sharded(layer.module):
        raise TypeError(f"The weights of {type(layer.module).__name__} are spread over processes: floss it before.")

    def exponents() -> list[Tensor]:
        growths = differentiable_layer_growth(layer, sequences, **options)
        return [growth.total.sum(0) / growth.steps.sum(0).unsqueeze(-1) for _, growth in growths]

    original = _copies(parameters.values())
    with torch.inference_mode(False), torch.enable_grad():
        try:
            before = _measured(exponents)
            scale = _scale_down_(parameters.values(), exponents, target, above=1 / int(sequences.lengths.max()))
            _descend_(list(parameters.values()), exponents, target, steps, lr)
            after = _measured(exponents)
        except BaseException:
            _assign_(parameters.values(), original)
            raise
    return FlossingResult(before, after, layer.cell_names, tuple(parameters), scale)


def _copies(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


@torch.no_grad()
def _assign_(parameters: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


@torch.no_grad()
def _measured(exponents: Callable[[], list[Tensor]]) -> Tensor:
    """Return the exponents as they are reported, ``(cells, num_exponents)``."""
    means = [of_cell.clamp(min=EXPONENT_FLOOR).mean(0) for of_cell in exponents()]
    return torch.stack(means).sort(dim=-1, descending=True).values


def _scale_down_(
    parameters: Iterable[Tensor], exponents: Callable[[], list[Tensor]], target: float, above: float
) -> float:
    """Multiply the matrices by a factor, until the largest exponent is near the target or falls no more; return it."""
    parameters = list(parameters)
    original, scale, tried = _copies(parameters), 1.0, 1.0
    lowest = largest = float(_measured(exponents).max())
    for _ in range(_MAX_SCALINGS):
        if lowest <= target + above:
            break
        tried *= max(math.exp(target - largest), _MIN_FACTOR)
        _scale_(parameters, original, tried)
        largest = float(_measured(exponents).max())
        if largest < lowest:
            scale, lowest = tried, largest
        elif tried < _MIN_FACTOR**3:
            break
    _scale_(parameters, original, scale)
    return scale


def _scale_(parameters: Iterable[Tensor], original: Iterable[Tensor], scale: float) -> None:
    _assign_(parameters, [value * scale if value.ndim > 1 else value for value in original])


def _descend_(
    parameters: list[nn.Parameter], exponents: Callable[[], list[Tensor]], target: float, steps: int, lr: float
) -> None:
    """Take steps of gradient descent on the squared distance to the target, and keep the best weights."""
    # Copies, so that no `.grad` is touched and small steps are not rounded away in a half-precision weight.
    leaves = [parameter.detach().double().requires_grad_() for parameter in parameters]
    optimizer = torch.optim.Adam(leaves, lr)
    best, kept = math.inf, _copies(parameters)
    for step in range(steps + 1):
        with torch.set_grad_enabled(step < steps):
            loss = torch.stack(
                [(of_cell.clamp(min=EXPONENT_FLOOR) - target).square().mean() for of_cell in exponents()]
            )
            loss = loss.mean()
        if loss < best:
            best, kept = float(loss.detach()), _copies(parameters)
        if step < steps:
            gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
            if not all(gradient.isfinite().all() for gradient in gradients):
                break
            for leaf, gradient in zip(leaves, gradients, strict=True):
                leaf.grad = gradient.to(leaf.dtype)
            optimizer.step()
            _assign_(parameters, leaves)
    _assign_(parameters, kept)
