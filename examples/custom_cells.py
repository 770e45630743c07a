"""Watch cells of your own: five that PyTorch does not have, and one layer that needs to be taught.

    python examples/custom_cells.py

Each learns to recall the first input of a sequence at its end, under `LyapunovMonitor(modules="cell")`. The monitor
needs no more than a call `(input, state) -> state`: its derivative comes from `torch.func`. A layer that takes whole
sequences is taught with `register_layer`.
"""

import argparse
import logging
import warnings

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from lightning_lyapunov import LyapunovMonitor, register_layer

STEPS, INPUTS, UNITS = 40, 2, 24


class LeakyTanhCell(nn.Module):
    """h' = (1 - a) h + a tanh(W h + U x)."""

    def __init__(self, leak: float = 0.2) -> None:
        super().__init__()
        self.leak, self.linear = leak, nn.Linear(INPUTS + UNITS, UNITS)

    def forward(self, inputs: Tensor, state: Tensor) -> Tensor:
        return torch.lerp(state, self.linear(torch.cat((inputs, state), -1)).tanh(), self.leak)


class UnitaryCell(nn.Module):
    """h' = U h + V x with a unitary U and a complex state: it neither forgets nor explodes, every exponent is 0."""

    def __init__(self) -> None:
        super().__init__()
        recurrent = nn.Linear(UNITS // 2, UNITS // 2, bias=False, dtype=torch.complex64)
        self.recurrent = nn.utils.parametrizations.orthogonal(recurrent, orthogonal_map="cayley")
        self.drive = nn.Linear(INPUTS, UNITS // 2, bias=False, dtype=torch.complex64)

    def forward(self, inputs: Tensor, state: Tensor) -> Tensor:
        return self.recurrent(state) + self.drive(inputs.to(state.dtype))


class MinimalGatedCell(nn.Module):
    """f = sigmoid(W_f [x, h]), h' = (1 - f) h + f tanh(W [x, f h])."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.candidate = nn.Linear(INPUTS + UNITS, UNITS), nn.Linear(INPUTS + UNITS, UNITS)

    def forward(self, inputs: Tensor, state: Tensor) -> Tensor:
        gate = self.gate(torch.cat((inputs, state), -1)).sigmoid()
        return torch.lerp(state, self.candidate(torch.cat((inputs, gate * state), -1)).tanh(), gate)


class ClosedFormContinuousTimeCell(nn.Module):
    """h' = s g + (1 - s) k, s = sigmoid(-f t), where f, g, k are heads of one layer on [x, h] (Hasani et al., 2022)."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.heads = nn.Linear(INPUTS + UNITS, 32), nn.Linear(32, 3 * UNITS)

    def forward(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        f, g, k = self.heads(self.backbone(torch.cat((inputs, state), -1)).tanh()).chunk(3, -1)
        state = torch.lerp(k.tanh(), g.tanh(), (-f).sigmoid())
        return state, state  # an output, and the state


class SelectiveStateSpace(nn.Module):
    """h' = exp(-d(x) a) h + d(x) B x, called with whole sequences, `(batch, time, input)`.

    The state enters linearly and each unit by itself, so the exponents are known: the means of -d(x) a.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(torch.linspace(-3, 0, UNITS))
        self.step_size, self.drive = nn.Linear(INPUTS, 1), nn.Linear(INPUTS, UNITS, bias=False)

    def step(self, inputs: Tensor, state: Tensor) -> Tensor:
        size = F.softplus(self.step_size(inputs))
        return torch.exp(-size * self.log_rate.exp()) * state + size * self.drive(inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        states = [inputs.new_zeros(len(inputs), UNITS)]
        for step_inputs in inputs.unbind(1):
            states.append(self.step(step_inputs, states[-1]))
        return torch.stack(states[1:], 1)


register_layer(
    SelectiveStateSpace,
    step=lambda layer, inputs, state: layer.step(inputs, state),
    read_call=lambda layer, inputs: (inputs.transpose(0, 1), inputs.new_zeros(len(inputs), UNITS)),
)


class Recall(L.LightningModule):
    """Says at the end of a sequence what its first input was."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(UNITS, INPUTS)

    def last_state(self, inputs: Tensor) -> Tensor:
        if isinstance(self.cell, SelectiveStateSpace):
            return self.cell(inputs)[:, -1]
        is_complex = isinstance(self.cell, UnitaryCell)
        state = torch.zeros(len(inputs), UNITS // 2 if is_complex else UNITS)
        state = state.to(torch.complex64) if is_complex else state
        for step_inputs in inputs.unbind(1):
            returned = self.cell(step_inputs, state)
            state = returned[1] if isinstance(returned, tuple) else returned
        return torch.view_as_real(state).flatten(1) if is_complex else state

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (inputs,) = batch
        return F.mse_loss(self.head(self.last_state(inputs)), inputs[:, 0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 3e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    epochs = parser.parse_args().epochs
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    rows = []
    classes = [LeakyTanhCell, UnitaryCell, MinimalGatedCell, ClosedFormContinuousTimeCell, SelectiveStateSpace]
    for cell_class in tqdm(classes, desc="cells"):
        L.seed_everything(0, verbose=False)
        data = torch.randn(1024, STEPS, INPUTS)
        monitor = LyapunovMonitor("cell", num_exponents=None, warmup=10)
        trainer = L.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            callbacks=[monitor],
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.fit(Recall(cell_class()), DataLoader(TensorDataset(data), batch_size=32, shuffle=True))
        before, after = monitor.history["cell"]["spectrum"][[0, -1]]
        rows.append((cell_class.__name__, before, after))
    print(f"\n{'cell':30} {'largest: before':>16} {'after':>8} {'smallest: before':>18} {'after':>8}  (nats per step)")
    for name, before, after in rows:
        print(f"{name:30} {before[0]:+16.4f} {after[0]:+8.4f} {before[-1]:+18.4f} {after[-1]:+8.4f}")


if __name__ == "__main__":
    main()
