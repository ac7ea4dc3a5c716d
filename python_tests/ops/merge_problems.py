"""What the merge tests share: calls on a sample problem, its reference, and bounds.

kappa(T) is the condition number of the s x s system and kappa(Q) that of the regularisation Gram
matrix.  Solving with Q and T loses eps (kappa(Q) + kappa(T)) of what the merge adds to W0; meeting
the constraints afterwards loses only eps kappa(T).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sample_inputs import EPS
from torch import Tensor

from immunize_ext import reference
from immunize_ext.ops import RegularizationFactor, merge_kv
from immunize_ext.testing.samples import MergeProblem


def numpy_of(tensors: Any) -> Any:
    """Nested sequences of tensors as float64 arrays."""
    if isinstance(tensors, Tensor):
        return tensors.detach().double().numpy()
    return None if tensors is None else [numpy_of(part) for part in tensors]


def factor_of(problem: MergeProblem) -> RegularizationFactor:
    return RegularizationFactor.from_embeddings(problem.c_reg, ridge=problem.ridge)


def solve(problem: MergeProblem, **options: Any) -> list[Tensor]:
    """The merge under test."""
    options.setdefault("hardness", problem.hardness)
    return merge_kv(
        problem.base,
        problem.concepts,
        problem.embeddings,
        factor_of(problem),
        values=problem.values,
        **options,
    )


def reference_of(problem: MergeProblem, **options: Any) -> list[np.ndarray]:
    """The null-space method on the same numbers: no T, no Q."""
    return reference.merge_layers(
        numpy_of(problem.base),
        numpy_of(problem.concepts),
        numpy_of(problem.embeddings),
        numpy_of(problem.c_reg),
        values=numpy_of(problem.values),
        ridge=problem.ridge,
        inverse_hardness=problem.inverse_hardness.numpy(),
        **options,
    )


def targets_of(problem: MergeProblem) -> list[np.ndarray]:
    """V of every layer (out_l, s)."""
    return reference.merge.layer_targets(
        numpy_of(problem.base),
        numpy_of(problem.concepts),
        numpy_of(problem.embeddings),
        numpy_of(problem.values),
    )


def conditions(problem: MergeProblem) -> tuple[float, float]:
    """kappa(Q) and kappa(T), from singular values of C_reg and without forming Q."""
    c_reg, c = numpy_of(problem.c_reg), np.concatenate(numpy_of(problem.embeddings))
    d = c.shape[1]
    ridge = reference.absolute_ridge(c_reg, problem.ridge)
    stacked = np.concatenate([c_reg, np.sqrt(ridge) * np.eye(d)])
    root = np.linalg.qr(stacked, mode="r")
    z = np.linalg.solve(root.T, c.T)
    t = z.T @ z + np.diag(problem.inverse_hardness.numpy())
    return float(np.linalg.cond(root)) ** 2, float(np.linalg.cond(t))


def assert_solves(problem: MergeProblem, merged: list[Tensor]) -> None:
    """Equal to the reference up to the rounding of both solves."""
    bound = 50 * EPS * sum(conditions(problem))
    for found, truth, base in zip(merged, reference_of(problem), problem.base, strict=True):
        moved = truth - numpy_of(base)
        error = np.linalg.norm(numpy_of(found) - truth)
        limit = bound * np.linalg.norm(moved) + 10 * EPS * np.linalg.norm(truth)
        # Not >, so that NaN counts as wrong.
        assert error <= limit, f"|W - reference| = {error:.3g} > {limit:.3g}"
