"""Shared by the tests: tensors, small models, data, trainers, and access to the results of a run."""

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_lyapunov import LyapunovMonitor, lyapunov_spectrum
from lightning_lyapunov.functional import layer_growth
from lightning_lyapunov.kernel.propagation import Growth
from lightning_lyapunov.layers.base import Sequences
from lightning_lyapunov.layers.discovery import FoundLayer
from lightning_lyapunov.layers.registry import as_layer
from lightning_lyapunov.recording.reading import follow
from lightning_lyapunov.recording.recorder import Recorder

ROOT = Path(__file__).parents[1]
FEATURES = 3
INTERVALS = [1, 2, 3, 7, 16, "auto"]
# How far the growth rates of a random network may lie apart, computed in two ways: a frame may lean by e^8, so that the
# condition number of its Gram matrix is e^16, and eps of that is 2e-9; the rest is the condition of single steps.
ROUNDING = 1e-7


# Tensors, in float64


def tensor(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def full(shape: tuple[int, ...], value: float) -> Tensor:
    return torch.full(shape, value, dtype=torch.float64)


def descending(values: Tensor) -> Tensor:
    return values.sort(dim=-1, descending=True).values


def assert_near(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    """Assert that two tensors differ by no more than a tolerance in any number."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def assert_equal(actual: Any, expected: Any) -> None:
    """Assert that tensors, alone or in containers, are equal; NaN equals NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def members(state: Any, indices: Any) -> Any:
    """Return the state of some members of a batch, as the layer takes it. A single index removes the batch."""
    return tuple(part[:, indices] for part in state) if isinstance(state, tuple) else state[:, indices]


# Spectra


def precise(*arguments: Any, **options: Any) -> Tensor:
    """Return spectra that are computed in float64."""
    return lyapunov_spectrum(*arguments, dtype=torch.float64, **options)


def map_spectrum(step: Any, state: Tensor, steps: int, **options: Any) -> Tensor:
    """Return the spectra of a map without input."""
    return lyapunov_spectrum(step, torch.zeros(steps, len(state), 0), state, **options)


def linear_spectrum(matrix: Tensor, steps: int, **options: Any) -> Tensor:
    """Return the spectrum of a constant matrix."""
    state = torch.zeros(1, len(matrix)).double()
    return map_spectrum(lambda s, _: s @ matrix.T.to(s.dtype), state, steps, **options)[0]


def make_recorder(module: nn.Module, num_sequences: int = 16, max_steps: int = 100) -> Recorder:
    """Return a recorder of one layer, by the name ``"layer"``."""
    return Recorder({"layer": FoundLayer(module, module)}, num_sequences, max_steps)


def sequences_of(recorder: Recorder) -> dict[str, Sequences]:
    """Return the sequences of each recorded layer, after the checks."""
    limits = recorder._num_sequences, recorder._max_steps
    followed = {name: follow(recorder._layers[name].module, calls, *limits) for name, calls in recorder.take().items()}
    return {name: one.sequences for name, one in followed.items() if one is not None}


def growth_of(module: nn.Module, sequences: Sequences, num_exponents: int | None = None) -> list[Growth]:
    """Return the growth in each cell of a layer along recorded sequences, in float64 and without warm-up."""
    options = {"num_exponents": num_exponents, "warmup": 0, "qr_interval": "auto", "dtype": torch.float64}
    return [growth for _, growth in layer_growth(as_layer(module), sequences, **options)]


def leading_exponents(module: nn.Module, sequences: int, *, steps: int, warmup: int, segments: int = 1) -> Tensor:
    """Return two exponents of each segment of random sequences, ``(segments, sequences, 2)``, in float32."""
    layer = as_layer(module)
    options = {"num_exponents": 2, "qr_interval": "auto", "dtype": torch.float32, "segments": segments}
    ((_, growth),) = layer_growth(layer, layer.read(torch.randn(steps, sequences, 2)), warmup=warmup, **options)
    return growth.total / growth.steps.unsqueeze(-1)


class FailingGrowth:
    """Measures as the package does, but raises an error if ``fails`` is true of the number of the measurement."""

    def __init__(self, fails: Any = lambda number: True, error: type[BaseException] = torch.linalg.LinAlgError) -> None:
        self.fails, self.error, self.calls = fails, error, 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        number, self.calls = self.calls, self.calls + 1
        if self.fails(number):
            raise self.error(f"no convergence in measurement {number}")
        return layer_growth(*args, **options)


def failing_monitor(*failure: Any, **options: Any) -> LyapunovMonitor:
    """Return a monitor whose measurements fail: see :class:`FailingGrowth`."""
    monitor = LyapunovMonitor(**options)
    monitor.growth_of = FailingGrowth(*failure)
    return monitor


# Data


class Stream(IterableDataset):
    """A dataset that does not know its length."""

    def __init__(self, *tensors: Tensor) -> None:
        self.samples = list(zip(*tensors, strict=True))

    def __iter__(self) -> Any:
        return iter(self.samples)


def series(num_batches: int = 3, *, batch_size: int = 4, time: int = 12, dataset: type = TensorDataset, **options: Any):
    """Return a loader of positive input sequences and targets, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.rand(num_batches * batch_size, time, FEATURES, generator=generator)
    return DataLoader(dataset(inputs, inputs.cumsum(1).mean(-1, keepdim=True)), batch_size, **options)


def tokens(num_batches: int = 3, *, batch_size: int = 4, time: int = 12):
    """Return a loader of token sequences, ``(inputs, targets)`` of integers below 5."""
    inputs = torch.randint(5, (num_batches * batch_size, time), generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(inputs, inputs.roll(-1, 1)), batch_size)


# Models


@cache
def regressor(pl: Any) -> type:
    """Return the class ``Regressor`` for ``pl``, ``lightning.pytorch`` or ``pytorch_lightning``."""

    class Regressor(pl.LightningModule):
        def __init__(self, cell: str = "LSTM", hidden_size: int = 5, lr: float = 0.1, **options: Any) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.rnn = getattr(nn, cell)(FEATURES, hidden_size, batch_first=True, **options)
            self.head = nn.Linear(hidden_size * (1 + self.rnn.bidirectional), 1)
            self.lr = lr

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(self.rnn(inputs)[0])

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            inputs, targets = batch
            loss = (self(inputs) - targets).square().mean()  # `mse_loss` in bf16 came with torch 2.5
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), self.lr)

    # Spawned processes find it by this name.
    Regressor.__qualname__ = "Regressor"
    return Regressor


Regressor = regressor(lightning.pytorch)


class Still(Regressor):
    """Trains without changing its weights."""

    def on_after_backward(self) -> None:
        self.zero_grad()


class Dial(Regressor):
    """All exponents are ``rates[epoch]`` in each epoch: active rectifiers, a multiple of the identity."""

    def __init__(self, rates: list[float]) -> None:
        super().__init__("RNN", lr=0.0, nonlinearity="relu")
        self.rates = rates
        for parameter in self.rnn.parameters():
            nn.init.constant_(parameter, 0.1)

    def on_train_epoch_start(self) -> None:
        identity = torch.eye(self.rnn.hidden_size)
        self.rnn.weight_hh_l0.data = identity * torch.tensor(self.rates[self.current_epoch]).exp()


class Language(Regressor):
    """Tokens, an embedding and a recurrent layer."""

    def __init__(self, cell: str = "GRU", **options: Any) -> None:
        super().__init__(cell, **options)
        self.embedding = nn.Embedding(5, FEATURES)
        self.head = nn.Linear(self.rnn.hidden_size, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(self.embedding(inputs))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten())


class Packed(Regressor):
    """Calls its layer with packed sequences; what is beyond their ends is NaN."""

    lengths = torch.tensor([5, 12, 9, 7])

    def forward(self, inputs: Tensor) -> Tensor:
        beyond = torch.arange(inputs.shape[1]) >= self.lengths.unsqueeze(-1)
        inputs = inputs.masked_fill(beyond.unsqueeze(-1), torch.nan)
        packed = nn.utils.rnn.pack_padded_sequence(inputs, self.lengths, batch_first=True, enforce_sorted=False)
        outputs, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.head(outputs)


class Keyword(Regressor):
    """Calls its layer by keyword, with a state."""

    def forward(self, inputs: Tensor) -> Tensor:
        state = torch.full((1, len(inputs), self.rnn.hidden_size), 0.3)
        return self.head(self.rnn(input=inputs, hx=(state, -state))[0])


class Halves(Regressor):
    """Calls its layer on the two halves of the steps in turn, and passes the state on."""

    def forward(self, inputs: Tensor) -> Tensor:
        first, second = inputs.chunk(2, 1)
        outputs, state = self.rnn(first)
        return self.head(torch.cat((outputs, self.rnn(second, state)[0]), 1))


class Parts(Regressor):
    """Calls its layer on the two halves of the batch in turn."""

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat([super(Parts, self).forward(part) for part in inputs.chunk(2)])


class Loop(Regressor):
    """A cell, called step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTMCell(FEATURES, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs, state = [], None
        for step_inputs in inputs.unbind(1):
            state = self.rnn(step_inputs, state)
            outputs.append(state[0])
        return self.head(torch.stack(outputs, 1))


class TwoLayers(Regressor):
    """Two recurrent layers; the second is called in every second batch only."""

    def __init__(self) -> None:
        super().__init__()
        self.sometimes = nn.GRU(FEATURES, 4, batch_first=True)
        self.calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        extra = self.sometimes(inputs)[0].mean(-1, keepdim=True) if self.calls % 2 else 0
        return super().forward(inputs) + extra


class TwoOptimizers(Regressor):
    """Manual optimisation: two optimizers, so two optimizer steps in every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), self.lr) for part in (self.rnn, self.head)]


class TanhCell(nn.Module):
    """A custom cell, h' = tanh(W [x, h]). It counts the calls of all cells of its kind."""

    calls: ClassVar[list[int]] = []

    def __init__(self, hidden_size: int = 5) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES + hidden_size, hidden_size)

    def drive(self, inputs: Tensor, state: Tensor) -> Tensor:
        self.calls.append(1)
        return self.linear(torch.cat((inputs, state), -1))

    def forward(self, inputs: Tensor, state: Tensor) -> Any:
        return self.drive(inputs, state).tanh()


class Cube(torch.autograd.Function):
    """A function without a forward derivative and without a batching rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


def run_cell(cell: Any, inputs: Tensor, state: Tensor) -> Tensor:
    """Call a cell step by step along ``(batch, time, input)``; return its states, ``(batch, time, state)``."""
    states = []
    for step_inputs in inputs.unbind(1):
        state = cell(step_inputs, state)
        states.append(state)
    return torch.stack(states, 1)


class CellModel(Regressor):
    """A custom cell, called step by step from zeros."""

    def __init__(self, cell: nn.Module, **options: Any) -> None:
        super().__init__(**options)
        self.rnn = cell

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(run_cell(self.rnn, inputs, inputs.new_zeros(len(inputs), self.head.in_features)))


# Trainers


def make_trainer(*callbacks: Any, pl: Any = lightning.pytorch, **options: Any) -> Any:
    """Return a quiet trainer on the CPU, by default for two epochs."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    cheap = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, "max_epochs": 2}
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **cheap, **options})


