"""Changes a task does not see: exact nullity, bounds over adversarial draws, the cheapest step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from immunize_ext import reference
from immunize_ext.errors import NotPositiveDefiniteError
from immunize_ext.ops import InputSubspace, clip_spectral_norm, gauss_newton_step, project_out


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def definite(seed: int, *shape: int) -> Tensor:
    root = draw(seed, *shape)
    return root @ root.mT + 0.1 * torch.eye(shape[-1], dtype=root.dtype)


seeds = st.integers(0, 2**31)


@given(seeds, st.integers(1, 6), st.integers(2, 9), st.integers(1, 7))
def test_rows_of_the_task_see_nothing(seed: int, o: int, d: int, rank: int) -> None:
    rows = draw(seed, 12, min(rank, d - 1)) @ draw(seed + 1, min(rank, d - 1), d)
    found = InputSubspace.of(rows)
    assert found.basis.shape[1] == min(rank, d - 1)
    delta = project_out(draw(seed + 2, o, d), found.basis)
    bound = 1e-13 * float(torch.linalg.matrix_norm(rows, 2)) * float(delta.norm())
    assert float((rows @ delta.mT).abs().max()) <= bound
    by_gram = InputSubspace.of(rows.mT @ rows, count=len(rows))
    assert by_gram.basis.shape == found.basis.shape


def test_one_free_direction_is_the_last_singular_vector() -> None:
    rows = draw(0, 20, 4) @ draw(1, 4, 5)
    last = torch.linalg.svd(rows).Vh[-1]
    delta = project_out(draw(2, 3, 5), InputSubspace.of(rows).basis)
    torch.testing.assert_close(delta, (delta @ last)[:, None] * last, atol=1e-12, rtol=0)


@given(seeds, st.integers(1, 5), st.integers(1, 8), st.floats(0.01, 1.0), st.booleans())
def test_no_change_that_is_allowed_drifts_further(
    seed: int, o: int, d: int, explained: float, whole: bool
) -> None:
    """Over adversarial draws: the worst change of the ball, and whatever chance proposes."""
    rows = draw(seed, 11, d) * torch.logspace(0, -3, d, dtype=torch.float64)
    found = InputSubspace.of(rows, explained=1.0 if whole else explained)
    change = clip_spectral_norm(project_out(10.0 * draw(seed + 1, o, d), found.basis), 0.7)
    held_out = draw(seed + 2, 5, d)
    moved, rounding = (held_out @ change.mT).norm(dim=1), 1e-14 * held_out.norm(dim=1)
    assert bool((moved <= 0.7 * found.rest(held_out) + rounding).all())
    bound = found.drift(0.7, o)
    assert float((rows @ change.mT).norm()) / math.sqrt(11) <= bound * (1 + 1e-9) + 1e-14
    # The worst one: the leading free directions, whole. The bound is theirs.
    left = project_out(torch.eye(d, dtype=torch.float64), found.basis)
    right = torch.linalg.svd(rows @ left).Vh[: min(o, len(found.tail))]
    worst = 0.7 * torch.linalg.qr(draw(seed + 3, o, o)).Q[:, : len(right)] @ right
    reached = float((rows @ worst.mT).norm()) / math.sqrt(11)
    assert reached == pytest.approx(bound, rel=1e-6, abs=1e-12)


def test_rank_one_along_the_next_vector_is_tight() -> None:
    rows = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))
    found = InputSubspace.of(rows, explained=16 / 21)
    delta = torch.tensor([[0.0, 0.5, 0.0]], dtype=torch.float64)
    assert math.sqrt(float((rows @ delta.mT).square().sum()) / 3) == found.drift(0.5, 1)


@pytest.mark.parametrize("rows", [torch.zeros(3, 4), torch.ones(1, 2), torch.ones(5, 1)])
def test_edges_of_the_subspace(rows: Tensor) -> None:
    found = InputSubspace.of(rows)
    rank = int(rows.any())
    assert found.basis.shape == (rows.shape[1], rank)
    assert len(found.tail) == rows.shape[1] - rank


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rank_of_a_gram_matrix_is_that_of_its_dtype(dtype: torch.dtype) -> None:
    for seed in range(20):
        rows = torch.linalg.qr(draw(seed, 50, 3)).Q @ torch.linalg.qr(draw(seed + 1, 8, 3)).Q.mT
        gram = (rows.mT @ rows).to(dtype)
        assert InputSubspace.of(gram, count=50).basis.shape == (8, 3)
    wide = torch.eye(200, dtype=dtype)  # 200 eps of bfloat16 is more than 1
    assert InputSubspace.of(wide, count=1).basis.shape == (200, 200)


@pytest.mark.parametrize(("second", "rank"), [(1e-12, 2), (0.0, 1)])
def test_many_rows_neither_hide_a_direction_nor_make_one(second: float, rank: int) -> None:
    rows = draw(0, 100_000, 2) * torch.tensor([1.0, second], dtype=torch.float64)
    rows = rows @ torch.linalg.qr(draw(1, 2, 2)).Q
    found = InputSubspace.of(rows)
    assert found.basis.shape == (2, rank)
    drawn = draw(2, 3, 2)
    delta = project_out(drawn, found.basis)
    bound = math.sqrt(rows.numel()) * torch.finfo(torch.float64).eps * float(rows.norm())
    assert float((rows @ delta.mT).norm(dim=1).max()) <= bound * float(drawn.norm())


def test_what_fits_already_comes_back_as_it_is() -> None:
    change = torch.linalg.qr(draw(0, 6, 6)).Q * 0.9  # of Frobenius norm 2.2
    assert torch.equal(clip_spectral_norm(change, 1.0), change)
    both = torch.stack([change, 3.0 * change])
    found = clip_spectral_norm(both, 1.0)
    assert torch.equal(found[0], change)
    assert float(torch.linalg.matrix_norm(found[1], 2)) == pytest.approx(1.0, abs=1e-14)


@given(seeds, st.integers(1, 5), st.integers(1, 5), st.floats(0.0, 3.0))
def test_clipping_is_the_reference_and_nearest(seed: int, o: int, d: int, limit: float) -> None:
    change = draw(seed, o, d)
    found = clip_spectral_norm(change, limit)
    expected = reference.clip_spectral_norm(change.numpy(), limit)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    assert float(torch.linalg.matrix_norm(found, 2)) <= limit * (1 + 1e-12) + 1e-300
    other = clip_spectral_norm(draw(seed + 1, o, d), limit)
    assert float((found - change).norm()) <= float((other - change).norm()) + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_stay(dtype: torch.dtype) -> None:
    g, basis = draw(0, 3, 4).to(dtype), torch.linalg.qr(draw(1, 4, 2)).Q
    assert project_out(g, basis).dtype == dtype
    assert clip_spectral_norm(g, 0.5).dtype == dtype
    step = gauss_newton_step(g, definite(2, 4, 4), definite(3, 3, 3), 1.0)
    assert step.change.dtype == step.worth.dtype == dtype


def test_projection_is_the_reference_and_differentiable() -> None:
    g, basis = draw(0, 2, 3, 5), torch.linalg.qr(draw(1, 5, 2)).Q
    expected = reference.project_out(g.numpy(), basis.numpy())
    np.testing.assert_allclose(project_out(g, basis).numpy(), expected, atol=1e-14)
    inputs = g.requires_grad_(), basis.requires_grad_()
    assert gradcheck(project_out, inputs, check_forward_ad=True)
    assert gradgradcheck(project_out, inputs)
    assert torch.equal(project_out(g.detach(), basis.detach()[:, :0]), g.detach())


@given(seeds, st.integers(1, 4), st.integers(1, 4), st.floats(0.01, 10.0))
def test_cheapest_step_is_the_reference_and_beats_all_others(
    seed: int, o: int, d: int, budget: float
) -> None:
    g, a, b = draw(seed, o, d), definite(seed + 1, d, d), definite(seed + 2, o, o)
    change, worth = gauss_newton_step(g, a, b, budget)
    expected, value = reference.gauss_newton_step(g.numpy(), a.numpy(), b.numpy(), budget)
    np.testing.assert_allclose(change.numpy(), expected, rtol=1e-7, atol=1e-9)
    assert float(worth) == pytest.approx(value, rel=1e-9)
    assert float((change * (b @ change @ a)).sum()) == pytest.approx(budget, rel=1e-9)
    assert float(-(g * change).sum()) == pytest.approx(float(worth), rel=1e-9)
    other = draw(seed + 3, o, d)
    other = other * (budget / (other * (b @ other @ a)).sum()).sqrt()
    assert float((g * other).sum()) >= -float(worth) * (1 + 1e-9)


def test_cheapest_step_is_differentiable_and_batched() -> None:
    g, a, b = draw(0, 2, 3, 4), definite(1, 2, 4, 4), definite(2, 3, 3)
    budget = torch.tensor(0.5, dtype=torch.float64)
    inputs = tuple(t.requires_grad_() for t in (g, a, b, budget))
    assert gradcheck(lambda *t: tuple(gauss_newton_step(*t)), inputs, atol=1e-6)
    one = gauss_newton_step(g[1], a[1], b, 0.5)
    torch.testing.assert_close(gauss_newton_step(g, a, b, 0.5).change[1], one.change)


def test_no_gradient_gives_no_step_and_no_slope() -> None:
    g = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    step = gauss_newton_step(g, definite(0, 2, 2), definite(1, 2, 2), 1.0)
    assert not step.change.any()
    (slope,) = torch.autograd.grad(step.worth, g)
    assert not slope.any()


@pytest.mark.parametrize("scale", [1e-170, 1e-308, 1e170])
def test_length_of_the_gradient_is_no_matter(scale: float) -> None:
    g, a, b = draw(0, 2, 3, 4), definite(1, 4, 4), definite(2, 3, 3)
    g[1] *= 1e3
    one, far = gauss_newton_step(g, a, b, 0.5), gauss_newton_step(scale * g, a, b, 0.5)
    torch.testing.assert_close(far.change, one.change, rtol=1e-10, atol=0)
    torch.testing.assert_close(far.worth / scale, one.worth, rtol=1e-10, atol=0)


def test_what_has_no_derivative_is_refused_by_name() -> None:
    moving = draw(0, 3, 3).requires_grad_()
    with pytest.raises(NotImplementedError, match=r"InputSubspace.of: the derivative in rows"):
        InputSubspace.of(moving)
    with pytest.raises(NotImplementedError, match="clip_spectral_norm: the derivative in change"):
        clip_spectral_norm(moving, 1.0)
    with torch.no_grad():
        assert clip_spectral_norm(moving, 1e-3).norm() > 0


def test_bad_arguments_are_refused_by_name() -> None:
    eye = torch.eye(2)
    with pytest.raises(ValueError, match=r"InputSubspace.of: explained must be above 0"):
        InputSubspace.of(eye, explained=0.0)
    with pytest.raises(ValueError, match=r"rows must have shape \(d, d\) for a count"):
        InputSubspace.of(torch.ones(3, 2), count=3)
    with pytest.raises(ValueError, match=r"InputSubspace.of: rows must be finite"):
        InputSubspace.of(eye * math.nan)
    with pytest.raises(ValueError, match="project_out: basis must have shape"):
        project_out(torch.ones(2, 3), eye)
    with pytest.raises(ValueError, match="limit must not be negative"):
        clip_spectral_norm(eye, -1.0)
    with pytest.raises(ValueError, match="gauss_newton_step: budget must be positive"):
        gauss_newton_step(eye, eye, eye, 0.0)
    with pytest.raises(ValueError, match="budget must be positive and finite, got inf"):
        gauss_newton_step(eye, eye, eye, math.inf)
    for argument in range(3):
        wrong = [eye * math.nan if i == argument else eye for i in range(3)]
        expected = f"step: {('gradient', 'inputs', 'outputs')[argument]} must be finite"
        with pytest.raises(ValueError, match=expected):
            gauss_newton_step(*wrong, 1.0)
    for batches in ((2, 3, 1, 1), (2, 1, 3, 1), (1, 2, 1, 3)):
        g, a, b = (eye.expand(n, 2, 2) for n in batches[:3])
        with pytest.raises(ValueError, match="inputs, outputs and budget must have batches"):
            gauss_newton_step(g, a, b, torch.ones(batches[3]))
    with pytest.raises(ValueError, match=r"outputs must have shape \(\*, 2, 2\)"):
        gauss_newton_step(eye, eye, torch.eye(3), 1.0)
    with pytest.raises(NotPositiveDefiniteError, match="gauss_newton_step: inputs must be pos"):
        gauss_newton_step(eye, -eye, eye, 1.0)
