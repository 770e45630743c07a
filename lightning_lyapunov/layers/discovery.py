"""The recurrent layers of a model, by name."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from lightning_lyapunov.layers.registry import as_closed_form, is_recurrent, refuse_what_cannot_be_read, registered

__all__ = ["FoundLayer", "find_layers"]


class FoundLayer(NamedTuple):
    """A layer of a model, and the module to put hooks on.

    Attributes:
        module: the module of the layer.
        hook_target: that module, or the compiled one around it; None where a hook would break a compiled graph.
        wrapper: the module that holds it, and its name there; None where that is the whole model.
    """

    module: nn.Module
    hook_target: nn.Module | None
    wrapper: tuple[nn.Module, str] | None = None

    @property
    def cell_names(self) -> tuple[str, ...]:
        """PyTorch's suffixes of its cells, ``l0``, ``l0_reverse``, ``l1`` ...; one empty name for a single cell."""
        closed = None if registered(self.module) else as_closed_form(self.module)
        return ("",) if closed is None else closed.cell_names

    @property
    def kind(self) -> str:
        """``"RNN"``, ``"LSTM"`` or ``"GRU"`` for one of torch's, "" for any other."""
        kinds = {"RNN": (nn.RNN, nn.RNNCell), "LSTM": (nn.LSTM, nn.LSTMCell), "GRU": (nn.GRU, nn.GRUCell)}
        return next((kind for kind, classes in kinds.items() if isinstance(self.module, classes)), "")

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """The components of the state of each cell; 0 where they are known only after a call."""
        closed = None if registered(self.module) else as_closed_form(self.module)
        return (0,) if closed is None else closed.state_sizes


def find_layers(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, FoundLayer]:
    """Return the recurrent layers of a model by their dotted names, in the order of ``named_modules()``.

    Args:
        model: the model to search.
        names: the dotted names of the layers to return; None for every recurrent layer.

    Raises:
        ValueError: if the model has no recurrent layer, or no layer of a name.
    """
    # torch.compile wraps a module in another; both go by the name that the user gave, and so does a shared module.
    modules: dict[str, nn.Module] = {}
    one_graph = {}
    for path, module in model.named_modules(remove_duplicate=False):
        modules.setdefault(_without_wrappers(path), module)
        if _is_one_graph(module):
            one_graph[_without_wrappers(path)] = module
    recurrent = {name: module for name, module in modules.items() if is_recurrent(getattr(module, "_orig_mod", module))}
    found = ", ".join(f"`{name}` ({type(module).__name__})" for name, module in recurrent.items()) or "none"
    if names is None and not recurrent:
        raise ValueError(
            f"{type(model).__name__} has no recurrent layer of torch.nn. Name the module to watch, "
            '`LyapunovMonitor(modules="...")`, or register its class with `register_layer`.'
        )
    layers: dict[str, FoundLayer] = {}
    known: set[int] = set()
    for name in map(_without_wrappers, names or recurrent):
        if not name:
            raise ValueError(f"`modules` names the whole model. Name a layer of it. Its recurrent layers: {found}.")
        if name not in modules:
            raise ValueError(f"`modules` names `{name}`, which the model does not have. Its recurrent layers: {found}.")
        module = getattr(modules[name], "_orig_mod", modules[name])
        try:
            refuse_what_cannot_be_read(module)
        except TypeError as error:
            raise ValueError(
                f"`modules`: `{name}` cannot be watched. {error} The recurrent layers: {found}."
            ) from error
        if id(module) not in known:
            known.add(id(module))
            # A hook breaks a compiled graph: where that is an error it can only stand outside.
            inside = any(name.startswith(f"{path}.") for path in one_graph)
            path, _, last = name.rpartition(".")
            wrapper = (modules[path], last) if path else None
            layers[name] = FoundLayer(module, None if inside else one_graph.get(name, module), wrapper)
    return layers


def _is_one_graph(module: nn.Module) -> bool:
    """Return whether ``torch.compile`` wraps it with ``fullgraph=True``."""
    context: Any = getattr(module, "dynamo_ctx", None)
    if hasattr(context, "fullgraph"):
        return bool(context.fullgraph)
    # Older releases of torch keep it in the kind of compiler alone.
    compiler = getattr(getattr(context, "callback", None), "_torchdynamo_orig_callable", None)
    return type(compiler).__name__ == "ConvertFrameAssert"


def _without_wrappers(path: str) -> str:
    return ".".join(part for part in path.split(".") if part != "_orig_mod")
