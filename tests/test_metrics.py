"""The metrics, compared with plain NumPy, and the rules of torchmetrics."""

import math
import pickle
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torchmetrics.wrappers import Running

from lightning_lyapunov import EXPONENT_FLOOR, lyapunov_metrics
from lightning_lyapunov.metrics import (
    KaplanYorkeDimension,
    KolmogorovSinaiEntropy,
    Log10GradientGain,
    LyapunovSpectrum,
    LyapunovStandardError,
    LyapunovSummary,
    MaximalLyapunovExponent,
    MaximalLyapunovStandardError,
    MeanLyapunovExponent,
    MemorySteps,
    NumFlooredExponents,
    NumPositiveExponents,
    NumSequences,
    ShareNearZero,
)

matplotlib.use("Agg")

COUNT = 5
_RNG = np.random.default_rng(0)
# Not in order of size: metrics sort what they report.
SPECTRA = np.array([0.2, 0.6, -0.1, -1.2, -0.5]) + _RNG.normal(size=(7, COUNT)) / 10
STEPS = np.array([10, 3, 25, 10, 7, 1, 10])


def estimate(spectra, steps):
    """The mean spectrum and its error by the textbook formula of a ratio estimate."""
    weights = steps[:, None] / steps.sum()
    mean = (weights * spectra).sum(0)
    stderr = np.sqrt(len(steps) / (len(steps) - 1) * (weights**2 * (spectra - mean) ** 2).sum(0))
    order = np.argsort(-mean)
    return SimpleNamespace(spectrum=mean[order], stderr=stderr[order], steps=steps.mean(), count=len(steps))


def kaplan_yorke(spectrum):
    total = 0.0
    for index, exponent in enumerate(spectrum):
        if total + exponent < 0:
            return index + total / -exponent
        total += exponent
    return len(spectrum)


REFERENCES = {
    LyapunovSpectrum: lambda e: e.spectrum,
    LyapunovStandardError: lambda e: e.stderr,
    MaximalLyapunovExponent: lambda e: e.spectrum[0],
    MaximalLyapunovStandardError: lambda e: e.stderr[0],
    MeanLyapunovExponent: lambda e: e.spectrum.mean(),
    KaplanYorkeDimension: lambda e: kaplan_yorke(e.spectrum),
    KolmogorovSinaiEntropy: lambda e: e.spectrum[e.spectrum > 0].sum(),
    NumPositiveExponents: lambda e: (e.spectrum > 0).sum(),
    NumFlooredExponents: lambda e: 0,
    NumSequences: lambda e: e.count,
    Log10GradientGain: lambda e: e.spectrum[0] * e.steps / np.log(10),
    MemorySteps: lambda e: 1 / abs(e.spectrum[0]),
    ShareNearZero: lambda e: np.mean([abs(exponent) * e.steps < 1 for exponent in e.spectrum]),
}
each_metric = pytest.mark.parametrize("metric_class", REFERENCES)


def updated(metric, rows=slice(None)):
    metric.update(torch.tensor(SPECTRA[rows]), steps=torch.tensor(STEPS[rows]))
    return metric


@each_metric
def test_value_is_that_of_the_definition(metric_class):
    expected = REFERENCES[metric_class](estimate(SPECTRA, STEPS))
    assert_close(updated(metric_class(COUNT)).compute().numpy(), np.asarray(expected), check_dtype=False)


@each_metric
@pytest.mark.parametrize("cuts", [[], [3], [1, 2, 3, 4, 5, 6], [0, 2, 2]], ids=str)
def test_any_split_of_the_data_gives_the_same_value(metric_class, cuts):
    metric = metric_class(COUNT)
    for rows in np.split(np.arange(len(SPECTRA)), cuts):
        updated(metric, rows)
    assert_close(metric.compute(), updated(metric_class(COUNT)).compute())


@each_metric
def test_merged_states_equal_one_state(metric_class):
    first, second = updated(metric_class(COUNT), slice(2)), updated(metric_class(COUNT), slice(2, None))
    first.merge_state(second)
    assert_close(first.compute(), updated(metric_class(COUNT)).compute())


@each_metric
def test_reset_forgets(metric_class):
    metric = updated(metric_class(COUNT), slice(4))
    metric.reset()
    assert_close(updated(metric, slice(4, None)).compute(), updated(metric_class(COUNT), slice(4, None)).compute())


