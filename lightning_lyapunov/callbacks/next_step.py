"""Do something around the next step of a strategy, and only around it."""

from collections.abc import Callable
from typing import Any

__all__ = ["NextStep"]


class NextStep:
    """Calls ``enter`` before the next call of a strategy's step, and ``leave`` after it, whatever happens in it.

    Lightning's hooks stand around a whole batch, with the hooks of all callbacks and of the module in between, and
    after an error they are not sure to come: a callback that fails in its own ``on_exception`` ends them all. A step is
    a single call of ``training_step``, ``validation_step`` or ``test_step`` of the strategy. This object takes its
    place, as an attribute of the instance, until it is called once or withdrawn. Several may stand before one another.

    Args:
        strategy: the trainer's strategy.
        name: the name of the step.
        enter: called before it.
        leave: called after it, also after an error.
    """

    def __init__(self, strategy: Any, name: str, enter: Callable[[], None], leave: Callable[[], None]) -> None:
        self._strategy, self._name, self._enter, self._leave = strategy, name, enter, leave
        self._replaced = vars(strategy).get(name)
        self._step = getattr(strategy, name)
        self._is_withdrawn = False
        setattr(strategy, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_withdrawn:
            return self._step(*args, **kwargs)
        self.withdraw()
        try:
            self._enter()
            return self._step(*args, **kwargs)
        finally:
            self._leave()

    def withdraw(self) -> None:
        """Give the strategy its own step back; where something else stands before this object, pass calls on."""
        self._is_withdrawn = True
        attributes = vars(self._strategy)
        while isinstance(top := attributes.get(self._name), NextStep) and top._is_withdrawn:
            if top._replaced is None:
                del attributes[self._name]
            else:
                attributes[self._name] = top._replaced
