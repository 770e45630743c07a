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

__all__ = [
    "as_closed_form",
    "as_layer",
    "has_own_forward",
    "is_recurrent",
    "refuse_what_cannot_be_read",
    "register_layer",
    "registered",
]

_registered: dict[type[nn.Module], tuple[Step, Callable[..., tuple[Any, ...]]]] = {}


def register_layer(module_class: type[nn.Module], *, step: Step, read_call: Callable[..., tuple[Any, ...]]) -> None:
    """Register a class of recurrent layers that are not called as ``(input, state)``, one step at a time.

    Modules of this class, and of its subclasses, are then found and measured like torch's own.

    Args:
        module_class: the class of the layer.
        step: ``step(module, input, state)``, which returns the next state, or ``(output, state)``. The input is
            ``(batch, ...)``, the state any pytree of tensors ``(batch, ...)``, real or complex. It gets a copy of the
            module in evaluation mode, in float64 where that works.
        read_call: ``read_call(module, *args, **kwargs)``, which returns, from the arguments of the module's
            ``forward``, the inputs of each step, ``(time, batch, ...)``, the state before the first and, if it follows
            from the arguments, the state after the last. The members of the batch must be independent: where they are
            not, as the nodes of a graph, all of them are one state, of a batch of one.

    Calls that go on from one another are one sequence: a cell may be registered that is called once for each step. The
    step is checked against the states that the layer returns and is given back.

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
    refuse_what_cannot_be_read(module)
    if (layer := registered(module) or as_closed_form(module)) is not None:
        return layer
    if not _takes_two(module.forward):
        raise TypeError(_no_layer(module))
    return CustomLayer(module)


def _no_layer(module: nn.Module) -> str:
    return (
        f"{type(module).__name__} is no recurrent layer: it is not called as (input, state). Pass one of its "
        "recurrent layers, a callable `step(state, input) -> state`, or register its class with `register_layer`."
    )


def registered(module: nn.Module) -> CustomLayer | None:
    """Return the layer of a module whose class was registered; None for any other."""
    for module_class in type(module).__mro__:
        if module_class in _registered:
            step, read_call = _registered[module_class]
            return CustomLayer(module, step, read_call)
    return None


def as_closed_form(module: nn.Module) -> StackedLayer | CellLayer | None:
    """Return the layer that torch's formulas give for a module, whatever its own forward does; None for any other."""
    if isinstance(module, nn.RNNBase):
        return StackedLayer(module)
    if isinstance(module, nn.LSTMCell | nn.GRUCell | nn.RNNCell):
        return CellLayer(module)
    return None


def has_own_forward(module: nn.Module) -> bool:
    """Return whether a recurrent layer or cell has another forward than torch's."""
    kind: Any = next(kind for kind in type(module).__mro__ if kind.__module__ == "torch.nn.modules.rnn")
    return "forward" in vars(module) or type(module).forward is not kind.forward


def is_recurrent(module: nn.Module) -> bool:
    """Return whether a module is a recurrent layer that is found without being named."""
    return isinstance(module, (nn.RNNBase, nn.RNNCellBase, *_registered))


def is_stateless(module: nn.Module) -> bool:
    """Return whether a module is one of torch's own that has no state, such as ``Linear``."""
    is_torchs = type(module).__module__.startswith("torch.nn.modules.") and not any(True for _ in module.children())
    return is_torchs and not isinstance(module, nn.RNNBase | nn.RNNCellBase | torch.jit.ScriptModule)


def _takes_two(forward: Callable[..., Any]) -> bool:
    positional = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    parameters = signature(forward).parameters.values()
    return sum(parameter.kind in positional for parameter in parameters) >= 2 or any(
        parameter.kind is Parameter.VAR_POSITIONAL for parameter in parameters
    )


def refuse_what_cannot_be_read(module: nn.Module) -> None:
    """Raise a TypeError for a module that cannot be followed, whatever it is called with."""
    name = type(module).__name__
    if is_stateless(module):
        raise TypeError(_no_layer(module))
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