def fit(model: Any, *callbacks: Any, data: Any = None, val: Any = None, ckpt_path: Any = None, **options: Any) -> Any:
    """Train a model on :func:`series` and return the trainer."""
    trainer = make_trainer(*callbacks, **options)
    trainer.fit(model, series() if data is None else data, val, ckpt_path=ckpt_path)
    return trainer


class At(Callback):
    """Do something in a hook."""

    def __init__(self, hook: str, action: Any) -> None:
        setattr(self, hook, lambda trainer, *_, **__: action(trainer))


class SilentLogger(Logger):
    """A minimal logger. It writes nothing and has no ``experiment``."""

    name, version = "silent", 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        pass

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


# The options of a schedule, and the steps that are measured in three epochs of four batches, counted from 0.
SCHEDULES = {
    "neither": ({}, [0, 3, 7, 11]),
    "every_epoch": ({"every_n_epochs": 1}, [0, 3, 7, 11]),
    "every_2_epochs": ({"every_n_epochs": 2}, [0, 7]),
    "every_9_epochs": ({"every_n_epochs": 9}, [0]),
    "every_step": ({"every_n_train_steps": 1}, list(range(12))),
    "every_3_steps": ({"every_n_train_steps": 3}, [0, 2, 5, 8, 11]),
    "every_5_steps": ({"every_n_train_steps": 5}, [0, 4, 9]),
    "both": ({"every_n_epochs": 1, "every_n_train_steps": 3}, [0, 2, 3, 5, 7, 8, 11]),
}


