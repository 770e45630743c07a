"""``GradientFlossing``: what it changes, when, what it leaves alone, and what it says where it cannot."""

import copy
import inspect
import pickle
import random
import warnings

import pytest
import torch
from helpers import (
    FEATURES,
    CellModel,
    Language,
    Loop,
    Regressor,
    TanhCell,
    TwoLayers,
    TwoOptimizers,
    assert_equal,
    assert_near,
    fit,
    hooks_of,
    messages,
    series,
    tokens,
)
from lightning.pytorch import Callback
from processes import RankModel, assert_all_know_the_same, fit_distributed, in_processes, shorter
from promises import bits
from torch import nn

from lightning_lyapunov import GradientFlossing, InstabilityStopping, LyapunovMonitor, lyapunov_init_, lyapunov_spectrum
from lightning_lyapunov.callbacks import flossing as module_of_callback

QUICK = {"num_exponents": 2, "steps": 5}
RECURRENT = {"rnn.weight_hh_l0", "rnn.bias_hh_l0"}


class Adam(Regressor):
    """Trains with Adam."""

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


class Counting:
    """Counts what is flossed, in place of ``floss_``, and does it unless an error is given."""

    def __init__(self, monkeypatch, error=None):
        self.steps, self.error, self.floss = [], error, module_of_callback.floss_
        monkeypatch.setattr(module_of_callback, "floss_", self)

    def __call__(self, *args, **options):
        self.steps.append(options["steps"])
        if self.error is not None:
            raise self.error
        return self.floss(*args, **options)


