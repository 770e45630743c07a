"""Elimination, Cholesky's and Householder's method: the next frame and the growth rates."""

import math

import pytest
import torch
from helpers import assert_near, randn
from hypothesis import given
from hypothesis import strategies as st

from lightning_lyapunov.kernel import orthonormalise


@given(st.integers(1, 9), st.data())
def test_elimination_goes_on_with_p_times_l(rows, data):
    vectors = randn(2, rows, data.draw(st.integers(1, rows)))
    permutation, lower, upper = torch.linalg.lu(vectors)
    alive = torch.ones(2, vectors.shape[-1], dtype=torch.bool)
    frame, growth, log_condition = orthonormalise.eliminate(vectors, alive, math.inf)
    assert_near(frame, permutation @ lower, 1e-15)
    assert_near(growth, upper.diagonal(dim1=-2, dim2=-1).abs().log())
    assert log_condition == pytest.approx(float((vectors.abs().amax((-2, -1))[:, None].log() - growth).amax()))


@pytest.mark.parametrize("count", [1, 31, 33, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthonormal_frame_is_that_of_householders_method(count, dtype):
    vectors, alive = randn(2, 90, count).to(dtype), torch.ones(2, count, dtype=torch.bool)
    expected, factor = torch.linalg.qr(vectors.double())
    signs = factor.diagonal(dim1=-2, dim2=-1).sign()
    frame, growth, _ = orthonormalise.orthonormalise_cholesky(vectors.clone(), alive, math.inf)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    assert_near(frame.double(), expected * signs.unsqueeze(-2), tolerance)
    assert_near(growth, factor.diagonal(dim1=-2, dim2=-1).abs().log(), tolerance)


@pytest.mark.parametrize("dead", [0, 1, 2, 3])
def test_a_dead_vector_takes_nothing_from_those_behind_it(dead):
    vectors, alive = randn(2, 5, 4), torch.ones(2, 4, dtype=torch.bool)
    vectors[0, :, dead], alive[0, dead] = 0, False
    living = [j for j in range(4) if j != dead]
    expected = torch.linalg.qr(vectors[0][:, living]).R.diagonal().abs().log()
    frame, growth, _ = orthonormalise.eliminate(vectors, alive, math.inf)
    assert_near(growth[0, living] + torch.linalg.qr(frame[0][:, living]).R.diagonal().abs().log(), expected)
    for known in (alive, torch.ones_like(alive)):
        _, growth, _, alive_after, finite = orthonormalise.orthonormalise_householder(vectors, known)
        assert_near(growth[0, living], expected)
        assert alive_after[0].tolist() == [j != dead for j in range(4)]
        assert alive_after[1].all()
        assert finite.all()


@given(st.integers(1, 4), st.integers(1, 9), st.data())
def test_the_order_of_the_rows_is_the_same_on_a_gpu(batch, rows, data):
    """By permutation matrices there, because reading the pivots would wait for the device."""
    vectors = randn(batch, rows, data.draw(st.integers(1, rows)))
    pivots = torch.linalg.lu_factor_ex(vectors).pivots
    expected = orthonormalise._rows_after_pivoting(pivots, rows)
    assert torch.equal(orthonormalise._rows_by_matrices(pivots, rows), expected)
