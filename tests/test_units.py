"""The share of each unit in the growth."""

import pytest
import torch
from helpers import assert_near, randn, tensor
from torch import nn

from lightning_lyapunov import covariant_lyapunov_vectors, participation, unit_shares

UNITS = 60


def with_planted_block(module_class, strength, count, seed):
    """Return a calm network in which some units excite one another, and these units."""
    torch.manual_seed(seed)
    module, planted = module_class(2, UNITS).double(), torch.randperm(UNITS)[:count]
    block = torch.zeros(UNITS, dtype=torch.bool)
    block[planted] = True
    with torch.no_grad():
        for weight in module.weight_hh_l0.chunk(len(module.weight_hh_l0) // UNITS):
            weight.normal_(std=0.3 / UNITS**0.5)
        # The last gate: in a GRU that of the candidate state.
        weight[torch.outer(block, block)] = strength * randn(count**2) / count**0.5
    return module, planted


@pytest.mark.parametrize(("module_class", "strength", "count", "seed"), [(nn.RNN, 3.0, 20, 0), (nn.GRU, 12.0, 10, 1)])
def test_a_planted_unstable_block_is_found(module_class, strength, count, seed):
    module, planted = with_planted_block(module_class, strength, count, seed)
    inputs = 0.1 * randn(300, 2, 2)
    found = covariant_lyapunov_vectors(module, inputs, num_exponents=3, warmup=100, cooldown=50)
    assert found.growth_rates[..., 0].mean() > 0.01
    shares = unit_shares(*found)
    assert shares.shape == (UNITS,)
    assert_near(shares.sum(), tensor(1.0)[0])
    assert sorted(shares.topk(count).indices.tolist()) == sorted(planted.tolist())
    assert shares[planted].sum() > 0.9
    # Without the block the growth is spread over more units than it has.
    calm, _ = with_planted_block(module_class, 0.3, count, seed)
    spread = unit_shares(covariant_lyapunov_vectors(calm, inputs, num_exponents=3, warmup=100).vectors)
    assert participation(shares) < 0.4 < participation(spread)


def test_shares_are_those_of_the_squares():
    vectors = torch.linalg.qr(randn(5, 2, 6, 3)).Q
    shares = unit_shares(vectors)
    assert_near(shares, vectors.square().mean((0, 1)).sum(-1) / 3)
    assert_near(unit_shares(vectors, num_tensors=2), shares[:3] + shares[3:])
    rates = tensor(0.3, 0.1, -2.0).expand(5, 2, 3)
    assert_near(unit_shares(vectors, rates), (vectors.square().mean((0, 1)) @ tensor(0.75, 0.25, 0.0).squeeze()))
    assert_near(unit_shares(vectors, rates - 1), vectors[..., 0].square().mean((0, 1)))


def test_what_is_not_finite_and_what_is_dead_count_for_nothing():
    vectors = torch.linalg.qr(randn(5, 4, 2)).Q
    padded = torch.cat((vectors, torch.full((3, 4, 2), torch.nan).double()))
    padded = torch.cat((padded, torch.zeros(8, 4, 1).double()), -1)
    rates = torch.full((8, 3), 0.1).double().masked_fill(padded.isnan().any(-2), torch.nan)
    rates[:, 2] = -87.3
    assert_near(unit_shares(padded), unit_shares(vectors))
    assert_near(unit_shares(padded, rates), unit_shares(vectors))
    assert unit_shares(padded[5:]).isnan().all()


def test_participation_goes_from_one_unit_to_all():
    assert_near(participation(torch.eye(4).double()), torch.full((4,), 0.25).double())
    assert_near(participation(torch.full((3, 5), 0.2).double()), torch.ones(3).double())


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="`num_tensors=2` must divide the size of the state, 3"):
        unit_shares(randn(4, 3, 1), num_tensors=2)
    with pytest.raises(ValueError, match="`growth_rates` must be"):
        unit_shares(randn(4, 3, 1), randn(4, 3))
