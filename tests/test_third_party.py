"""``pytorch_lightning``, and the models of pytorch-forecasting, snntorch and gluonts."""

import copy
import csv
import itertools
import math

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from helpers import keys_of, make_trainer, published, regressor, series, steps_of
from reference import growth_rates, jacobians
from torch.testing import assert_close

from lightning_lyapunov import LyapunovMonitor, lyapunov_spectrum
from lightning_lyapunov.callbacks import measurement
from lightning_lyapunov.recording.reading import follow

pytestmark = pytest.mark.slow

# pytorch_lightning, whose classes are others than those of lightning.pytorch


def fit(model, *callbacks, ckpt_path=None, **options):
    trainer = make_trainer(*callbacks, pl=pytorch_lightning, **options)
    trainer.fit(model, series(), ckpt_path=ckpt_path)
    return trainer


def test_the_packages_classes_are_not_the_same():
    assert not isinstance(LyapunovMonitor(), pytorch_lightning.Callback)


@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_pytorch_lightning_measures_what_lightning_measures(cell):
    histories = []
    for pl in (lightning.pytorch, pytorch_lightning):
        monitor = LyapunovMonitor(every_n_train_steps=2, strict=True)
        make_trainer(monitor, pl=pl).fit(regressor(pl)(cell), series())
        histories.append(monitor.history)
    assert_close(*histories, rtol=0, atol=0)


def test_pytorch_lightning_logs_every_key_at_its_step(tmp_path):
    monitor = LyapunovMonitor(strict=True)
    logger = pytorch_lightning.loggers.CSVLogger(tmp_path)
    trainer = fit(regressor(pytorch_lightning)(), monitor, logger=logger, log_every_n_steps=1)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["lyapunov/max"]]
    assert [int(row["step"]) for row in rows] == steps_of(monitor) == [0, 2, 5]
    assert {key for key in rows[0] if key.startswith("lyapunov/")} == keys_of("rnn") == set(published(trainer))
    written = torch.tensor([float(row["lyapunov/rnn/max"]) for row in rows])
    assert_close(written, monitor.history["rnn"]["spectrum"][:, 0])


def test_pytorch_lightning_stops_on_it():
    stop = pytorch_lightning.callbacks.EarlyStopping("lyapunov/max", divergence_threshold=-99.0, patience=10**6)
    for callbacks in ([stop, LyapunovMonitor()], [LyapunovMonitor(), stop]):
        trainer = fit(regressor(pytorch_lightning)(), *callbacks, max_epochs=5)
        assert trainer.current_epoch == 1
        assert trainer.should_stop
    calm = pytorch_lightning.callbacks.EarlyStopping("lyapunov/max", divergence_threshold=99.0, patience=10**6)
    assert fit(regressor(pytorch_lightning)(), calm, LyapunovMonitor(), max_epochs=5).current_epoch == 5


def test_pytorch_lightning_keeps_the_checkpoint_of_the_smallest_and_resumes_from_it(tmp_path):
    keep = pytorch_lightning.callbacks.ModelCheckpoint(tmp_path, monitor="lyapunov/max", save_top_k=-1)
    monitor = LyapunovMonitor(strict=True)
    fit(regressor(pytorch_lightning)(), keep, monitor, max_epochs=3, enable_checkpointing=True)
    spectrum = monitor.history["rnn"]["spectrum"][:, 0]
    ends = spectrum[1:]  # the first is that of the first batch
    assert keep.best_model_score == ends.min()
    assert len(keep.best_k_models) == 3
    second = next(path for path, score in keep.best_k_models.items() if score == ends[1])

    resumed = LyapunovMonitor(strict=True)
    trainer = fit(regressor(pytorch_lightning)(), resumed, max_epochs=4, ckpt_path=second)
    assert trainer.current_epoch == 4
    assert steps_of(resumed) == [0, 2, 5, 6, 8, 11]
    assert_close(resumed.history["rnn"]["spectrum"][:3], monitor.history["rnn"]["spectrum"][:3], rtol=0, atol=0)
    assert_close(resumed.history["rnn"]["spectrum"][4], monitor.history["rnn"]["spectrum"][3])  # the same training


def test_a_run_of_pytorch_lightning_with_the_monitor_is_bitwise_that_without():
    models = []
    for callbacks in ([], [LyapunovMonitor(every_n_train_steps=1, strict=True)]):
        models.append(regressor(pytorch_lightning)("GRU"))
        fit(models[-1], *callbacks)
    assert all(map(torch.equal, *(model.state_dict().values() for model in models)))


# pytorch-forecasting


@pytest.fixture(scope="module")
def forecasting():
    return pytest.importorskip("pytorch_forecasting")


