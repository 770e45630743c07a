"""A run with the monitor beside the same run without it: one account of each, to be compared bit by bit."""

import gc
import random
import signal
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from helpers import Regressor, SilentLogger, hooks_of, make_trainer, series
from lightning.pytorch import Callback

from lightning_lyapunov import LyapunovMonitor

__all__ = ["Account", "Setting", "bits", "compare", "random_states", "run", "seed", "users"]


@dataclass(frozen=True)
class Setting:
    """A training run. Everything is made anew for each of the two runs.

    Attributes:
        model: makes the model.
        trainer: options of the trainer, or a function of the folder of the run that makes them.
        callbacks: makes the callbacks, from the folder of the run and the monitor (None in the run without it).
        data: makes the training data.
        val: makes the validation data.
        monitor: options of the monitor.
        pictures: whether the loggers are given pictures of the spectrum.
        first: whether the monitor is the first of the callbacks, or the last.
        play: runs the trainer, ``play(trainer, model, data, val)``; by default it fits.
        raises: the error that both runs end with.
        says: a part of the one warning that the monitor gives; None for no warning.
        measures: whether the history holds numbers: True, False, or None for either.
    """

    model: Callable[[], Any] = Regressor
    trainer: Any = field(default_factory=dict)
    callbacks: Callable[[Any, Any], list[Any]] = lambda folder, monitor: []
    data: Callable[[], Any] = series
    val: Callable[[], Any] = lambda: series(1)
    monitor: dict[str, Any] = field(default_factory=dict)
    pictures: bool = False
    first: bool = False
    play: Callable[..., Any] = lambda trainer, model, data, val: trainer.fit(model, data, val)
    raises: type[BaseException] | None = None
    says: str | None = None
    measures: bool | None = True


@dataclass
class Account:
    """What a run did: ``seen`` must be the same with and without the monitor."""

    seen: list[tuple[str, Any]] = field(default_factory=list)
    monitor: Any = None
    said: list[str] = field(default_factory=list)


