"""A run with the monitor is bitwise equal to the run without it, in many settings.

Each setting is trained twice. A callback records the whole state of the run at every hook; the two records must be
equal.
"""

import itertools
import random

import numpy as np
import pytest
import torch
import torchmetrics
from helpers import FEATURES, Regressor, SilentLogger, TanhCell, make_trainer, series
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from promises import bits, seed, state_of, users
from torch import nn

from lightning_lyapunov import LyapunovMonitor

pytestmark = pytest.mark.slow

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


class Notebook(SilentLogger):
    """A logger that keeps what it receives."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def log_hyperparams(self, *args, **kwargs):
        self.lines.append(("hyperparameters", args, kwargs))

    def log_metrics(self, metrics, step=None):
        if users(metrics):
            self.lines.append((step, users(metrics)))


class Witness(Callback):
    """Record, at every hook, everything that a callback could have changed."""

    def __init__(self):
        self.account = {}

    def note(self, place, **seen):
        for name, value in seen.items():
            self.account[len(self.account), place, name] = bits(value)

    def look(self, place, trainer, module):
        self.note(
            place,
            **state_of(trainer, module),
            progress_bar=users(trainer.progress_bar_metrics),
            calls=[module.calls, module.rnn_calls],
        )

    def hooks(self, place, module):
        self.note(place, hooks=[[len(getattr(part, kind)) for kind in HOOKS] for part in module.modules()])

    def on_train_start(self, trainer, module):
        self.hooks("train start", module)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.look("before the optimizer", trainer, module)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        # After the clipping, which Lightning does behind the hook before the optimizer.
        self.look("batch end", trainer, module)
        self.hooks("batch end", module)
        self.note("batch end", outputs=outputs, batch=batch)

    def on_validation_batch_end(self, trainer, module, *_):
        self.look("validation", trainer, module)
        self.hooks("validation", module)

    def on_train_epoch_end(self, trainer, module):
        self.look("epoch end", trainer, module)

    def on_train_end(self, trainer, module):
        self.look("train end", trainer, module)
        self.hooks("train end", module)


class Guarded(Regressor):
    """Uses all random number generators, running statistics, all ways of logging, and own hooks."""

    def __init__(self, cell="GRU", manual=False, **options):
        super().__init__("GRU")
        torch.manual_seed(0)
        self.automatic_optimization = not manual
        dropout = options.get("dropout", 0.0)
        if cell == "LSTMCell":
            self.rnn = nn.LSTMCell(FEATURES, 5)
        elif cell == "custom":
            self.rnn = TanhCell()
        else:
            self.rnn = getattr(nn, cell.removeprefix("spectral "))(FEATURES, 5, batch_first=True, **options)
        if cell.startswith("spectral"):
            # Reading such a weight in training changes its buffers.
            nn.utils.parametrizations.spectral_norm(self.rnn, "weight_hh_l0")
        self.norm, self.dropout = nn.BatchNorm1d(5), nn.Dropout(dropout)
        self.mean = torchmetrics.MeanMetric()
        self.calls = self.rnn_calls = 0
        self.rnn.register_forward_hook(self.count)
        self.rnn.register_forward_pre_hook(lambda module, args: None)

    def count(self, module, args, output):
        self.rnn_calls += 1

    def forward(self, inputs):
        self.calls += 1
        if isinstance(self.rnn, nn.RNNBase):
            outputs = self.rnn(inputs)[0]
        else:
            zeros, outputs = inputs.new_zeros(len(inputs), 5), []
            state = (zeros, zeros) if isinstance(self.rnn, nn.LSTMCell) else zeros
            for step_inputs in inputs.unbind(1):
                state = self.rnn(step_inputs, state)
                outputs.append(state[0] if isinstance(state, tuple) else state)
            outputs = torch.stack(outputs, 1)
        return self.head(self.dropout(self.norm(outputs.transpose(1, 2)).transpose(1, 2)))

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        inputs = inputs + 0.01 * torch.randn_like(inputs) * random.random() + 0.01 * float(np.random.rand())
        loss = (self(inputs) - targets).square().mean()
        self.mean(loss.detach().float())
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, 0.3, "norm")
            optimizer.step()
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("validation", (self(batch[0]) - batch[1]).square().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), 0.05)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


FACTORS = {
    "cell": {
        **{cell: {} for cell in ("RNN", "GRU", "LSTM", "LSTMCell", "spectral GRU")},
        "custom": {"monitor": {"modules": "rnn"}},
    },
    "layers": {
        "one layer": {},
        "two layers": {"model": {"num_layers": 2}},
        "dropout": {"model": {"num_layers": 2, "dropout": 0.5}},
    },
    "steps": {
        "each batch": {},
        "clipped": {"trainer": {"gradient_clip_val": 0.3}},
        "accumulated": {
            "trainer": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}
        },
        "manual": {"model": {"manual": True}},
    },
    "precision": {name: {"trainer": {"precision": name}} for name in ("32-true", "bf16-mixed", "bf16-true", "64-true")},
    "checks": {
        "unchecked": {},
        "deterministic": {"trainer": {"deterministic": True}},
        "anomalies": {"trainer": {"detect_anomaly": True}},
    },
    "validation": {
        "at the end": {},
        "twice": {"trainer": {"val_check_interval": 0.5}},
        "every 3 batches": {"trainer": {"val_check_interval": 3, "check_val_every_n_epoch": None}},
        "never": {"trainer": {"limit_val_batches": 0}},
    },
    "loader": {
        "in order": {},
        "shuffled": {"data": {"shuffle": True}},
        "two workers": {"data": {"shuffle": True, "num_workers": 2}},
    },
    "schedule": {
        "every step": {"monitor": {"every_n_train_steps": 1}},
        "every epoch": {},
        "half of the time": {"monitor": {"every_n_train_steps": 1, "max_overhead": 0.5}},
    },
}


def covering(factors):
    """Return few settings in which every two values of two factors meet: greedily, the same at every call."""
    draw, names = random.Random(0), list(factors)
    missing = {
        frozenset({(a, x), (b, y)})
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(factors[a], factors[b])
    }

    def met(setting):
        return {frozenset(pair) for pair in itertools.combinations(setting.items(), 2)} & missing

    settings = []
    while missing:
        start = dict(min(missing, key=lambda pair: sorted(pair)))
        candidates = [{**{n: draw.choice(list(factors[n])) for n in names}, **start} for _ in range(200)]
        settings.append(max(candidates, key=lambda setting: len(met(setting))))
        missing -= met(settings[-1])
    return settings


SETTINGS = covering(FACTORS)


def chosen(setting):
    """Return the options of the model, the trainer, the loader and the monitor of a setting."""
    options = {"model": {}, "trainer": {}, "data": {}, "monitor": {}}
    for factor, value in setting.items():
        for part, more in FACTORS[factor][value].items():
            options[part] |= more
    return options


def train(setting, *, monitored, ckpt_path=None, callbacks=(), **more):
    """Train a setting and return the account of the run, and its trainer."""
    options = chosen(setting)
    model, witness, notebook = Guarded(setting["cell"], **model_options(setting, options)), Witness(), Notebook()
    guests = [LyapunovMonitor(strict=True, **options["monitor"])] if monitored else []
    data, val = series(5, time=8, **options["data"]), series(2, time=8)
    seed()
    options["trainer"] |= {"logger": notebook, "log_every_n_steps": 1, **more}
    trainer = make_trainer(*guests, witness, *callbacks, **options["trainer"])
    try:
        trainer.fit(model, data, val, ckpt_path=ckpt_path)
    finally:
        torch.use_deterministic_algorithms(False)
    witness.look("end", trainer, model)
    witness.hooks("end", model)
    witness.note("end", logs=notebook.lines, parts=[name for name, _ in model.named_modules()])
    if monitored:
        assert guests[0].history  # it did measure
    return witness.account, trainer


def model_options(setting, options):
    """Return the options of the model, without those that its layer does not have."""
    if setting["cell"] in ("LSTMCell", "custom"):
        return {name: value for name, value in options["model"].items() if name in ("manual", "dropout")}
    return options["model"]


def differences(account, other):
    return sorted({key for key in account.keys() | other.keys() if account.get(key) != other.get(key)})


def test_every_two_values_meet_in_a_setting():
    for (a, xs), (b, ys) in itertools.combinations(FACTORS.items(), 2):
        for x, y in itertools.product(xs, ys):
            assert any(setting[a] == x and setting[b] == y for setting in SETTINGS), (x, y)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: "; ".join(setting.values()))
def test_a_run_with_the_monitor_is_the_run_without_it(setting):
    without, _ = train(setting, monitored=False)
    monitored, _ = train(setting, monitored=True)
    assert len(without) > 50
    assert not differences(without, monitored)


def interrupted_after(batches):
    """Return a callback that ends a run with an error after so many batches."""

    class Interrupt(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == batches:
                raise ConnectionError("the machine is gone")

    return Interrupt()


INTERRUPTED = {"between epochs": (5, 6), "in an epoch": (3, 4)}
RESUMED = {"cell": "LSTM", "layers": "dropout", "loader": "shuffled", "schedule": "every step"}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("monitored", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize(("saved", "ended"), INTERRUPTED.values(), ids=INTERRUPTED)
def test_a_run_that_is_interrupted_and_resumed_is_the_same_with_the_monitor_in_either_part(
    saved, ended, monitored, tmp_path
):
    def both_parts(folder, first, second):
        keep = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=saved, save_top_k=-1)
        options = {"callbacks": [keep, interrupted_after(ended)], "enable_checkpointing": True}
        with pytest.raises(ConnectionError):
            train(RESUMED, monitored=first, **options)
        checkpoint = tmp_path / folder / f"step={saved}.ckpt"
        account, trainer = train(RESUMED, monitored=second, ckpt_path=checkpoint)
        assert trainer.current_epoch == 2
        return torch.load(checkpoint, weights_only=True), account

    checkpoint, account = both_parts("without", False, False)
    monitored_checkpoint, monitored_account = both_parts("with", *monitored)
    for content in (checkpoint, monitored_checkpoint):
        del content["callbacks"]  # the history, and the folder
    assert bits(checkpoint) == bits(monitored_checkpoint)
    assert not differences(account, monitored_account)