@pytest.fixture(scope="module")
def dataset(forecasting):
    """Four noisy sines; the encoders see from 4 to 10 steps of them."""
    import pandas as pd

    generator = torch.Generator().manual_seed(0)
    time = torch.arange(30)
    noise = 0.1 * torch.randn(4, 30, generator=generator)
    rows = [
        {"series": str(i), "time": int(t), "value": math.sin(0.5 * t + i) + float(noise[i, t])}
        for i, t in itertools.product(range(4), time)
    ]
    return forecasting.TimeSeriesDataSet(
        pd.DataFrame(rows),
        time_idx="time",
        target="value",
        group_ids=["series"],
        min_encoder_length=4,
        max_encoder_length=10,
        min_prediction_length=2,
        max_prediction_length=4,
        time_varying_unknown_reals=["value"],
        randomize_length=None,
    )


MODELS = {
    "RecurrentNetwork": ({"cell_type": "GRU", "rnn_layers": 2, "dropout": 0.3}, ["rnn.l0", "rnn.l1"]),
    "RecurrentNetwork, LSTM": ({"cell_type": "LSTM", "rnn_layers": 1}, ["rnn"]),
    "DeepAR": ({"cell_type": "LSTM", "rnn_layers": 2, "dropout": 0.3}, ["rnn.l0", "rnn.l1"]),
    "DeepAR, GRU": ({"cell_type": "GRU", "rnn_layers": 1}, ["rnn"]),
    "TemporalFusionTransformer": (
        {"attention_head_size": 1, "hidden_continuous_size": 4},
        ["lstm_encoder", "lstm_decoder"],
    ),
    "TemporalFusionTransformer, two layers": (
        {"attention_head_size": 1, "hidden_continuous_size": 4, "lstm_layers": 2},
        ["lstm_encoder.l0", "lstm_encoder.l1", "lstm_decoder.l0", "lstm_decoder.l1"],
    ),
}
each_model = pytest.mark.parametrize("name", MODELS)


def train(forecasting, dataset, name, *callbacks, **options):
    torch.manual_seed(0)
    kind = getattr(forecasting, name.split(",")[0])
    model = kind.from_dataset(dataset, hidden_size=6, log_interval=-1, learning_rate=0.01, **MODELS[name][0])
    trainer = make_trainer(*callbacks, **{"max_epochs": 1, "limit_train_batches": 3, **options})
    trainer.fit(model, dataset.to_dataloader(train=True, batch_size=8, num_workers=0))
    return model, trainer


@pytest.mark.filterwarnings("ignore")
@each_model
def test_a_forecasting_model_has_every_key_and_a_finite_value(forecasting, dataset, name):
    monitor = LyapunovMonitor(strict=True)
    _, trainer = train(forecasting, dataset, name, monitor)
    assert set(published(trainer)) == keys_of(*MODELS[name][1])
    assert all(value.isfinite() for value in published(trainer).values())
    for measurements in monitor.history.values():
        assert measurements["step"].tolist() == [0, 2]
        assert measurements["spectrum"].isfinite().all()
        assert -10 < measurements["spectrum"][-1, 0] < 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.filterwarnings("error:.*[Ll]yapunov")
@each_model
def test_a_forecasting_model_takes_a_monitor_and_nothing_else(forecasting, dataset, name):
    _, trainer = train(forecasting, dataset, name, LyapunovMonitor())
    assert set(published(trainer)) == keys_of(*MODELS[name][1])
    assert all(value.isfinite() for value in published(trainer).values())


@pytest.mark.filterwarnings("ignore")
@each_model
def test_a_forecasting_run_with_the_monitor_is_bitwise_that_without(forecasting, dataset, name):
    without, _ = train(forecasting, dataset, name)
    with_monitor, _ = train(forecasting, dataset, name, LyapunovMonitor(every_n_train_steps=1, strict=True))
    assert all(map(torch.equal, without.state_dict().values(), with_monitor.state_dict().values()))