class Keep(Callback):
    """Keeps a copy of what a hook finds: the last weights, gradients, optimizer and random states."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, model, *_):
        self.seen.append(
            copy.deepcopy(
                {
                    "weights": model.state_dict(),
                    "gradients": [parameter.grad for parameter in model.parameters()],
                    "optimizer": trainer.optimizers[0].state_dict(),
                    "random": [torch.get_rng_state(), random.getstate()],
                    "modes": [part.training for part in model.modules()],
                }
            )
        )


def parts(model, without=()):
    return {name: weight.detach().clone() for name, weight in model.state_dict().items() if name not in without}


# What it does


def test_with_no_argument_the_exponents_are_near_zero_before_the_second_step():
    flossing, monitor, model = GradientFlossing(), LyapunovMonitor(every_n_train_steps=1, warmup=0), Adam("RNN", 24)
    trainer = fit(model, flossing, monitor, max_steps=1)
    assert monitor.history["rnn"]["spectrum"][0, :8].abs().max() < 0.15
    result, metrics = flossing.results["rnn"], trainer.callback_metrics
    assert result.before.abs().max() > 0.5 > 0.15 > result.after[0, :8].abs().max()
    assert float(metrics["lyapunov/flossing/rnn/max_before"]) == pytest.approx(float(result.before.max()))
    assert float(metrics["lyapunov/flossing/rnn/max_after"]) == pytest.approx(float(result.after.max()))
    assert metrics["lyapunov/flossing/rnn/distance_after"] < 0.2 * metrics["lyapunov/flossing/rnn/distance_before"]
    assert metrics["lyapunov/flossing/steps"] == 60
    assert metrics["lyapunov/flossing/seconds"] > 0


def test_it_is_what_the_function_does_along_the_first_batch():
    data, by_hand, flossed = series(1), Adam(), Adam()
    fit(by_hand, max_steps=1, data=data)
    lyapunov_init_(by_hand.rnn, next(iter(data))[0], **QUICK)
    fit(flossed, GradientFlossing(**QUICK), max_steps=1, data=data)
    for name, weight in by_hand.state_dict().items():
        assert_near(flossed.state_dict()[name], weight, 1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_recurrent_weights_change_and_nothing_else(accumulate):
    seen = []
    for callbacks in ((), (GradientFlossing(**QUICK),)):
        torch.manual_seed(1)
        random.seed(1)
        keep = Keep()
        model = Adam(dropout=0.3, num_layers=2)
        fit(model, *callbacks, keep, max_steps=1, accumulate_grad_batches=accumulate, data=series(4))
        assert len(hooks_of(model)) == 0
        seen.append(keep.seen)
    for plain, flossed in zip(*seen, strict=True):
        (plain_weights, flossed_weights), is_last = (
            (one.pop("weights") for one in (plain, flossed)),
            plain is seen[0][-1],
        )
        # While gradients accumulate, the weights that they are of stay.
        assert is_last or bits(flossed_weights) == bits(plain_weights)
        assert_equal(flossed.pop("random")[0], plain.pop("random")[0])
        assert flossed.pop("modes") == plain.pop("modes")
        assert_equal(flossed, plain)
    changed = {name for name in plain_weights if not torch.equal(plain_weights[name], flossed_weights[name])}
    assert changed == {f"rnn.{kind}_hh_l{layer}" for kind in ("weight", "bias") for layer in (0, 1)}
    assert len(seen[0]) == accumulate


def test_a_run_that_is_never_flossed_is_bitwise_the_run_without():
    plain, guest = Adam(), Adam()
    fit(plain)
    fit(guest, GradientFlossing(steps=0))
    assert_equal(guest.state_dict(), plain.state_dict())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_it_works_in_every_precision(precision):
    flossing, model = GradientFlossing(**QUICK | {"steps": 20}), Regressor("RNN", lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(model, flossing, precision=precision)
    assert flossing.results["rnn"].after.abs().max() < 0.3 * flossing.results["rnn"].before.abs().max()


@pytest.mark.parametrize(
    ("model", "options", "data"),
    [
        (Loop, {}, series),
        (Language, {}, tokens),
        (TwoLayers, {}, series),
        (TwoOptimizers, {}, series),
        (lambda: CellModel(TanhCell()), {"modules": "rnn"}, series),
        (lambda: Regressor(bidirectional=True), {}, series),
    ],
)
def test_every_layer_is_flossed(model, options, data):
    model = model()
    flossing = GradientFlossing(**options, **QUICK | {"steps": 10}, strict=True)
    fit(model, flossing, data=data())
    assert set(flossing.results) == {"sometimes", "rnn"} if isinstance(model, TwoLayers) else {"rnn"}
    for result in flossing.results.values():
        assert result.after.square().mean() < 0.7 * result.before.square().mean()


class Passing(nn.GRU):
    """A forward of its own that changes nothing of the recurrence."""

    def forward(self, inputs, hx=None):
        return super().forward(inputs.clone(), hx)


def test_a_layer_with_a_forward_of_its_own_is_flossed_where_its_weights_are():
    model = Regressor("GRU", lr=0.0)
    model.rnn = Passing(FEATURES, 8, batch_first=True)
    model.head = nn.Linear(8, 1)
    inputs = next(iter(series(1)))[0]
    before = lyapunov_spectrum(model.rnn, inputs, num_exponents=2).mean(0)
    fit(model, GradientFlossing(num_exponents=2, lr=0.03, strict=True))
    assert (lyapunov_spectrum(model.rnn, inputs, num_exponents=2).mean(0).abs() < 0.3 * before.abs()).all()


# When


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [5]),
        ({"every_n_train_steps": 2}, [5, 3, 3, 3]),
        ({"every_n_epochs": 1}, [5, 3, 3]),
        ({"every_n_train_steps": 2, "steps": 0}, [3, 3, 3]),
    ],
)
def test_it_flosses_when_it_is_due(options, expected, monkeypatch):
    counting = Counting(monkeypatch)
    fit(Regressor(), GradientFlossing(**QUICK | {"steps_later": 3, **options}), data=series(3))  # six steps
    assert counting.steps == expected


@pytest.mark.parametrize(("options", "later"), [({}, []), ({"every_n_train_steps": 2, "steps_later": 3}, [3, 3])])
def test_a_resumed_run_is_not_flossed_again(options, later, monkeypatch, tmp_path):
    counting = Counting(monkeypatch)
    trainer = fit(Adam(), GradientFlossing(**QUICK | options), max_steps=3)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    counting.steps.clear()
    model = Adam()
    fit(model, GradientFlossing(**QUICK | options), max_steps=6, max_epochs=9, ckpt_path=tmp_path / "last.ckpt")
    assert counting.steps == later


def test_another_run_of_the_same_callback_is_flossed(monkeypatch):
    counting, flossing = Counting(monkeypatch), GradientFlossing(**QUICK)
    fit(Regressor(), flossing)
    fit(Regressor(), copy.deepcopy(flossing))
    fit(Regressor(), pickle.loads(pickle.dumps(flossing)))
    assert counting.steps == [5, 5, 5]


def test_it_lives_beside_a_monitor_and_a_rule():
    flossing, model = GradientFlossing(num_exponents=2, lr=0.03, every_n_train_steps=2), Regressor()
    monitor = LyapunovMonitor(every_n_train_steps=1, warmup=2, strict=True)
    trainer = fit(model, monitor, flossing, InstabilityStopping(), data=series(3))
    assert trainer.global_step == 6
    assert monitor.history["rnn"]["step"].tolist() == [0, 1, 2, 3, 4, 5]
    # The monitor before it in the list has measured before, and sees the change one step later.
    first, second = monitor.history["rnn"]["spectrum"][:2, 0]
    assert second > first + 0.1
    assert len(hooks_of(model)) == 0


# What it says where it cannot


@pytest.mark.parametrize("error", [RuntimeError("no luck"), torch.linalg.LinAlgError("singular"), ValueError("bad")])
def test_a_failure_is_one_warning_and_the_run_goes_on(error, monkeypatch):
    plain, guest = Adam(), Adam()
    fit(plain)
    Counting(monkeypatch, error)
    with pytest.warns(UserWarning, match="was not flossed") as given:
        fit(guest, GradientFlossing(every_n_train_steps=1))
    assert len(messages(given, "flossed")) == 1
    assert str(error) in str(given[0].message) or any(str(error) in text for text in messages(given))
    assert_equal(guest.state_dict(), plain.state_dict())
    with pytest.raises(RuntimeError, match=str(error)):
        fit(Adam(), GradientFlossing(strict=True))


def test_a_layer_that_is_not_called_is_a_warning():
    model = Regressor()
    model.other = nn.GRU(FEATURES, 4)
    flossing = GradientFlossing(**QUICK)
    with pytest.warns(UserWarning, match="`other` was not flossed.*not called as a module"):
        fit(model, flossing)
    assert set(flossing.results) == {"rnn"}


class Inside(nn.Module):
    """A loop whose state no call returns."""

    def __init__(self):
        super().__init__()
        self.up, self.across = nn.Linear(FEATURES, 5), nn.Linear(5, 5)

    def forward(self, inputs):
        h, outputs = inputs.new_zeros(len(inputs), 5), []
        for x in inputs.unbind(1):
            h = torch.tanh(self.up(x) + self.across(h))
            outputs.append(h)
        return torch.stack(outputs, 1)


class Outside(Regressor):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, inputs):
        return self.head(self.rnn(inputs))


def test_what_no_graph_reaches_is_refused_with_the_line_to_write():
    with pytest.raises(ValueError, match=r"`rnn` cannot be flossed.*register_layer\(cls, step=\.\.\., read_call"):
        fit(Outside(Inside()), GradientFlossing(modules="rnn"))


class Making(nn.RNN):
    """Makes its recurrent weight in its forward."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.raw = nn.Parameter(self.weight_hh_l0.detach().clone())
        del self.weight_hh_l0
        self.weight_hh_l0 = self.raw * 0.5

    def forward(self, inputs, hx=None):
        self.weight_hh_l0 = self.raw * 0.5
        self._flat_weights = [getattr(self, name) for name in self._flat_weights_names]
        return super().forward(inputs, hx)


