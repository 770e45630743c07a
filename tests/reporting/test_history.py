"""The history of measurements: its size, its state after a resume, and older layouts."""

import io
import itertools

import pytest
import torch
from helpers import assert_equal

from lightning_lyapunov.reporting.history import MAX_MEASUREMENTS, History


def test_errors_that_were_not_saved_are_unknown():
    history = History()
    history.load_state_dict({"history": {"rnn": {"step": torch.arange(2), "spectrum": torch.ones(2, 3)}}})
    assert history.tensors()["rnn"]["stderr"].isnan().all()
    assert_equal(history.tensors()["rnn"]["spectrum"], torch.ones(2, 3))


def spectrum_of(step, num_exponents=3):
    return torch.full((num_exponents,), float(step))


def measured(history, steps, cell="rnn", num_exponents=3):
    for step in steps:
        spectrum = spectrum_of(step, num_exponents)
        history.append(step, {cell: (spectrum, -spectrum)})
    return history


def through_a_file(history):
    file = io.BytesIO()
    torch.save(history.state_dict(), file)
    file.seek(0)
    other = History()
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def assert_covers(history, count):
    rows = history.tensors()["rnn"]
    steps = rows["step"].tolist()
    assert steps[0] == 0
    assert steps[-1] == count - 1
    assert min(count, MAX_MEASUREMENTS // 2) <= len(steps) <= MAX_MEASUREMENTS
    gaps = [later - earlier for earlier, later in itertools.pairwise(steps)]
    assert len(set(gaps[:-1])) <= 1
    assert all(gap <= gaps[0] for gap in gaps[-1:])
    assert_equal(rows["spectrum"], rows["step"].float()[:, None].expand(-1, 3))
    assert_equal(rows["stderr"], -rows["spectrum"])


COUNTS = [1, 2, 3, 999, 1000, 1001, 1002, 1003, 1500, 1999, 2000, 2001, 2002, 4001, 12_345]


@pytest.mark.parametrize("count", COUNTS)
def test_what_is_kept_covers_the_whole_run_evenly_with_its_ends(count):
    history = measured(History(), range(count))
    assert_covers(history, count)
    assert_covers(through_a_file(history), count)


@pytest.mark.parametrize("count", [1500, 2001, 5000])
@pytest.mark.parametrize("at", [1, 2, 1000, 1001, 1002, 1499])
def test_a_run_that_is_resumed_keeps_what_one_that_is_not_keeps(at, count):
    resumed = measured(through_a_file(measured(History(), range(at))), range(at, count))
    assert_equal(resumed.state_dict(), measured(History(), range(count)).state_dict())


@pytest.mark.parametrize("count", [1000, 1001, 1002, 2500, 10_000])
def test_a_long_history_of_the_first_layout_is_thinned_when_it_is_read(count):
    steps = torch.arange(count)
    rows = steps.float()[:, None].expand(-1, 3)
    history = History()
    history.load_state_dict({"history": {"rnn": {"step": steps, "spectrum": rows, "stderr": -rows}}})
    assert_covers(history, count)
    assert_covers(measured(history, range(count, count + 700)), count + 700)


@pytest.mark.slow
@pytest.mark.parametrize("num_exponents", [1, 16, 64])
@pytest.mark.parametrize("num_cells", [1, 3])
def test_a_file_grows_no_further(num_cells, num_exponents):
    def size(history):
        file = io.BytesIO()
        torch.save(history.state_dict(), file)
        return len(file.getvalue())

    history, sizes = History(), []
    cells = [f"rnn.l{index}" for index in range(num_cells)]
    bound = num_cells * (MAX_MEASUREMENTS * (8 * num_exponents + 8) + 2000) + 2000
    for start, end in itertools.pairwise([0, 900, 4000, 9000]):
        for cell in cells:
            measured(history, range(start, end), cell, num_exponents)
        sizes.append(size(history))
    assert max(sizes) <= bound
    assert max(sizes) >= 0.5 * bound - 4000


def test_cells_that_are_measured_at_different_times_are_thinned_apart():
    history = measured(measured(History(), range(5), "late"), range(3000))
    measured(history, range(5, 9), "late")
    assert history.tensors()["late"]["step"].tolist() == list(range(9))
    assert_covers(history, 3000)
