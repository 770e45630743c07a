"""Small models, data and trainers for the tests."""

from functools import cache
from typing import Any

import lightning.pytorch
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

FEATURES = 3


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
            loss = nn.functional.mse_loss(self(inputs), targets)
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
    """Calls its layer on one half of the steps after the other, carrying the state on."""

    def forward(self, inputs: Tensor) -> Tensor:
        first, second = inputs.chunk(2, 1)
        outputs, state = self.rnn(first)
        return self.head(torch.cat((outputs, self.rnn(second, state)[0]), 1))


class Parts(Regressor):
    """Calls its layer on one half of the batch after the other."""

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


def make_trainer(*callbacks: Any, pl: Any = lightning.pytorch, **options: Any) -> Any:
    """Return a quiet trainer on the CPU, for two epochs if nothing else is said."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    cheap = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, "max_epochs": 2}
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **cheap, **options})


def fit(model: Any, *callbacks: Any, data: Any = None, val: Any = None, ckpt_path: Any = None, **options: Any) -> Any:
    """Train a model on :func:`series` and return the trainer."""
    trainer = make_trainer(*callbacks, **options)
    trainer.fit(model, series() if data is None else data, val, ckpt_path=ckpt_path)
    return trainer
