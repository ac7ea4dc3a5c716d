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

Hessian-vector products follow by the rules of ``_jets``.
"""

from __future__ import annotations

from typing import Literal, Unpack

import numpy as np
import numpy.typing as npt

from immunize_ext.reference._arrays import FloatArray, as_matrices, matrices_and_direction
from immunize_ext.reference._jets import Jet, difference, divided, half_square, jet, reciprocal
from immunize_ext.reference._policy import Policy, Tolerances
from immunize_ext.reference.gram import gram_jet, squared_frobenius_jet
from immunize_ext.reference.spectrum import Extreme, extreme_jet, singular_values


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
    return _well("r_well", s, p, gram=False)


def r_well_gradient(
    s: npt.ArrayLike, *, p: float | None = None, **tolerances: Unpack[Tolerances]
) -> FloatArray:
    """Gradient sigma_max mean(u v^T) - S / p.

    Args:
        s: ``(*, n, q)``.
        p: as in :func:`r_well`.
        **tolerances: as in ``spectrum.extremal_singular_values``.

    Returns:
        ``(*, n, q)`` float64.

    Raises:
        ValueError: as :func:`r_well`.

    Example:
        >>> float(abs(r_well_gradient([[2.0, 0.0], [0.0, 2.0]])).max())
        0.0
    """
    return _well_jet("r_well_gradient", s, None, p, gram=False, **tolerances).gradient


def r_well_hvp(
    s: npt.ArrayLike,
    direction: npt.ArrayLike,
    *,
    p: float | None = None,
    **tolerances: Unpack[Tolerances],
) -> FloatArray:
    """Hessian of R_well applied to a direction.

    Args:
        s: ``(*, n, q)``.
        direction: ``(*, n, q)``.
        p: as in :func:`r_well_gradient`.
        **tolerances: as in ``spectrum.extremal_singular_values``.

    Returns:
        ``(*, n, q)`` float64.

    Raises:
        ValueError: sigma_max is a cluster or zero, or bad arguments.

    Example:
        >>> r_well_hvp([[2.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]])
        array([[0.5, 0. ],
               [0. , 0. ]])
    """
    product = _well_jet("r_well_hvp", s, direction, p, gram=False, **tolerances).product
    assert product is not None
    return product


def r_ill(
    s: npt.ArrayLike, *, k: float | None = None, **tolerances: Unpack[Tolerances]
) -> FloatArray:
    """R_ill(S) = 1 / (|S|_F^2 / (2 k) - sigma_min^2 / 2); 0 in the limit of infinite kappa.

    Args:
        s: ``(*, n, q)``.
        k: the width that normalises the Frobenius part; default the numerical rank of each matrix.
        **tolerances: as in ``spectrum.extremal_singular_values``.

    Returns:
        ``(*,)`` float64, positive for the default k.

    Raises:
        ValueError: all counted singular values are equal (also rank 1 and the zero matrix), or bad
            arguments.

    Example:
        >>> print(f"{float(r_ill([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0]])):.6f}")
        0.545455
    """
    return 1.0 / _ill_denominator("r_ill", s, k, gram=False, **tolerances)[0]


def r_ill_gradient(
    s: npt.ArrayLike, *, k: float | None = None, **tolerances: Unpack[Tolerances]
) -> FloatArray:
    """Gradient (sigma_min mean(u v^T) - S / k) / D^2.

    Args:
        s: ``(*, n, q)``.
        k: as in :func:`r_ill`.
        **tolerances: as in ``spectrum.extremal_singular_values``.

    Returns:
        ``(*, n, q)`` float64.

    Raises:
        ValueError: as :func:`r_ill`.

    Example:
        >>> r_ill_gradient([[3.0, 0.0], [0.0, 1.0]]) + 0.0
        array([[-0.375,  0.   ],
               [ 0.   ,  0.125]])
    """
    return _ill_jet("r_ill_gradient", s, None, k, gram=False, **tolerances).gradient


def r_ill_hvp(
    s: npt.ArrayLike,
    direction: npt.ArrayLike,
    *,
    k: float | None = None,
    **tolerances: Unpack[Tolerances],
) -> FloatArray:
    """Hessian of R_ill applied to a direction.

    Args:
        s: ``(*, n, q)``.
        direction: ``(*, n, q)``.
        k: as in :func:`r_ill_gradient`.
        **tolerances: as in ``spectrum.extremal_singular_values``.

    Returns:
        ``(*, n, q)`` float64.

    Raises:
        ValueError: sigma_min is a cluster, D = 0, or bad arguments.

    Example:
        >>> r_ill_hvp([[3.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]])
        array([[ 0.4375,  0.    ],
               [ 0.    , -0.1875]])
    """
    product = _ill_jet("r_ill_hvp", s, direction, k, gram=False, **tolerances).product
    assert product is not None
    return product


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
    return _well("gram_r_well", x, p, gram=True)


def gram_r_well_gradient(
    x: npt.ArrayLike, *, p: float | None = None, **tolerances: Unpack[Tolerances]
) -> FloatArray:
    """Gradient with respect to X: lambda_max grad lambda_max - 2 X K / p.

    Args:
        x: ``(*, n, p)``.
        p: as in :func:`gram_r_well`.
        **tolerances: as in ``spectrum.extremal_singular_values``, in units of the singular
            values of X.

    Returns:
        ``(*, n, p)`` float64.

    Raises:
        ValueError: as :func:`r_well`.

    Example:
        >>> gram_r_well_gradient([[2.0, 0.0], [0.0, 1.0]])
        array([[ 8.,  0.],
               [ 0., -1.]])
    """
    return _well_jet("gram_r_well_gradient", x, None, p, gram=True, **tolerances).gradient


def gram_r_well_hvp(
    x: npt.ArrayLike,
    direction: npt.ArrayLike,
    *,
    p: float | None = None,
    **tolerances: Unpack[Tolerances],
) -> FloatArray:
    """Hessian of R_well(X^T X) with respect to X, applied to a direction.

    Args:
        x: ``(*, n, p)``.
        direction: ``(*, n, p)``.
        p: as in :func:`gram_r_well_gradient`.
        **tolerances: as in ``spectrum.extremal_singular_values``, in units of the singular
            values of X.

    Returns:
        ``(*, n, p)`` float64.

    Raises:
        ValueError: lambda_max is a cluster or zero, or bad arguments.

    Example:
        >>> gram_r_well_hvp([[2.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]])
        array([[12.,  0.],
               [ 0.,  0.]])
    """
    product = _well_jet("gram_r_well_hvp", x, direction, p, gram=True, **tolerances).product
    assert product is not None
    return product


def gram_r_ill(
    x: npt.ArrayLike, *, k: float | None = None, **tolerances: Unpack[Tolerances]
) -> FloatArray:
    """R_ill of K = X^T X from the singular values of X; k defaults to the numerical rank of X.

    Args:
        x: ``(*, n, p)`` features.
        k: the width that normalises |K|_F^2.
        **tolerances: as in ``spectrum.extremal_singular_values``, in units of the singular
            values of X.

    Returns:
        ``(*,)`` float64.

    Raises:
        ValueError: as :func:`r_ill`.

    Example:
        >>> print(f"{float(gram_r_ill([[2.0, 0.0], [0.0, 1.0]])):.6f}")
        0.266667
    """
    return 1.0 / _ill_denominator("gram_r_ill", x, k, gram=True, **tolerances)[0]


def gram_r_ill_gradient(
    x: npt.ArrayLike, *, k: float | None = None, **tolerances: Unpack[Tolerances]
) -> FloatArray:
    """Gradient with respect to X: (lambda_min grad lambda_min - 2 X K / k) / D^2.

    Args:
        x: ``(*, n, p)``.
        k: as in :func:`gram_r_ill`.
        **tolerances: as in ``spectrum.extremal_singular_values``, in units of the singular
            values of X.

    Returns:
        ``(*, n, p)`` float64.

    Raises:
        ValueError: as :func:`r_ill`.

    Example:
        >>> print(np.round(gram_r_ill_gradient([[2.0, 0.0], [0.0, 1.0]]), 6) + 0.0)
        [[-0.568889  0.      ]
         [ 0.        0.071111]]
    """
    return _ill_jet("gram_r_ill_gradient", x, None, k, gram=True, **tolerances).gradient


def gram_r_ill_hvp(
    x: npt.ArrayLike,
    direction: npt.ArrayLike,
    *,
    k: float | None = None,
    **tolerances: Unpack[Tolerances],
) -> FloatArray:
    """Hessian of R_ill(X^T X) with respect to X, applied to a direction.

    Args:
        x: ``(*, n, p)``.
        direction: ``(*, n, p)``.
        k: as in :func:`gram_r_ill_gradient`.
        **tolerances: as in ``spectrum.extremal_singular_values``, in units of the singular
            values of X.

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
    product = _ill_jet("gram_r_ill_hvp", x, direction, k, gram=True, **tolerances).product
    assert product is not None
    return product