@each_metric
@pytest.mark.parametrize(
    "copy", [lambda m: m.clone(), lambda m: pickle.loads(pickle.dumps(m))], ids=["clone", "pickle"]
)
def test_a_copy_goes_on_by_itself(metric_class, copy):
    metric = updated(metric_class(COUNT), slice(4))
    value, copied = metric.compute(), copy(metric)
    assert_close(updated(copied, slice(4, None)).compute(), updated(metric_class(COUNT)).compute())
    assert_close(metric.compute(), value)


@each_metric
def test_equal_metrics_are_distinct_keys(metric_class):
    assert len({metric_class(COUNT), metric_class(COUNT)}) == 2


@each_metric
def test_checkpoints_hold_no_state(metric_class):
    assert updated(metric_class(COUNT)).state_dict() == {}


@each_metric
def test_forward_returns_the_batch_and_keeps_the_sum(metric_class):
    metric = metric_class(COUNT)
    values = [metric(torch.tensor(SPECTRA[rows]), torch.tensor(STEPS[rows])) for rows in (slice(3), slice(3, None))]
    assert_close(values[1], updated(metric_class(COUNT), slice(3, None)).compute())
    assert_close(metric.compute(), updated(metric_class(COUNT)).compute())


@each_metric
def test_running_window_sees_the_last_updates_only(metric_class):
    metric = Running(metric_class(COUNT), window=2)
    for rows in (slice(2), slice(2, 4), slice(4, None)):
        updated(metric, rows)
    assert_close(metric.compute(), updated(metric_class(COUNT), slice(2, None)).compute())


@each_metric
def test_plot_draws_the_value(metric_class):
    figure, axis = updated(metric_class(COUNT)).plot()
    assert axis.figure is figure
    assert axis.has_data()
    matplotlib.pyplot.close(figure)


def test_spectrum_is_plotted_over_the_index_of_the_exponent():
    metric = updated(LyapunovSpectrum(COUNT))
    figure, axis = metric.plot()
    x, y = axis.lines[0].get_data()
    np.testing.assert_array_equal(x, range(1, COUNT + 1))
    np.testing.assert_allclose(np.asarray(y, float), metric.compute().numpy())
    matplotlib.pyplot.close(figure)


def test_spectra_given_to_plot_share_the_axis_given():
    figure, axis = matplotlib.pyplot.subplots()
    spectra = [torch.tensor(SPECTRA[0]), torch.tensor(SPECTRA[1])]
    assert LyapunovSpectrum(COUNT).plot(spectra, axis) == (figure, axis)
    np.testing.assert_allclose([line.get_ydata() for line in axis.lines[:2]], SPECTRA[:2])
    matplotlib.pyplot.close(figure)


def test_collection_updates_one_shared_state():
    collection = updated(lyapunov_metrics(COUNT))
    assert [set(group) for group in collection.compute_groups.values()] == [set(collection.keys())]
    metrics = collection.values(copy_state=False)
    assert len({metric.moments.data_ptr() for metric in metrics}) == 1


def test_collection_shares_its_state_from_the_first_update_even_if_it_is_nan():
    collection = lyapunov_metrics(COUNT)
    collection.update(torch.full((2, COUNT), torch.nan))
    assert len(collection.compute_groups) == 1


def test_collection_gives_the_values_of_its_members():
    collection = updated(lyapunov_metrics(COUNT, prefix="lyapunov/lstm/"))
    for key, value in collection.compute().items():
        metric = collection[key.removeprefix("lyapunov/lstm/")]
        assert_close(value, updated(type(metric)(COUNT)).compute())


def test_collection_counts_each_update_once():
    collection = lyapunov_metrics(COUNT)
    for rows in (slice(3), slice(3, None)):
        updated(collection, rows)
    assert collection.compute()["num_sequences"] == len(SPECTRA)


def test_the_summary_holds_the_values_of_the_collection():
    summary, collection = updated(LyapunovSummary(COUNT)).compute(), updated(lyapunov_metrics(COUNT)).compute()
    assert set(summary) == set(collection)
    for name, value in summary.items():
        assert_close(value, collection[name], rtol=0, atol=0)


def test_the_summary_is_gathered_once():
    gathered = []

    def gather(moments, group):
        gathered.append(moments)
        return [moments, moments]

    metric = updated(LyapunovSummary(COUNT, dist_sync_fn=gather, distributed_available_fn=lambda: True))
    assert metric.compute()["num_sequences"] == 2 * len(SPECTRA)
    assert len(gathered) == 1


