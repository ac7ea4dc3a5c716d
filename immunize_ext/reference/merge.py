"""Key/value merge of one layer or of several, by routes that share nothing with the closed form.

The problem, for every layer alone, with D = W - W0, Q = C_reg^T C_reg + ridge I and
nu_j = 1 / mu_j (the *inverse hardness*; nu_j = 0 is a hard constraint):

    minimise  tr(D Q D^T) + sum_{nu_j > 0} |W c_j - v_j|^2 / nu_j
    subject to  W c_j = v_j  for nu_j = 0.

Shapes: W0 and W (out, d); C (s, d), its rows c_j; V (out, s); C_reg (m, d); R = V - W0 C^T.

Derivation of the closed form (:func:`merge_formula`).  With a multiplier matrix Z (out, s),

    D Q = Z C,        D C^T = R - Z diag(nu)                                              (KKT)

holds for hard rows (stationarity of the Lagrangian; the second equation is the constraint) and for
soft ones (the gradient of the penalty is Z = (R - D C^T) diag(1/nu)).  Hence D = Z C Q^-1, and the
second equation gives Z (C Q^-1 C^T + diag(nu)) = R:

    A = Q^-1 C^T,   T = C A + diag(nu),   W = W0 + R T^-1 A^T.

Two other routes to the same W:

* :func:`merge_null_space`.  An orthogonal basis of R^d by a pivoted QR of the hard rows,
  [Y | N] with C_hard N = 0.  D^T = Y a + N b: the constraints fix a, by least squares where
  rows repeat or contradict each other; b minimises the rest, a least squares problem
  with the matrix [C_reg; sqrt(ridge) I; diag(nu)^-1/2 C_soft] N that is never squared.  Q is not
  formed, so kappa(C_reg) counts and not its square.
* :func:`merge_kkt`.  The symmetric indefinite system of (KKT) in the unknowns D^T and -Z^T,

      [ Q   C^T      ] [  D^T ]   [  0  ]
      [ C  -diag(nu) ] [ -Z^T ] = [ R^T ],

  by minimum-norm least squares, which tolerates repeated rows with equal targets.

Repeated and dependent hard rows.  Where targets contradict each other no W exists.  The documented
answer ("average") satisfies the constraints in the least squares sense, which for a repeated row
is the mean of its targets, and minimises the rest among those.  The closed form gives the same with
the pseudo-inverse of T: then W C^T - V = -R (I - P) with P the projector onto the range of C.

Source: the merge of Custom Diffusion (equation 4) and MIMA for nu = 0, ridge = 0; the soft form of
unified concept editing for C_reg -> identity and finite mu.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import scipy.linalg

from immunize_ext.reference._arrays import FloatArray
from immunize_ext.reference._merge_problem import (
    CONTRADICTION_RTOL,
    DEPENDENCE_RTOL,
    Contradictions,
    MergeProblem,
    kkt_matrix,
    pseudo_inverse,
    regularization_root,
    require_contradictions_choice,
    restore_batch,
    row_and_null_space,
    single_problems,
)


def merge_null_space(
    base: npt.ArrayLike,
    values: npt.ArrayLike,
    c: npt.ArrayLike,
    c_reg: npt.ArrayLike | None,
    *,
    ridge: float = 0.0,
    relative: bool = True,
    inverse_hardness: npt.ArrayLike = 0.0,
    contradictions: Contradictions = "raise",
    dependence_rtol: float = DEPENDENCE_RTOL,
    contradiction_rtol: float = CONTRADICTION_RTOL,
) -> FloatArray:
    """Merged weights by the null-space method.

    Args:
        base: ``(*, out, d)`` base weights W0.
        values: ``(*, out, s)`` targets V.
        c: ``(*, s, d)`` concept embeddings, one row per target.
        c_reg: ``(*, m, d)`` regularization embeddings; None means Q = I.
        ridge: added to the diagonal of Q.
        relative: whether ridge counts in units of the mean diagonal of C_reg^T C_reg.
        inverse_hardness: scalar or ``(*, s)``, 1/mu; 0 is a hard constraint.
        contradictions: "raise", or "average" for the least squares answer.
        dependence_rtol: rows count as dependent below this, relative to the largest.
        contradiction_rtol: targets of dependent rows count as equal up to this, relative to
            |V| + |W0 C^T|.

    Returns:
        ``(*, out, d)`` float64.

    Raises:
        ValueError: Q is singular, hard targets contradict each other, or bad arguments.

    Note:
        Deterministic.  Derivatives: ``merge_gradients``.

    Example:
        >>> merge_null_space([[0.0, 0.0]], [[2.0]], [[1.0, 1.0]], [[1.0, 0.0], [0.0, 2.0]]).round(7)
        array([[1.6, 0.4]])
    """
    lead, problems = single_problems(
        "merge_null_space", base, values, c, c_reg, ridge, relative, inverse_hardness
    )
    results = [
        _null_space(problem, contradictions, dependence_rtol, contradiction_rtol)
        for problem in problems
    ]
    return restore_batch(results, lead, np.shape(base)[-2:])


def merge_kkt(
    base: npt.ArrayLike,
    values: npt.ArrayLike,
    c: npt.ArrayLike,
    c_reg: npt.ArrayLike | None,
    *,
    ridge: float = 0.0,
    relative: bool = True,
    inverse_hardness: npt.ArrayLike = 0.0,
) -> FloatArray:
    """Merged weights by the linear system of the optimality conditions, for consistent targets.

    Args:
        base: as in :func:`merge_null_space`.
        values: as in :func:`merge_null_space`.
        c: as in :func:`merge_null_space`.
        c_reg: as in :func:`merge_null_space`.
        ridge: as in :func:`merge_null_space`.
        relative: as in :func:`merge_null_space`.
        inverse_hardness: as in :func:`merge_null_space`.

    Returns:
        ``(*, out, d)`` float64.  With contradictory hard targets the result means nothing; use
        :func:`merge_null_space`.

    Raises:
        ValueError: Q is singular, or bad arguments.

    Example:
        >>> merge_kkt([[0.0, 0.0]], [[2.0]], [[1.0, 1.0]], [[1.0, 0.0], [0.0, 2.0]]).round(7)
        array([[1.6, 0.4]])
    """
    lead, problems = single_problems(
        "merge_kkt", base, values, c, c_reg, ridge, relative, inverse_hardness
    )
    results = [_kkt(problem) for problem in problems]
    return restore_batch(results, lead, np.shape(base)[-2:])


def merge_formula(
    base: npt.ArrayLike,
    values: npt.ArrayLike,
    c: npt.ArrayLike,
    c_reg: npt.ArrayLike | None,
    *,
    ridge: float = 0.0,
    relative: bool = True,
    inverse_hardness: npt.ArrayLike = 0.0,
    dependence_rtol: float = DEPENDENCE_RTOL,
) -> FloatArray:
    """Merged weights W0 + R T^+ A^T, the closed form with a pseudo-inverse.

    Contradictory hard targets are averaged.

    Args:
        base: as in :func:`merge_null_space`.
        values: as in :func:`merge_null_space`.
        c: as in :func:`merge_null_space`.
        c_reg: as in :func:`merge_null_space`.
        ridge: as in :func:`merge_null_space`.
        relative: as in :func:`merge_null_space`.
        inverse_hardness: as in :func:`merge_null_space`.
        dependence_rtol: square root of the relative eigenvalue of T below which it counts as 0.

    Returns:
        ``(*, out, d)`` float64.

    Raises:
        ValueError: Q is singular, or bad arguments.

    Example:
        >>> merge_formula([[0.0, 0.0]], [[2.0]], [[1.0, 1.0]], [[1.0, 0.0], [0.0, 2.0]]).round(7)
        array([[1.6, 0.4]])
    """
    lead, problems = single_problems(
        "merge_formula", base, values, c, c_reg, ridge, relative, inverse_hardness
    )
    results = [_formula(problem, dependence_rtol) for problem in problems]
    return restore_batch(results, lead, np.shape(base)[-2:])


def merge_layers(
    base: Sequence[npt.ArrayLike],
    concepts: Sequence[Sequence[npt.ArrayLike]] | None,
    embeddings: Sequence[npt.ArrayLike],
    c_reg: npt.ArrayLike | None,
    *,
    values: Sequence[npt.ArrayLike] | None = None,
    ridge: float = 0.0,
    relative: bool = True,
    inverse_hardness: npt.ArrayLike = 0.0,
    contradictions: Contradictions = "raise",
) -> list[FloatArray]:
    """Merged weights of several layers, with targets from concept weights or given.

    Args:
        base: per layer ``(out_l, d)``.
        concepts: concept-major, ``concepts[n][l]`` of shape ``(out_l, d)``; the targets of layer l
            are ``[W_1 C_1^T | ... | W_N C_N^T]``.  None where ``values`` are given.
        embeddings: per concept ``(s_n, d)``.
        c_reg: ``(m, d)`` or None for Q = I.
        values: per layer ``(out_l, s)`` targets in place of concept weights.
        ridge: as in :func:`merge_null_space`.
        relative: as in :func:`merge_null_space`.
        inverse_hardness: as in :func:`merge_null_space`.
        contradictions: as in :func:`merge_null_space`.

    Returns:
        Per layer ``(out_l, d)`` float64.

    Raises:
        ValueError: neither or both of ``concepts`` and ``values``, or as :func:`merge_null_space`.

    Example:
        >>> w = merge_layers([[[0.0, 0.0]]], [[[[1.0, 1.0]]]], [[[1.0, 1.0]]], None)
        >>> w[0].round(7)
        array([[1., 1.]])
    """
    c = stack_embeddings(embeddings)
    targets = layer_targets(base, concepts, embeddings, values)
    return [
        merge_null_space(
            weight,
            target,
            c,
            c_reg,
            ridge=ridge,
            relative=relative,
            inverse_hardness=inverse_hardness,
            contradictions=contradictions,
        )
        for weight, target in zip(base, targets, strict=True)
    ]


def stack_embeddings(embeddings: Sequence[npt.ArrayLike]) -> FloatArray:
    """The rows of all concepts below each other, ``(s, d)``.

    Args:
        embeddings: per concept ``(s_n, d)``; at least one.

    Returns:
        ``(s, d)`` float64.

    Raises:
        ValueError: no concept.

    Example:
        >>> stack_embeddings([[[1.0, 2.0]], [[3.0, 4.0]]]).shape
        (2, 2)
    """
    if len(embeddings) == 0:
        raise ValueError(
            "stack_embeddings: embeddings must hold at least one concept, got none; "
            "pass an array with no rows for a concept without tokens"
        )
    return np.concatenate([np.asarray(rows, dtype=np.float64) for rows in embeddings], axis=0)


def layer_targets(
    base: Sequence[npt.ArrayLike],
    concepts: Sequence[Sequence[npt.ArrayLike]] | None,
    embeddings: Sequence[npt.ArrayLike],
    values: Sequence[npt.ArrayLike] | None,
) -> list[FloatArray]:
    """Per layer the targets V: as given, or ``[W_1 C_1^T | ... | W_N C_N^T]``.

    Args:
        base: per layer ``(out_l, d)``; only its length is used.
        concepts: as in :func:`merge_layers`.
        embeddings: as in :func:`merge_layers`.
        values: as in :func:`merge_layers`.

    Returns:
        Per layer ``(out_l, s)`` float64.

    Raises:
        ValueError: neither or both of ``concepts`` and ``values``, or counts that do not fit.

    Example:
        >>> layer_targets([[[0.0]]], [[[[3.0]]]], [[[2.0]]], None)
        [array([[6.]])]
    """
    if (concepts is None) == (values is None):
        raise ValueError(
            "layer_targets: exactly one of concepts and values must be given, got "
            f"{'neither' if concepts is None else 'both'}; leave the other one None"
        )
    if values is not None:
        if len(values) != len(base):
            raise ValueError(
                f"layer_targets: values must have one entry per layer ({len(base)}), "
                f"got {len(values)}; list them in the order of base"
            )
        return [np.asarray(target, dtype=np.float64) for target in values]
    assert concepts is not None
    if len(concepts) != len(embeddings) or any(len(layers) != len(base) for layers in concepts):
        raise ValueError(
            f"layer_targets: concepts must be {len(embeddings)} lists of {len(base)} layers, got "
            f"lengths {[len(layers) for layers in concepts]}; order them concept first"
        )
    rows = [np.asarray(part, dtype=np.float64) for part in embeddings]
    return [
        np.concatenate(
            [
                np.asarray(layers[index], dtype=np.float64) @ part.T
                for layers, part in zip(concepts, rows, strict=True)
            ],
            axis=1,
        )
        for index in range(len(base))
    ]


def _null_space(
    problem: MergeProblem,
    contradictions: Contradictions,
    dependence_rtol: float,
    contradiction_rtol: float,
) -> FloatArray:
    root = regularization_root(problem, "merge_null_space")
    base, c, nu = problem.base, problem.c, problem.inverse_hardness
    if c.shape[0] == 0 or base.shape[0] == 0:
        return base.copy()
    residual = problem.values - base @ c.T  # R
    hard = nu == 0
    y, null = row_and_null_space(c[hard], dependence_rtol)
    fixed = np.zeros_like(base.T)
    if y.shape[1]:
        along = scipy.linalg.lstsq(c[hard] @ y, residual[:, hard].T)[0]
        fixed = y @ along
        left_over = residual[:, hard].T - c[hard] @ fixed
        _refuse_left_over(problem, left_over, contradictions, contradiction_rtol)
    if null.shape[1] == 0:
        return np.asarray(base + fixed.T)
    weight = 1.0 / np.sqrt(nu[~hard])
    design = np.concatenate([root, weight[:, None] * c[~hard]], axis=0)
    target = np.concatenate(
        [np.zeros((root.shape[0], base.shape[0])), weight[:, None] * residual[:, ~hard].T], axis=0
    )
    free = scipy.linalg.lstsq(design @ null, target - design @ fixed)[0]
    return np.asarray(base + (fixed + null @ free).T)


def _kkt(problem: MergeProblem) -> FloatArray:
    regularization_root(problem, "merge_kkt")
    base, c = problem.base, problem.c
    if c.shape[0] == 0 or base.shape[0] == 0:
        return base.copy()
    matrix, unit = kkt_matrix(problem)
    residual = (problem.values - base @ c.T).T / unit
    right = np.concatenate([np.zeros_like(base.T), residual], axis=0)
    return np.asarray(base + scipy.linalg.lstsq(matrix, right)[0][: base.shape[1]].T)


def _formula(problem: MergeProblem, dependence_rtol: float) -> FloatArray:
    root = regularization_root(problem, "merge_formula")
    if problem.c.shape[0] == 0 or problem.base.shape[0] == 0:
        return problem.base.copy()
    half = scipy.linalg.solve_triangular(root, problem.c.T, trans="T")  # F^-T C^T
    a = scipy.linalg.solve_triangular(root, half)
    t = half.T @ half + np.diag(problem.inverse_hardness)
    residual = problem.values - problem.base @ problem.c.T
    return np.asarray(problem.base + residual @ pseudo_inverse(t, dependence_rtol) @ a.T)


def _refuse_left_over(
    problem: MergeProblem, left_over: FloatArray, contradictions: Contradictions, rtol: float
) -> None:
    require_contradictions_choice(contradictions)
    if contradictions == "average" or left_over.size == 0:
        return
    scale = np.max(np.abs(problem.values)) + np.max(np.abs(problem.base @ problem.c.T))
    worst = np.max(np.abs(left_over), axis=1)
    hard_rows = np.flatnonzero(problem.inverse_hardness == 0)
    rows = hard_rows[worst > rtol * scale].tolist()
    if rows:
        raise ValueError(
            "merge_null_space: hard targets of dependent rows must agree, got contradictions at "
            f"rows {rows} of up to {float(np.max(worst)):.3g}; pass contradictions='average' or "
            "soften them"
        )
