"""What a spectrum costs: the package, its floor, and what else one could write, side by side in one run.

    python tests/benchmarks/bench_spectrum.py [--device cuda] [--repeats 5] [--only GRU-64]

The floor is the batched products with the frame that the method must do, alone, in float32 and in float64; the package
chooses between the two by how far the directions part in a step, and its choice is marked. The textbook is
`vmap(jacrev)` of torch's own cell, or of the same callable, and a QR decomposition at every step; JAX's column is the
same loop, jitted. All of a case are timed in turn, so that what disturbs one disturbs the others. Medians.
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from lightning_lyapunov import lyapunov_spectrum
from lightning_lyapunov.kernel.interval import IntervalController

INPUTS = 32


def seconds(function: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(functions: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    """Time functions in turn, after a run of each to warm up; without repeats that one."""
    rounds = [{name: seconds(run, device) for name, run in functions.items()} for _ in range(repeats + 1)]
    return {name: statistics.median(times[name] for times in rounds[1:] or rounds) for name in functions}


def floor(units: int, rows: int, batch: int, steps: int, num_exponents: int, options: dict[str, object]) -> Callable:
    """Return the products alone: of the frame with the dense columns of the Jacobian, for an LSTM those of h."""
    jacobian = torch.randn(batch, rows, units, **options) / units**0.5
    frame = torch.randn(batch, units, num_exponents, **options)

    def products() -> None:
        for _ in range(steps):
            jacobian @ frame

    return products


def textbook_step(module: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the step of a layer on one flat state, written with torch's own cell."""
    cell = {nn.RNN: nn.RNNCell, nn.GRU: nn.GRUCell, nn.LSTM: nn.LSTMCell}[type(module)](INPUTS, module.hidden_size)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in module.state_dict().items()})
    cell.to(next(module.parameters()).device)

    def step(state: Tensor, inputs: Tensor) -> Tensor:
        if isinstance(cell, nn.LSTMCell):
            return torch.cat(cell(inputs.unsqueeze(0), tuple(state.unsqueeze(0).chunk(2, -1))), -1).squeeze(0)
        return cell(inputs.unsqueeze(0), state.unsqueeze(0)).squeeze(0)

    return step


def textbook(step: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, size: int) -> Tensor:
    """Follow one frame for each sequence, with a QR decomposition at every step."""
    batch = inputs.shape[1]
    state = inputs.new_zeros(batch, size)
    frame = torch.linalg.qr(torch.randn(batch, size, size, device=inputs.device)).Q
    jacobian, advance = torch.func.vmap(torch.func.jacrev(step)), torch.func.vmap(step)
    total = inputs.new_zeros(batch, size)
    with torch.no_grad():
        for step_inputs in inputs:
            frame, factor = torch.linalg.qr(jacobian(state, step_inputs) @ frame)
            total += factor.diagonal(dim1=-2, dim2=-1).abs().log()
            state = advance(state, step_inputs)
    return total / len(inputs)


def jax_gru(module: nn.GRU, inputs: Tensor) -> Callable[[], object] | None:
    """Return the textbook loop in JAX, jitted, for a GRU; None without JAX."""
    try:
        import jax
        import jax.numpy as jnp
    except ModuleNotFoundError:
        return None
    weights = {name: jnp.asarray(value.detach().cpu().numpy()) for name, value in module.named_parameters()}
    size = module.hidden_size

    def step(h: object, x: object) -> object:
        gates_x = weights["weight_ih_l0"] @ x + weights["bias_ih_l0"]
        gates_h = weights["weight_hh_l0"] @ h + weights["bias_hh_l0"]
        (r_x, z_x, n_x), (r_h, z_h, n_h) = jnp.split(gates_x, 3), jnp.split(gates_h, 3)
        z = jax.nn.sigmoid(z_x + z_h)
        return (1 - z) * jnp.tanh(n_x + jax.nn.sigmoid(r_x + r_h) * n_h) + z * h

    def one(carry: object, x: object) -> tuple[object, object]:
        h, frame = carry
        frame, factor = jnp.linalg.qr(jax.jacrev(step)(h, x) @ frame)
        return (step(h, x), frame), jnp.log(jnp.abs(jnp.diagonal(factor)))

    @jax.jit
    def spectra(sequences: object, frame: object) -> object:
        def along(sequence: object) -> object:
            return jax.lax.scan(one, (jnp.zeros(size), frame), sequence)[1].mean(0)

        return jax.vmap(along)(sequences)

    sequences = jnp.asarray(inputs.transpose(0, 1).cpu().numpy())
    frame = jnp.linalg.qr(jax.random.normal(jax.random.PRNGKey(0), (size, size)))[0]
    return lambda: spectra(sequences, frame).block_until_ready()


