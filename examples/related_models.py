"""Neighbours of the usual networks under the monitor: five models from the literature, and what their exponents say.

    python examples/related_models.py    # half a minute on one core

Each forecasts the next value of a sum of waves, and `LyapunovMonitor` measures it while it learns:

- a unitary network with learned phases, h' = modReLU(W h + V x) with W = (1 + A)^-1 (1 - A) D, A skew-Hermitian and D =
  diag(e^(i theta)) (scuRNN: Maduranga, Helfrich & Ye, 2019). Its linear part has exponents of 0. modReLU changes sizes
  by a bias b and keeps phases, so that a small change of the phase is multiplied by (|z| + b) / |z|: with b > 0 the
  largest exponents are above 0, with b < 0 below; what is smaller than -b is wiped out.
- its real orthogonal sibling (scoRNN: Helfrich, Willmott & Ye, 2018). A real modReLU has the slope 1 or 0: all
  exponents are 0 as long as no unit is shut, and none is above 0.
- a network from a bilevel problem, h' = h - step * gradient of an inner objective (SBO-RNN: Zhang et al., 2021). For an
  objective whose curvature is between m and M, exponents lie between ln(1 - step * M) and ln(1 - step * m).
- a network whose read-out sees all hidden states (NeuroView-RNN: Barberan et al., 2022). The read-out is no part of the
  recurrence: an exponent far below 0 is no loss, because no gradient must flow back through time.
- stateful training: each batch goes on from the states that the last one ended in. The exponents are those from the
  handed-on state on, as if all batches were one sequence: without the transient of a start at zero.
"""

import argparse
import copy
import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lyapunov import LyapunovMonitor, lyapunov_spectrum

UNITS, WINDOW, SERIES = 24, 40, 16


def waves(num_windows: int) -> Tensor:
    """Return the windows of long series one after the other, `(windows * series, time + 1, 1)`."""
    frequencies, phases = torch.rand(2, SERIES, 1, 3)
    time = torch.arange(num_windows * WINDOW + 1).view(1, -1, 1)
    values = torch.sin(time * (0.05 + 0.3 * frequencies) + 6.28 * phases).mean(-1) + 0.5
    return values.unfold(1, WINDOW + 1, WINDOW).transpose(0, 1).flatten(0, 1).unsqueeze(-1)


# The cells


def mod_relu(values: Tensor, bias: Tensor) -> Tensor:
    """Return values of the same sign or phase, whose sizes are larger by a bias, and zero where that is below zero."""
    sizes = values.abs()
    return values / (sizes + 1e-12) * F.relu(sizes + bias)


class UnitaryCell(nn.Module):
    """W is unitary, the state complex; `bias` is where that of modReLU starts, None leaves modReLU out."""

    def __init__(self, bias: float | None = 0.0) -> None:
        super().__init__()
        self.size = UNITS // 2
        self.real, self.imaginary = (nn.Parameter(0.3 * torch.randn(self.size, self.size)) for _ in range(2))
        self.phases = nn.Parameter(6.28 * torch.rand(self.size))
        self.drive = nn.Linear(1, 2 * self.size)
        self.bias = None if bias is None else nn.Parameter(torch.full((self.size,), bias))

    def weight(self) -> Tensor:
        skew = torch.complex(self.real - self.real.T, self.imaginary + self.imaginary.T)
        identity = torch.eye(self.size, dtype=skew.dtype)
        return torch.linalg.solve(identity + skew, identity - skew) * torch.polar(
            torch.ones_like(self.phases), self.phases
        )

    def forward(self, inputs: Tensor, state: Tensor) -> Tensor:
        driven = torch.complex(*self.drive(inputs).chunk(2, -1)) + state @ self.weight().T
        return driven if self.bias is None else mod_relu(driven, self.bias)

    def first_state(self, batch: int) -> Tensor:
        return torch.zeros(batch, self.size, dtype=torch.complex64)


