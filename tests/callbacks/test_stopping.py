"""``InstabilityStopping``: which runs it stops, and what it says."""

import copy
import math
import pickle
import warnings

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from helpers import FEATURES, At, Dial, Regressor, Still, TwoLayers, fit, leading_exponents, series
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_lyapunov import InstabilityStopping, LyapunovMonitor
from lightning_lyapunov.callbacks.host import EarlyStoppingReason
from lightning_lyapunov.confidence import Estimate, student_t_quantile

RISING = [0.1] * 6
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
    rule = InstabilityStopping(0.0, patience=patience)
    trainer = run(rule, order=order, data=series(2), **options)
    # The third epoch is the first above zero; a rule before the monitor sees its last batch's measurement at its end.
    assert rule.stopped_epoch == 1 + patience
    assert trainer.current_epoch == 2 + patience
    assert rule.stopping_reason == EarlyStoppingReason.DIVERGENCE_THRESHOLD


def test_measurements_above_must_follow_one_another():
    rule = InstabilityStopping(0.0, patience=2)
    rates = [-0.1, 0.2, -0.1, 0.2, -0.1, 0.2, 0.2, 0.2]
    run(rule, rates)
    assert rule.stopped_epoch == 6


def test_it_counts_measurements_and_not_epochs_or_batches():
    rule = InstabilityStopping(0.0, patience=3)
    fit(Dial([0.1] * 9), LyapunovMonitor(every_n_epochs=2), rule, max_epochs=9)
    # One at the first batch, then one every second epoch.
    assert rule.stopped_epoch == 3


def test_a_stable_run_goes_on_to_its_end():
    rule = InstabilityStopping(0.0, patience=1)
    trainer = run(rule, [-0.2, -0.01, -0.001, -0.3])
    assert trainer.current_epoch == 4
    assert rule.stopping_reason == EarlyStoppingReason.NOT_STOPPED
    assert rule.stopping_reason_message is None


def test_it_stops_a_network_whose_memory_has_died_where_that_is_wanted():
    rule = InstabilityStopping(patience=2, lower_threshold=-2.0)
    run(rule, [-0.1, -3.0, -3.0, -3.0, -3.0])
    assert rule.stopped_epoch == 2
    assert "below -2 with" in rule.stopping_reason_message
    assert rule.stopping_reason_message.endswith("its memory lasts 0.33 of the 12 steps of a sequence.")
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
    estimate = Estimate(value, stderr, num_sequences, "rnn", 0, length=options.pop("length", 10))
    return InstabilityStopping(**({"threshold": 0.0} if "decades" not in options else {}) | options)._judge(estimate)


def test_a_value_counts_if_its_confidence_bound_is_above():
    t = student_t_quantile(0.95, 15)
    assert judged(0.1, 0.0999 / t) == "above"
    assert judged(0.1, 0.1001 / t) == ""
    assert judged(0.1, 0.0999 / t, confidence=0.99) == ""
    assert judged(0.1, 0.0999 / t, num_sequences=3) == ""
    assert judged(0.1, math.nan) == ""
    assert judged(0.1, 0.01, num_sequences=1) == ""


def test_decades_are_counted_over_the_whole_sequence():
    nats = 2 * math.log(10) / 100
    assert judged(1.01 * nats, 0.0, decades=2.0, length=100) == "above"
    assert judged(0.99 * nats, 0.0, decades=2.0, length=100) == ""
    assert judged(1.01 * nats, 0.0, decades=2.0, length=50) == ""
    assert judged(1.01 * nats, nats, decades=2.0, length=100) == ""
    assert judged(1.01 * nats, 0.0, decades=2.0, length=math.nan) == ""
    assert judged(-87.3, 0.0, decades=2.0, length=100) == ""


def test_by_default_it_allows_two_decades_over_the_sequences_that_are_trained_on():
    rule = InstabilityStopping()
    # Over 12 steps two decades are 0.384 nats per step: the sixth epoch is the first above.
    run(rule)
    assert rule.stopped_epoch == 6
    assert rule.stopping_reason_message == (
        "Training stops at step 20: the largest Lyapunov exponent of `rnn` is +0.500 ± 0.000 nats per step, +2.6 "
        "decades over the 12 steps of a sequence, above 2 with 95% confidence in 2 measurements in a row; gradients "
        "explode."
    )
    rule = InstabilityStopping()
    assert run(rule, data=series(time=8)).current_epoch == 8
    rule = InstabilityStopping(decades=0.9)
    run(rule)
    assert rule.stopped_epoch == 4