# Memory, and exponents near zero


def value_of(metric_class, spectrum, steps=80, **options):
    metric = metric_class(len(spectrum))
    metric.update(torch.tensor([spectrum], dtype=torch.float64), steps=steps, **options)
    return metric.compute().item()


@pytest.mark.parametrize(
    ("spectrum", "memory"),
    [
        ([-0.05, -1.0], 20.0),
        ([-1.0, -0.05], 20.0),
        ([0.5, -0.5], 2.0),
        ([-2.0], 0.5),
        ([-0.0125], 80.0),
        ([-0.001, -1.0], 80.0),
        ([0.0], 80.0),
        ([-0.0], 80.0),
        ([1e-300], 80.0),
        ([EXPONENT_FLOOR, EXPONENT_FLOOR], 1 / -EXPONENT_FLOOR),
        ([-math.inf], 1 / -EXPONENT_FLOOR),
    ],
    ids=str,
)
def test_the_memory_is_the_time_of_an_e_fold_and_at_most_the_window(spectrum, memory):
    assert value_of(MemorySteps, spectrum) == pytest.approx(memory, rel=1e-12)


@pytest.mark.parametrize(
    ("spectrum", "share"),
    [
        ([0.5, 0.012, -0.012, -1.0], 0.5),
        ([0.013, -0.013, -1.0], 0.0),
        ([0.0, 0.0], 1.0),
        ([0.0], 1.0),
        ([0.2], 0.0),
        ([0.0, EXPONENT_FLOOR, -math.inf], 1 / 3),
        ([EXPONENT_FLOOR, EXPONENT_FLOOR], 0.0),
    ],
    ids=str,
)
def test_near_zero_is_what_changes_less_than_e_fold_over_the_window(spectrum, share):
    assert value_of(ShareNearZero, spectrum) == pytest.approx(share)


def test_a_longer_window_tells_more_from_zero():
    assert [value_of(ShareNearZero, [0.01, -0.001], steps) for steps in (50, 200, 2000)] == [1.0, 0.5, 0.0]
    assert [value_of(MemorySteps, [-0.01], steps) for steps in (50, 200)] == pytest.approx([50, 100])


@pytest.mark.parametrize("spectrum", [[math.nan], [-0.1, math.nan]], ids=str)
@pytest.mark.parametrize("metric_class", [MemorySteps, ShareNearZero])
def test_of_a_network_that_is_not_finite_neither_is_known(metric_class, spectrum):
    assert math.isnan(value_of(metric_class, spectrum))


@pytest.mark.parametrize(("metric_class", "whole"), [(Log10GradientGain, -8 / math.log(10)), (MemorySteps, 10.0)])
def test_stretches_of_a_sequence_are_together_as_long_as_it(metric_class, whole):
    metric = metric_class(1)
    metric.update(torch.full((8, 1), -0.1), steps=10, segments=8)
    assert metric.compute().item() == pytest.approx(whole)
    metric.update(torch.full((3, 1), -0.1), steps=80)
    assert metric.compute().item() == pytest.approx(whole)


def test_stretches_of_a_sequence_are_samples_for_the_error():
    spectra = torch.tensor(SPECTRA)
    whole, cut = (lyapunov_metrics(COUNT) for _ in range(2))
    whole.update(spectra, steps=10)
    cut.update(spectra, steps=10, segments=len(spectra))
    for name in ("spectrum", "stderr", "num_sequences"):
        assert_close(cut.compute()[name], whole.compute()[name])


def test_longer_sequences_weigh_more():
    metric = LyapunovSpectrum(1)
    metric.update(torch.tensor([[1.0], [4.0]]), steps=torch.tensor([20, 10]))
    assert metric.compute().item() == 2.0


@pytest.mark.parametrize("steps", [1.0, 50])
def test_standard_error_of_equal_lengths_is_the_usual_one(steps):
    metric = LyapunovStandardError(COUNT)
    metric.update(torch.tensor(SPECTRA), steps=steps)
    order = np.argsort(-SPECTRA.mean(0))
    np.testing.assert_allclose(metric.compute().numpy(), SPECTRA.std(0, ddof=1)[order] / math.sqrt(len(SPECTRA)))