def test_weights_that_a_forward_makes_are_refused_with_the_line_to_write():
    model = Regressor("RNN")
    model.rnn = Making(FEATURES, 5, batch_first=True)
    with pytest.raises(ValueError, match=r"makes the weights that it uses.*register_parametrization"):
        fit(model, GradientFlossing())


def test_sharded_weights_are_refused_with_the_line_to_write(monkeypatch):
    monkeypatch.setattr(module_of_callback, "is_sharded", lambda module: True)
    with pytest.raises(ValueError, match=r"lyapunov_init_\(self\.rnn, inputs\)` in `configure_model`"):
        fit(Regressor(), GradientFlossing())


def test_layers_that_are_not_trained_are_left_out_or_refused(monkeypatch):
    counting, model = Counting(monkeypatch), Regressor()
    model.rnn.requires_grad_(False)
    with pytest.raises(ValueError, match=r"lyapunov_init_\(model\.rnn, inputs\)"):
        fit(model, GradientFlossing())
    with pytest.raises(ValueError, match="`rnn` is not trained"):
        fit(model, GradientFlossing("rnn"))
    model.sometimes = nn.GRU(FEATURES, 4, batch_first=True)
    monkeypatch.setattr(Regressor, "forward", lambda self, x: self.head(self.rnn(x)[0]) + self.sometimes(x)[0].mean())
    flossing = GradientFlossing(**QUICK)
    fit(model, flossing)
    assert set(flossing.results) == {"sometimes"}
    assert counting.steps == [5]


