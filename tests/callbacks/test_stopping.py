"""``InstabilityStopping``: which runs it stops, and what it says."""

import copy
import math
import pickle
import warnings

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from helpers import Dial, Regressor, TwoLayers, fit, leading_exponents, series
from torch import nn

from lightning_lyapunov import InstabilityStopping, LyapunovMonitor
from lightning_lyapunov.callbacks.host import EarlyStoppingReason
from lightning_lyapunov.callbacks.publish import Estimate
from lightning_lyapunov.confidence import student_t_quantile

WORSE = [-0.2, -0.1, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]


def run(rule, rates=WORSE, *, order=("monitor", "rule"), **options):
    callbacks = {"monitor": LyapunovMonitor(strict=True), "rule": rule}
    return fit(Dial(rates), *[callbacks[name] for name in order], max_epochs=len(rates), **options)


@pytest.mark.slow
@pytest.mark.parametrize("order", [("monitor", "rule"), ("rule", "monitor")], ids="-".join)
@pytest.mark.parametrize(
    "options",
    [{}, {"val": True}, {"val": True, "val_check_interval": 0.5}, {"val": True, "check_val_every_n_epoch": 2}],
    ids=str,
)
@pytest.mark.parametrize("patience", [1, 2, 3])
def test_it_stops_after_so_many_measurements_above_the_threshold(patience, options, order):
    options = {**options, "val": series(2)} if "val" in options else options
    rule = InstabilityStopping(patience=patience)
    trainer = run(rule, order=order, data=series(2), **options)
    # The third epoch is the first above zero; a rule before the monitor sees its last batch's measurement at its end.
    assert rule.stopped_epoch == 1 + patience
    assert trainer.current_epoch == 2 + patience
    assert rule.stopping_reason == EarlyStoppingReason.DIVERGENCE_THRESHOLD


def test_measurements_above_must_follow_one_another():
    rule = InstabilityStopping(patience=2)
    rates = [-0.1, 0.2, -0.1, 0.2, -0.1, 0.2, 0.2, 0.2]
    run(rule, rates)
    assert rule.stopped_epoch == 6


def test_it_counts_measurements_and_not_epochs_or_batches():
    rule = InstabilityStopping(patience=3)
    fit(Dial([0.1] * 9), LyapunovMonitor(every_n_epochs=2), rule, max_epochs=9)
    # One at the first batch, then one every second epoch.
    assert rule.stopped_epoch == 3


def test_a_stable_run_goes_on_to_its_end():
    rule = InstabilityStopping(patience=1)
    trainer = run(rule, [-0.2, -0.01, -0.001, -0.3])
    assert trainer.current_epoch == 4
    assert rule.stopping_reason == EarlyStoppingReason.NOT_STOPPED
    assert rule.stopping_reason_message is None


def test_it_stops_a_network_whose_memory_has_died_where_that_is_wanted():
    rule = InstabilityStopping(patience=2, lower_threshold=-2.0)
    run(rule, [-0.1, -3.0, -3.0, -3.0, -3.0])
    assert rule.stopped_epoch == 2
    assert "below -2" in rule.stopping_reason_message
    rule = InstabilityStopping(patience=2)
    assert run(rule, [-0.1, -3.0, -3.0, -3.0, -3.0]).current_epoch == 5


def test_it_says_why_in_one_sentence_with_layer_value_error_and_step():
    rule = InstabilityStopping(0.05, patience=2)
    run(rule, data=series(2))
    assert rule.stopping_reason_message == (
        "Training stops at step 7: the largest Lyapunov exponent of `rnn` is +0.200 ± 0.000 nats per step, above 0.05 "
        "with 95% confidence in 2 measurements in a row; perturbations and gradients grow 7.39-fold in 10 steps."
    )


def judged(value, stderr, num_sequences=16, **options):
    return InstabilityStopping(**options)._judge(Estimate(value, stderr, num_sequences, "rnn", 0))


def test_a_value_counts_if_its_confidence_bound_is_above():
    t = student_t_quantile(0.95, 15)
    assert judged(0.1, 0.0999 / t) == "above"
    assert judged(0.1, 0.1001 / t) == ""
    assert judged(0.1, 0.0999 / t, confidence=0.99) == ""
    assert judged(0.1, 0.0999 / t, num_sequences=3) == ""
    assert judged(0.1, math.nan) == ""
    assert judged(0.1, 0.01, num_sequences=1) == ""


