"""What a spectrum costs: the package, its floor, and what else one could write, side by side in one run.

    python tests/benchmarks/bench_spectrum.py [--device cuda] [--repeats 5] [--only GRU-64]

The floor is the batched products with the frame that the method must do, alone, in the dtype used. The textbook is
`vmap(jacrev)` of torch's own cell and a QR decomposition at every step; JAX's column is the same loop, jitted. Medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_lyapunov import lyapunov_spectrum

INPUTS = 32


def median_seconds(function: Callable[[], object], repeats: int, device: str) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def floor(module: nn.Module, batch: int, steps: int, num_exponents: int, device: str) -> Callable[[], None]:
    """Return the products alone: of the frame with the dense columns of the Jacobian, for an LSTM those of h."""
    size = module.hidden_size
    rows = 2 * size if isinstance(module, nn.LSTM) else size
    jacobian = torch.randn(batch, rows, size, device=device) / size**0.5
    frame = torch.randn(batch, size, num_exponents, device=device)

    def products() -> None:
        for _ in range(steps):
            jacobian @ frame

    return products


def textbook_step(module: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the step of a layer on one flat state, as anybody would write it with torch's own cell."""
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


CASES = {
    # name: layer, units, sequences, steps, exponents (None = all), peers
    "GRU-64": (nn.GRU, 64, 16, 512, None, True),
    "GRU-256": (nn.GRU, 256, 8, 128, None, True),
    "GRU-256, 16": (nn.GRU, 256, 8, 128, 16, False),
    "RNN-256": (nn.RNN, 256, 8, 128, None, True),
    "LSTM-256, 16": (nn.LSTM, 256, 16, 100, 16, False),
    "LSTM-512": (nn.LSTM, 512, 10, 10, None, False),
    "LSTM-512, 64": (nn.LSTM, 512, 10, 10, 64, False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--no-peers", action="store_true", help="leave out the textbook and JAX, which take minutes")
    arguments = parser.parse_args()
    device, repeats = arguments.device, arguments.repeats
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {name}; seconds, and multiples of the package's time")
    print(f"{'case':14} {'floor':>8} {'package':>9} {'x floor':>8} {'textbook':>16} {'JAX, jitted':>16}")
    for case, (layer, units, batch, steps, wanted, peers) in CASES.items():
        if arguments.only not in (None, case):
            continue
        torch.manual_seed(0)
        module, inputs = layer(INPUTS, units).to(device), torch.randn(steps, batch, INPUTS, device=device)
        size = units * (2 if layer is nn.LSTM else 1)
        bottom = median_seconds(floor(module, batch, steps, wanted or size, device), repeats, device)
        own = median_seconds(lambda: lyapunov_spectrum(module, inputs, num_exponents=wanted), repeats, device)  # noqa: B023
        columns = f"{case:14} {bottom:8.3f} {own:9.3f} {own / bottom:8.1f}"
        if peers and not arguments.no_peers:
            step = textbook_step(module)
            slow = median_seconds(lambda: textbook(step, inputs, size), min(repeats, 3), device)  # noqa: B023
            columns += f" {slow:8.3f} {slow / own:6.1f}x"
            jitted = jax_gru(module, inputs) if layer is nn.GRU else None
            if jitted is not None:
                peer = median_seconds(jitted, min(repeats, 3), device)
                columns += f" {peer:8.3f} {peer / own:6.1f}x"
        print(columns, flush=True)


if __name__ == "__main__":
    main()
