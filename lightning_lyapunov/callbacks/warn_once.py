"""Warnings that are given once, whatever numbers they hold."""

import sys
import warnings

__all__ = ["WarnOnce"]


class WarnOnce:
    """Give each warning once in its lifetime: ``warn(key, message)``."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def __call__(self, key: str, message: str) -> None:
        """Give a warning unless one of this key was given before."""
        if key not in self._given:
            self._given.add(key)
            warnings.warn(message, stacklevel=_level_outside())


def _level_outside() -> int:
    """Return how many calls above its caller the package was called."""
    level = 1
    while sys._getframe(level).f_globals.get("__name__", "").startswith("lightning_lyapunov."):
        level += 1
    return level