def test_a_network_that_is_not_finite_is_stopped_at_once():
    class Breaks(Regressor):
        def on_train_batch_start(self, batch, batch_idx):
            if self.current_epoch == 1:
                nn.init.constant_(self.rnn.weight_hh_l0, math.nan)

    rule = InstabilityStopping(patience=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = fit(Breaks(), LyapunovMonitor(), rule, max_epochs=6)
    assert trainer.current_epoch == 2
    assert rule.stopping_reason == EarlyStoppingReason.NON_FINITE_METRIC
    assert "is not finite" in rule.stopping_reason_message


def test_it_watches_the_layer_that_it_is_told():
    rule = InstabilityStopping(monitor="lyapunov/rnn/max", patience=1)
    run(rule)
    assert rule.stopped_epoch == 2
    with pytest.raises(
        ValueError, match=r"`monitor='lyapunov/gru/max'` is not measured. Write one of `.*lyapunov/rnn/max"
    ):
        run(InstabilityStopping(monitor="lyapunov/gru/max"))


def test_a_layer_that_is_not_called_yet_is_waited_for():
    model = TwoLayers()
    model.calls = 1  # the first batch goes without it
    rule = InstabilityStopping(-50.0, monitor="lyapunov/sometimes/max")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = fit(model, LyapunovMonitor(every_n_train_steps=1), rule, max_epochs=1, data=series(6))
    # It is called in every second batch, and what is repeated in between is not counted again.
    assert trainer.global_step == 4
    assert rule.stopping_reason == EarlyStoppingReason.DIVERGENCE_THRESHOLD


@pytest.mark.parametrize("key", ["lyapunov/sometimes/mean", "lyapunov/sometimes", "loss", "lyapunov/worst_layer"])
def test_what_is_no_largest_exponent_cannot_be_watched(key):
    with pytest.raises(ValueError, match=r"Write one of `.*lyapunov/sometimes/max"):
        fit(TwoLayers(), LyapunovMonitor(), InstabilityStopping(monitor=key), max_epochs=1)


@pytest.mark.parametrize("order", [("monitor", "rule"), ("rule", "monitor")], ids="-".join)
def test_it_says_its_reason_once(order, caplog):
    rule = InstabilityStopping(patience=1)
    with caplog.at_level("INFO"):
        trainer = run(rule, order=order, min_epochs=6, data=series(2))
    assert trainer.current_epoch == 6
    assert rule.stopped_epoch == 2
    (said,) = [message for message in caplog.messages if "Training stops at step" in message]
    assert said.endswith(rule.stopping_reason_message)


def test_it_judges_anew_in_another_fit():
    rule = InstabilityStopping(patience=1)
    run(rule)
    run(rule, [-0.1, -0.1])
    assert rule.stopping_reason == EarlyStoppingReason.NOT_STOPPED
    assert rule.stopping_reason_message is None
    assert run(rule, [-0.1, 0.1, 0.1, 0.1]).current_epoch == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 0}, "`patience=0` must be"),
        ({"confidence": 95}, "`confidence=95` must be from 0.5 to 1"),
        ({"confidence": 0.2}, "`confidence=0.2`"),
        ({"threshold": math.nan}, "`threshold=nan`"),
        ({"lower_threshold": 0.0}, "`lower_threshold=0.0` must be below `threshold=0.0`"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        InstabilityStopping(**options)


def test_without_a_monitor_it_says_what_to_write():
    with pytest.raises(ValueError, match=r"LyapunovMonitor\(\), InstabilityStopping\(\)"):
        fit(Dial([0.0]), InstabilityStopping(), max_epochs=1)


def test_its_count_survives_a_resume(tmp_path):
    rates = [0.1, 0.1, 0.1, 0.1, 0.1, 0.1]
    callbacks = LyapunovMonitor(), InstabilityStopping(patience=4)
    fit(Dial(rates), *callbacks, max_epochs=1).save_checkpoint(tmp_path / "run.ckpt")
    assert callbacks[1].wait_count == 2
    rule = InstabilityStopping(patience=4)
    fit(Dial(rates), LyapunovMonitor(), rule, max_epochs=6, ckpt_path=tmp_path / "run.ckpt")
    # Two before the break, one at the first batch after it, one at the end of that epoch.
    assert rule.stopped_epoch == 1


def test_it_can_be_copied_and_pickled():
    rule = InstabilityStopping(0.1, patience=3)
    run(rule)
    for copied in (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        assert (copied.threshold, copied.patience, copied.stopped_epoch) == (0.1, 3, rule.stopped_epoch)


def test_it_stops_a_trainer_of_the_other_lightning():
    class Unstable(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.rnn = nn.RNN(3, 5, nonlinearity="relu", batch_first=True)
            for parameter in self.rnn.parameters():
                nn.init.constant_(parameter, 0.1)
            self.rnn.weight_hh_l0.data = 1.2 * torch.eye(5)

        def training_step(self, batch, batch_idx):
            return self.rnn(batch[0])[0].mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    rule = InstabilityStopping()
    trainer = pytorch_lightning.Trainer(
        max_epochs=5,
        accelerator="cpu",
        callbacks=[LyapunovMonitor(), rule],
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Unstable(), series())
    assert trainer.current_epoch == 1
    assert rule.stopping_reason_message


def test_lightning_orders_it_as_early_stopping():
    assert isinstance(InstabilityStopping(), lightning.pytorch.callbacks.EarlyStopping)


def random_network(size=24, gain=1.4):
    torch.manual_seed(1)
    module = nn.RNN(2, size)
    nn.init.normal_(module.weight_hh_l0, std=gain / size**0.5)
    return module


@pytest.mark.slow
def test_false_alarms_on_a_stable_network_near_the_edge_are_rare():
    # Its exponent is below the threshold by the scatter between sequences; the windows are those of the monitor.
    module = random_network()
    threshold = float(leading_exponents(module, 64, steps=2000, warmup=500)[0, :, 0].mean()) + 0.02
    repeats, sequences = 400, 16
    values = leading_exponents(module, repeats * sequences, steps=100, warmup=20)[0, :, 0]
    assert values.std() > 0.015
    alarms = [
        judged(float(v.mean()), float(v.std()) / sequences**0.5, sequences, threshold=threshold) == "above"
        for v in values.view(repeats, sequences)
    ]
    # One measurement in twenty may be; two in a row were 0 of 200.
    assert sum(alarms) / repeats <= 0.05
    assert sum(a and b for a, b in zip(alarms[::2], alarms[1::2], strict=True)) <= 1
