"""Dimension, entropy and the number of positive exponents of a spectrum."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor

from lightning_lyapunov import EXPONENT_FLOOR, kaplan_yorke_dimension, kolmogorov_sinai_entropy
from lightning_lyapunov.invariants import num_positive

INF, NAN = math.inf, math.nan


def dimension_of(spectrum):
    """Walk down the spectrum until the sum turns negative."""
    total = 0.0
    for j, exponent in enumerate(sorted(spectrum, reverse=True)):
        if total + exponent < 0:
            return j + total / abs(exponent) if j else 0.0
        total += exponent
    return float(len(spectrum))


def entropy_of(spectrum):
    return sum(exponent for exponent in spectrum if exponent > 0)


# Small fractions of two are added without rounding, so that a sum of zero is zero in any order.
exponents = st.integers(-64, 64).map(lambda n: n / 16) | st.just(EXPONENT_FLOOR)
spectra = st.integers(1, 6).flatmap(
    lambda size: st.lists(st.lists(exponents, min_size=size, max_size=size), min_size=1, max_size=4)
)


@given(spectra)
def test_dimension_is_that_of_a_walk_down_each_spectrum(batch):
    expected = tensor([dimension_of(spectrum) for spectrum in batch], dtype=torch.float64)
    torch.testing.assert_close(kaplan_yorke_dimension(tensor(batch, dtype=torch.float64)), expected, rtol=0, atol=1e-14)


@given(spectra)
def test_entropy_is_the_sum_of_the_positive_exponents_of_each_spectrum(batch):
    expected = tensor([entropy_of(spectrum) for spectrum in batch], dtype=torch.float64)
    assert torch.equal(kolmogorov_sinai_entropy(tensor(batch, dtype=torch.float64)), expected)


@given(spectra)
def test_number_of_positive_exponents_is_counted(batch):
    expected = tensor([sum(exponent > 0 for exponent in spectrum) for spectrum in batch], dtype=torch.float64)
    assert torch.equal(num_positive(tensor(batch, dtype=torch.float64)), expected)


@given(spectra, st.randoms())
def test_order_of_the_exponents_does_not_matter(batch, random):
    shuffled = [random.sample(spectrum, len(spectrum)) for spectrum in batch]
    for invariant in (kaplan_yorke_dimension, kolmogorov_sinai_entropy, num_positive):
        assert torch.equal(invariant(tensor(shuffled)), invariant(tensor(batch)))


@pytest.mark.parametrize(
    ("spectrum", "dimension"),
    [
        ([-1.0, -2.0], 0.0),  # forgets where it started
        ([-1e-30, -2.0], 0.0),
        ([0.0, -2.0], 1.0),
        ([0.0, 0.0, 0.0], 3.0),  # an isometry
        ([2.0, 1.0], 2.0),  # of a truncated spectrum: a lower bound
        ([1.0], 1.0),
        ([-1.0], 0.0),
        ([0.0], 1.0),
        ([1.0, -1.0], 2.0),  # volumes are kept
        ([1.0, -2.0], 1.5),
        ([1.0, 0.0, -4.0], 2.25),
        ([1.0, EXPONENT_FLOOR], 1 - 1 / EXPONENT_FLOOR),
        ([0.5, EXPONENT_FLOOR, EXPONENT_FLOOR], 1 - 0.5 / EXPONENT_FLOOR),
        ([EXPONENT_FLOOR, EXPONENT_FLOOR], 0.0),
        ([1.0, -INF], 1.0),  # no extent at all
        ([-INF, -INF], 0.0),
        ([0.0, -INF, -INF], 1.0),
        ([NAN], NAN),
        ([1.0, NAN, -1.0], NAN),
        ([NAN, -INF], NAN),
        # Sprott, Chaos and Time-Series Analysis (2003): the dimensions are rounded to six digits.
        ([0.419217, -1.623190], pytest.approx(1.258267, abs=1e-6)),
        ([0.90563, 0.0, -14.57219], pytest.approx(2.06215, abs=1e-5)),
        ([0.0714, 0.0, -5.3943], pytest.approx(2.0132, abs=1e-4)),
    ],
)
def test_dimension(spectrum, dimension):
    assert kaplan_yorke_dimension(tensor(spectrum, dtype=torch.float64)).item() == pytest.approx(dimension, nan_ok=True)


@pytest.mark.parametrize(
    ("spectrum", "entropy", "number"),
    [
        ([-1.0, -2.0], 0.0, 0.0),
        ([0.0, 0.0], 0.0, 0.0),
        ([0.5, 0.25, -2.0], 0.75, 2.0),
        ([0.5, EXPONENT_FLOOR], 0.5, 1.0),
        ([0.5, -INF], 0.5, 1.0),
        ([-INF], 0.0, 0.0),
        ([NAN, 1.0], NAN, NAN),
        ([-1.0, NAN], NAN, NAN),
    ],
)
def test_entropy_and_number_of_positive_exponents(spectrum, entropy, number):
    assert kolmogorov_sinai_entropy(tensor(spectrum)).item() == pytest.approx(entropy, nan_ok=True)
    assert num_positive(tensor(spectrum)).item() == pytest.approx(number, nan_ok=True)


@pytest.mark.parametrize("invariant", [kaplan_yorke_dimension, kolmogorov_sinai_entropy, num_positive])
@pytest.mark.parametrize("shape", [(5,), (1,), (2, 5), (0, 5), (2, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_keep_their_shape_and_dtype(invariant, shape, dtype):
    result = invariant(torch.randn(shape, dtype=dtype))
    assert (result.shape, result.dtype) == (shape[:-1], dtype)


def test_one_member_that_is_not_a_number_leaves_the_others_alone():
    assert kaplan_yorke_dimension(tensor([[NAN, -1.0], [1.0, -2.0]])).tolist() == pytest.approx([NAN, 1.5], nan_ok=True)


@pytest.mark.parametrize("invariant", [kaplan_yorke_dimension, kolmogorov_sinai_entropy, num_positive])
@pytest.mark.parametrize(
    ("spectrum", "message"),
    [
        (tensor([1, -2]), r"`spectrum` must be a tensor of real numbers, not torch.int64. Write `spectrum.double\(\)`"),
        (tensor([1j]), r"`spectrum` must be a tensor of real numbers, not torch.complex64"),
        ([1.0, -2.0], r"`spectrum` must be a tensor of real numbers, not list"),
        (tensor(1.0), r"`spectrum` of shape \(\) holds no exponents. Its shape must be \(..., num_exponents\)"),
        (torch.zeros(3, 0), r"`spectrum` of shape \(3, 0\) holds no exponents"),
    ],
)
def test_what_is_no_spectrum_is_refused(invariant, spectrum, message):
    with pytest.raises(ValueError, match=message):
        invariant(spectrum)
