"""The one place in which the errors of a callback's hooks end."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["guarded"]

_Hook = TypeVar("_Hook", bound=Callable[..., Any])


def guarded(*, passes: tuple[type[Exception], ...] = (), default: Any = None) -> Callable[[_Hook], _Hook]:
    """Let no error of a hook reach the trainer.

    An ``Exception`` in the hook is given to the callback's ``_give_up(name, error)``, which cleans up and warns once;
    the hook then returns ``default`` and the run goes on. Three kinds pass: every error if the callback's ``strict`` is
    true; warnings that the user's filters turn into errors; and what is no ``Exception``, such as KeyboardInterrupt,
    SystemExit and Lightning's SIGTERMException.

    Args:
        passes: errors that the hook is documented to raise.
        default: what the hook returns instead.
    """

    def guard(hook: _Hook) -> _Hook:
        @functools.wraps(hook)
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return hook(self, *args, **kwargs)
            except Exception as error:
                if self.strict or isinstance(error, (Warning, *passes)):
                    raise
                self._give_up(hook.__name__, error)
            return default

        return run  # type: ignore[return-value]

    return guard
