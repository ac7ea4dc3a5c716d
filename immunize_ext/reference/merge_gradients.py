"""Gradients of the key/value merge by two routes: the closed form and implicit differentiation.

Symbols as in ``merge``; G = dL/dW (out, d) is the incoming gradient, sym(M) = (M + M^T)/2.

Derivation of the closed form.  W = W0 + R B, B = T^-1 A^T, A = Q^-1 C^T, T = C A + diag(nu),
R = V - W0 C^T.

    W = W0 + R B:          dR = G B^T,   dB = R^T G,   dW0 = G (direct)
    R = V - W0 C^T:        dV = dR,   dW0 -= dR C,   dC -= dR^T W0
    T B = A^T:             T dB' + dT' B = dA'^T, so with Y = T^-1 dB:
                           dA = Y^T,   dT = -sym(Y B^T)        (T symmetric)
    T = C A + diag(nu):    dC += dT A^T,   dA += C^T dT,   dnu = diag(dT)
    Q A = C^T:             dC += (Q^-1 dA)^T,   dQ = -sym(Q^-1 dA A^T)
    Q = C_reg^T C_reg + ridge I:   dC_reg = 2 C_reg dQ,   dridge = tr(dQ)

A relative ridge r stands for ridge = r |C_reg|_F^2 / d:
dr = tr(dQ) |C_reg|_F^2 / d and dC_reg += (2 r / d) tr(dQ) C_reg.

Derivation of the implicit route.  D = W - W0 and the multipliers Z solve

    [ Q   C^T      ] [  D^T ]   [  0  ]
    [ C  -diag(nu) ] [ -Z^T ] = [ R^T ]     in short  M x = f.

dL = <G^T, dD^T> = <lambda, df - dM x> with the symmetric M and M lambda = [G^T; 0],
lambda = [P; S]:

    dR = S^T,   dQ = -sym(P D),   dC = Z^T P^T - S D,   dnu_j = -(S Z)_jj

and R, Q as above.  No T, no B: only D, Z and one more solve.

Dependent hard rows.  T is singular and its pseudo-inverse is used.  The gradients of W0, V, C_reg,
ridge (the rank stays the same) are right.  C is differentiable only along perturbations that keep
the dependence, as when the repeated rows are one variable: summed over the repeats, dC is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg

from immunize_ext.reference._arrays import FloatArray, symmetric_part
from immunize_ext.reference._merge_problem import (
    MergeProblem,
    kkt_matrix,
    pseudo_inverse,
    regularization_root,
    restore_batch,
    single_candidates,
    single_problems,
)
from immunize_ext.reference.merge import layer_targets, stack_embeddings


@dataclass(frozen=True)
class MergeGradients:
    """Gradients dL of every input of the merge, in the shapes of the inputs."""

    base: FloatArray  # (*, out, d)
    values: FloatArray  # (*, out, s)
    c: FloatArray  # (*, s, d)
    c_reg: FloatArray  # (*, m, d)
    ridge: FloatArray  # (*,), of the ridge as it was passed, relative or absolute
    inverse_hardness: FloatArray  # (*, s)


@dataclass(frozen=True)
class LayersGradients:
    """dL with respect to every input of ``merge_layers``."""

    base: list[FloatArray]  # per layer (out_l, d)
    concepts: list[list[FloatArray]] | None  # concept-major, None where values were given
    values: list[FloatArray] | None  # per layer (out_l, s), None where concepts were given
    embeddings: list[FloatArray]  # per concept (s_n, d)
    c_reg: FloatArray  # (m, d); of the identity where None was passed
    ridge: float
    inverse_hardness: FloatArray  # (s,)


def merge_gradient(
    grad: npt.ArrayLike,
    base: npt.ArrayLike,
    values: npt.ArrayLike,
    c: npt.ArrayLike,
    c_reg: npt.ArrayLike | None,
    *,
    ridge: float = 0.0,
    relative: bool = True,
    inverse_hardness: npt.ArrayLike = 0.0,
) -> MergeGradients:
    """All gradients of the merge by the closed form.

    Args:
        grad: ``(*, out, d)``, dL/dW.
        base: as in ``merge.merge_null_space``.
        values: as in ``merge.merge_null_space``.
        c: as in ``merge.merge_null_space``.
        c_reg: as in ``merge.merge_null_space``.
        ridge: as in ``merge.merge_null_space``.
        relative: as in ``merge.merge_null_space``.
        inverse_hardness: as in ``merge.merge_null_space``.

    Returns:
        :class:`MergeGradients`.

    Raises:
        ValueError: Q is singular, or bad arguments.

    Example:
        >>> g = merge_gradient([[1.0, 0.0]], [[0.0, 0.0]], [[2.0]], [[1.0, 1.0]], None)
        >>> g.values, g.base
        (array([[0.5]]), array([[ 0.5, -0.5]]))
    """
    return _gradients(
        "merge_gradient", False, grad, base, values, c, c_reg, ridge, relative, inverse_hardness
    )


def merge_gradient_implicit(
    grad: npt.ArrayLike,
    base: npt.ArrayLike,
    values: npt.ArrayLike,
    c: npt.ArrayLike,
    c_reg: npt.ArrayLike | None,
    *,
    ridge: float = 0.0,
    relative: bool = True,
    inverse_hardness: npt.ArrayLike = 0.0,
) -> MergeGradients:
    """All gradients of the merge by implicit differentiation of its optimality conditions.

    Args:
        grad: as in :func:`merge_gradient`.
        base: as in :func:`merge_gradient`.
        values: as in :func:`merge_gradient`.
        c: as in :func:`merge_gradient`.
        c_reg: as in :func:`merge_gradient`.
        ridge: as in :func:`merge_gradient`.
        relative: as in :func:`merge_gradient`.
        inverse_hardness: as in :func:`merge_gradient`.

    Returns:
        :class:`MergeGradients`.

    Raises:
        ValueError: Q is singular, or bad arguments.

    Example:
        >>> g = merge_gradient_implicit([[1.0, 0.0]], [[0.0, 0.0]], [[2.0]], [[1.0, 1.0]], None)
        >>> g.values.round(7)
        array([[0.5]])
    """
    return _gradients(
        "merge_gradient_implicit",
        True,
        grad,
        base,
        values,
        c,
        c_reg,
        ridge,
        relative,
        inverse_hardness,
    )


# Derivation.  V_l = [W_1,l C_1^T | ... ], so with dV_n the columns of concept n:
# dW_n,l = dV_n C_n and dC_n += dV_n^T W_n,l; together with -dR_n^T W0 from R that is
# dR_n^T (W_n,l - W0_l).  Q and nu are shared: their gradients are sums over the layers.
def merge_layers_gradient(
    grads: Sequence[npt.ArrayLike],
    base: Sequence[npt.ArrayLike],
    concepts: Sequence[Sequence[npt.ArrayLike]] | None,
    embeddings: Sequence[npt.ArrayLike],
    c_reg: npt.ArrayLike | None,
    *,
    values: Sequence[npt.ArrayLike] | None = None,
    ridge: float = 0.0,
    relative: bool = True,
    inverse_hardness: npt.ArrayLike = 0.0,
) -> LayersGradients:
    """All gradients of ``merge_layers`` by the closed form.

    Args:
        grads: per layer ``(out_l, d)``, dL/dW_l.
        base: as in ``merge.merge_layers``.
        concepts: as in ``merge.merge_layers``.
        embeddings: as in ``merge.merge_layers``.
        c_reg: as in ``merge.merge_layers``.
        values: as in ``merge.merge_layers``.
        ridge: as in ``merge.merge_layers``.
        relative: as in ``merge.merge_layers``.
        inverse_hardness: as in ``merge.merge_layers``.

    Returns:
        :class:`LayersGradients`.

    Raises:
        ValueError: no layer, Q is singular, or bad arguments.

    Example:
        >>> g = merge_layers_gradient(
        ...     [[[1.0, 0.0]]], [[[0.0, 0.0]]], [[[[1.0, 1.0]]]], [[[1.0, 1.0]]], None
        ... )
        >>> g.concepts[0][0]
        array([[0.5, 0.5]])
    """
    if len(base) == 0 or len(grads) != len(base):
        raise ValueError(
            f"merge_layers_gradient: grads must have one entry per layer ({len(base)}, at least "
            f"one), got {len(grads)}; list them in the order of base"
        )
    rows = [np.asarray(part, dtype=np.float64) for part in embeddings]
    c = stack_embeddings(embeddings)
    targets = layer_targets(base, concepts, embeddings, values)
    layers = [
        merge_gradient(
            grad,
            weight,
            target,
            c,
            c_reg,
            ridge=ridge,
            relative=relative,
            inverse_hardness=inverse_hardness,
        )
        for grad, weight, target in zip(grads, base, targets, strict=True)
    ]
    dc = np.sum([layer.c for layer in layers], axis=0)
    cuts = np.cumsum([part.shape[0] for part in rows])[:-1]
    per_concept = [np.array(part) for part in np.split(dc, cuts, axis=0)]
    dconcepts: list[list[FloatArray]] | None = None
    if concepts is not None:
        dv = [np.split(layer.values, cuts, axis=1) for layer in layers]
        dconcepts = [
            [dv[index][n] @ part for index in range(len(base))] for n, part in enumerate(rows)
        ]
        for n, weights in enumerate(concepts):
            for index, weight in enumerate(weights):
                per_concept[n] += dv[index][n].T @ np.asarray(weight, dtype=np.float64)
    return LayersGradients(
        base=[layer.base for layer in layers],
        concepts=dconcepts,
        values=None if values is None else [layer.values for layer in layers],
        embeddings=per_concept,
        c_reg=np.asarray(np.sum([layer.c_reg for layer in layers], axis=0)),
        ridge=float(np.sum([layer.ridge for layer in layers])),
        inverse_hardness=np.asarray(np.sum([layer.inverse_hardness for layer in layers], axis=0)),
    )


def _gradients(
    function: str,
    implicit: bool,
    grad: npt.ArrayLike,
    base: npt.ArrayLike,
    values: npt.ArrayLike,
    c: npt.ArrayLike,
    c_reg: npt.ArrayLike | None,
    ridge: float,
    relative: bool,
    inverse_hardness: npt.ArrayLike,
) -> MergeGradients:
    lead, problems = single_problems(
        function, base, values, c, c_reg, ridge, relative, inverse_hardness
    )
    flat = single_candidates(function, "grad", grad, lead, np.shape(base)[-2:])
    one = _implicit if implicit else _closed_form
    parts = [
        one(function, problem, g, ridge if relative else None)
        for problem, g in zip(problems, flat, strict=True)
    ]
    d = np.shape(base)[-1]
    m = d if c_reg is None else np.shape(c_reg)[-2]
    s = np.shape(c)[-2]
    return MergeGradients(
        base=restore_batch([part.base for part in parts], lead, np.shape(base)[-2:]),
        values=restore_batch([part.values for part in parts], lead, np.shape(values)[-2:]),
        c=restore_batch([part.c for part in parts], lead, (s, d)),
        c_reg=restore_batch([part.c_reg for part in parts], lead, (m, d)),
        ridge=restore_batch([part.ridge for part in parts], lead, ()),
        inverse_hardness=restore_batch([part.inverse_hardness for part in parts], lead, (s,)),
    )


def _closed_form(
    function: str, problem: MergeProblem, g: FloatArray, relative_ridge: float | None
) -> MergeGradients:
    w0, c = problem.base, problem.c
    root = regularization_root(problem, function)

    def solve_q(right: FloatArray) -> FloatArray:
        half = scipy.linalg.solve_triangular(root, right, trans="T")
        return np.asarray(scipy.linalg.solve_triangular(root, half))

    if c.shape[0] == 0:
        return _finish(problem, relative_ridge, g, np.zeros_like(problem.values), c, root * 0.0, c)
    a = solve_q(c.T)
    t = symmetric_part(c @ a) + np.diag(problem.inverse_hardness)
    t_inverse = pseudo_inverse(t)
    b = t_inverse @ a.T
    r = problem.values - w0 @ c.T
    dr = g @ b.T
    y = t_inverse @ (r.T @ g)
    dt = -symmetric_part(y @ b.T)
    q_inverse_da = solve_q(y.T + c.T @ dt)
    dq = -symmetric_part(q_inverse_da @ a.T)
    dc = dt @ a.T + q_inverse_da.T - dr.T @ w0
    return _finish(problem, relative_ridge, g - dr @ c, dr, dc, dq, np.diagonal(dt).copy())


def _implicit(
    function: str, problem: MergeProblem, g: FloatArray, relative_ridge: float | None
) -> MergeGradients:
    w0, c = problem.base, problem.c
    out, d = w0.shape
    root = regularization_root(problem, function)
    if c.shape[0] == 0 or out == 0:
        zero_c = np.zeros_like(c)
        nothing = np.zeros(c.shape[0])
        return _finish(
            problem, relative_ridge, g, np.zeros_like(problem.values), zero_c, root * 0.0, nothing
        )
    # The scaled system of kkt_matrix: unknowns (D^T, -Z^T unit / size), rows (1 / size, 1 / unit).
    matrix, unit = kkt_matrix(problem)
    size = (float(np.sum(problem.c_reg**2)) + problem.ridge * d) / d
    r = problem.values - w0 @ c.T
    right = np.zeros((d + c.shape[0], 2 * out))
    right[d:, :out] = r.T / unit
    right[:d, out:] = g.T / size
    solution = scipy.linalg.lstsq(matrix, right)[0]
    big_d = solution[:d, :out].T
    z = -solution[d:, :out].T * (size / unit)
    p, s_block = solution[:d, out:], solution[d:, out:] * (size / unit)
    dr = s_block.T
    dq = -symmetric_part(p @ big_d)
    dc = z.T @ p.T - s_block @ big_d - dr.T @ w0
    dnu = -np.sum(s_block * z.T, axis=1)
    return _finish(problem, relative_ridge, g - dr @ c, dr, dc, dq, dnu)


def _finish(
    problem: MergeProblem,
    relative_ridge: float | None,
    dbase: FloatArray,
    dvalues: FloatArray,
    dc: FloatArray,
    dq: FloatArray,
    dnu: FloatArray,
) -> MergeGradients:
    trace = float(np.trace(dq))
    dc_reg = 2.0 * problem.c_reg @ dq
    dridge = trace
    if relative_ridge is not None:
        d = problem.base.shape[1]
        dridge = trace * float(np.sum(problem.c_reg**2)) / d
        dc_reg = dc_reg + (2.0 * relative_ridge * trace / d) * problem.c_reg
    return MergeGradients(
        base=dbase,
        values=dvalues,
        c=dc,
        c_reg=dc_reg,
        ridge=np.asarray(dridge),
        inverse_hardness=dnu.reshape(-1) if dnu.ndim == 1 else np.zeros(problem.c.shape[0]),
    )
