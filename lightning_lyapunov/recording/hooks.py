"""The hooks on a layer, and the calls that they cannot read."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx import Proxy

__all__ = ["Hook", "add_hooks", "beside_modes", "has_numbers", "remove_hooks"]


def add_hooks(recorder: Any, name: str, target: nn.Module | None, wrapper: nn.Module | None) -> None:
    """Pass the calls of a layer on to a recorder's ``receive(name, what, ...)``.

    Args:
        recorder: gets ``"before"`` with arguments and keyword arguments, ``"after"`` with what was returned, and
            ``"before_wrapper"`` with the arguments of the module that makes the weights.
        name: the name of the layer.
        target: the module to put the hooks on, if any.
        wrapper: the module that makes the weights of the layer, if any.
    """
    if wrapper is not None:
        wrapper.register_forward_pre_hook(Hook(recorder, name, "before_wrapper"), with_kwargs=True)
        vars(wrapper).setdefault(_SCRIPTED, _BeforeScript(wrapper))
    if target is not None:
        target.register_forward_pre_hook(Hook(recorder, name, "before"), with_kwargs=True)
        target.register_forward_hook(Hook(recorder, name, "after"), with_kwargs=True)
        vars(target).setdefault(_SCRIPTED, _BeforeScript(target))


def remove_hooks(module: nn.Module, recorder: Any) -> None:
    """Remove the hooks of a recorder, and those that a copy of a module has inherited from the original."""
    # They are searched for: an interrupt may have prevented storing a handle.
    _remove(module, lambda hook: hook.recorder in (None, recorder))


def _remove(module: nn.Module, is_meant: Callable[["Hook"], bool]) -> None:
    tables = (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    )
    for hooks, with_kwargs in tables:
        for number, hook in list(hooks.items()):
            if isinstance(hook, Hook) and is_meant(hook):
                with_kwargs.pop(number, None)
                hooks.pop(number, None)
    some_left = any(isinstance(hook, Hook) for hooks, _ in tables for hook in hooks.values())
    if not some_left and isinstance(vars(module).get(_SCRIPTED), _BeforeScript):
        del vars(module)[_SCRIPTED]


class Hook:
    """Passes the calls of a layer on to a recorder. In a copy or a pickle of the layer it removes itself."""

    def __init__(self, recorder: Any = None, name: str = "", what: str = "") -> None:
        self.recorder, self._name, self._what = recorder, name, what

    def __reduce__(self) -> Any:
        return type(self), ()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
        if self.recorder is None:
            remove_hooks(module, None)
        else:
            self.recorder.receive(self._name, self._what, *(output or (args, kwargs)))

    def skip(self) -> bool:
        """Say that calls from now on are not recorded; return True, because the hook is to be removed."""
        if self.recorder is not None:
            self.recorder.receive(self._name, "skip")
        return True


# `torch.jit.script` would compile the hooks of a module, too. It first asks the module to prepare itself.
_SCRIPTED = "__prepare_scriptable__"


class _BeforeScript:
    """Removes our hooks from a module that is about to be scripted; the rest of the batch is not recorded."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self) -> nn.Module:
        _remove(self._module, Hook.skip)
        own = getattr(self._module, _SCRIPTED, None)
        return self._module if own is None else own()


def has_numbers(leaves: list[Any]) -> bool:
    """Return whether a call computes with numbers: not under ``torch.func``, in a trace or in an export."""
    traced = (Proxy, FakeTensor, FunctionalTensor)
    return not (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or any(isinstance(leaf, traced) or (isinstance(leaf, Tensor) and leaf.is_meta) for leaf in leaves)
    )


@contextmanager
def beside_modes() -> Iterator[None]:
    """Keep what we compute from the user's dispatch modes, which count or change operations."""
    disabled = getattr(torch.utils._python_dispatch, "_disable_current_modes", nullcontext)
    with disabled() if torch._C._len_torch_dispatch_stack() else nullcontext():
        yield
