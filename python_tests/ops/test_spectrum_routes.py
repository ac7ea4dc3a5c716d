"""Every route to the extremes against scipy, on both sides of each threshold that parts them.

The thin Gram matrix settles what it can prove and hands the rest to a decomposition; which of the
two served cannot be seen from outside, so matrices are built where each of them has to.
"""

import numpy as np
import pytest
import scipy.linalg
import torch

from immunize_ext.ops import extremal_singular_values, gram_extremes, symmetric_extremes
from immunize_ext.ops.regularizers import gram_r_ill

EPS = float(np.finfo(np.float64).eps)
SHAPES = [(1, 7), (3, 3), (13, 200), (64, 784), (300, 40), (90, 90), (260, 300)]
# The Gram matrix alone is right to 1e4, refined to about 3e6 and of no use beyond.
LOG_KAPPAS = [0, 1, 3, 4, 5, 6, 6.4, 6.6, 7, 9, 12]


def with_singular_values(sigma, n, p, seed=0):
    """Matrix (n, p) with the given descending singular values."""
    generator = torch.Generator().manual_seed(seed)
    side = len(sigma)
    u = torch.linalg.qr(torch.randn(n, side, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(p, side, generator=generator, dtype=torch.float64))[0]
    return (u * torch.as_tensor(sigma, dtype=torch.float64)) @ v.mT


def triplets(a):
    """Values and vectors of the raw operator, with the default tolerances."""
    tolerance = max(a.shape[-2:]) * EPS
    values = torch.ops.immunize_ext.extremal_singular_values(a, tolerance, tolerance, False)
    return [(values[0], values[5], values[6]), (values[1], values[7], values[8])]


@pytest.mark.parametrize("log_kappa", LOG_KAPPAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_kappa_is_in_the_class_of_gesdd(shape, log_kappa):
    side = min(shape)
    a = with_singular_values(np.logspace(0, -log_kappa, side), *shape)
    truth = scipy.linalg.svdvals(a.numpy())
    found = extremal_singular_values(a)
    bound = 4 * np.sqrt(sum(shape)) * EPS * truth[0]
    assert abs(found.sigma_max.item() - truth[0]) <= bound
    assert abs(found.sigma_min.item() - truth[-1]) <= bound
    assert found.rank.item() == side
    for sigma, u, v in triplets(a):
        # Two residuals within the class: a triplet of a matrix that close.
        assert (a @ v - sigma * u).norm() <= bound
        assert (a.mT @ u - sigma * v).norm() <= bound
        assert u.norm().item() == pytest.approx(1.0, abs=1e-13)
        assert v.norm().item() == pytest.approx(1.0, abs=1e-13)


@pytest.mark.parametrize("log_kappa", LOG_KAPPAS)
@pytest.mark.parametrize("shape", [(20, 60), (60, 20)])
def test_vectors_are_as_good_as_the_gap_allows(shape, log_kappa):
    """The backward error over the gap, whatever the route.

    On the long side the null space is a neighbour as well, at the distance sigma_min.
    """
    sigma = np.ones(20)
    sigma[0], sigma[1:-1] = 2.0, np.linspace(1.5, 1.0, 18)
    sigma[-1] = 10.0**-log_kappa / 2
    a = with_singular_values(sigma, *shape)
    u, s, vh = np.linalg.svd(a.numpy(), full_matrices=False)
    (_, _, _), (_, found_u, found_v) = triplets(a)
    thin_gap, long_gap = s[-2] - s[-1], min(s[-2] - s[-1], s[-1])
    gaps = (thin_gap, long_gap) if shape[0] < shape[1] else (long_gap, thin_gap)
    for found, truth, gap in zip((found_u, found_v), (u[:, -1], vh[-1]), gaps, strict=True):
        aligned = found.numpy() * np.sign(found.numpy() @ truth)
        assert np.linalg.norm(aligned - truth) <= 200 * EPS * s[0] / gap


@pytest.mark.parametrize("log_next", [-9, -7.6, -7.3, -7, -6, -4])
def test_rank_decisions_in_float64(log_next):
    """The sixth value crosses what a Gram matrix can tell from zero; five always count."""
    sigma = [1.0, 0.5, 0.3, 0.2, 0.1, 10.0**log_next, 0.0, 0.0]
    found = extremal_singular_values(with_singular_values(sigma, 8, 30))
    assert found.rank.item() == 6
    assert found.sigma_min.item() == pytest.approx(10.0**log_next, abs=100 * EPS)


@pytest.mark.parametrize("factor", [0.2, 0.9, 0.999, 1.001, 1.1, 5.0])
def test_rank_threshold_of_the_caller(factor):
    """On the Gram route: a wide tolerance puts the threshold far above its noise."""
    sigma = [1.0, 0.7, 0.4, 1e-3 * factor]
    found = extremal_singular_values(with_singular_values(sigma, 4, 9), rank_rtol=1e-3)
    assert found.rank.item() == (4 if factor > 1 else 3)
    assert found.sigma_min.item() == pytest.approx(sigma[found.rank.item() - 1], rel=1e-13)


@pytest.mark.parametrize("distance", [1e-15, 1e-13, 5e-12, 1e-8, 1e-4])
@pytest.mark.parametrize("cluster_rtol", [1e-12, 1e-6])
def test_cluster_decisions(distance, cluster_rtol):
    sigma = [1.0, 1.0 - distance, 0.5, 0.1 + distance, 0.1]
    found = extremal_singular_values(with_singular_values(sigma, 5, 12), cluster_rtol=cluster_rtol)
    expected = 2 if distance < cluster_rtol else 1
    assert found.multiplicity_max.item() == expected
    assert found.multiplicity_min.item() == expected


def test_a_batch_of_every_route_equals_single_calls():
    """An element that is handed over leaves the others bitwise unchanged."""
    a = torch.stack(
        [with_singular_values(np.logspace(0, -k, 12), 12, 50, seed=k) for k in (0, 2, 5, 8, 11)]
        + [torch.zeros(12, 50, dtype=torch.float64)]
    )
    batch = extremal_singular_values(a)
    for index, matrix in enumerate(a):
        single = extremal_singular_values(matrix)
        for field, value in zip(single._fields, single, strict=True):
            assert torch.equal(getattr(batch, field)[index], value), (index, field)


@pytest.mark.parametrize("shape", [(64, 784), (784, 64), (5, 30, 40)])
def test_threads_change_nothing(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            features = x.clone().requires_grad_()
            value = gram_r_ill(features)
            value.sum().backward()
            results.append((value.detach(), features.grad, *gram_extremes(x)))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(31, 200), (200, 31)])
def test_narrow_types_are_computed_in_float64(dtype, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    narrow, wide = extremal_singular_values(x), extremal_singular_values(x.double())
    assert torch.equal(narrow.sigma_max, wide.sigma_max.to(dtype))
    assert torch.equal(narrow.sigma_min, wide.sigma_min.to(dtype))


# From 192 on in two stages, whose blocks have 24 rows.
@pytest.mark.parametrize("side", [1, 2, 11, 12, 13, 48, 97, 191, 192, 193, 217, 218, 300])
@pytest.mark.parametrize("kind", ["random", "definite", "graded", "blocks", "banded", "arrow"])
def test_symmetric_extremes_equal_eigh(side, kind):
    generator = torch.Generator().manual_seed(side)
    h = torch.randn(side, side, generator=generator, dtype=torch.float64)
    h = (h + h.mT) / 2
    if kind == "definite":
        h = h @ h
    elif kind == "graded":
        q = torch.linalg.qr(h)[0]
        h = (q * torch.logspace(0, -14, side, dtype=torch.float64)) @ q.mT
        h = (h + h.mT) / 2
    elif kind == "blocks":
        h = torch.block_diag(h[: side // 2, : side // 2], h[side // 2 :, side // 2 :])
    elif kind == "banded":  # nothing to reflect in the first stage
        h = h.tril(3).triu(-3)
    elif kind == "arrow":  # nothing beside the last row and the diagonal
        h[:-1, :-1] = torch.diag(h.diagonal()[:-1])
    values = scipy.linalg.eigvalsh(h.numpy())
    found = symmetric_extremes(h)
    size = max(abs(values[0]), abs(values[-1]))
    bound = 4 * max(side, 16) * EPS * size
    assert abs(found.lambda_max.item() - values[-1]) <= bound
    assert abs(found.lambda_min.item() - values[0]) <= bound


def test_symmetric_extremes_need_no_lucky_start():
    """Extremes whose vectors are orthogonal to any start that is not random enough."""
    for sign in (1.0, -1.0):
        d = torch.tensor([1.0, 1.0 - 1e-6, 0.5] + [0.1] * 9, dtype=torch.float64) * sign
        found = symmetric_extremes(torch.diag(d))
        assert found.lambda_max.item() == d.max().item()
        assert found.lambda_min.item() == d.min().item()
    swap = symmetric_extremes(torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64))
    assert (swap.lambda_max.item(), swap.lambda_min.item()) == (1.0, -1.0)


@pytest.mark.parametrize("excess", [0.5, 2.0])
def test_asymmetry_beyond_rounding_is_refused(excess):
    h = torch.eye(9, dtype=torch.float64)
    h[0, 1] = excess * 8 * 3 * EPS
    if excess < 1:
        assert symmetric_extremes(h).lambda_max.item() == pytest.approx(1.0)
    else:
        with pytest.raises(ValueError, match="symmetric_extremes: h must be symmetric"):
            symmetric_extremes(h)