class OrthogonalCell(nn.Module):
    """W is orthogonal, the state real; half of the signs in D are negative."""

    def __init__(self, bias: float = 0.0) -> None:
        super().__init__()
        self.skew, self.drive = nn.Parameter(0.3 * torch.randn(UNITS, UNITS)), nn.Linear(1, UNITS)
        self.bias = nn.Parameter(torch.full((UNITS,), bias))
        self.register_buffer("signs", torch.tensor([1.0, -1.0]).repeat(UNITS // 2))

    def forward(self, inputs: Tensor, state: Tensor) -> Tensor:
        skew, identity = self.skew - self.skew.T, torch.eye(UNITS, dtype=self.skew.dtype)
        weight = torch.linalg.solve(identity + skew, identity - skew) * self.signs
        return mod_relu(self.drive(inputs) + state @ weight.T, self.bias)

    def first_state(self, batch: int) -> Tensor:
        return torch.zeros(batch, UNITS)


class BilevelCell(nn.Module):
    """One step of gradient descent on `decay |h|^2 / 2 + sum log cosh(W h + V x)`, whose curvature is known."""

    def __init__(self, step: float = 0.2, decay: float = 0.05) -> None:
        super().__init__()
        self.step, self.decay = step, decay
        self.recurrent, self.drive = nn.Linear(UNITS, UNITS, bias=False), nn.Linear(1, UNITS)

    def forward(self, inputs: Tensor, state: Tensor) -> Tensor:
        slope = torch.tanh(self.recurrent(state) + self.drive(inputs))
        return state - self.step * (self.decay * state + slope @ self.recurrent.weight)

    def first_state(self, batch: int) -> Tensor:
        return torch.zeros(batch, UNITS)

    def bounds(self) -> tuple[float, float]:
        """Return the exponents of the most and of the least curved direction."""
        most = self.decay + float(torch.linalg.matrix_norm(self.recurrent.weight.detach(), 2)) ** 2
        return math.log(1 - self.step * most), math.log(1 - self.step * self.decay)


# The models


class Forecaster(L.LightningModule):
    """Forecasts each next value with a cell of one's own, in a loop."""

    learning_rate = 3e-3

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(UNITS, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        state, outputs = self.cell.first_state(len(inputs)), []
        for step_inputs in inputs.unbind(1):
            state = self.cell(step_inputs, state)
            real = torch.view_as_real(state).flatten(1) if state.is_complex() else state
            outputs.append(self.head(real))
        return torch.stack(outputs, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (windows,) = batch
        loss = F.mse_loss(self(windows[:, :-1]), windows[:, 1:])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.learning_rate)


class NeuroView(Forecaster):
    """Forecasts the value after the window from the hidden states of all of its steps at once."""

    def __init__(self) -> None:
        super().__init__(nn.GRU(1, UNITS, batch_first=True))
        self.head = nn.Linear(WINDOW * UNITS, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (windows,) = batch
        states, _ = self.cell(windows[:, :-1])
        loss = F.mse_loss(self.head(states.flatten(1)), windows[:, -1])
        self.log("loss", loss)
        return loss


class Stateful(Forecaster):
    """Each batch goes on with the series of the last one, in two calls of half a window.

    Args:
        hand_on: whether the state is handed on to the next batch; zero otherwise.
    """

    learning_rate = 1e-4  # a state that is handed on is one of the weights before the step

    def __init__(self, hand_on: bool) -> None:
        super().__init__(nn.GRU(1, UNITS, batch_first=True))
        with torch.no_grad():
            # So strong that zero is unstable: from there the state takes a while to its usual size.
            nn.init.orthogonal_(self.cell.weight_hh_l0[2 * UNITS :], gain=4.0)
        self.hand_on, self.state = hand_on, torch.zeros(1, SERIES, UNITS)
        self.starts: list[Tensor] = []
        self.layers: list[nn.GRU] = []

    def forward(self, inputs: Tensor) -> Tensor:
        state, outputs = self.state, []
        self.starts.append(state)
        for half in inputs.chunk(2, 1):
            states, state = self.cell(half, state)
            outputs.append(self.head(states))
        if self.hand_on:
            self.state = state.detach()
        return torch.cat(outputs, 1)

    def on_train_batch_end(self, *_: object) -> None:
        self.layers.append(copy.deepcopy(self.cell))

    def from_start(self, batch: int, windows: Tensor) -> Tensor:
        """Return the spectrum of a batch from the state that it started from, without the monitor."""
        inputs = windows[batch * SERIES : (batch + 1) * SERIES, :-1]
        return lyapunov_spectrum(self.layers[batch], inputs, self.starts[batch]).mean(0)

    def of_one_sequence(self, batch: int, windows: Tensor) -> Tensor:
        """Return the spectrum of a batch as the end of one sequence of all batches up to it."""
        inputs = windows[: (batch + 1) * SERIES, :-1].unflatten(0, (-1, SERIES)).transpose(0, 1).flatten(1, 2)
        return lyapunov_spectrum(self.layers[batch], inputs, warmup=batch * WINDOW).mean(0)


# What is run


@dataclass(frozen=True)
class Result:
    """The spectra that the monitor measured at the first batch and at the end, and the last loss."""

    model: Forecaster
    spectra: Tensor
    stderr: Tensor
    loss: float

    def row(self, name: str, remark: str = "") -> str:
        first, last = self.spectra[[0, -1]]
        return f"{name:34} {first[0]:+8.4f} {last[0]:+8.4f} {last[-1]:+9.4f} {self.loss:9.4f}  {remark}"


def train(model: Forecaster, windows: Tensor, **options: object) -> Result:
    """Train a model on windows in their order; `options` are those of the monitor."""
    monitor = LyapunovMonitor("cell", **{"num_exponents": None, "warmup": 10, **options})
    trainer = L.Trainer(
        max_epochs=1,
        callbacks=[monitor],
        gradient_clip_val=1.0,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(windows), SERIES))
    history = monitor.history["cell"]
    return Result(model, history["spectrum"], history["stderr"], float(trainer.callback_metrics["loss"]))


def run(make: Callable[[], Forecaster], *, batches: int = 40, **options: object) -> tuple[Result, Tensor]:
    """Return the run of a new model, and the windows that it saw; the same windows at every call."""
    L.seed_everything(0, verbose=False)
    windows = waves(batches)
    return train(make(), windows, **options), windows


def stateful(hand_on: bool) -> tuple[Result, dict[str, Tensor]]:
    """Return a run, and the spectrum of its second batch: by the monitor, without it, and as a part of one sequence."""
    result, windows = run(lambda: Stateful(hand_on), batches=20, warmup=0, every_n_train_steps=1)
    spectra = {
        "monitor": result.spectra[1],
        "without it": result.model.from_start(1, windows),
        "in one sequence": result.model.of_one_sequence(1, windows),
    }
    return result, spectra


CELLS = {
    "unitary, linear": lambda: UnitaryCell(None),
    "unitary, modReLU, bias 0": UnitaryCell,
    "unitary, modReLU, bias +0.1": lambda: UnitaryCell(0.1),
    "unitary, modReLU, bias -0.02": lambda: UnitaryCell(-0.02),
    "orthogonal, modReLU, bias +0.1": lambda: OrthogonalCell(0.1),
    "bilevel": BilevelCell,
}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    print(f"{'exponents, nats per step':34} {'λ1 first':>8} {'last':>8} {'smallest':>9} {'loss':>9}")
    for name, make_cell in CELLS.items():
        result, _ = run(lambda make_cell=make_cell: Forecaster(make_cell()))
        cell = result.model.cell
        bounds = "bounds: {1:+.4f} to {0:+.4f}".format(*cell.bounds()) if isinstance(cell, BilevelCell) else ""
        print(result.row(name, bounds))
    print(run(NeuroView)[0].row("all states are read (GRU)"))
    for name, hand_on in {"stateful (GRU)": True, "the same, from zero each time": False}.items():
        result, second = stateful(hand_on)
        values = ", ".join(f"{where} {spectrum.mean():+.4f}" for where, spectrum in second.items())
        print(result.row(name, f"mean in the second batch: {values}"))


if __name__ == "__main__":
    main()