def test_standard_error_of_close_large_exponents_survives_the_difference():
    exponents = 50 + torch.tensor([[1e-4], [2e-4], [3e-4]], dtype=torch.float64)
    metric = MaximalLyapunovStandardError(1)
    metric.update(exponents, steps=1000)
    assert metric.compute().item() == pytest.approx(exponents.std().item() / math.sqrt(3), rel=1e-2)


@each_metric
def test_sequence_of_no_steps_is_ignored(metric_class):
    metric = updated(metric_class(COUNT))
    metric.update(torch.full((2, COUNT), torch.nan), steps=0)
    assert_close(metric.compute(), updated(metric_class(COUNT)).compute())


def test_columns_are_averaged_before_they_are_sorted():
    metric = LyapunovSpectrum(2)
    metric.update(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    assert metric.compute().tolist() == [1.5, 0.5]


@pytest.mark.parametrize("dead", [-math.inf, EXPONENT_FLOOR, EXPONENT_FLOOR - 1])
def test_a_direction_dead_in_one_sequence_is_at_the_floor(dead):
    collection = lyapunov_metrics(2)
    collection.add_metrics({"degenerate": NumFlooredExponents(2)})
    collection.update(torch.tensor([[0.5, dead], [0.3, -1.0]]))
    values = collection.compute()
    assert_close(values["spectrum"], torch.tensor([0.4, EXPONENT_FLOOR]), check_dtype=False)
    assert values["stderr"][1] == 0
    assert values["degenerate"] == 1
    assert all(value.isfinite().all() for value in values.values())


@pytest.mark.parametrize("metric_class", [m for m in REFERENCES if m is not NumSequences])
def test_nan_stays_nan(metric_class):
    metric = updated(metric_class(COUNT))
    metric.update(torch.full((1, COUNT), torch.nan))
    assert metric.compute().isnan().all()


def test_one_nan_exponent_is_the_largest():
    metric = updated(MaximalLyapunovExponent(COUNT))
    metric.update(torch.tensor([[0.0, 0.0, 0.0, 0.0, math.nan]]))
    assert metric.compute().isnan()


def test_one_sequence_is_its_own_mean_and_has_no_error():
    metrics = updated(lyapunov_metrics(COUNT), slice(1)).compute()
    np.testing.assert_allclose(metrics["spectrum"].numpy(), np.sort(SPECTRA[0])[::-1])
    assert metrics["stderr"].isnan().all()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_is_known_before_the_first_update():
    assert LyapunovSpectrum(COUNT).compute().isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_spectra_of_any_precision_are_summed_in_float64(dtype):
    spectra = torch.tensor(SPECTRA).to(dtype)
    metric = LyapunovSpectrum(COUNT)
    metric.update(spectra)
    assert_close(metric.compute(), spectra.double().mean(0).sort(descending=True).values)


def test_gradients_do_not_flow_into_the_state():
    metric = LyapunovSpectrum(COUNT)
    metric.update(torch.tensor(SPECTRA, requires_grad=True))
    assert not metric.compute().requires_grad


@pytest.mark.parametrize("shape", [(COUNT,), (2, COUNT + 1), (2, 2, COUNT)], ids=str)
def test_wrong_shape_is_refused_by_name(shape):
    with pytest.raises(ValueError, match=r"`spectrum` to be of shape \(batch, 5\) but got"):
        LyapunovSpectrum(COUNT).update(torch.zeros(shape))


@pytest.mark.parametrize("num_exponents", [0, -1, 1.5, None])
def test_a_wrong_number_of_exponents_is_refused_by_name(num_exponents):
    with pytest.raises(ValueError, match=f"`num_exponents` to be a positive integer but got {num_exponents}"):
        LyapunovSpectrum(num_exponents)


def _process(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    collection = lyapunov_metrics(COUNT)
    # Four sequences on one rank and three on the other, then none on the second.
    updated(collection, slice(rank, None, 2))
    updated(collection, slice(2 * (1 - rank)))
    torch.save(collection.compute(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_every_process_gets_the_value_over_all_of_them(tmp_path):
    torch.multiprocessing.spawn(_process, (tmp_path,), nprocs=2)
    expected = updated(updated(lyapunov_metrics(COUNT)), slice(2)).compute()
    for rank in range(2):
        assert_close(torch.load(tmp_path / f"{rank}.pt"), dict(expected))
