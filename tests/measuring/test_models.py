"""The spectra of a model from one call: those that a monitor logs, and a model that is as before."""

import random

import numpy as np
import pytest
import torch
from helpers import (
    FEATURES,
    CellModel,
    Language,
    Loop,
    Packed,
    Regressor,
    TanhCell,
    assert_equal,
    assert_near,
    make_trainer,
    series,
    tokens,
)
from torch import nn

from lightning_lyapunov import LyapunovMonitor, lyapunov_spectrum, model_spectra

INPUTS = torch.rand(4, 12, FEATURES)


class Drawing(nn.Module):
    """Draws, counts, and keeps what it has seen, in evaluation mode, too."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(FEATURES, 4, batch_first=True)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros(()))
        self.calls, self.last = 0, None
        self.norm.eval()

    def forward(self, inputs):
        self.calls += 1
        self.seen += inputs.sum()
        self.last = inputs
        random.random(), np.random.rand(), torch.rand(1)
        return self.norm(self.rnn(inputs)[0][:, -1])


@pytest.mark.parametrize(
    "make",
    [Regressor, lambda: Regressor(num_layers=2, bidirectional=True), Loop, Packed, lambda: CellModel(TanhCell())],
)
def test_the_values_are_those_that_a_monitor_logs(make):
    model, names = make(), "rnn" if isinstance(make(), CellModel) else None
    monitor = LyapunovMonitor(names, metrics="all", strict=True)
    trainer = make_trainer(monitor)
    trainer.validate(model, series(1), verbose=False)
    spectra = model_spectra(model, next(iter(series(1)))[0], modules=names)
    assert set(spectra) == set(monitor.history)
    for cell, found in spectra.items():
        assert_near(found.spectrum.float(), monitor.history[cell]["spectrum"][-1], 1e-5)
        assert_near(found.stderr.float(), monitor.history[cell]["stderr"][-1], 1e-5)
        logged = {
            key.rpartition("/")[2]: value for key, value in trainer.callback_metrics.items() if f"/{cell}/" in key
        }
        assert set(found.metrics) == set(logged)
        assert found.num_sequences == logged["num_sequences"] == 4
        assert found.num_steps == logged["num_steps"]


def test_token_ids_go_in_as_in_training():
    model, (ids, _) = Language(), next(iter(tokens(1)))
    embedded = model.embedding(ids).detach()
    found = model_spectra(model, ids)["rnn"]
    assert_equal(found.spectrum, model_spectra(nn.Sequential(model.rnn), embedded)["0"].spectrum)
    assert_near(found.spectrum.sum(), lyapunov_spectrum(model.rnn, embedded, warmup=6).sum(-1).mean().double(), 1e-4)
    with pytest.raises(TypeError, match=r"model_spectra\(model, ids\)"):
        lyapunov_spectrum(model.rnn, ids)


def test_the_model_and_the_process_are_as_before():
    model = Drawing()
    model(INPUTS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes, calls, last = [part.training for part in model.modules()], model.calls, model.last
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]
    model.rnn.weight_ih_l0.requires_grad_(False)
    model_spectra(model, INPUTS + 1)
    assert_equal(model.state_dict(), before)
    assert modes == [part.training for part in model.modules()]
    assert (model.calls, model.last) == (calls, last)
    assert_equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert hooks == [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]
    assert [p.requires_grad for p in model.rnn.parameters()] == [False, True, True, True]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_call_that_fails_leaves_the_model_as_before():
    model = Drawing()
    with pytest.raises(RuntimeError):
        model_spectra(model, torch.rand(2, 5, FEATURES + 1))
    assert model.training
    assert model.calls == 0
    assert model.seen == 0
    assert not model.rnn._forward_hooks


def test_dropout_is_off_and_inference_mode_is_no_obstacle():
    model = Regressor(num_layers=2, dropout=0.9)
    first = model_spectra(model, INPUTS)
    with torch.inference_mode():
        second = model_spectra(model, INPUTS.clone())
    for cell, found in first.items():
        assert_equal(found.spectrum, second[cell].spectrum)
    assert model.rnn.dropout == 0.9


def test_a_layer_that_is_not_called_or_cannot_be_followed_is_nan_with_a_warning():
    class Zoneout(Loop):
        def __init__(self):
            super().__init__()
            self.other = nn.GRU(FEATURES, 4)

        def forward(self, inputs):
            outputs, (h, c) = [], (inputs.new_zeros(len(inputs), 5), inputs.new_zeros(len(inputs), 5))
            for x in inputs.unbind(1):
                h, c = (0.9 * new + 0.1 * old for new, old in zip(self.rnn(x, (h, c)), (h, c), strict=True))
                outputs.append(h)
            return self.head(torch.stack(outputs, 1))

    model = Zoneout().requires_grad_(False)
    with pytest.warns(UserWarning, match="values are NaN") as given:
        spectra = model_spectra(model, INPUTS)
    messages = [str(warning.message) for warning in given]
    assert any("`rnn` could not be measured" in message and "comes back changed" in message for message in messages)
    assert any("`other` was not called" in message for message in messages)
    assert all(
        found.spectrum.isnan().all() and found.num_sequences == found.num_steps == 0 for found in spectra.values()
    )
    assert all(warning.filename == __file__ for warning in given)


def test_the_error_of_one_long_sequence_comes_from_its_segments():
    spectra = model_spectra(Regressor(), torch.rand(1, 200, FEATURES), max_steps=200)
    assert spectra["rnn"].num_sequences == 8
    assert spectra["rnn"].num_steps >= 144
    assert spectra["rnn"].stderr.isfinite().all()
    assert "8 sequences" in repr(spectra["rnn"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_sequences": 0}, "num_sequences=0"),
        ({"num_exponents": 2.5}, "num_exponents=2.5"),
        ({"warmup": 100}, "leaves nothing"),
        ({"qr_interval": "never"}, "qr_interval='never'"),
        ({"dtype": torch.float16}, "dtype"),
        ({"modules": "nothing"}, "`nothing`"),
    ],
)
def test_bad_options_are_refused_before_the_call(options, message):
    model = Drawing()
    with pytest.raises(ValueError, match=message):
        model_spectra(model, INPUTS, **options)
    assert model.calls == 0


def test_what_holds_no_layer_is_refused():
    with pytest.raises(TypeError, match="must be a module"):
        model_spectra(lambda x: x, INPUTS)
    with pytest.raises(ValueError, match=r"torch\.nn\.Sequential\(model\)"):
        model_spectra(nn.GRU(FEATURES, 4), INPUTS)
    assert set(model_spectra(nn.Sequential(nn.GRU(FEATURES, 4)), INPUTS)) == {"0"}