def _well(function: str, array: npt.ArrayLike, p: float | None, *, gram: bool) -> FloatArray:
    """sigma_1^2 / 2 - sum sigma_i^2 / (2 p) from differences, exactly 0 for equal values."""
    matrices = as_matrices(function, "x" if gram else "s", array)
    sigma = singular_values(matrices) ** (2 if gram else 1)
    width = _well_width(function, matrices, p, gram=gram)
    largest = sigma[..., :1]
    differences = np.sum((largest - sigma) * (largest + sigma), axis=-1)
    # p values of which the last p - m are zero contribute sigma_1^2 each.
    missing = width - sigma.shape[-1]
    total: FloatArray = differences + (missing * largest[..., 0] ** 2 if missing else 0.0)
    return total / (2.0 * width)


def _well_jet(
    function: str,
    array: npt.ArrayLike,
    direction: npt.ArrayLike | None,
    p: float | None,
    *,
    gram: bool,
    **tolerances: Unpack[Tolerances],
) -> Jet:
    """sigma_max^2 / 2 - |S|_F^2 / (2 p)."""
    frobenius = _frobenius(function, array, direction, gram=gram)
    width = _well_width(function, frobenius.gradient, p, gram=gram)
    top = _extreme(function, array, "max", direction, gram=gram, **tolerances)
    return difference(half_square(top), divided(frobenius, 2.0 * width))