class Unlike(Regressor):
    """Two layers: one of short sequences with the larger exponent, one of long sequences with the larger gain."""

    def __init__(self):
        super().__init__("RNN", lr=0.0, nonlinearity="relu")
        self.short = nn.RNN(FEATURES, 5, nonlinearity="relu", batch_first=True)
        for layer, rate in ((self.rnn, 0.2), (self.short, 0.4)):
            for parameter in layer.parameters():
                nn.init.constant_(parameter, 0.1)
            layer.weight_hh_l0.data = torch.eye(5) * math.exp(rate)

    def forward(self, inputs):
        return super().forward(inputs) + self.short(inputs[:, :4])[0].mean()


def test_the_worst_layer_is_the_one_with_the_largest_gain():
    rule, monitor = InstabilityStopping(decades=1.0), LyapunovMonitor()
    fit(Unlike(), monitor, rule, max_epochs=3)
    assert monitor.estimates["lyapunov/max"].layer == "short"
    assert "exponent of `rnn` is +0.200" in rule.stopping_reason_message
    assert fit(Unlike(), LyapunovMonitor(), InstabilityStopping(decades=1.1), max_epochs=3).current_epoch == 3


@pytest.mark.parametrize(
    ("key", "threshold", "unit"), [("max", 0.15, "above 0.15"), ("log10_gradient_gain", 0.9, "decades")]
)
def test_an_exponent_or_a_gain_can_be_watched_in_its_unit(key, threshold, unit):
    rule = InstabilityStopping(threshold, monitor=f"lyapunov/rnn/{key}")
    run(rule)
    assert rule.stopped_epoch == 4
    assert unit in rule.stopping_reason_message


def test_a_gain_can_be_too_low_in_its_unit():
    rule = InstabilityStopping(monitor="lyapunov/rnn/log10_gradient_gain", lower_threshold=-5.0)
    run(rule, [-0.1, -0.9, -1.0, -1.1, -1.2])
    assert rule.stopped_epoch == 3
    assert "decades over the 12 steps of a sequence, below -5 with" in rule.stopping_reason_message


def test_two_rules_share_a_trainer_and_a_checkpoint(tmp_path):
    def rules():
        return [
            InstabilityStopping(0.0, patience=3),
            InstabilityStopping(0.0, patience=9),
            InstabilityStopping(0.0, patience=9, lower_threshold=-2.0),
            InstabilityStopping(0.0, patience=9, confidence=0.9),
            InstabilityStopping(decades=3.0),
            InstabilityStopping(),
        ]

    first, path = rules(), tmp_path / "run.ckpt"
    fit(Dial(RISING), LyapunovMonitor(), *first, max_epochs=1).save_checkpoint(path)
    assert [rule.wait_count for rule in first] == [2, 2, 2, 2, 0, 0]
    second = rules()
    fit(Dial(RISING), LyapunovMonitor(), *second, max_epochs=6, ckpt_path=path)
    assert [rule.stopped_epoch for rule in second] == [1, 0, 0, 0, 0, 0]
    assert len({rule.state_key for rule in second}) == len(second)


