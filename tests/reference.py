"""The reference implementation: slow, and independent of the package.

Jacobians are those of torch's own forward, by autograd. The frame is re-orthonormalised at every step, or, in arbitrary
precision, only at the end. Nothing of the package is used except the initial frame.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from mpmath import mp
from torch import Tensor, nn

from lightning_lyapunov.kernel.propagation import generic_frame

CELLS = {
    "rnn-tanh": nn.RNN,
    "rnn-relu": partial(nn.RNN, nonlinearity="relu"),
    "gru": nn.GRU,
    "lstm": nn.LSTM,
    "lstm-proj": partial(nn.LSTM, proj_size=2),
}

# Digits to compute with: a product of ten steps may spread over 200 decades, and differences take half of the digits.
DIGITS = 500


def make(cell: str, hidden: int = 4, gain: float = 1.5, **options) -> nn.RNNBase:
    """Return a float64 module of 3 inputs, whose recurrent weights are ``gain / sqrt(hidden)`` in size."""
    module = CELLS[cell](3, hidden, **options).double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = gain / hidden**0.5 if name.startswith("weight_hh") else 0.5
            parameter.copy_(scale * torch.randn_like(parameter))
    return module


def initial_state(module: nn.RNNBase, batch: int) -> Tensor | tuple[Tensor, Tensor]:
    """Return a random state as the module takes it."""
    cells = module.num_layers * (1 + module.bidirectional)
    output = torch.randn(cells, batch, module.proj_size or module.hidden_size, dtype=torch.float64)
    if module.mode != "LSTM":
        return output
    return output, torch.randn(cells, batch, module.hidden_size, dtype=torch.float64)


def flatten(state: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Return a state ``(cells, size)`` or ``((cells, size), (cells, size))`` as one vector, cell after cell."""
    return torch.cat(state if isinstance(state, tuple) else (state,), -1).flatten()