def _ill_jet(
    function: str,
    array: npt.ArrayLike,
    direction: npt.ArrayLike | None,
    k: float | None,
    *,
    gram: bool,
    **tolerances: Unpack[Tolerances],
) -> Jet:
    """1 / D with D = |S|_F^2 / (2 k) - sigma_min^2 / 2, the value of D from differences."""
    denominator, width = _ill_denominator(function, array, k, gram=gram, **tolerances)
    frobenius = _frobenius(function, array, direction, gram=gram)
    bottom = _extreme(function, array, "min", direction, gram=gram, **tolerances)
    d = difference(divided(frobenius, 2.0 * width), half_square(bottom))
    return reciprocal(d._replace(value=denominator))


def _extreme(
    function: str,
    array: npt.ArrayLike,
    which: Extreme,
    direction: npt.ArrayLike | None,
    *,
    gram: bool,
    **tolerances: Unpack[Tolerances],
) -> Jet:
    """An extreme of S, or of K as a function of X."""
    if gram:
        return gram_jet(function, array, which, direction, **tolerances)
    return extreme_jet(function, "s", array, which, direction, **tolerances)


def _frobenius(
    function: str, array: npt.ArrayLike, direction: npt.ArrayLike | None, *, gram: bool
) -> Jet:
    """|S|_F^2, or |K|_F^2 as a function of X."""
    if gram:
        return squared_frobenius_jet(function, array, direction)
    matrices = as_matrices(function, "s", array)
    with np.errstate(over="ignore", under="ignore"):
        value = np.sum(matrices**2, axis=(-1, -2))
    if direction is None:
        return jet(value, 2.0 * matrices)
    _, along = matrices_and_direction(function, "s", array, direction)
    return jet(value, 2.0 * matrices, along, 2.0 * along)


def _ill_denominator(
    function: str,
    array: npt.ArrayLike,
    k: float | None,
    *,
    gram: bool,
    **tolerances: Unpack[Tolerances],
) -> tuple[FloatArray, FloatArray]:
    """D of S or of K = X^T X from differences, and k; raises where D is 0."""
    argument: Literal["x", "s"] = "x" if gram else "s"
    power = 2 if gram else 1
    matrices = as_matrices(function, argument, array)
    policy = Policy.of(function, array, **tolerances)
    sigma = singular_values(matrices)
    largest = sigma[..., :1]
    # Relative to the largest, so that squares of tiny or huge singular values lose nothing before
    # the decision; a zero matrix keeps its zeros.
    unit = sigma / np.where(largest > 0, largest, 1.0)
    counts = unit > policy.rank_rtol
    rank = np.sum(counts, axis=-1)
    # Rank 0 has D = 0 and is refused before this is used.
    width = np.maximum(rank, 1.0) if k is None else np.full(rank.shape, _width(function, "k", k))
    values = unit**power
    side = matrices.shape[-1] if gram else unit.shape[-1]
    last = np.maximum(rank - 1, 0)[..., None]
    smallest = np.take_along_axis(values, last, axis=-1)
    if policy.rank == "full":
        smallest = np.where(rank[..., None] < side, 0.0, smallest)
    squares = np.where(counts, (values - smallest) * (values + smallest), values**2)
    total = np.sum(squares, axis=-1) + (rank - width) * smallest[..., 0] ** 2
    denominator = total / (2.0 * width)
    # What rounding of the singular values alone can produce where D is 0.
    equal = np.abs(denominator) <= 4.0 * power * policy.default
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
    return result, width


def _well_width(function: str, matrices: FloatArray, p: float | None, *, gram: bool) -> float:
    """P as given; default the number of values that S or K has."""
    n, q = matrices.shape[-2:]
    return float(q if gram else min(n, q)) if p is None else _width(function, "p", p)


def _width(function: str, name: str, given: float) -> float:
    if not given > 0 or not np.isfinite(given):
        raise ValueError(
            f"{function}: {name} must be positive and finite, got {given}; "
            "leave it out for the default"
        )
    return float(given)