def gated_step(module: nn.GRU) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a custom cell, without a closed form: the equations of the GRU, with one bias."""
    weight_x, weight_h = module.weight_ih_l0.detach().T, module.weight_hh_l0.detach().T

    def step(state: Tensor, inputs: Tensor) -> Tensor:
        (r_x, z_x, n_x), (r_h, z_h, n_h) = (inputs @ weight_x).chunk(3, -1), (state @ weight_h).chunk(3, -1)
        z = (z_x + z_h).sigmoid()
        return (1 - z) * (n_x + (r_x + r_h).sigmoid() * n_h).tanh() + z * state

    return step


class Case(NamedTuple):
    layer: type[nn.RNNBase]
    units: int
    batch: int
    steps: int
    num_exponents: int | None = None
    peers: bool = True
    own_cell: bool = False


CASES = {
    "GRU-64": Case(nn.GRU, 64, 16, 512),
    "GRU-256": Case(nn.GRU, 256, 8, 128),
    "RNN-64": Case(nn.RNN, 64, 16, 512),
    "RNN-256": Case(nn.RNN, 256, 8, 128),
    "LSTM-64": Case(nn.LSTM, 64, 16, 128, peers=False),  # vmap knows no `lstm_cell`
    "own cell, 64": Case(nn.GRU, 64, 16, 128, own_cell=True),
    "own cell, 256": Case(nn.GRU, 256, 8, 64, own_cell=True),
    "GRU-256, 16": Case(nn.GRU, 256, 8, 128, 16, peers=False),
    "LSTM-256, 16": Case(nn.LSTM, 256, 16, 100, 16, peers=False),
    "LSTM-512, 64": Case(nn.LSTM, 512, 10, 100, 64, peers=False),
    "LSTM-512": Case(nn.LSTM, 512, 10, 100, peers=False),
}


def dtype_of_most_products(run: Callable[[], object]) -> torch.dtype:
    counts: Counter[torch.dtype] = Counter()
    accept = IntervalController.accept

    def noted(controller: IntervalController, steps: int, log_condition: float, *, oblique: bool) -> None:
        counts[controller.current.dtype] += steps
        accept(controller, steps, log_condition, oblique=oblique)

    with mock.patch.object(IntervalController, "accept", noted):
        run()
    return counts.most_common(1)[0][0]


def compare(case: Case, repeats: int, device: str, peers: bool) -> str:
    """Return the columns of a case, in seconds and ratios."""
    torch.manual_seed(0)
    module = case.layer(INPUTS, case.units).to(device)
    inputs = torch.randn(case.steps, case.batch, INPUTS, device=device)
    parts = 2 if case.layer is nn.LSTM else 1
    size, state = case.units * parts, torch.zeros(case.batch, case.units, device=device)
    step = gated_step(module) if case.own_cell else textbook_step(module)
    arguments = (step, inputs, state) if case.own_cell else (module, inputs)
    functions: dict[str, Callable[[], object]] = {
        str(dtype): floor(
            case.units, size, case.batch, case.steps, case.num_exponents or size, {"dtype": dtype, "device": device}
        )
        for dtype in (torch.float32, torch.float64)
    }
    functions["package"] = lambda: lyapunov_spectrum(*arguments, num_exponents=case.num_exponents)
    used = dtype_of_most_products(functions["package"])
    if peers and case.peers:
        functions["textbook"] = lambda: textbook(step, inputs, size)
        if case.layer is nn.GRU and not case.own_cell and (jitted := jax_gru(module, inputs)):
            functions["JAX"] = jitted
    times = medians(functions, repeats, device)
    columns = f"{times['package']:9.3f}"
    for dtype in (torch.float32, torch.float64):
        columns += f" {times[str(dtype)]:9.3f} {times['package'] / times[str(dtype)]:5.1f}{'x*'[dtype == used]}"
    for peer in ("textbook", "JAX"):
        columns += f" {times[peer]:9.3f} {times[peer] / times['package']:5.1f}x" if peer in times else ""
    return columns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--no-peers", action="store_true", help="leave out the textbook and JAX, which take minutes")
    arguments = parser.parse_args()
    device = arguments.device
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {name}; seconds; *: the dtype of most of the package's products")
    heads = ("package", "float32 floor", "float64 floor", "textbook", "JAX, jitted")
    print(f"{'case':14} {heads[0]:>9}" + "".join(f" {head:>16}" for head in heads[1:]))
    for name, case in CASES.items():
        if arguments.only in (None, name):
            print(f"{name:14} " + compare(case, arguments.repeats, device, not arguments.no_peers), flush=True)


if __name__ == "__main__":
    main()