def test_a_network_that_is_not_finite_is_stopped_at_once():
    class Breaks(Regressor):
        def on_train_batch_start(self, batch, batch_idx):
            if self.current_epoch == 1:
                nn.init.constant_(self.rnn.weight_hh_l0, math.nan)

    rule = InstabilityStopping(0.0, patience=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = fit(Breaks(), LyapunovMonitor(), rule, max_epochs=6)
    assert trainer.current_epoch == 2
    assert rule.stopping_reason == EarlyStoppingReason.NON_FINITE_METRIC
    assert "is not finite" in rule.stopping_reason_message


def test_it_watches_the_layer_that_it_is_told():
    rule = InstabilityStopping(0.0, monitor="lyapunov/rnn/max", patience=1)
    run(rule)
    assert rule.stopped_epoch == 2
    with pytest.raises(
        ValueError, match=r"`monitor='lyapunov/gru/max'` cannot be watched. Write one of `.*lyapunov/rnn/max"
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


@pytest.mark.parametrize(
    "key",
    [
        "lyapunov/sometimes/mean",
        "lyapunov/gru/log10_gradient_gain",
        "lyapunov/sometimes",
        "loss",
        "lyapunov/worst_layer",
    ],
)
def test_what_is_no_largest_exponent_and_no_gain_cannot_be_watched(key):
    keys = r"lyapunov/sometimes/max.*lyapunov/sometimes/log10_gradient_gain"
    with pytest.raises(ValueError, match=rf"Write one of `.*{keys}"):
        fit(TwoLayers(), LyapunovMonitor(), InstabilityStopping(monitor=key), max_epochs=1)


@pytest.mark.parametrize("order", [("monitor", "rule"), ("rule", "monitor")], ids="-".join)
def test_it_says_its_reason_once(order, caplog):
    rule = InstabilityStopping(0.0, patience=1)
    with caplog.at_level("INFO"):
        trainer = run(rule, order=order, min_epochs=6, data=series(2))
    assert trainer.current_epoch == 6
    assert rule.stopped_epoch == 2
    (said,) = [message for message in caplog.messages if "Training stops at step" in message]
    assert said.endswith(rule.stopping_reason_message)


def test_it_judges_anew_in_another_fit():
    rule = InstabilityStopping(0.0, patience=1)
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
        ({"threshold": 0.0, "lower_threshold": 0.0}, "`lower_threshold=0.0` must be below `threshold=0.0`"),
        ({"lower_threshold": 0.5}, "`lower_threshold=0.5` must be below 0"),
        ({"lower_threshold": math.nan}, "`lower_threshold=nan` must be below 0"),
        ({"decades": 0.0}, "`decades=0.0` must be a number above 0"),
        ({"threshold": 0.1, "decades": 2.0}, "Give `threshold=0.1` or `decades=2.0`, not both"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        InstabilityStopping(**options)


def test_without_a_monitor_it_says_what_to_write():
    with pytest.raises(ValueError, match=r"LyapunovMonitor\(\), InstabilityStopping\(\)"):
        fit(Dial([0.0]), InstabilityStopping(), max_epochs=1)


class Judged(InstabilityStopping):
    """Notes what it judges, through checkpoints too."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.judged = []

    def _judge(self, estimate):
        self.judged.append((estimate.step, estimate.value))
        return super()._judge(estimate)

    def state_dict(self):
        return {**super().state_dict(), "judged": self.judged.copy()}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.judged = state["judged"]


@pytest.fixture(scope="module")
def host_that_resumes_exactly(tmp_path_factory):
    """Skip where Lightning itself, without the package, takes the batch at which it resumes once more (2.4 does)."""
    folder = tmp_path_factory.mktemp("host")
    keep = ModelCheckpoint(folder, filename="run", every_n_train_steps=3)
    fit(Dial(RISING), keep, max_epochs=1, enable_checkpointing=True)
    resumed = fit(Dial(RISING), max_epochs=2, ckpt_path=folder / "run.ckpt")
    if resumed.global_step != fit(Dial(RISING), max_epochs=2).global_step:
        pytest.skip("this Lightning repeats the batch at which it resumes")


@pytest.mark.usefixtures("host_that_resumes_exactly")
@pytest.mark.parametrize("order", [("monitor", "rule"), ("rule", "monitor")], ids="-".join)
@pytest.mark.parametrize("schedule", [{}, {"every_n_train_steps": 2}, {"every_n_train_steps": 1}], ids=str)
@pytest.mark.parametrize("at", [3, 6])
def test_a_resumed_run_judges_the_measurements_of_one_that_was_not_interrupted(schedule, at, order, tmp_path):
    def rule_and_callbacks():
        callbacks = {"monitor": LyapunovMonitor(**schedule), "rule": Judged(0.0, patience=8)}
        return callbacks["rule"], *[callbacks[name] for name in order]

    straight, *callbacks = rule_and_callbacks()
    whole = fit(Dial(RISING), *callbacks, max_epochs=6)
    keep = ModelCheckpoint(tmp_path, filename="run", every_n_train_steps=at)
    fit(Dial(RISING), *rule_and_callbacks()[1:], keep, max_epochs=at // 3, enable_checkpointing=True)
    rule, *callbacks = rule_and_callbacks()
    resumed = fit(Dial(RISING), *callbacks, max_epochs=6, ckpt_path=tmp_path / "run.ckpt")
    assert rule.judged == straight.judged
    assert resumed.global_step == whole.global_step
    assert rule.stopping_reason_message == straight.stopping_reason_message


@pytest.mark.usefixtures("host_that_resumes_exactly")
def test_a_run_that_is_resumed_within_an_epoch_judges_the_same_too(tmp_path):
    schedule = {"every_n_train_steps": 4}
    straight, rule = Judged(patience=99), Judged(patience=99)
    fit(Still(), LyapunovMonitor(**schedule), straight, max_epochs=1, data=series(12))
    keep = ModelCheckpoint(tmp_path, filename="run", every_n_train_steps=6)
    options = {"max_steps": 6, "max_epochs": 1, "enable_checkpointing": True}
    fit(Still(), LyapunovMonitor(**schedule), Judged(patience=99), keep, data=series(12), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning: the loader starts anew
        fit(Still(), LyapunovMonitor(**schedule), rule, max_epochs=1, data=series(12), ckpt_path=tmp_path / "run.ckpt")
    assert [step for step, _ in straight.judged] == [0, 3, 7, 11]
    assert [step for step, _ in rule.judged] == [0, 3, 7, 11]


def test_the_estimates_come_back(tmp_path):
    monitor, path = LyapunovMonitor(), tmp_path / "run.ckpt"
    fit(TwoLayers(), monitor, max_epochs=1).save_checkpoint(path)
    seen = []
    resumed = LyapunovMonitor()
    note = At("on_train_start", lambda trainer: seen.append(dict(resumed.estimates)))
    fit(TwoLayers(), resumed, note, max_epochs=2, ckpt_path=path)
    assert seen == [monitor.estimates]
    overall = {"lyapunov/max", "lyapunov/smallest_max"}
    assert set(seen[0]) == overall | {"lyapunov/rnn/max", "lyapunov/sometimes/max"}


def test_the_estimates_of_layers_that_are_gone_do_not_come_back(tmp_path):
    path = tmp_path / "run.ckpt"
    fit(TwoLayers(), LyapunovMonitor(), max_epochs=1).save_checkpoint(path)
    resumed = LyapunovMonitor(modules="rnn")
    fit(TwoLayers(), resumed, max_epochs=2, ckpt_path=path)
    assert set(resumed.estimates) == {"lyapunov/max", "lyapunov/rnn/max"}


def test_a_layer_that_was_not_called_before_a_resume_is_waited_for(tmp_path):
    path = tmp_path / "run.ckpt"

    def run_to(epochs, **options):
        rule, model = InstabilityStopping(-50.0, monitor="lyapunov/sometimes/max", patience=1), TwoLayers()
        model.calls = 1  # the first batch goes without it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = fit(model, rule, LyapunovMonitor(), max_epochs=epochs, data=series(1), **options)
        return rule, trainer

    run_to(1)[1].save_checkpoint(path)
    rule, _ = run_to(5, ckpt_path=path)
    assert rule.stopping_reason == EarlyStoppingReason.DIVERGENCE_THRESHOLD


def test_another_fit_starts_without_the_estimates_and_the_count_of_the_last_one():
    monitor, rule = LyapunovMonitor(), InstabilityStopping(0.0, patience=3)
    fit(Dial([0.1]), rule, monitor, max_epochs=1)
    assert rule.wait_count == 2
    fit(Dial(RISING), rule, monitor, max_epochs=6)
    assert rule.stopped_epoch == 1


def test_a_resumed_run_whose_first_measurement_is_not_finite_goes_on_to_its_next_one(tmp_path):
    path = tmp_path / "run.ckpt"
    fit(Regressor(), LyapunovMonitor(), Judged(), max_epochs=1).save_checkpoint(path)
    rule, model = Judged(), Regressor()

    def spoil(trainer):
        nn.init.constant_(model.rnn.weight_hh_l0, math.nan)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = fit(model, LyapunovMonitor(), rule, At("on_train_start", spoil), max_epochs=3, ckpt_path=path)
    assert (trainer.global_step, len(rule.judged)) == (6, 3)
    assert rule.stopping_reason == EarlyStoppingReason.NON_FINITE_METRIC


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

    rule = InstabilityStopping(0.0)
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


@pytest.mark.parametrize("seen", [5, "rnn", ["rnn"], [1, 2], {"rnn": 3}, torch.zeros(2)], ids=str)
def test_a_rule_with_a_damaged_state_judges_anew_and_the_run_goes_on(seen):
    rule = InstabilityStopping()
    rule.load_state_dict({**rule.state_dict(), "seen": seen})
    trainer = fit(Regressor("RNN"), LyapunovMonitor(every_n_train_steps=1), rule)
    assert trainer.global_step > 0
    assert rule.stopping_reason.name == "NOT_STOPPED"
