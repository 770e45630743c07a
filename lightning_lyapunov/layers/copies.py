"""Copies of a module that can be called without a trace on the original."""

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.utils import _pytree as pytree

from lightning_lyapunov.layers.trees import flatten, unflatten

__all__ = [
    "aliased_copy",
    "assign",
    "cast",
    "frozen_copy",
    "get_attribute",
    "has_made_weights",
    "is_sharded",
    "kept_tensors",
    "private_copy",
    "same",
    "stepping_copy",
]

# Attributes of every module, and the list of weights of torch's recurrent layers.
_INTERNAL = {*vars(nn.Module()), "_flat_weights", "_flat_weight_refs", "_compiled_call_impl"}
# Larger constants are not looked at: a state is small.
_MAX_KEPT_ELEMENTS = 2**24


def frozen_copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy in evaluation mode and in a dtype, without hooks or gradients."""
    frozen = _deepcopy(module, {}).eval().requires_grad_(False)
    frozen._apply(lambda tensor: cast(tensor, dtype))
    for name, value in kept_tensors(frozen).items():
        leaves, structure = flatten(value)
        assign(frozen, name, unflatten(structure, [cast(leaf, dtype) for leaf in leaves]))
    return frozen


def stepping_copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy as :func:`frozen_copy` makes it; with gradients, its weights are the module's parameters, cast.

    What it returns can then be differentiated by the parameters.
    """
    attached = frozen_copy(module, dtype)
    if not torch.is_grad_enabled():
        return attached
    for copied, part in zip(attached.modules(), module.modules(), strict=True):
        own: dict[str, Any] = {name: cast(parameter, dtype) for name, parameter in part._parameters.items()}
        copied._parameters.update(own)
        if isinstance(copied, nn.RNNBase):
            copied._flat_weights = [getattr(copied, name, None) for name in copied._flat_weights_names]
    return attached


def _deepcopy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return a copy without hooks, but those of torch: pruning and the older norms make weights.

    ``fully_shard`` installs a class that forbids deepcopy: the original class is restored on the copy.
    """
    for part in module.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
            of_torch = [key for key, hook in hooks.items() if type(hook).__module__.startswith("torch.nn.utils.")]
            # In the place of the table, because a hook may hold its owner, the model, or tensors with a graph.
            memo[id(hooks)] = OrderedDict((key, hooks[key]) for key in of_torch)
    # Tensors that hang on a graph refuse to be copied, wherever the module keeps them.
    for value in pytree.tree_leaves([part.__dict__ for part in module.modules()]):
        if isinstance(value, Tensor) and value.grad_fn is not None:
            memo[id(value)] = value.detach().clone()
    units: list[Any] = [part for part in module.modules() if hasattr(part, "unshard")]
    for unit in units:
        own = next(kind for kind in type(unit).__mro__ if not kind.__module__.startswith("torch.distributed."))
        memo[id(unit)] = object.__new__(own)
        memo[id(unit._get_fsdp_state())] = unit._get_fsdp_state()
    for unit in units:
        memo[id(unit)].__setstate__(copy.deepcopy(unit.__dict__, memo))
    copied = copy.deepcopy(module, memo)
    for part in copied.modules():
        part._compiled_call_impl = None  # what `module.compile()` made calls the original
    return copied


def cast(tensor: Any, dtype: torch.dtype) -> Any:
    """Return a tensor in the real dtype, or the complex one of the same precision; anything else as it is."""
    if not isinstance(tensor, Tensor):
        return tensor
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def aliased_copy(module: nn.Module) -> nn.Module | None:
    """Return a copy in the same mode that shares the parameters, without the user's hooks.

    None for a module whose weights are spread over processes: outside its own forward they are not here.
    """
    if is_sharded(module):
        return None
    memo: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    for part in module.modules():
        for hook in part._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):  # its vectors change before each call; the call has seen those of now
                vectors = (part._buffers[f"{hook.name}_{suffix}"] for suffix in ("u", "v"))
                memo |= {id(vector): vector for vector in vectors}
    aliased = _deepcopy(module, memo)
    for part in aliased.modules():
        for key, hook in part._forward_pre_hooks.items():
            if isinstance(hook, SpectralNorm):
                still = copy.copy(hook)
                still.n_power_iterations = 0
                part._forward_pre_hooks[key] = still
    return aliased


def private_copy(module: nn.Module) -> nn.Module:
    """Return a copy in the same mode with weights of its own, those of now, without the user's hooks."""
    return _deepcopy(module, {})


def is_sharded(module: nn.Module) -> bool:
    """Return whether the weights of a module are spread over processes, so that its forward has to gather them."""
    is_unit = any(hasattr(part, "unshard") for part in module.modules())
    return is_unit or any(hasattr(parameter, "full_tensor") for parameter in module.parameters())


def kept_tensors(module: nn.Module) -> dict[str, Any]:
    """Return copies of the tensors that a module keeps beside its parameters, in buffers and attributes, by name."""
    kept = {}
    for path, part in module.named_modules():
        attributes = {name: value for name, value in vars(part).items() if name not in _INTERNAL}
        for name, value in {**part._buffers, **attributes}.items():
            leaves, structure = flatten(value)
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            # None, too: a state that is not there yet.
            if (tensors or value is None) and not any(
                isinstance(t, nn.Parameter) or t.numel() > _MAX_KEPT_ELEMENTS for t in tensors
            ):
                kept[f"{path}.{name}" if path else name] = unflatten(structure, [_detached(leaf) for leaf in leaves])
    return kept


def assign(module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute of a module, or of one of its parts, by its dotted name."""
    path, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(path), attribute, value)


def has_made_weights(module: nn.Module) -> bool:
    """Return whether a weight of one of torch's recurrent layers is no parameter, but was computed from one."""
    for name, value in {**vars(module), **module._parameters}.items():
        is_weight = name.startswith(("weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh"))
        # Pruning and the older norms of torch make a weight in a hook, which a copy keeps.
        by_torch = any(f"{name}_{source}" in module._parameters for source in ("orig", "g"))
        if is_weight and isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and not by_torch:
            return True
    return False


def get_attribute(module: nn.Module, name: str) -> Any:
    """Return a copy of an attribute of a module, or of one of its parts, by its dotted name."""
    path, _, attribute = name.rpartition(".")
    leaves, structure = flatten(getattr(module.get_submodule(path), attribute))
    return unflatten(structure, [_detached(leaf) for leaf in leaves])


def _detached(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    with torch.inference_mode(False), torch.no_grad():
        return leaf.detach().clone()


def same(a: Any, b: Any) -> bool:
    """Return whether two nested values have the same structure and equal leaves."""
    (leaves, structure), (others, other_structure) = flatten(a), flatten(b)
    return structure == other_structure and all(map(_equal, leaves, others))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    return a is b or (type(a) is type(b) and bool(a == b))