def unflatten(module: nn.RNNBase, state: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    parts = state.reshape(module.num_layers, -1)
    if module.mode != "LSTM":
        return parts
    output = module.proj_size or module.hidden_size
    return parts[:, :output].contiguous(), parts[:, output:].contiguous()


def member(state: Tensor | tuple[Tensor, Tensor], i: int) -> Tensor:
    """Return the flat state of one member of a batch."""
    return flatten(tuple(part[:, i] for part in state) if isinstance(state, tuple) else state[:, i])


def jacobians(module: nn.RNNBase, inputs: Tensor, state: Tensor) -> Tensor:
    """Return the Jacobians ``(time, state, state)`` of torch's forward along one sequence, from a flat state."""

    def step(before: Tensor, x: Tensor) -> Tensor:
        return flatten(module(x, unflatten(module, before))[1])

    matrices = []
    for x in inputs.unsqueeze(1):
        matrices.append(torch.autograd.functional.jacobian(partial(step, x=x), state))
        state = step(state, x).detach()
    return torch.stack(matrices)


def growth_rates(matrices: Tensor, num_exponents: int | None = None) -> Tensor:
    """Return ``log|R_jj|`` of every step, ``(time, num_exponents)``, with a QR decomposition at each."""
    size = matrices.shape[-1]
    frame, rates = generic_frame(size, num_exponents or size), []
    for matrix in matrices:
        frame, factor = torch.linalg.qr(matrix @ frame)
        rates.append(factor.diagonal().abs().log())
    return torch.stack(rates)


def spectrum(matrices: Tensor, num_exponents: int | None = None, warmup: int = 0) -> Tensor:
    """Return the Lyapunov exponents of one sequence of Jacobians, largest first."""
    return growth_rates(matrices, num_exponents)[warmup:].mean(0).sort(descending=True).values


def spectra(matrices: Tensor, **options) -> Tensor:
    """Return the Lyapunov exponents of Jacobians ``(time, batch, state, state)``, for each member of the batch."""
    return torch.stack([spectrum(one, **options) for one in matrices.unbind(1)])


def mean_log_determinant(matrices: Tensor) -> Tensor:
    """Return the sum of all exponents of Jacobians ``(time, batch, state, state)``."""
    return matrices.slogdet().logabsdet.mean(0)


def module_spectrum(module: nn.RNNBase, inputs: Tensor, state: Tensor | tuple[Tensor, Tensor], **options) -> Tensor:
    """Return the spectra of a one-layer module along ``inputs`` of shape ``(time, batch, input)``."""
    members = range(inputs.shape[1])
    return torch.stack([spectrum(jacobians(module, inputs[:, i], member(state, i)), **options) for i in members])


# In arbitrary precision: arrays of mpmath's numbers.

Step = Callable[[np.ndarray, np.ndarray], np.ndarray]


def exact(tensor: Tensor) -> np.ndarray:
    """Return the numbers of a tensor, without rounding."""
    return np.vectorize(mp.mpf, otypes=[object])(tensor.detach().double().numpy())


_tanh = np.vectorize(lambda x: mp.tanh(x), otypes=[object])
_sigmoid = np.vectorize(lambda x: 1 / (1 + mp.exp(-x)), otypes=[object])


def exact_step(module: nn.RNNBase) -> Step:
    """Return the equations of a one-layer tanh RNN, GRU or LSTM as torch's documentation prints them."""
    weight = {name.removesuffix("_l0"): exact(parameter) for name, parameter in module.named_parameters()}

    def linear(kind: str, values: np.ndarray) -> np.ndarray:
        return weight[f"weight_{kind}"] @ values + weight.get(f"bias_{kind}", 0)

    def rnn(h: np.ndarray, x: np.ndarray) -> np.ndarray:
        return _tanh(linear("ih", x) + linear("hh", h))

    def gru(h: np.ndarray, x: np.ndarray) -> np.ndarray:
        (r_x, z_x, n_x), (r_h, z_h, n_h) = np.split(linear("ih", x), 3), np.split(linear("hh", h), 3)
        r, z = _sigmoid(r_x + r_h), _sigmoid(z_x + z_h)
        return (1 - z) * _tanh(n_x + r * n_h) + z * h

    def lstm(state: np.ndarray, x: np.ndarray) -> np.ndarray:
        h, c = np.split(state, 2)
        i, f, g, o = np.split(linear("ih", x) + linear("hh", h), 4)
        c = _sigmoid(f) * c + _sigmoid(i) * _tanh(g)
        return np.concatenate([_sigmoid(o) * _tanh(c), c])

    return {"RNN_TANH": rnn, "GRU": gru, "LSTM": lstm}[module.mode]


def exact_jacobian(step: Step, state: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return the Jacobian of a step by central differences so small that they are exact to a third of the digits."""
    nudge = mp.mpf(10) ** (-DIGITS // 3)
    columns = []
    for j in range(len(state)):
        shift = np.array([nudge * (i == j) for i in range(len(state))], dtype=object)
        columns.append((step(state + shift, x) - step(state - shift, x)) / (2 * nudge))
    return np.stack(columns, -1)


def exact_spectrum(step: Step, inputs: Tensor, state: Tensor, num_exponents: int | None = None) -> Tensor:
    """Return the exponents along one sequence from the explicit product, orthonormalised once, in 500 digits."""
    with mp.workdps(DIGITS):
        at, vectors = exact(state), exact(generic_frame(len(state), num_exponents or len(state)))
        for x in exact(inputs):
            vectors, at = exact_jacobian(step, at, x) @ vectors, step(at, x)
        rates, basis = [], []
        for vector in vectors.T:
            for other in basis:
                vector = vector - (other @ vector) * other
            length = mp.sqrt(vector @ vector)
            basis.append(vector / length)
            rates.append(float(mp.log(length) / len(inputs)))
    return torch.tensor(rates, dtype=torch.float64).sort(descending=True).values