# Results of a run

_NUMBERS = ("max", "max_stderr", "log10_gradient_gain", "memory_steps", "sequence_length")


def keys_of(*cells: str) -> set[str]:
    """Return the keys that are logged of cells of these names."""
    overall = {"lyapunov/max", "lyapunov/max_stderr", "lyapunov/worst_layer"}
    overall |= {"lyapunov/smallest_max"} if len(cells) > 1 else set()
    return overall | {f"lyapunov/{cell}/{name}" for cell in cells for name in _NUMBERS}


def published(trainer: Any) -> dict[str, Tensor]:
    """Return the metrics of the package that callbacks see."""
    return {key: value for key, value in trainer.callback_metrics.items() if key.startswith("lyapunov/")}


def steps_of(monitor: LyapunovMonitor) -> list[int]:
    """Return the steps in the history of a monitor of one cell."""
    (measurements,) = monitor.history.values()
    return measurements["step"].tolist()


def hooks_of(model: nn.Module) -> list[Any]:
    """Return the hooks on a model's calls."""
    return [
        hook
        for module in model.modules()
        for name, hooks in vars(module).items()
        if name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        for hook in hooks.values()
    ]


class BeforeEachLine:
    """A trace for ``sys.settrace``: calls ``action`` with the number of each line of some functions, before it."""

    def __init__(self, functions: Iterable[Any], action: Callable[[int], Any]) -> None:
        self.action, self.lines, self.codes = action, 0, {function.__code__ for function in functions}

    def __call__(self, frame: Any, event: str, arg: Any) -> Any:
        if frame.f_code not in self.codes:
            return None
        if event == "line":
            self.lines += 1
            self.action(self.lines)
        return self


def messages(record: Any, text: str = "") -> list[str]:
    """Return the recorded warnings that hold a text."""
    return [message for message in (str(warning.message) for warning in record) if text in message]


def ours(record: Any) -> list[str]:
    """Return the recorded warnings of the package: those that name Lyapunov or hold a name in backticks."""
    return [message for message in messages(record) if "yapunov" in message or "`" in message]
