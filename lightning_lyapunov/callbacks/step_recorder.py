"""Record the calls of a trainer's own step alone."""

from typing import Any

from lightning_lyapunov.recording.recorder import Recorder

__all__ = ["StepRecorder"]

_STEPS = {None, "training_step", "validation_step", "test_step"}


class StepRecorder(Recorder):
    """A recorder of what layers are called with in a trainer's own step of a batch, and not in its hooks.

    With manual optimization these stand inside the step, and other callbacks may call the model there: that is no data.
    Lightning keeps the name of the hook that it calls in the module, for ``self.log``.

    Args:
        pl_module: the module that is trained.
        arguments: those of :class:`~lightning_lyapunov.recording.recorder.Recorder`.
    """

    def __init__(self, pl_module: Any, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._pl_module = pl_module

    def receive(self, name: str, record: str, *arguments: Any) -> None:
        if record == "skip" or getattr(self._pl_module, "_current_fx_name", None) in _STEPS:
            super().receive(name, record, *arguments)
