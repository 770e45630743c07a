"""No setting of the process changes a number, and every setting is given back."""

import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_lyapunov import jacobians, lyapunov_spectrum, model_spectra

LAYERS = {
    "GRU, two layers": lambda: nn.GRU(3, 5, 2),
    "LSTM, both directions": lambda: nn.LSTM(3, 5, bidirectional=True),
    "LSTMCell": lambda: nn.LSTMCell(3, 5),
    "RNN, large": lambda: nn.RNN(3, 70),
}
layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


@contextmanager
def setting(get, put, value):
    before = get()
    put(value)
    try:
        yield
        assert get() == value
    finally:
        put(before)


def matmul(value):
    return setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, value)


SETTINGS = {
    "float64 by default": partial(setting, torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "bfloat16 by default": partial(setting, torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "meta by default": lambda: torch.device("meta"),
    "deterministic": partial(
        setting, torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "TF32": partial(matmul, "high"),
    "bfloat16 products": partial(matmul, "medium"),
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@layers
@pytest.mark.parametrize("changed", SETTINGS.values(), ids=SETTINGS)
def test_a_setting_of_the_process_changes_no_number(make, changed, device):
    module, inputs = make().to(device), torch.randn(40, 4, 3, device=device)
    expected = lyapunov_spectrum(module, inputs, warmup=10)
    with changed():
        spectrum = lyapunov_spectrum(module, inputs, warmup=10)
    assert_close(spectrum, expected, rtol=0, atol=0)


@pytest.mark.parametrize("changed", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("make", [lambda: nn.LSTM(3, 5, 2), lambda: OwnLayer(3, 5)], ids=["LSTM", "own layer"])
def test_a_setting_of_the_process_changes_no_number_that_a_model_is_recorded_for(make, changed, device):
    torch.manual_seed(0)
    model, inputs = nn.ModuleDict({"rnn": make()}).to(device), torch.randn(40, 4, 3, device=device)
    model.forward = lambda inputs: model["rnn"](inputs)[0]
    expected = model_spectra(model, inputs, modules="rnn")
    is_coarse = changed is SETTINGS["autocast"]  # the states that the model starts from, and its inputs, are then other
    with changed():
        spectra = model_spectra(model, inputs, modules="rnn")
    for cell, found in spectra.items():
        assert_close(found.spectrum, expected[cell].spectrum, rtol=0, atol=1e-2 if is_coarse else 0)


class OwnLayer(nn.Module):
    """A layer whose state is made on the device and in the dtype of its inputs."""

    def __init__(self, inputs, hidden):
        super().__init__()
        self.cell = nn.GRUCell(inputs, hidden)

    def forward(self, sequence):
        state, outputs = sequence.new_zeros(sequence.shape[1], self.cell.hidden_size), []
        for inputs in sequence:
            state = torch.tanh(2 * self.cell(inputs, state))
            outputs.append(state)
        return torch.stack(outputs), state


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_are_in_full_float32_while_a_spectrum_is_computed(precision, device):
    seen = set()

    def step(state, inputs):
        seen.add((torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32))
        return torch.tanh(1.5 * state)

    with matmul(precision):
        inputs, state = torch.zeros(5, 1, 0, device=device), torch.ones(1, 3, device=device)
        lyapunov_spectrum(step, inputs, state)
        jacobians(step, inputs, state)
    assert seen == {("highest", False)}


def test_the_precision_is_given_back_by_the_last_of_several_threads():
    modules, inputs = [nn.RNN(3, 70) for _ in range(4)], torch.randn(60, 4, 3)
    expected = [lyapunov_spectrum(module, inputs) for module in modules]
    with matmul("high"), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: lyapunov_spectrum(modules[number % 4], inputs), range(12)))
    assert all(torch.equal(spectrum, expected[number % 4]) for number, spectrum in enumerate(found))


@pytest.mark.slow
@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize("layer", ["nn.RNN(8, 256)", "nn.LSTM(8, 128)", "nn.GRU(8, 160)"])
def test_the_number_of_threads_changes_no_number(layer, threads):
    """In a process of its own, because the suite runs in one thread: MKL's batched LU is wrong with more."""
    script = f"""
        import torch
        from torch import nn
        from lightning_lyapunov import lyapunov_spectrum
        torch.manual_seed(0)
        module, inputs = {layer}, torch.randn(40, 8, 8)
        torch.set_num_threads(1)
        one = lyapunov_spectrum(module, inputs, warmup=20)
        torch.set_num_threads({threads})
        print((lyapunov_spectrum(module, inputs, warmup=20) - one).abs().max().item())
        assert torch.get_num_threads() == {threads}
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "DLASWP" not in run.stdout + run.stderr
    assert float(run.stdout.split()[-1]) < 1e-4  # rounding in float32; the wrong factors are off by up to 2.5