class Calls(lightning.pytorch.Callback):
    """Keep what a layer was called with in the last batch, by a hook of the test's own."""

    def __init__(self, name):
        self.name, self.calls = name, []

    def on_fit_start(self, trainer, pl_module):
        self.layer = pl_module.get_submodule(self.name)
        self.layer.register_forward_hook(self.keep, with_kwargs=True)

    def on_train_batch_start(self, *_):
        self.calls = []

    def keep(self, module, args, kwargs, output):
        self.calls.append(copy.deepcopy(([arg.detach() for arg in args if isinstance(arg, torch.Tensor)], kwargs)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["RecurrentNetwork, LSTM", "DeepAR, GRU"])
def test_a_forecasting_models_value_is_that_of_encoder_and_decoder_by_hand(forecasting, dataset, name):
    calls = Calls("rnn")
    monitor = LyapunovMonitor(num_exponents=1, warmup=0, num_sequences=99, strict=True)
    model, _ = train(forecasting, dataset, name, calls, monitor)
    (encoded, encoding), (decoded, decoding) = calls.calls
    layer = getattr(torch.nn, model.rnn.mode)(model.rnn.input_size, model.rnn.hidden_size)
    layer.load_state_dict(model.rnn.state_dict())
    growth, steps = 0.0, 0
    for member in range(8):
        seen = [
            inputs[member, :length]
            for inputs, length in zip(
                (encoded[0], decoded[0]), (encoding["lengths"][member], decoding["lengths"][member]), strict=True
            )
        ]
        sequence = torch.cat(seen)
        growth += float(lyapunov_spectrum(layer, sequence, num_exponents=1)) * len(sequence)
        steps += len(sequence)
    assert 8 * 5 < steps < 8 * 14  # the lengths differ
    assert_close(float(monitor.history["rnn"]["spectrum"][-1, 0]), growth / steps, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_forecasting_models_values_are_those_of_what_was_recorded(forecasting, dataset, monkeypatch):
    followed = {}

    def follow_and_keep(module, *limits):
        followed[module] = follow(module, *limits)
        return followed[module]

    monkeypatch.setattr(measurement, "follow", follow_and_keep)
    monitor = LyapunovMonitor(num_exponents=1, warmup=0, strict=True)
    model, _ = train(forecasting, dataset, "TemporalFusionTransformer", monitor)
    assert len(followed) == 2
    for name in ("lstm_encoder", "lstm_decoder"):
        layer, growth = model.get_submodule(name), 0.0
        sequences = followed[layer].sequences
        for member, length in enumerate(sequences.lengths):
            state = sequences.states[:, [member]].chunk(2, -1)
            inputs = sequences.inputs[:length, [member]].transpose(0, 1)
            growth += float(lyapunov_spectrum(layer, inputs, state, num_exponents=1)) * length
        expected = growth / sequences.lengths.sum()
        assert_close(monitor.history[name]["spectrum"][-1, 0], expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_forecasting_run_is_logged_stopped_and_resumed(forecasting, dataset, tmp_path):
    pl = lightning.pytorch
    keep = pl.callbacks.ModelCheckpoint(tmp_path, monitor="lyapunov/max")
    stop = pl.callbacks.EarlyStopping("lyapunov/max", divergence_threshold=-99.0, patience=10**6)
    options = {"max_epochs": 3, "enable_checkpointing": True, "logger": pl.loggers.CSVLogger(tmp_path)}
    _, trainer = train(forecasting, dataset, "DeepAR, GRU", stop, keep, LyapunovMonitor(strict=True), **options)
    assert trainer.current_epoch == 1
    resumed = LyapunovMonitor(strict=True)
    model = forecasting.DeepAR.load_from_checkpoint(keep.best_model_path, weights_only=False)
    trainer = make_trainer(resumed, limit_train_batches=3)
    loader = dataset.to_dataloader(train=True, batch_size=8, num_workers=0)
    trainer.fit(model, loader, ckpt_path=keep.best_model_path, weights_only=False)
    assert steps_of(resumed) == [0, 2, 3, 5]


# snntorch


@pytest.fixture(scope="module")
def snntorch():
    return pytest.importorskip("snntorch")


UNITS, SPIKING_COUNT = 5, 3
SPIKING = {
    "Leaky": {"beta": 0.9},
    "Leaky, reset at once": {"beta": 0.9, "reset_delay": False},
    "Leaky, learned": {"beta": torch.tensor([0.9, 0.7, 0.5, 0.95, 0.8]), "learn_beta": True},
    "Lapicque": {"beta": 0.8},
    "Synaptic": {"alpha": 0.8, "beta": 0.9},
    "Synaptic, reset to zero": {"alpha": 0.8, "beta": 0.9, "reset_mechanism": "zero"},
    "Alpha": {"alpha": 0.9, "beta": 0.8, "reset_mechanism": "none"},
    "RLeaky": {"beta": 0.9, "linear_features": UNITS},
    "RLeaky, each to itself": {"beta": 0.9, "all_to_all": False, "V": torch.linspace(0.2, 0.9, UNITS)},
    "RSynaptic": {"alpha": 0.8, "beta": 0.9, "linear_features": UNITS},
    "SLSTM": {"input_size": UNITS, "hidden_size": UNITS},
}
STATE_PARTS = {"Leaky": 1, "Lapicque": 1, "Synaptic": 2, "Alpha": 3, "RLeaky": 2, "RSynaptic": 3, "SLSTM": 2}


class Spiking(lightning.pytorch.LightningModule):
    """Calls a cell of snntorch in a loop; the cell takes its state and returns it, or keeps it."""

    def __init__(self, cell, parts):
        super().__init__()
        self.cell, self.parts = cell, parts

    def training_step(self, batch, batch_idx):
        # What a cell returns is its spikes and its state; of a recurrent one the spikes are a part of that.
        state = [batch.new_zeros(len(batch), UNITS)] * self.parts
        if self.cell.init_hidden:
            (self.cell.reset_hidden if hasattr(self.cell, "reset_hidden") else self.cell.reset_mem)()
        total = 0
        for x in batch.unbind(1):
            if self.cell.init_hidden:
                spikes = self.cell(x)
            else:
                spikes, *state = self.take(self.cell, x, state)
            total = total + spikes.sum() + sum(part.square().sum() for part in state)
        return total * torch.ones((), requires_grad=True)

    @staticmethod
    def take(cell, x, state):
        returned = cell(x, *state)
        return returned[0], *returned[-len(state) :]

    def configure_optimizers(self):
        return torch.optim.SGD([*self.parameters(), torch.nn.Parameter(torch.zeros(1))], 0.0)


def mean_spectrum(step, inputs, parts, skip):
    """Return the mean spectrum of a batch by autograd, in float64; the first ``skip`` steps lead to the first state."""
    total = torch.zeros(SPIKING_COUNT, dtype=torch.float64)
    for member in inputs.double():
        state, matrices = torch.zeros(parts * UNITS, dtype=torch.float64), []
        for x in member:
            matrices.append(torch.autograd.functional.jacobian(lambda s, x=x: step(x, s), state))
            state = step(x, state).detach()
        rates = growth_rates(torch.stack(matrices[skip:]), SPIKING_COUNT)
        total += rates[len(rates) // 2 :].mean(0)
    return (total / len(inputs)).sort(descending=True).values


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("keeps", [False, True], ids=["", "keeps its state"])
@pytest.mark.parametrize("name", SPIKING)
def test_a_spiking_cell_has_the_spectrum_of_a_loop(snntorch, name, keeps):
    kind = name.split(",")[0]
    if keeps and kind in ("Lapicque", "Alpha"):
        pytest.skip("the same as Leaky and Synaptic")
    parts, make = STATE_PARTS[kind], getattr(snntorch, kind)
    cell = make(**SPIKING[name], init_hidden=keeps)
    inputs = 2 * torch.randn(6, 40, UNITS, generator=torch.Generator().manual_seed(1))
    twin = make(**SPIKING[name])
    twin.load_state_dict(
        {key: value for key, value in cell.state_dict().items() if key in dict(twin.named_parameters())}, strict=False
    )
    twin = twin.double().eval()
    monitor = LyapunovMonitor("cell", num_exponents=SPIKING_COUNT, strict=True)
    loader = torch.utils.data.DataLoader(inputs, len(inputs))
    make_trainer(monitor, max_steps=1).fit(Spiking(cell, parts), loader)

    def step(x, state):
        return torch.cat(Spiking.take(twin, x[None], state[None].split(UNITS, 1))[1:], 1)[0]

    expected = mean_spectrum(step, inputs, parts, int(keeps))
    assert_close(monitor.history["cell"]["spectrum"][-1].double(), expected, rtol=0, atol=1e-3)


# gluonts


@pytest.mark.filterwarnings("ignore")
def test_the_network_of_gluonts_has_the_spectrum_of_a_loop(tmp_path):
    gluonts = pytest.importorskip("gluonts.torch")
    from gluonts.dataset.common import ListDataset

    calls, monitor = Calls("model.rnn"), LyapunovMonitor(num_exponents=SPIKING_COUNT, strict=True)
    trainer = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer |= {"callbacks": [calls, monitor], "default_root_dir": tmp_path, "enable_model_summary": False}
    options = {"num_layers": 1, "hidden_size": 6, "batch_size": 8, "num_batches_per_epoch": 3}
    series = [{"start": "2020-01-01", "target": torch.sin(0.3 * torch.arange(120) + i).numpy()} for i in range(6)]
    estimator = gluonts.DeepAREstimator(
        freq="D", prediction_length=5, context_length=30, trainer_kwargs=trainer, **options
    )
    estimator.train(ListDataset(series, freq="D"))
    ((inputs,), _) = calls.calls[0]
    lstm = torch.nn.LSTM(inputs.shape[-1], 6).double()
    lstm.load_state_dict(calls.layer.state_dict())
    windows = inputs.cpu().double().unique(dim=0)  # they are drawn, and the same one counts once
    matrices = [jacobians(lstm, window, torch.zeros(12).double()) for window in windows]
    rates = [growth_rates(one, SPIKING_COUNT)[len(one) // 2 :].mean(0) for one in matrices]
    expected = torch.stack(rates).mean(0).sort(descending=True).values
    assert_close(monitor.history["model.rnn"]["spectrum"][-1].double(), expected, rtol=0, atol=1e-3)