@pytest.mark.parametrize(
    "options",
    [
        {"num_exponents": 0},
        {"steps": -1},
        {"steps_later": 0},
        {"every_n_epochs": 0.5},
        {"lr": 0.0},
        {"target": torch.inf},
    ],
)
def test_bad_arguments_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        GradientFlossing(**options)
    with pytest.raises(ValueError, match="`nothing`"):
        fit(Regressor(), GradientFlossing("nothing"))


def test_every_hook_is_guarded_and_says_so():
    hooks = [name for name in vars(GradientFlossing) if name.startswith("on_") or name == "teardown"]
    assert len(hooks) == 6
    for name in hooks:
        assert "uarded" in inspect.getdoc(getattr(GradientFlossing, name))
        assert hasattr(getattr(GradientFlossing, name), "__wrapped__")


def test_errors_of_the_function_name_its_argument():
    with pytest.raises(TypeError, match="`module` cannot be followed") as caught:
        lyapunov_init_(nn.Linear(3, 3), torch.zeros(5, 2, 3))
    assert "`dynamics`" not in str(caught.value)


# Several processes


class Ranks(RankModel):
    """The batches of a rank are its own, and the weights stay."""

    def on_after_backward(self) -> None:
        self.zero_grad()


@pytest.mark.parametrize("mark", [pytest.param(None, marks=in_processes)])
@pytest.mark.parametrize("change", [None, shorter])
def test_all_ranks_have_the_weights_of_the_first(change, mark, tmp_path):
    flossing = GradientFlossing(**QUICK | {"steps": 20}, every_n_train_steps=2, strict=True)
    results = fit_distributed(Ranks(change), 2, tmp_path, flossing, data=series(8))
    assert_all_know_the_same(results)
    values = results[1]["values"][-1]
    assert values["lyapunov/flossing/rnn/distance_after"] <= values["lyapunov/flossing/rnn/distance_before"]
    assert not torch.equal(results[1]["weights"]["rnn.weight_hh_l0"], Ranks().rnn.weight_hh_l0)
    assert_equal(results[1]["weights"]["rnn.weight_ih_l0"], Ranks().rnn.weight_ih_l0.detach())


def fail_on_the_first(trainer, *arguments, **options):
    raise RuntimeError("no luck")


@pytest.mark.parametrize("mark", [pytest.param(None, marks=in_processes)])
def test_no_rank_waits_for_one_that_fails(mark, tmp_path, monkeypatch):
    monkeypatch.setattr(module_of_callback, "floss_", fail_on_the_first)
    results = fit_distributed(Ranks(), 2, tmp_path, GradientFlossing(**QUICK, every_n_train_steps=1))
    assert_all_know_the_same(results)
    assert_equal(results[1]["weights"]["rnn.weight_hh_l0"], Ranks().rnn.weight_hh_l0.detach())
    assert not [key for key in results[0]["values"][-1] if "flossing" in key]
