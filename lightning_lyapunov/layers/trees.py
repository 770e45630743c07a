"""Nested arguments and results of a module: tuples, lists, dictionaries, dataclasses, and what they hold."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Structure", "flatten", "unflatten"]


class Structure(NamedTuple):
    """The containers of a nested value, without its leaves.

    Attributes:
        container: the type of the outermost container; None for a leaf.
        keys: the names of its children.
        children: their structures.
    """

    container: type | None
    keys: tuple[Any, ...] = ()
    children: tuple["Structure", ...] = ()


_LEAF = Structure(None)


def flatten(value: Any) -> tuple[list[Any], Structure]:
    """Return the leaves of a nested value, in order, and its structure. What is no container is a leaf, None too."""
    if value is None or isinstance(value, Tensor):  # most are: no look at what else they could be
        return [value], _LEAF
    keys, items = _items(value)
    if keys is None:
        return [value], _LEAF
    leaves, children = [], []
    for item in items:
        more, child = flatten(item)
        leaves += more
        children.append(child)
    return leaves, Structure(type(value), keys, tuple(children))


def unflatten(structure: Structure, leaves: list[Any]) -> Any:
    """Return the nested value of a structure and its leaves."""
    return _build(structure, iter(leaves))


def _items(value: Any) -> tuple[tuple[Any, ...] | None, list[Any]]:
    if isinstance(value, tuple | list):
        return tuple(range(len(value))), list(value)
    if isinstance(value, dict | Mapping):
        return tuple(value.keys()), list(value.values())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = tuple(field.name for field in dataclasses.fields(value))
        return names, [getattr(value, name) for name in names]
    return None, []


def _build(structure: Structure, leaves: Iterator[Any]) -> Any:
    container: Any = structure.container
    if container is None:
        return next(leaves)
    items = [_build(child, leaves) for child in structure.children]
    if issubclass(container, Mapping):
        pairs = dict(zip(structure.keys, items, strict=True))
        return pairs if container is dict else container(pairs)
    if hasattr(container, "_fields"):  # a named tuple
        return container(*items)
    if issubclass(container, tuple | list):
        return container(items)
    made = object.__new__(container)
    for name, item in zip(structure.keys, items, strict=True):
        object.__setattr__(made, name, item)
    return made
