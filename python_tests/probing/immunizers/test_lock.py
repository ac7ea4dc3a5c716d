"""Locks: nothing is left for linear probes, the price is the predicted one, refusals by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from immunize_ext.probing.certificates import linear_information
from immunize_ext.probing.data import Problem, Task, digits_task
from immunize_ext.probing.immunizers import (
    LabelDirectionImmunizer,
    LinearLock,
    PencilLock,
    best_head,
    lock_price,
)
from immunize_ext.probing.immunizers.lock import cross_covariance


def halves(task: Task) -> tuple[Task, Task]:
    """The defender's samples and the attacker's."""
    return tuple(  # type: ignore[return-value]
        Task(task.name, task.x_train[k::2], task.y_train[k::2], task.x_test, task.y_test)
        for k in (0, 1)
    )


@pytest.fixture(scope="module")
def problem() -> Problem[Task]:
    return Problem.of(digits_task((3,), (8,)), digits_task((4,), (9,)), digits_task((1,), (7,)))


def test_no_covariance_is_left_for_any_harm(problem: Problem[Task]) -> None:
    locked = LinearLock().fit(None, problem)
    for task in problem.harmful:
        x = task.x_train.double()
        before = cross_covariance(x, task.y_train).norm()
        left = cross_covariance(x @ locked.theta, task.y_train)
        assert float(left.norm()) <= 1e-12 * float(before)
        assert (
            linear_information(Task("t", x, task.y_train, x, task.y_train), locked.theta).r2 < 1e-12
        )
    rank = int(torch.linalg.matrix_rank(locked.theta))
    assert rank == locked.theta.shape[1] < 64, "a true rank reduction, in fewer columns"


def test_the_attacker_has_other_samples(problem: Problem[Task]) -> None:
    own, other = halves(problem.harmful[0])
    locked = LinearLock().fit(None, Problem.of(problem.primary, own))
    before = linear_information(other)
    after = linear_information(other, locked.theta)
    assert before.r2 > 0.8
    # What leaks is about p / n_d, for the attacker's best ridge down to 1e-8.
    assert after.r2 <= 4.0 * 64 / len(own.x_train)
    kept = [linear_information(problem.primary, t).accuracy for t in (None, locked.theta)]
    assert kept[0] is not None
    assert kept[1] is not None
    assert kept[1] >= kept[0] - 0.02


def test_without_a_variance_floor_signs_are_still_read(problem: Problem[Task]) -> None:
    """R^2 is gone, right answers are not: directions of tiny variance and heavy tails."""
    own, other = halves(problem.harmful[0])
    loose = LinearLock(variance_floor=0.0).fit(None, Problem.of(problem.primary, own))
    firm = LinearLock(variance_floor=1e-1).fit(None, Problem.of(problem.primary, own))
    signs = [linear_information(other, lock.theta).accuracy for lock in (loose, firm)]
    assert signs[0] is not None
    assert signs[1] is not None
    assert signs[0] > signs[1] + 0.05
    assert firm.theta.shape[1] < loose.theta.shape[1]


def test_the_price_is_what_formula_says_and_what_is_measured(problem: Problem[Task]) -> None:
    locked = LinearLock().fit(None, problem)
    end = locked.history[1]
    start = locked.history[0]
    measured = end["loss_primary"] - start["loss_primary"]
    assert measured == pytest.approx(end["price_of_cut"] + end["price_of_lock"], rel=1e-8)
    assert end["price_of_lock"] > 0.0


@pytest.mark.parametrize("rank", [1, 2])
def test_lock_price_against_constrained_least_squares(rank: int) -> None:
    """numpy: heads with Delta^T w = 0 are N c, N a basis of the complement."""
    rng = np.random.default_rng(rank)
    x, y, null = (
        rng.standard_normal((60, 7)),
        rng.standard_normal(60),
        rng.standard_normal((7, rank)),
    )
    x[:, 0] *= 30.0
    centred, target = x - x.mean(0), y - y.mean()

    def loss(basis: np.ndarray) -> float:
        z = centred @ basis
        head = np.linalg.lstsq(z, target, rcond=None)[0]
        return float(((z @ head - target) ** 2).mean())

    complement = np.linalg.svd(null.T, full_matrices=True)[2][rank:].T
    truth = loss(complement) - loss(np.eye(7))
    found = lock_price(*map(torch.from_numpy, (x, y, null)))
    assert found == pytest.approx(truth, rel=1e-10)
    # A direction that the features do not have costs nothing.
    wide = np.concatenate([x, np.zeros((60, 1))], 1)
    unit = np.eye(8)[:, 7:]
    assert lock_price(*map(torch.from_numpy, (wide, y, unit))) == pytest.approx(0.0, abs=1e-12)


def test_best_head_is_the_least_squares_one() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((40, 5)) + 3.0, rng.standard_normal(40)
    truth = np.linalg.lstsq(np.c_[x, np.ones(40)], y, rcond=None)[0]
    head = best_head(torch.from_numpy(x), torch.from_numpy(y))
    np.testing.assert_allclose(head.weight.numpy(), truth[:5], rtol=1e-9)
    assert float(head.bias) == pytest.approx(truth[5], rel=1e-9)


def test_pencil_lock_needs_no_labels(problem: Problem[Task]) -> None:
    shuffled = [
        Task(t.name, t.x_train, t.y_train.flip(0), t.x_test, t.y_test) for t in problem.harmful
    ]
    method = PencilLock(directions=10)
    first = method.fit(None, problem)
    second = method.fit(None, Problem.of(problem.primary, *shuffled))
    assert torch.equal(first.theta, second.theta)
    before, after = (linear_information(problem.harmful[0], t).r2 for t in (None, first.theta))
    assert after < 0.7 * before
    kept = [linear_information(problem.primary, t).r2 for t in (None, first.theta)]
    assert kept[1] > kept[0] - 0.15


def test_an_extractor_goes_before_a_lock(problem: Problem[Task]) -> None:
    theta0 = torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    locked = LinearLock().fit(theta0, problem)
    task = problem.harmful[0]
    assert torch.equal(locked.theta0, theta0)
    left = cross_covariance(task.x_train.double() @ locked.theta, task.y_train)
    assert float(left.norm()) < 1e-9


def test_label_direction_is_invertible_and_keeps_the_primary_function(
    problem: Problem[Task],
) -> None:
    one = Problem.of(problem.primary, problem.harmful[0])
    immunized = LabelDirectionImmunizer(strength=1e4).fit(None, one)
    theta = immunized.theta
    assert torch.linalg.cond(theta) < 1e6
    x = problem.primary.x_test.double()
    head = best_head(problem.primary.x_train, problem.primary.y_train)
    compensated = torch.linalg.solve(theta, head.weight)
    torch.testing.assert_close(x @ theta @ compensated, x @ head.weight, rtol=1e-8, atol=1e-8)
    # Variance along the harmful direction is divided, that beside it is kept in size.
    s = cross_covariance(problem.harmful[0].x_train.double(), problem.harmful[0].y_train)
    seen = cross_covariance(problem.harmful[0].x_train.double() @ theta, problem.harmful[0].y_train)
    assert float(seen.norm()) == pytest.approx(1e-2 * float(s.norm()), rel=1e-6)


def test_refusals(problem: Problem[Task]) -> None:
    x = problem.primary.x_train
    constant = Task("one class", x, torch.ones(len(x)).to(x), x, torch.ones(len(x)).to(x))
    still = Task("still", torch.ones_like(x), problem.primary.y_train, x, torch.ones(len(x)).to(x))
    with pytest.raises(ValueError, match="still must have labels that vary"):
        LabelDirectionImmunizer().fit(None, Problem.of(problem.primary, still))
    for method in (LinearLock(), LabelDirectionImmunizer()):
        with pytest.raises(ValueError, match="one class must have labels that vary"):
            method.fit(None, Problem.of(problem.primary, constant))
    with pytest.raises(ValueError, match="variance_floor must be at least 0 and below 1"):
        LinearLock(variance_floor=1.0)
    with pytest.raises(ValueError, match="directions must be at least 1"):
        PencilLock(directions=0)
    with pytest.raises(ValueError, match="strength must be finite and at least 1"):
        LabelDirectionImmunizer(strength=0.5)
    with pytest.raises(ValueError, match="must leave a direction to the primary task"):
        LinearLock(variance_floor=0.9).fit(None, problem)


def leace(x: Tensor, labels: Tensor, *, packaged: bool) -> Tensor:
    """P of the eraser x - (I - P)(x - mean), by its closed form or by its authors' package.

    With W = Sigma^(-1/2) and U the range of W Cov(x, z): P = I - W^-1 U U^T W (Belrose et al.,
    2023, theorem 4.3).
    """
    z = torch.nn.functional.one_hot(labels).double()
    if packaged:
        package = pytest.importorskip("concept_erasure", reason="concept-erasure is not installed")
        found: Tensor = package.LeaceEraser.fit(
            x, z, shrinkage=False, svd_tol=1e-8, constrain_cov_trace=False
        ).P
        return found
    centred = x - x.mean(0)
    values, vectors = np.linalg.eigh((centred.mT @ centred / len(x)).numpy())
    root, inverse = (vectors * values**power @ vectors.T for power in (0.5, -0.5))
    u, s, _ = np.linalg.svd(inverse @ (centred.mT @ (z - z.mean(0)) / len(x)).numpy())
    u = u[:, : np.count_nonzero(s > 1e-8)]
    return torch.from_numpy(np.eye(x.shape[1]) - root @ u @ u.T @ inverse)


@pytest.mark.parametrize("packaged", [False, True])
@pytest.mark.parametrize("classes", [2, 3])
def test_the_same_linear_functions_are_left_as_by_leace(classes: int, packaged: bool) -> None:
    """LEACE keeps all of x that is not correlated with the labels, and so does the lock.

    The metric in which it projects decides what is nearest to x, not what a probe can read.
    """
    generator = torch.Generator().manual_seed(classes)
    mix = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    labels = torch.arange(600) % classes
    means = torch.randn(classes, 8, generator=generator, dtype=torch.float64)
    x = (torch.randn(600, 8, generator=generator, dtype=torch.float64) + means[labels]) @ mix
    projection = leace(x, labels, packaged=packaged)
    erased = x - (x - x.mean(0)) @ (torch.eye(8).double() - projection).mT
    y = x @ torch.randn(8, generator=generator, dtype=torch.float64)
    harms = [
        Task(f"class {k}", x, torch.where(labels == k, 1.0, -1.0).double(), x, y.sign())
        for k in range(1, classes)
    ]
    primary = Task("primary", x, y, x, y)
    locked = LinearLock(variance_floor=0.0).fit(None, Problem.of(primary, *harms))
    assert locked.theta.shape == (8, 8 - (classes - 1))
    ours = torch.linalg.qr(locked.theta).Q
    # Rows of the eraser's projection span the heads that its features allow.
    left, sigma, _ = torch.linalg.svd(projection.mT)
    theirs = left[:, : 8 - (classes - 1)]
    assert float(sigma[8 - classes]) > 0.1 > 1e6 * float(sigma[8 - classes + 1])
    cosines = torch.linalg.svdvals(ours.mT @ theirs)
    torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=1e-7)
    for target in (y, harms[0].y_train):
        losses = [best_head(z, target).loss(z, target) for z in (x @ locked.theta, erased)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