def bits(value: Any) -> Any:
    """Return an object that is equal for two values only if they are bitwise equal, NaN included."""
    if isinstance(value, torch.Tensor):
        if value.is_quantized:
            return "quantized", bits(value.detach().int_repr())
        content = value.detach().cpu().to_dense().flatten().contiguous().view(torch.uint8).numpy().tobytes()
        return str(value.dtype), str(value.device), tuple(value.shape), value.requires_grad, content
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return [(str(key), bits(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [bits(item) for item in value]
    return repr(value)


def random_states() -> dict[str, Any]:
    """Return the random states of Python, numpy and torch."""
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}


def seed() -> None:
    """Seed Python, numpy and torch, each with another number."""
    random.seed(3)
    np.random.seed(4)
    torch.manual_seed(5)


def users(metrics: Any) -> dict[str, Any]:
    """Return the metrics that are not the package's."""
    return {key: value for key, value in metrics.items() if not key.startswith("lyapunov/")}


def state_of(trainer: Any, module: Any) -> dict[str, Any]:
    """Return what a callback could have changed in a run."""
    return {
        "weights": module.state_dict(),
        "gradients": [parameter.grad for parameter in module.parameters()],
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "random": random_states(),
        "modes": {name: part.training for name, part in module.named_modules()},
        "metrics": [users(trainer.callback_metrics), users(trainer.logged_metrics)],
        "switches": [
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_anomaly_enabled(),
            torch.get_num_threads(),
        ],
        "steps": [trainer.global_step, trainer.current_epoch, trainer.should_stop],
    }


class Notebook(SilentLogger):
    """A logger that keeps what it receives of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[Any] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if users(metrics):
            self.lines.append((step, users(metrics)))


class Witness(Callback):
    """Record what the monitor could have changed, and which of the tensors of a batch outlive it."""

    def __init__(self, account: Account) -> None:
        self.account, self.tensors = account, []
        self.handles: list[Any] = []

    def note(self, place: str, **seen: Any) -> None:
        self.account.seen += [(f"{place}: {name}", bits(value)) for name, value in seen.items()]

    def look(self, place: str, trainer: Any, module: Any) -> None:
        self.note(place, **state_of(trainer, module))

    def outlived(self, place: str) -> None:
        if any(tensor() is not None for tensor in self.tensors):
            gc.collect()
        self.note(place, outlived=[tensor() is not None for tensor in self.tensors])
        self.tensors = []

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        def keep(part: Any, args: Any, output: Any) -> None:
            self.watch((args, output))

        # Not on the layer: it may be copied or scripted. What comes here is a view of what the layer returned.
        self.handles = [module.head.register_forward_hook(keep)]

    def watch(self, values: Any) -> None:
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]
        self.tensors += [weakref.ref(tensor) for tensor in tensors]

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.outlived("next batch")
        self.watch(batch)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.look("batch end", trainer, module)
        self.note("batch end", outputs=outputs, batch=batch)
        self.watch((outputs, batch))

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.look("epoch end", trainer, module)

    def finish(self) -> None:
        for handle in self.handles:
            handle.remove()


def run(setting: Setting, folder: Any, *, monitored: bool) -> Account:
    """Train a setting, and return the account of the run."""
    seed()
    account, notebook, model = Account(), Notebook(), setting.model()
    account.monitor = (
        LyapunovMonitor(**{"every_n_train_steps": 1, "log_spectrum": setting.pictures, **setting.monitor})
        if monitored
        else None
    )
    witness, hooks = Witness(account), len(hooks_of(model))
    guests, others = [account.monitor] if monitored else [], setting.callbacks(folder, account.monitor)
    callbacks = [*guests, *others, witness] if setting.first else [*others, witness, *guests]
    options = setting.trainer(folder) if callable(setting.trainer) else setting.trainer
    seed()
    trainer = make_trainer(*callbacks, **{"logger": notebook, "log_every_n_steps": 1, **options})
    strategy, raised = set(vars(trainer.strategy)), None
    handler = signal.getsignal(signal.SIGINT)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        try:
            setting.play(trainer, model, setting.data(), setting.val())
        except BaseException as error:
            if setting.raises is None or not isinstance(error, setting.raises):
                raise
            raised = f"{type(error).__name__}: {error}"
            error.__traceback__ = error.__context__ = None
        finally:
            signal.signal(signal.SIGINT, handler)
            torch.use_deterministic_algorithms(False)
    witness.finish()
    witness.look("end", trainer, model)
    account.said = [str(warning.message) for warning in given]
    left = [key for part in model.modules() for key in ("__prepare_scriptable__",) if key in vars(part)]
    new = [key for key in set(vars(trainer.strategy)) - strategy if key.endswith("_step")]
    account.seen += [
        ("raised", raised),
        ("logs", bits(notebook.lines)),
        ("hooks", len(hooks_of(model)) - hooks),
        ("attributes", left + new),
    ]
    return account


def spoken(without: Account, account: Account) -> list[str]:
    """Return the warnings that the run with the monitor gives, and the one without it does not."""
    others = ("torch", "callbacks used to create", "There is a performance drop")
    new = [m for m in account.said if m not in without.said]
    return [m for m in new if "yapunov" in m or not any(part in m for part in others)]


def compare(setting: Setting, folder: Any) -> Account:
    """Run a setting without and with the monitor, and assert what is promised; return the account of the second."""
    without = run(setting, folder / "without", monitored=False)
    account = run(setting, folder / "with", monitored=True)
    assert len(without.seen) > 5
    first = next(((a[0], b[0]) for a, b in zip(without.seen, account.seen, strict=False) if a != b), None)
    assert first is None
    assert without.seen == account.seen
    said = spoken(without, account)
    assert len(said) == (setting.says is not None), said
    assert all(setting.says in message for message in said)
    spectra = [m["spectrum"] for m in account.monitor.history.values()]
    if setting.measures is not None:
        assert any(bool(spectrum.isfinite().any()) for spectrum in spectra) == setting.measures
    return account
