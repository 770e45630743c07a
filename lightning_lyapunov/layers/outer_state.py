"""What the forward of a module may change outside of it: random generators, and attributes of its classes."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["OuterState", "undisturbed"]

_LIBRARIES = ("torch", "lightning", "pytorch_lightning", "lightning_lyapunov", "builtins", "abc", "typing")
_PLAIN = (bool, int, float, complex, str, bytes, tuple, frozenset, type(None))
_ABSENT = object()


class OuterState:
    """The random states of a process and the class attributes of a module, as they are when this object is made.

    The generators are those of torch (on the CPU, and on the devices of the module's parameters), Python and NumPy, and
    those that are an attribute of a class. A copy of the module has copies of the generators that it holds itself. What
    lies in a global variable or in a closure cannot be reached.

    Args:
        modules: the modules that are called.
    """

    def __init__(self, *modules: nn.Module | None) -> None:
        parts = [part for module in modules if module is not None for part in module.modules()]
        devices = {parameter.device for part in parts for parameter in part.parameters(recurse=False)}
        self._generators = [*_PROCESS, *filter(None, (_of_device(device) for device in sorted(devices, key=str)))]
        self._classes = list(dict.fromkeys(kind for part in parts for kind in type(part).__mro__ if _is_users(kind)))
        self._states = self._read()

    def has_drawn(self) -> bool:
        """Return whether random numbers of torch were drawn since."""
        pairs = zip(self._generators, self._states[0], strict=True)
        return any(not torch.equal(read(), old) for (read, _), old in pairs if read not in _OF_OTHERS)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Start from these states again, and leave the states as they are now."""
        now = self._read()
        try:
            self._write(self._states)
            yield
        finally:
            self._write(now)

    def restore(self) -> None:
        """Give the states back."""
        self._write(self._states)

    def _read(self) -> tuple[list[Any], list[dict[str, Any]]]:
        return [read() for read, _ in self._generators], [_attributes(kind) for kind in self._classes]

    def _write(self, states: tuple[list[Any], list[dict[str, Any]]]) -> None:
        for (_, write), state in zip(self._generators, states[0], strict=True):
            write(state)
        for kind, attributes in zip(self._classes, states[1], strict=True):
            now = _attributes(kind)
            for name in now.keys() - attributes.keys():
                delattr(kind, name)
            for name, kept in attributes.items():
                kept.give_back(kind, name)


@contextmanager
def undisturbed(*modules: nn.Module | None) -> Iterator[None]:
    """Leave the state outside of modules as it is, whatever calling them, or copies of them, changes."""
    state = OuterState(*modules)
    try:
        yield
    finally:
        state.restore()


_Generator = tuple[Callable[[], Any], Callable[[Any], Any]]
_OF_OTHERS = (random.getstate, np.random.get_state)
_PROCESS: list[_Generator] = [
    (torch.get_rng_state, torch.set_rng_state),
    (random.getstate, random.setstate),
    (np.random.get_state, np.random.set_state),
]


def _of_device(device: torch.device) -> _Generator | None:
    if device.type == "cuda":
        return lambda: torch.cuda.get_rng_state(device), lambda state: torch.cuda.set_rng_state(state, device)
    if device.type == "mps":
        return torch.mps.get_rng_state, torch.mps.set_rng_state
    return None


def _is_users(kind: type) -> bool:
    return kind.__module__.partition(".")[0] not in _LIBRARIES


class _Kept:
    """The value of an attribute of a class, and what is in it."""

    def __init__(self, value: Any) -> None:
        self._value = value
        self._content: Any = _content(value)
        self._version = _version(value)

    def give_back(self, kind: type, name: str) -> None:
        if vars(kind).get(name, _ABSENT) is not self._value:
            setattr(kind, name, self._value)
        value, content = self._value, self._content
        if isinstance(value, Tensor):
            if _version(value) != self._version or value.is_inference():
                with torch.no_grad(), torch.inference_mode(value.is_inference()):
                    value.copy_(content)
        elif isinstance(value, list):
            value[:] = content
        elif isinstance(value, dict | set):
            value.clear()
            value.update(content)
        elif isinstance(value, np.ndarray):
            value[...] = content
        elif isinstance(value, torch.Generator):
            value.set_state(content)
        elif isinstance(value, random.Random):
            value.setstate(content)
        elif isinstance(value, np.random.Generator):
            value.bit_generator.state = content


def _version(value: Any) -> int:
    """Return how often a tensor was written to, as far as torch counts that."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _content(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, list | dict | set | np.ndarray):
        return value.copy()
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    return None


_KEPT_TYPES = (*_PLAIN, Tensor, list, dict, set, np.ndarray, torch.Generator, random.Random, np.random.Generator)


def _attributes(kind: type) -> dict[str, Any]:
    """Return the attributes of a class that hold data, but for those that Python itself makes."""
    return {
        name: _Kept(value)
        for name, value in vars(kind).items()
        if isinstance(value, _KEPT_TYPES) and not (name.startswith("__") and name.endswith("__"))
    }
