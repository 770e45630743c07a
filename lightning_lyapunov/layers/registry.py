"""Which recurrent layer a module is: torch's, a registered one, or one that is refused."""

from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lyapunov.layers.base import RecurrentLayer
from lightning_lyapunov.layers.custom import CallableLayer, CustomLayer, Step
from lightning_lyapunov.layers.sharding import missing_weight
from lightning_lyapunov.layers.torch_nn import CellLayer, StackedLayer

__all__ = ["as_layer", "is_recurrent", "register_layer"]

_registered: dict[type[nn.Module], tuple[Step, Callable[..., tuple[Tensor, Any]]]] = {}


def register_layer(module_class: type[nn.Module], *, step: Step, read_call: Callable[..., tuple[Tensor, Any]]) -> None:
    """Register a class of recurrent layers that are not called as ``(input, state)``, one step at a time.

    Modules of this class, and of its subclasses, are then found and measured like torch's own.

    Args:
        module_class: the class of the layer.
        step: ``step(module, input, state)``, which returns the next state, or ``(output, state)``. The input is
            ``(batch, ...)``, the state any pytree of tensors ``(batch, ...)``, real or complex. It gets a copy of the
            module in evaluation mode, in float64 where that works.
        read_call: ``read_call(module, *args, **kwargs)``, which returns, from the arguments of the module's
            ``forward``, the inputs of each step, ``(time, batch, ...)``, and the state before the first.

    Example::

        >>> import torch
        >>> class Leaky(torch.nn.Module):  # called with a whole sequence, (batch, time, input)
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = torch.nn.Linear(3, 5)
        >>> register_layer(
        ...     Leaky,
        ...     step=lambda module, x, h: 0.9 * h + torch.tanh(module.linear(x)),
        ...     read_call=lambda module, x: (x.transpose(0, 1), x.new_zeros(len(x), 5)),
        ... )
        >>> from lightning_lyapunov import lyapunov_spectrum
        >>> lyapunov_spectrum(Leaky(), torch.randn(2, 50, 3), num_exponents=1).exp()
        tensor([[0.9000],
                [0.9000]])
    """
    _registered[module_class] = (step, read_call)


def as_layer(dynamics: nn.Module | Callable[[Tensor, Tensor], Tensor]) -> RecurrentLayer:
    """Return the layer that a module or a plain callable is.

    Raises:
        TypeError: if it is none; the message says what to pass instead.
    """
    if not isinstance(dynamics, nn.Module):
        if not callable(dynamics):
            raise TypeError(
                "It must be a recurrent module or a callable `step(state, input) -> state`, "
                f"not {type(dynamics).__name__}."
            )
        return CallableLayer(dynamics)
    module = getattr(dynamics, "_orig_mod", dynamics)  # what torch.compile wraps
    _refuse_what_cannot_be_read(module)
    for module_class in type(module).__mro__:
        if module_class in _registered:
            step, read_call = _registered[module_class]
            return CustomLayer(module, step, read_call)
    if isinstance(module, nn.RNNBase):
        return StackedLayer(module)
    if isinstance(module, nn.RNNCellBase):
        return CellLayer(module)
    if not _takes_two(module.forward):
        raise TypeError(
            f"{type(module).__name__} is no recurrent layer: it is not called as (input, state). Pass one of its "
            "recurrent layers, a callable `step(state, input) -> state`, or register its class with `register_layer`."
        )
    return CustomLayer(module)


def is_recurrent(module: nn.Module) -> bool:
    """Return whether a module is a recurrent layer that is found without being named."""
    return isinstance(module, (nn.RNNBase, nn.RNNCellBase, *_registered))


def _takes_two(forward: Callable[..., Any]) -> bool:
    positional = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    parameters = signature(forward).parameters.values()
    return sum(parameter.kind in positional for parameter in parameters) >= 2 or any(
        parameter.kind is Parameter.VAR_POSITIONAL for parameter in parameters
    )


def _refuse_what_cannot_be_read(module: nn.Module) -> None:
    name = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(f"{name} is scripted: its weights cannot be followed. Pass the module that was scripted.")
    if "quantized" in type(module).__module__:
        raise TypeError(f"{name} is quantised: its map has no derivative. Pass the module before quantisation.")
    if (missing := missing_weight(module)) is not None:
        raise TypeError(
            f"The parameters of {name} are sharded, and `{missing}` is not here. Shard them with `fully_shard` "
            "(`ModelParallelStrategy`), whose weights are gathered, keep them whole (`DDPStrategy`; DeepSpeed: "
            "stage 2), or measure a gathered copy."
        )
