"""R_well and R_ill of a matrix and of a Gram matrix: values, gradients, Hessian-vector products.

Source: the condition number regularizers of model immunization; R_well is the minimiser of kappa
of Nenov et al., R_ill its counterpart (equations 3, 12 and 13 of the condition number paper).

For a matrix S with singular values sigma_1 >= ... >= sigma_m, smallest counted value sigma_min
(numerical rank r), p = min dimension, k = r unless given:

    R_well(S) = sigma_max^2 / 2 - |S|_F^2 / (2 p)
    R_ill(S)  = 1 / D,      D = |S|_F^2 / (2 k) - sigma_min^2 / 2.

Derivation of the gradients.  d(sigma^2 / 2) = sigma u^T dS v and d(|S|_F^2 / 2) = <S, dS>:

    grad R_well = sigma_max u_1 v_1^T - S / p
    grad D      = S / k - sigma_min u_r v_r^T
    grad R_ill  = -grad D / D^2 = (sigma_min u_r v_r^T - S / k) / D^2.

In a cluster u v^T becomes the mean over it, see ``spectrum``.  The Frobenius part never goes
through singular vectors.

For K = X^T X with p = number of features, sigma_i(K) = sigma_i(X)^2 and |K|_F^2 = tr(K^2):

    grad_X R_well(K) = lambda_max grad lambda_max - (4 X K) / (2 p)
    grad_X R_ill(K)  = (lambda_min grad lambda_min - (4 X K) / (2 k)) / D^2

with grad lambda = 2 sigma u v^T.

Accuracy.  |S|_F^2 / k and sigma_min^2 cancel where the singular values are nearly equal.  The value
is therefore summed from differences that are formed before anything is squared,

    2 k D = sum_{i <= r} (sigma_i - sigma_min)(sigma_i + sigma_min)
            + sum_{i > r} sigma_i^2 + (r - k) sigma_min^2,

and likewise 2 p R_well = sum_i (sigma_max - sigma_i)(sigma_max + sigma_i) + (p - m) sigma_max^2.
D is 0 iff all counted singular values are equal and none is left out: R_ill is infinite there, and
a ``ValueError`` says so.

Derivation of the Hessian-vector products along E, with C the Hessian-vector product of sigma and
s = <u v^T, E> its slope:  D(sigma u v^T)[E] = s u v^T + sigma C, so

    R_well:  s u v^T + sigma_max C - E / p
    R_ill :  2 <grad D, E> grad D / D^3 - (E / k - s u v^T - sigma_min C) / D^2.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from immunize_ext.reference._arrays import (
    FloatArray,
    as_matrices,
    eps_of,
    per_matrix,
    require_shape,
)
from immunize_ext.reference._decomposition import Tolerances, default_rtol
from immunize_ext.reference.gram import gram_extremes, gram_extremes_gradient, gram_extremes_hvp
from immunize_ext.reference.spectrum import (
    extremal_singular_values,
    extremal_singular_values_gradient,
    extremal_singular_values_hvp,
    singular_values,
)


def r_well(s: npt.ArrayLike, *, p: float | None = None) -> FloatArray:
    """R_well(S) = sigma_max^2 / 2 - |S|_F^2 / (2 p); 0 iff all singular values are equal.

    Args:
        s: ``(*, n, q)``, any real dtype; computed in float64.
        p: the width that normalises the Frobenius part; default min(n, q).

    Returns:
        ``(*,)`` float64, not negative for the default p.

    Raises:
        ValueError: s is not finite or has no entries per matrix, or p is not positive.

    Example:
        >>> print(f"{float(r_well([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0]])):.6f}")
        2.166667
    """
    matrices = as_matrices("r_well", "s", s)
    width = _width("r_well", "p", p, min(matrices.shape[-2:]))
    return _well_value(singular_values(matrices), width)


def r_well_gradient(
    s: npt.ArrayLike, *, p: float | None = None, cluster_rtol: float | None = None
) -> FloatArray:
    """Gradient sigma_max mean(u v^T) - S / p.

    Args:
        s: ``(*, n, q)``.
        p: as in :func:`r_well`.
        cluster_rtol: as in ``spectrum.extremal_singular_values``.

    Returns:
        ``(*, n, q)`` float64.

    Raises:
        ValueError: as :func:`r_well`.

    Example:
        >>> float(abs(r_well_gradient([[2.0, 0.0], [0.0, 2.0]])).max())
        0.0
    """
    matrices = as_matrices("r_well_gradient", "s", s)
    width = _width("r_well_gradient", "p", p, min(matrices.shape[-2:]))
    sigma = extremal_singular_values(s, cluster_rtol=cluster_rtol).sigma_max
    slope = extremal_singular_values_gradient(s, cluster_rtol=cluster_rtol).sigma_max
    gradient: FloatArray = per_matrix(sigma) * slope - matrices / width
    return gradient


def r_well_hvp(
    s: npt.ArrayLike,
    direction: npt.ArrayLike,
    *,
    p: float | None = None,
    cluster_rtol: float | None = None,
) -> FloatArray:
    """Hessian of R_well applied to a direction.

    Args:
        s: ``(*, n, q)``.
        direction: ``(*, n, q)``.
        p: as in :func:`r_well_gradient`.
        cluster_rtol: as in :func:`r_well_gradient`.

    Returns:
        ``(*, n, q)`` float64.

    Raises:
        ValueError: sigma_max is a cluster or zero, or bad arguments.

    Example:
        >>> r_well_hvp([[2.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]])
        array([[0.5, 0. ],
               [0. , 0. ]])
    """
    matrices, along = _with_direction("r_well_hvp", "s", s, direction)
    width = _width("r_well_hvp", "p", p, min(matrices.shape[-2:]))
    sigma = extremal_singular_values(s, cluster_rtol=cluster_rtol).sigma_max
    gradient = extremal_singular_values_gradient(s, cluster_rtol=cluster_rtol).sigma_max
    curvature = extremal_singular_values_hvp(s, along, which="max", cluster_rtol=cluster_rtol)
    product: FloatArray = _square_hvp(sigma, gradient, curvature, along) - along / width
    return product


def r_ill(
    s: npt.ArrayLike, *, k: float | None = None, rank_rtol: float | None = None
) -> FloatArray:
    """R_ill(S) = 1 / (|S|_F^2 / (2 k) - sigma_min^2 / 2); 0 in the limit of infinite kappa.

    Args:
        s: ``(*, n, q)``.
        k: the width that normalises the Frobenius part; default the numerical rank of each matrix.
        rank_rtol: as in ``spectrum.extremal_singular_values``.

    Returns:
        ``(*,)`` float64, positive for the default k.

    Raises:
        ValueError: all counted singular values are equal (also rank 1 and the zero matrix), or bad
            arguments.

    Example:
        >>> print(f"{float(r_ill([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0]])):.6f}")
        0.545455
    """
    denominator: FloatArray = _ill_denominator("r_ill", "s", s, k, rank_rtol, power=1)
    return 1.0 / denominator


def r_ill_gradient(
    s: npt.ArrayLike,
    *,
    k: float | None = None,
    rank_rtol: float | None = None,
    cluster_rtol: float | None = None,
) -> FloatArray:
    """Gradient (sigma_min mean(u v^T) - S / k) / D^2.

    Args:
        s: ``(*, n, q)``.
        k: as in :func:`r_ill`.
        rank_rtol: as in :func:`r_ill`.
        cluster_rtol: as in ``spectrum.extremal_singular_values``.

    Returns:
        ``(*, n, q)`` float64.

    Raises:
        ValueError: as :func:`r_ill`.

    Example:
        >>> r_ill_gradient([[3.0, 0.0], [0.0, 1.0]])
        array([[-0.375,  0.   ],
               [ 0.   ,  0.125]])
    """
    matrices = as_matrices("r_ill_gradient", "s", s)
    denominator = _ill_denominator("r_ill_gradient", "s", s, k, rank_rtol, power=1)
    options: Tolerances = {"rank_rtol": rank_rtol, "cluster_rtol": cluster_rtol}
    extremes = extremal_singular_values(s, **options)
    slope = extremal_singular_values_gradient(s, **options).sigma_min
    width = per_matrix(_rank_width("r_ill_gradient", k, extremes.rank))
    gradient: FloatArray = (per_matrix(extremes.sigma_min) * slope - matrices / width) / per_matrix(
        denominator
    ) ** 2
    return gradient


def r_ill_hvp(
    s: npt.ArrayLike,
    direction: npt.ArrayLike,
    *,
    k: float | None = None,
    rank_rtol: float | None = None,
    cluster_rtol: float | None = None,
) -> FloatArray:
    """Hessian of R_ill applied to a direction.

    Args:
        s: ``(*, n, q)``.
        direction: ``(*, n, q)``.
        k: as in :func:`r_ill_gradient`.
        rank_rtol: as in :func:`r_ill_gradient`.
        cluster_rtol: as in :func:`r_ill_gradient`.

    Returns:
        ``(*, n, q)`` float64.

    Raises:
        ValueError: sigma_min is a cluster, D = 0, or bad arguments.

    Example:
        >>> r_ill_hvp([[3.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]])
        array([[ 0.4375,  0.    ],
               [ 0.    , -0.1875]])
    """
    matrices, along = _with_direction("r_ill_hvp", "s", s, direction)
    denominator = _ill_denominator("r_ill_hvp", "s", s, k, rank_rtol, power=1)
    options: Tolerances = {"rank_rtol": rank_rtol, "cluster_rtol": cluster_rtol}
    extremes = extremal_singular_values(s, **options)
    gradient = extremal_singular_values_gradient(s, **options).sigma_min
    curvature = extremal_singular_values_hvp(s, along, which="min", **options)
    width = per_matrix(_rank_width("r_ill_hvp", k, extremes.rank))
    grad_d = matrices / width - per_matrix(extremes.sigma_min) * gradient
    second = along / width - _square_hvp(extremes.sigma_min, gradient, curvature, along)
    return _reciprocal_hvp(denominator, grad_d, second, along)


def gram_r_well(x: npt.ArrayLike, *, p: float | None = None) -> FloatArray:
    """R_well of K = X^T X from the singular values of X; p defaults to the number of features.

    Args:
        x: ``(*, n, p)`` features.
        p: the width that normalises |K|_F^2.

    Returns:
        ``(*,)`` float64.

    Raises:
        ValueError: as :func:`r_well`.

    Example:
        >>> float(gram_r_well([[2.0, 0.0], [0.0, 1.0]]))
        3.75
    """
    matrices = as_matrices("gram_r_well", "x", x)
    width = _width("gram_r_well", "p", p, matrices.shape[-1])
    return _well_value(singular_values(matrices) ** 2, width)


def gram_r_well_gradient(
    x: npt.ArrayLike, *, p: float | None = None, cluster_rtol: float | None = None
) -> FloatArray:
    """Gradient with respect to X: lambda_max grad lambda_max - 2 X K / p.

    Args:
        x: ``(*, n, p)``.
        p: as in :func:`gram_r_well`.
        cluster_rtol: in units of the singular values of X.

    Returns:
        ``(*, n, p)`` float64.

    Raises:
        ValueError: as :func:`r_well`.

    Example:
        >>> gram_r_well_gradient([[2.0, 0.0], [0.0, 1.0]])
        array([[ 8.,  0.],
               [ 0., -1.]])
    """
    matrices = as_matrices("gram_r_well_gradient", "x", x)
    width = _width("gram_r_well_gradient", "p", p, matrices.shape[-1])
    extremes = gram_extremes(x, cluster_rtol=cluster_rtol)
    slopes = gram_extremes_gradient(x, cluster_rtol=cluster_rtol)
    gradient: FloatArray = per_matrix(
        extremes.lambda_max
    ) * slopes.lambda_max - slopes.squared_frobenius / (2.0 * width)
    return gradient


def gram_r_well_hvp(
    x: npt.ArrayLike,
    direction: npt.ArrayLike,
    *,
    p: float | None = None,
    cluster_rtol: float | None = None,
) -> FloatArray:
    """Hessian of R_well(X^T X) with respect to X, applied to a direction.

    Args:
        x: ``(*, n, p)``.
        direction: ``(*, n, p)``.
        p: as in :func:`gram_r_well_gradient`.
        cluster_rtol: as in :func:`gram_r_well_gradient`.

    Returns:
        ``(*, n, p)`` float64.

    Raises:
        ValueError: lambda_max is a cluster or zero, or bad arguments.

    Example:
        >>> gram_r_well_hvp([[2.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]])
        array([[12.,  0.],
               [ 0.,  0.]])
    """
    matrices, along = _with_direction("gram_r_well_hvp", "x", x, direction)
    width = _width("gram_r_well_hvp", "p", p, matrices.shape[-1])
    value = gram_extremes(x, cluster_rtol=cluster_rtol).lambda_max
    gradient = gram_extremes_gradient(x, cluster_rtol=cluster_rtol).lambda_max
    curvature = gram_extremes_hvp(x, along, which="max", cluster_rtol=cluster_rtol)
    frobenius = gram_extremes_hvp(x, along, which="squared_frobenius")
    product: FloatArray = _square_hvp(value, gradient, curvature, along) - frobenius / (2.0 * width)
    return product


def gram_r_ill(
    x: npt.ArrayLike, *, k: float | None = None, rank_rtol: float | None = None
) -> FloatArray:
    """R_ill of K = X^T X from the singular values of X; k defaults to the numerical rank of X.

    Args:
        x: ``(*, n, p)`` features.
        k: the width that normalises |K|_F^2.
        rank_rtol: in units of the singular values of X.

    Returns:
        ``(*,)`` float64.

    Raises:
        ValueError: as :func:`r_ill`.

    Example:
        >>> print(f"{float(gram_r_ill([[2.0, 0.0], [0.0, 1.0]])):.6f}")
        0.266667
    """
    denominator: FloatArray = _ill_denominator("gram_r_ill", "x", x, k, rank_rtol, power=2)
    return 1.0 / denominator


def gram_r_ill_gradient(
    x: npt.ArrayLike,
    *,
    k: float | None = None,
    rank_rtol: float | None = None,
    cluster_rtol: float | None = None,
) -> FloatArray:
    """Gradient with respect to X: (lambda_min grad lambda_min - 2 X K / k) / D^2.

    Args:
        x: ``(*, n, p)``.
        k: as in :func:`gram_r_ill`.
        rank_rtol: as in :func:`gram_r_ill`.
        cluster_rtol: in units of the singular values of X.

    Returns:
        ``(*, n, p)`` float64.

    Raises:
        ValueError: as :func:`r_ill`.

    Example:
        >>> print(np.round(gram_r_ill_gradient([[2.0, 0.0], [0.0, 1.0]]), 6) + 0.0)
        [[-0.568889  0.      ]
         [ 0.        0.071111]]
    """
    denominator = _ill_denominator("gram_r_ill_gradient", "x", x, k, rank_rtol, power=2)
    options: Tolerances = {"rank_rtol": rank_rtol, "cluster_rtol": cluster_rtol}
    extremes = gram_extremes(x, **options)
    slopes = gram_extremes_gradient(x, **options)
    width = per_matrix(_rank_width("gram_r_ill_gradient", k, extremes.rank))
    gradient: FloatArray = (
        per_matrix(extremes.lambda_min) * slopes.lambda_min
        - slopes.squared_frobenius / (2.0 * width)
    ) / per_matrix(denominator) ** 2
    return gradient


def gram_r_ill_hvp(
    x: npt.ArrayLike,
    direction: npt.ArrayLike,
    *,
    k: float | None = None,
    rank_rtol: float | None = None,
    cluster_rtol: float | None = None,
) -> FloatArray:
    """Hessian of R_ill(X^T X) with respect to X, applied to a direction.

    Args:
        x: ``(*, n, p)``.
        direction: ``(*, n, p)``.
        k: as in :func:`gram_r_ill_gradient`.
        rank_rtol: as in :func:`gram_r_ill_gradient`.
        cluster_rtol: as in :func:`gram_r_ill_gradient`.

    Returns:
        ``(*, n, p)`` float64.

    Raises:
        ValueError: lambda_min is a cluster, D = 0, or bad arguments.

    Example:
        >>> product = gram_r_ill_hvp([[2.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]])
        >>> print(np.round(product, 6) + 0.0)
        [[ 1.573926  0.      ]
         [ 0.       -0.303407]]
    """
    _, along = _with_direction("gram_r_ill_hvp", "x", x, direction)
    denominator = _ill_denominator("gram_r_ill_hvp", "x", x, k, rank_rtol, power=2)
    options: Tolerances = {"rank_rtol": rank_rtol, "cluster_rtol": cluster_rtol}
    extremes = gram_extremes(x, **options)
    slopes = gram_extremes_gradient(x, **options)
    curvature = gram_extremes_hvp(x, along, which="min", **options)
    frobenius = gram_extremes_hvp(x, along, which="squared_frobenius")
    width = per_matrix(_rank_width("gram_r_ill_hvp", k, extremes.rank))
    grad_d = (
        slopes.squared_frobenius / (2.0 * width)
        - per_matrix(extremes.lambda_min) * slopes.lambda_min
    )
    second = frobenius / (2.0 * width) - _square_hvp(
        extremes.lambda_min, slopes.lambda_min, curvature, along
    )
    return _reciprocal_hvp(denominator, grad_d, second, along)


def _well_value(sigma: FloatArray, width: float) -> FloatArray:
    """sigma_1^2 / 2 - sum sigma_i^2 / (2 p) from differences, exactly 0 for equal values."""
    largest = sigma[..., :1]
    differences = np.sum((largest - sigma) * (largest + sigma), axis=-1)
    # p values of which the last p - m are zero contribute sigma_1^2 each.
    missing = width - sigma.shape[-1]
    total: FloatArray = differences + (missing * largest[..., 0] ** 2 if missing else 0.0)
    return total / (2.0 * width)


def _ill_denominator(
    function: str,
    argument: str,
    array: npt.ArrayLike,
    k: float | None,
    rank_rtol: float | None,
    *,
    power: int,
) -> FloatArray:
    """D of S (power 1) or of K = X^T X (power 2), from differences; raises where it is 0."""
    matrices = as_matrices(function, argument, array)
    default = default_rtol(matrices.shape, eps_of(array))
    tolerance = default if rank_rtol is None else rank_rtol
    sigma = singular_values(matrices)
    largest = sigma[..., :1]
    # Relative to the largest, so that squares of tiny or huge singular values lose nothing before
    # the decision; a zero matrix keeps its zeros.
    unit = sigma / np.where(largest > 0, largest, 1.0)
    counts = (unit > tolerance).astype(np.float64)
    rank = np.sum(counts, axis=-1)
    width = _rank_width(function, k, rank)
    values = unit**power
    last = np.maximum(rank.astype(np.int64) - 1, 0)
    smallest = np.take_along_axis(values, last[..., None], axis=-1)
    differences = counts * (values - smallest) * (values + smallest) + (1.0 - counts) * values**2
    total = np.sum(differences, axis=-1) + (rank - width) * smallest[..., 0] ** 2
    denominator = total / (2.0 * width)
    # What rounding of the singular values alone can produce where D is 0.
    equal = np.abs(denominator) <= 4.0 * power * default
    if np.any(equal):
        first = tuple(int(i[0]) for i in np.nonzero(np.atleast_1d(equal)))
        where = f" at batch index {first}" if denominator.ndim else ""
        raise ValueError(
            f"{function}: {argument} must have at least two different counted singular values, "
            f"got all equal{where} (D = 0, R_ill is infinite); "
            "perturb the matrix or leave it out"
        )
    with np.errstate(over="ignore", under="ignore"):
        result: FloatArray = denominator * (largest[..., 0] ** power) ** 2
    return result


def _square_hvp(
    value: FloatArray, gradient: FloatArray, curvature: FloatArray, along: FloatArray
) -> FloatArray:
    """Hessian-vector product of value^2 / 2."""
    slope = np.sum(gradient * along, axis=(-1, -2))
    product: FloatArray = per_matrix(slope) * gradient + per_matrix(value) * curvature
    return product


def _reciprocal_hvp(
    value: FloatArray, gradient: FloatArray, curvature: FloatArray, along: FloatArray
) -> FloatArray:
    """Hessian-vector product of 1 / value."""
    slope = np.sum(gradient * along, axis=(-1, -2))
    product: FloatArray = (
        2.0 * per_matrix(slope / value**3) * gradient - curvature / per_matrix(value) ** 2
    )
    return product


def _width(function: str, name: str, given: float | None, default: int) -> float:
    width = float(default) if given is None else float(given)
    if not width > 0 or not np.isfinite(width):
        raise ValueError(
            f"{function}: {name} must be positive and finite, got {given}; "
            "leave it out for the default"
        )
    return width


def _rank_width(function: str, k: float | None, rank: npt.NDArray[np.generic]) -> FloatArray:
    ranks = np.asarray(rank, dtype=np.float64)
    if k is None:
        return np.maximum(ranks, 1.0)  # rank 0 has D = 0 and is refused before this is used
    return np.full(ranks.shape, _width(function, "k", k, 1))


def _with_direction(
    function: str, argument: str, array: npt.ArrayLike, direction: npt.ArrayLike
) -> tuple[FloatArray, FloatArray]:
    matrices = as_matrices(function, argument, array)
    along = as_matrices(function, "direction", direction)
    require_shape(function, "direction", along, matrices.shape)
    return matrices, along
