"""Traces and energies of resolvents: values, derivatives, transforms, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operator_contract import OperatorContract, Refusal, bad_matrices
from sample_inputs import EPS, diagonal, gaussian, half_examples, symmetric
from torch import Tensor

from immunize_ext import reference, testing
from immunize_ext.ops import resolvent_traces


def definite(*batch: int, p: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    x = gaussian(*batch, p + 2, p, seed=seed)
    return (x.mT @ x).to(dtype)


def ridges(*batch: int, s: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return gaussian(*batch, s, seed=seed).square().to(dtype)


def problem(*batch: int, p: int = 4, s: int = 3, m: int = 2, seed: int = 1) -> tuple[Tensor, ...]:
    return (
        definite(*batch, p=p, seed=seed),
        ridges(*batch, s=s, seed=seed + 1),
        gaussian(*batch, p, m, seed=seed + 2),
    )


def positive(shifts: Tensor) -> Tensor:
    """Shifts of any sign as ridges, so that every input of the contract is one of the operator."""
    return shifts.square() + 0.5


def traces(a: Tensor, shifts: Tensor | None = None, vectors: Tensor | None = None):
    """One argument is enough to be refused for it."""
    return resolvent_traces(a, torch.ones(1) if shifts is None else shifts, vectors)


class TestContract(OperatorContract):
    function = staticmethod(traces)
    name = "resolvent_traces"
    smooth = {
        "matrix": problem(),
        "one": problem(p=1, s=1, m=1, seed=7),
        "batch": problem(2, 3, p=3),
        "repeated": (diagonal(1, 1, 2, 3, 3), ridges(), gaussian(5, 2)),
    }
    degenerate = {
        "zero": (torch.zeros(3, 3).double(), ridges(), gaussian(3, 2)),
        "no vectors": problem(m=0),
    }
    node = "_Resolvents"
    large = problem(3, p=30)
    poisons = {
        **dict.fromkeys(("zero", "rank_one", "huge", "tiny"), "independent"),
        "nan": "raised",
    }
    refusals = bad_matrices(
        "a",
        Refusal((gaussian(2, 3), torch.ones(2)), "a must .*shape"),
        Refusal((gaussian(3, 3), torch.ones(2)), "a must .*symmetric"),
        Refusal((torch.eye(3), torch.ones(2, 2)), "shifts must have shape"),
        Refusal((torch.eye(3), torch.ones(2, dtype=torch.int64)), "shifts must .*floating-point"),
        Refusal((torch.eye(3), torch.tensor([1.0, -1.0])), "shifts must make a .*definite"),
        Refusal((torch.eye(3), torch.ones(1), torch.ones(2, 1)), "vectors must have shape"),
        Refusal((torch.eye(3), torch.tensor([float("nan")])), "shifts must be finite"),
        Refusal((torch.eye(3), torch.ones(1), torch.full((3, 1), torch.inf)), "vectors must be"),
    )
    # Inverses are differentiable to every order, and by several inputs at once: tests below.
    test_third_derivative_is_refused = None
    test_second_derivative_is_refused_at_kinks = None
    test_second_derivative_equals_the_reference = None
    test_jacobian_and_hessian = None

    def call(self, a, shifts, vectors):
        return resolvent_traces((a + a.mT) / 2, positive(shifts), vectors)

    def sample(self, *batch, seed=1, dtype=torch.float64):
        return tuple(x.to(dtype) for x in problem(*batch, seed=seed))

    def truth(self, a, shifts, vectors):
        return reference.resolvent_traces(a.numpy(), positive(shifts).numpy(), vectors.numpy())

    def true_gradients(self, inputs, cotangents):
        a, shifts, vectors = inputs
        found = reference.resolvent_traces_gradient(
            a.numpy(),
            positive(shifts).numpy(),
            vectors.numpy(),
            *(w.numpy() for w in cotangents),
        )
        return found.a, 2.0 * shifts.numpy() * found.shifts, found.vectors

    def composition(self, a, shifts, vectors):
        k = positive(shifts)[..., None, None]
        h = ((a + a.mT) / 2)[..., None, :, :]
        b = torch.linalg.inv(h + k * torch.eye(a.shape[-1], dtype=a.dtype))
        share = h @ b
        return (
            share.diagonal(dim1=-2, dim2=-1).sum(-1),
            (share @ share).diagonal(dim1=-2, dim2=-1).sum(-1),
            (b @ vectors[..., None, :, :]).square().sum(-2),
        )


@half_examples
@given(data=st.data())
def test_values_are_those_of_the_chosen_spectrum(route, data):
    """Graded and singular, at scales of 1e-30 to 1e30, with ridges far below and far above."""
    p, seed = data.draw(st.integers(1, 20)), data.draw(st.integers(0, 1000))
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.standard_normal((p, p)))[0]
    values = np.logspace(0, -data.draw(st.floats(0, 12)), p) * rng.choice(
        [1.0, 0.0], p, p=[0.8, 0.2]
    )
    scale = 10.0 ** data.draw(st.integers(-30, 30))
    k = 10.0 ** rng.uniform(-6, 6, 4)
    h = torch.from_numpy(scale * ((q * values) @ q.T))
    b = rng.standard_normal((p, 2))
    found = resolvent_traces((h + h.mT) / 2, torch.from_numpy(scale * k), torch.from_numpy(q @ b))
    share = values / (values + k[:, None])
    # Eigenvalues are known to p eps of the largest, and their sum with k is what divides.
    noise = 64 * p * EPS * (1.0 + p / k)
    assert np.all(np.abs(found.first.numpy() - share.sum(1)) <= noise)
    assert np.all(np.abs(found.second.numpy() - (share**2).sum(1)) <= 2 * noise)
    energies = ((b / (values + k[:, None])[..., None]) ** 2).sum(1) / scale**2
    error = np.abs(found.energies.numpy() - energies) / energies
    assert np.all(error <= 64 * p * EPS * (1.0 + 1.0 / k[:, None]))


@pytest.mark.parametrize("p", [2, 3, 12, 13, 33, 100, 257])
def test_sides(route, p):
    a, shifts, vectors = problem(p=p, s=2, m=1)
    shifts = shifts + 0.1
    found = resolvent_traces(a, shifts, vectors)
    truth = reference.resolvent_traces(a.numpy(), shifts.numpy(), vectors.numpy())
    for value, right in zip(found, truth, strict=True):
        np.testing.assert_allclose(value.numpy(), right, rtol=1e-9)
    leaves = [x.requires_grad_() for x in (a, shifts, vectors)]
    weights = [gaussian(*v.shape, seed=5 + k) for k, v in enumerate(found)]
    grads = torch.autograd.grad(resolvent_traces(*leaves), leaves, weights)
    true = reference.resolvent_traces_gradient(
        *(x.detach().numpy() for x in leaves), *(w.numpy() for w in weights)
    )
    for grad, right in zip(grads, true, strict=True):
        testing.assert_gradients_close(grad, torch.from_numpy(right), rtol=1e-9)


def test_a_beyond_the_side_where_blocks_begin():
    """The reduction takes blocks of reflectors from 700 on."""
    p = 710
    x = gaussian(p, p, seed=3) / p**0.5
    a, shifts, vectors = x.mT @ x, torch.tensor([0.1, 2.0]).double(), gaussian(p, 1)
    found = resolvent_traces(a, shifts, vectors)
    values, columns = torch.linalg.eigh(a)
    share = values / (values + shifts[:, None])
    torch.testing.assert_close(found.first, share.sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.second, share.square().sum(1), rtol=1e-12, atol=0)
    energy = ((columns.mT @ vectors).mT / (values + shifts[:, None])).square().sum(1)
    torch.testing.assert_close(found.energies[:, 0], energy, rtol=1e-11, atol=0)


def test_shifts_for_all_matrices_are_expanded(route):
    a, shifts, vectors = problem(2, p=3)
    one = resolvent_traces(a, shifts[0] + 0.1, vectors)
    same = resolvent_traces(a, (shifts[0] + 0.1).expand(2, -1).clone(), vectors)
    for found, right in zip(one, same, strict=True):
        assert torch.equal(found, right)
    assert resolvent_traces(a, shifts[0] + 0.1).energies.shape == (2, 3, 0)


def test_indefinite_matrices_take_a_larger_shift(route):
    a = diagonal(-1.0, 2.0)
    found = resolvent_traces(a, torch.tensor([2.0]).double())
    assert found.first.item() == pytest.approx(-1.0 + 0.5)
    with pytest.raises(ValueError, match=r"shifts must make a \+ shift I positive definite"):
        resolvent_traces(a, torch.tensor([1.0]).double())


def test_derivatives_of_every_order_and_direction(route):
    """Third derivatives by finite differences of the second; the Hessian by both modes."""
    a, shifts, vectors = (x[:2, :2] if x.dim() > 1 else x[:1] + 0.5 for x in problem())

    def scalar(a: Tensor, shifts: Tensor, vectors: Tensor) -> Tensor:
        found = resolvent_traces((a + a.mT) / 2, shifts, vectors)
        return found.first.sum() + found.second.square().sum() + found.energies.sin().sum()

    def slope(*inputs: Tensor) -> Tensor:
        return torch.stack([g.square().sum() for g in torch.func.grad(scalar, (0, 1, 2))(*inputs)])

    leaves = [x.clone().requires_grad_() for x in (a, shifts, vectors)]
    assert torch.autograd.gradgradcheck(slope, leaves, fast_mode=True)
    forward = torch.func.jacfwd(torch.func.jacfwd(scalar, (0, 1, 2)), (0, 1, 2))(a, shifts, vectors)
    reverse = torch.func.hessian(scalar, (0, 1, 2))(a, shifts, vectors)
    for rows, others in zip(forward, reverse, strict=True):
        for found, right in zip(rows, others, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-11)


def test_symmetric_gradients_and_untouched_shifts(route):
    """The gradient in a is symmetric to the bit, and a shift that nobody reads has none."""
    a, shifts, vectors = problem(p=5, s=4)
    leaves = [x.requires_grad_() for x in (a, shifts + 0.1, vectors)]
    found = resolvent_traces(*leaves)
    of_a, of_shifts, _ = torch.autograd.grad(found.first[1] + found.energies[1, 0], leaves)
    assert torch.equal(of_a, of_a.mT)
    assert (of_shifts != 0).tolist() == [False, True, False, False]


def test_the_eigenvalues_of_a_lone_symmetric_matrix_are_not_needed_to_be_apart(route):
    """At repeated eigenvalues, where those of eigenvectors do not exist, derivatives do."""
    a = symmetric(3, seed=2)
    a = (a @ a + torch.eye(3)).requires_grad_()
    k = torch.tensor([1.0]).double()
    for h in (torch.eye(3).double().requires_grad_(), a):
        assert torch.autograd.gradcheck(
            lambda x: resolvent_traces((x + x.mT) / 2, k, gaussian(3, 1))[:3], (h,)
        )
