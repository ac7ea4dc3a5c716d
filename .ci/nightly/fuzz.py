"""Operators on inputs made to hurt, judged by the numpy reference.

A case is a matrix (or a merge) of the strategies of ``immunize_ext.testing``, drawn at random: full
rank and rank deficient, exact and near clusters, scales to 1e+-300, condition numbers to 1e16,
mixed batches, every memory layout, float64 and float32, compiled and torch-only route. What an
operator returns and its gradient may differ from the reference by the rounding that its docstring
allows and by no more; where the truth hangs on the last bits of the input (a value at a tolerance,
a gradient at a gap of a few eps) only what is determined is judged.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from immunize_ext import ops, reference
from immunize_ext.errors import EqualSingularValuesError, FallbackWarning, NumericalWarning
from immunize_ext.ops import regularizers
from immunize_ext.ops.operators import fallbacks_only
from immunize_ext.testing import strategies

from .counts import Count

EPS = torch.finfo(torch.float64).eps
# A backward stable decomposition: so many max(n, p) eps sigma_max for each singular value.
VALUE_UNITS = 8.0
VECTOR_UNITS = 100.0
# Beyond this a bound says nothing and is not judged.
VAGUE = 0.05


@dataclass(frozen=True)
class Matrices:
    """Input of a spectral operator and the tolerances that it is called with."""

    a: Tensor
    rank: Literal["numerical", "full"]
    rank_rtol: float
    cluster_rtol: float
    compiled: bool

    def __repr__(self) -> str:
        return (
            f"{tuple(self.a.shape)} {self.a.dtype} strides {self.a.stride()} rank={self.rank} "
            f"rank_rtol={self.rank_rtol:.3g} cluster_rtol={self.cluster_rtol:.3g} "
            f"compiled={self.compiled} {self.a.double().tolist()}"
        )

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of operator and reference."""
        return {
            "rank": self.rank,
            "rank_rtol": self.rank_rtol,
            "cluster_rtol": self.cluster_rtol,
        }


def spectra(dtype: torch.dtype) -> st.SearchStrategy[Any]:
    """Every kind of matrix, with exponents and condition numbers that the dtype just holds."""
    wide = dtype == torch.float64
    return st.one_of(
        strategies.matrices(dtype=dtype),
        strategies.mixed_batches(dtype=dtype),
        strategies.near_multiple(dtype=dtype, min_exponent=-16 if wide else -8),
        strategies.badly_scaled(dtype=dtype, max_exponent=290 if wide else 30),
        strategies.ill_conditioned(dtype=dtype, max_kappa=1e16 if wide else 1e8),
        strategies.well_conditioned(dtype=dtype, max_side=40, max_kappa=1e3, min_gap=1e-3),
    )


@st.composite
def matrices(draw: st.DrawFn) -> Matrices:
    """A matrix with tolerances."""
    dtype = draw(st.sampled_from([torch.float64, torch.float64, torch.float32]))
    a = draw(spectra(dtype)).matrix
    default = max(a.shape[-2:]) * torch.finfo(dtype).eps
    return Matrices(
        a,
        draw(st.sampled_from(["numerical", "full"])),
        draw(st.sampled_from([default, default, 1e-6, 0.0])),
        draw(st.sampled_from([64 * default, 64 * default, 1e-6, default])),
        draw(st.sampled_from([True, True, True, False])),
    )


@contextlib.contextmanager
def route(compiled: bool) -> Iterator[None]:
    """The kernels, or the torch-only route."""
    with contextlib.ExitStack() as stack:
        if not compiled:
            stack.enter_context(fallbacks_only())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", (FallbackWarning))
        warnings.simplefilter("ignore", (NumericalWarning))
        yield


@dataclass(frozen=True)
class Truth:
    """One matrix of a batch: its singular values and how far they determine the rest."""

    matrix: np.ndarray
    sigma: np.ndarray
    case: Matrices

    @property
    def top(self) -> float:
        """The largest singular value."""
        return float(self.sigma[0])

    @property
    def delta(self) -> float:
        """Backward error of one singular value, in float64."""
        return VALUE_UNITS * max(self.matrix.shape) * EPS * self.top

    def rank(self) -> int | None:
        """How many values count; None where one lies at the tolerance."""
        edge = self.case.rank_rtol * self.top
        if np.any((np.abs(self.sigma - edge) <= 4 * self.delta) & (self.sigma > 0)):
            return None
        return int(np.count_nonzero(self.sigma > edge))

    def cluster(self, which: str, rank: int) -> tuple[int, float, float] | None:
        """Size of the cluster of an extreme, the gap beside it and its width over sigma_max."""
        counted = self.sigma[:rank]
        extreme = counted[0] if which == "max" else counted[-1]
        distance = np.abs(counted - extreme)
        near = self.case.cluster_rtol * self.top
        if np.any(np.abs(distance - near) <= 4 * self.delta):
            return None
        inside = distance <= near
        # Vectors mix with those of every other value, also of those that do not count, and of the
        # null space: 0 is a neighbour.
        others = np.concatenate([counted[~inside], self.sigma[rank:], [0.0]])
        gap = float(np.min(np.abs(others[:, None] - counted[inside]))) / self.top
        return int(np.count_nonzero(inside)), gap, float(np.ptp(counted[inside])) / self.top


def truths(case: Matrices) -> list[Truth]:
    """The matrices of a batch, one after the other."""
    flat = case.a.detach().double().reshape(-1, *case.a.shape[-2:]).numpy()
    return [Truth(m, np.atleast_1d(reference.singular_values(m)), case) for m in flat]


def _close(name: str, got: float, wanted: float, bound: float, dtype: torch.dtype) -> None:
    """|got - wanted| within the bound and the rounding of the dtype; beyond its range, infinity."""
    kind = torch.finfo(dtype)
    if np.isfinite(wanted) and abs(wanted) > 0.9 * kind.max:
        return  # the largest numbers may round to infinity
    if not np.isfinite(wanted):
        if got != wanted:
            raise AssertionError(f"{name}: got {got}, expected {wanted}")
        return
    slack = bound + (2 * kind.eps if dtype != torch.float64 else 4 * EPS) * abs(wanted)
    if not abs(got - wanted) <= slack + 8 * kind.smallest_normal * kind.eps:
        raise AssertionError(f"{name}: got {got!r}, expected {wanted!r} within {slack:.3g}")


def _close_gradient(name: str, got: Tensor, wanted: np.ndarray, relative: float) -> None:
    """Frobenius distance relative to the size of the gradient."""
    kind = torch.finfo(got.dtype)
    size = float(np.linalg.norm(wanted))
    if not np.isfinite(size) or size > 0.1 * kind.max or relative > VAGUE:
        return
    if 0 < size < 1e3 * kind.smallest_normal / kind.eps:
        return  # entries round to multiples of the smallest number
    if got.dtype != torch.float64:
        relative += 4 * kind.eps
    distance = float(np.linalg.norm(got.double().numpy() - wanted))
    if not distance <= relative * size + 1e-300:
        raise AssertionError(
            f"{name}: gradient off by {distance / size if size else distance:.3g}, allowed "
            f"{relative:.3g}: got {got.tolist()}, expected {wanted.tolist()}"
        )


def _gradient(values: list[Tensor], leaf: Tensor, which: int) -> Tensor:
    finite = values[which]
    (grad,) = torch.autograd.grad(finite.sum(), leaf, retain_graph=True)
    return grad.reshape(-1, *leaf.shape[-2:])


def _leaf(case: Matrices) -> Tensor:
    return case.a.detach().requires_grad_()


# --- extremes -------------------------------------------------------------------------------------


def singular(case: Matrices) -> None:
    """sigma_max, sigma_min, rank, multiplicities, both gradients."""
    with route(case.compiled):
        leaf = _leaf(case)
        found = ops.extremal_singular_values(leaf, **case.options)
        grads = [_gradient([found[0], found[1]], leaf, k) for k in (0, 1)] if leaf.numel() else []
    flat = [x.detach().reshape(-1) for x in found]
    for index, truth in enumerate(truths(case)):
        _judge_extremes(
            case, truth, [float(x[index]) for x in flat], [g[index] for g in grads], of_gram=False
        )


def gram(case: Matrices) -> None:
    """lambda_max, lambda_min, |K|_F^2, rank, multiplicities, gradients."""
    with route(case.compiled):
        leaf = _leaf(case)
        found = ops.gram_extremes(leaf, **case.options)
        values = [found.lambda_max, found.lambda_min]
        grads = [_gradient(values, leaf, k) for k in (0, 1)] if leaf.numel() else []
    flat = [
        x.detach().reshape(-1)
        for x in (*values, found.rank, found.multiplicity_max, found.multiplicity_min)
    ]
    for index, truth in enumerate(truths(case)):
        _judge_extremes(
            case, truth, [float(x[index]) for x in flat], [g[index] for g in grads], of_gram=True
        )
        with np.errstate(all="ignore"):
            wanted = float(np.sum(truth.sigma**2 * truth.sigma**2))
        norm = float(found.squared_frobenius.detach().reshape(-1)[index])
        if wanted == 0 or wanted > 1e-290:
            bound = 64 * max(truth.matrix.shape) * EPS * wanted if np.isfinite(wanted) else 0.0
            if wanted < torch.finfo(case.a.dtype).tiny:
                bound = torch.finfo(case.a.dtype).tiny
            _close("squared_frobenius", norm, wanted, bound, case.a.dtype)


def _judge_extremes(
    case: Matrices, truth: Truth, values: list[float], grads: list[Tensor], *, of_gram: bool
) -> None:
    dtype = case.a.dtype
    power = 2 if of_gram else 1

    def value(sigma: float) -> tuple[float, float]:
        with np.errstate(over="ignore", invalid="ignore"):
            wanted = np.float64(sigma) ** power
            bound = (np.float64(sigma) + truth.delta) ** power - wanted
        return float(wanted), float(bound) if np.isfinite(wanted) else 0.0

    _close("largest", values[0], *value(truth.top), dtype)
    rank = truth.rank()
    if truth.top == 0.0 or rank is None:
        if truth.top == 0.0 and values[1:3] != [0.0, 0.0]:
            raise AssertionError(f"zero matrix: got {values}")
        return
    if int(values[2]) != rank:
        raise AssertionError(f"rank: got {values[2]}, expected {rank}, sigma {truth.sigma}")
    # K = x^T x has p eigenvalues, x only min(n, p) singular values.
    side = truth.matrix.shape[1] if of_gram else len(truth.sigma)
    missing = case.rank == "full" and rank < side
    smallest = 0.0 if missing else float(truth.sigma[rank - 1])
    _close("smallest", values[1], *((0.0, 0.0) if missing else value(smallest)), dtype)
    for which, place, count in (("max", 0, 3), ("min", 1, 4)):
        if missing and which == "min":
            if int(values[count]) != side - rank:
                raise AssertionError(f"zeros: got {values[count]} of {truth.sigma}")
            if grads[place].abs().max() > 0:
                raise AssertionError(f"gradient at sigma_min = 0: got {grads[place]}")
            continue
        cluster = truth.cluster(which, rank)
        if cluster is None:
            continue
        size, gap, width = cluster
        if int(values[count]) != size:
            raise AssertionError(
                f"multiplicity_{which}: got {values[count]}, expected {size}, sigma {truth.sigma}"
            )
        name = "gram_extremes_gradient" if of_gram else "extremal_singular_values_gradient"
        with np.errstate(all="ignore"):
            wanted = getattr(reference, name)(truth.matrix, **case.options)[place]
        relative = VECTOR_UNITS * max(truth.matrix.shape) * EPS / max(gap, 1e-300)
        if of_gram:
            # 2 sigma u v^T: sigma is known to delta, and anywhere within its cluster.
            sigma = truth.top if which == "max" else smallest
            relative += (truth.delta + 2 * size**0.5 * width * truth.top) / sigma
        _close_gradient(f"gradient of {which}", grads[place], wanted, relative)


def symmetric(case: Matrices) -> None:
    """Extremes of (A + A^T) / 2 padded to a square, by sign, against numpy."""
    side = min(case.a.shape[-2:])
    square = case.a.detach()[..., :side, :side].double()
    if not case.compiled or square.abs().max() > 1e300 if square.numel() else False:
        square = square * 1e-8
    h = (0.5 * square + 0.5 * square.mT).requires_grad_()
    with route(case.compiled):
        found = ops.symmetric_extremes(h, cluster_rtol=case.cluster_rtol)
        grads = [_gradient([found[0], found[1]], h, k) for k in (0, 1)] if h.numel() else []
    flat = h.detach().reshape(-1, side, side).numpy()
    for index, matrix in enumerate(flat):
        scale = float(np.abs(matrix).max()) or 1.0
        values, vectors = np.linalg.eigh(matrix / scale)
        top = float(np.abs(values).max())
        delta = VALUE_UNITS * side * EPS * top
        for place, extreme in ((0, values[-1]), (1, values[0])):
            got = float(found[place].detach().reshape(-1)[index])
            wanted = float(extreme) * scale
            _close(f"eigenvalue {place}", got, wanted, delta * scale, torch.float64)
            distance = np.abs(values - extreme)
            near = case.cluster_rtol * top
            if top == 0 or np.any(np.abs(distance - near) <= 4 * delta):
                continue
            inside = distance <= near
            count = int(found[2 + place].reshape(-1)[index])
            if count != np.count_nonzero(inside):
                raise AssertionError(f"multiplicity {place}: got {count}, values {values}")
            outside = values[~inside]
            gap = np.min(np.abs(outside[:, None] - values[inside])) / top if outside.size else 1.0
            mean = vectors[:, inside] @ vectors[:, inside].T / count
            relative = VECTOR_UNITS * side * EPS / max(float(gap), 1e-300)
            _close_gradient(f"gradient {place}", grads[place][index], mean, relative)


# --- condition numbers and regularizers -----------------------------------------------------------


def condition(case: Matrices) -> None:
    """kappa, log kappa and the gradient of the latter."""
    with route(case.compiled):
        leaf = _leaf(case)
        kappa = ops.condition_number(leaf, **case.options)
        logarithm = ops.log_condition_number(leaf, **case.options)
        grads = _gradient([logarithm], leaf, 0) if leaf.numel() else None
    for index, truth in enumerate(truths(case)):
        rank = truth.rank()
        if rank is None:
            continue
        got = [float(x.detach().reshape(-1)[index]) for x in (kappa, logarithm)]
        missing = truth.top == 0.0 or (case.rank == "full" and rank < len(truth.sigma))
        if missing:
            if got != [np.inf, np.inf]:
                raise AssertionError(f"singular: got kappa, log kappa {got}")
            continue
        smallest = float(truth.sigma[rank - 1])
        if 2 * truth.delta > VAGUE * smallest:
            continue
        relative = 4 * truth.delta / smallest
        with np.errstate(over="ignore"):
            wanted = truth.top / smallest
        _close("kappa", got[0], wanted, relative * wanted, case.a.dtype)
        _close("log kappa", got[1], float(np.log(wanted)), relative, case.a.dtype)
        clusters = [truth.cluster(which, rank) for which in ("max", "min")]
        if None in clusters or grads is None or not np.isfinite(wanted):
            continue
        with np.errstate(all="ignore"):
            right = reference.log_condition_number_gradient(truth.matrix, **case.options)
        gap = min(pair[1] for pair in clusters if pair is not None)
        bound = relative + VECTOR_UNITS * max(truth.matrix.shape) * EPS / max(gap, 1e-300)
        # u_1 v_1^T / sigma_1 and u_k v_k^T / sigma_k cancel where kappa is 1.
        if float(np.linalg.norm(right)) * smallest > 1e-3:
            _close_gradient("gradient of log kappa", grads[index], right, 1e3 * bound)


def _regularizer(
    case: Matrices, function: Callable[..., Tensor], truth_of: Callable[[Truth, int], Any]
) -> None:
    """Value and gradient of R_well or R_ill; ``truth_of`` gives value, bound, gradient, bound."""
    options = dict(case.options)
    if "rank" not in inspect.signature(function).parameters:
        case = replace(case, rank="numerical")
        del options["rank"]
    judged = [(t, t.rank()) for t in truths(case)]
    with route(case.compiled):
        leaf = _leaf(case)
        try:
            value = function(leaf, **options)
        except EqualSingularValuesError:
            # Right where D is rounding for some element, or where its singular values are one.
            if any(t.top == 0 or r is None or truth_of(t, r) is None for t, r in judged):
                return
            raise
        grads = _gradient([value], leaf, 0) if leaf.numel() else None
    for index, (truth, rank) in enumerate(judged):
        if rank is None or truth.top == 0 or grads is None:
            continue
        known = truth_of(truth, rank)
        if known is None:
            continue
        wanted, bound, right, relative = known
        got = float(value.detach().reshape(-1)[index])
        if bound > VAGUE * abs(wanted) and bound > 1e-3 * truth.top**2:
            continue
        _close("value", got, wanted, bound, case.a.dtype)
        if truth.cluster("max", rank) is not None and truth.cluster("min", rank) is not None:
            _close_gradient("gradient", grads[index], right, relative)


def _moderate(truth: Truth) -> bool:
    """Whether fourth powers of the singular values, and their reciprocals, stay normal."""
    return 1e-30 < truth.top < 1e30


def _well_truth(of_gram: bool) -> Callable[[Truth, int], Any]:
    name = "gram_r_well" if of_gram else "r_well"

    def truth_of(truth: Truth, rank: int) -> Any:
        if not _moderate(truth):
            return None
        found = truth.cluster("max", rank)
        if found is None:
            return None
        options = {"rank_rtol": truth.case.rank_rtol, "cluster_rtol": truth.case.cluster_rtol}
        wanted = float(getattr(reference, name)(truth.matrix))
        right = getattr(reference, name + "_gradient")(truth.matrix, **options)
        power = 4 if of_gram else 2
        bound = 64 * max(truth.matrix.shape) * EPS * truth.top**power
        size = float(np.linalg.norm(right))
        _, gap, width = found
        slack = VECTOR_UNITS * max(truth.matrix.shape) * EPS / max(gap, 1e-300) + 4 * width
        return wanted, bound, right, slack * truth.top ** (power - 1) / size if size else 1.0

    return truth_of


def _ill_truth(of_gram: bool) -> Callable[[Truth, int], Any]:
    name = "gram_r_ill" if of_gram else "r_ill"

    def truth_of(truth: Truth, rank: int) -> Any:
        if not _moderate(truth):
            return None
        found = truth.cluster("min", rank)
        if found is None or found[0] >= rank:
            return None
        s = truth.sigma**2 if of_gram else truth.sigma
        full = truth.case.rank == "full"
        missing = full and rank < (truth.matrix.shape[1] if of_gram else len(s))
        # k is the rank, or the full width.
        smallest = 0.0 if missing else float(s[rank - 1])
        mean = float(np.sum(s**2)) / (2 * rank)
        denominator = mean - smallest**2 / 2
        error = 64 * max(truth.matrix.shape) * EPS * (mean + truth.top * smallest)
        if denominator <= 1e3 * error:
            return None
        try:
            wanted = float(getattr(reference, name)(truth.matrix, **truth.case.options))
            right = getattr(reference, name + "_gradient")(truth.matrix, **truth.case.options)
        except ValueError:
            return None
        relative = 4 * error / denominator
        _, gap, width = found
        vectors = VECTOR_UNITS * max(truth.matrix.shape) * EPS / max(gap, 1e-300)
        size = float(np.linalg.norm(right))
        power = 3 if of_gram else 1
        # d(sigma^4 / 2) = 2 sigma^3 u v^T, d(sigma^2 / 2) = sigma u v^T, anywhere in a cluster.
        size_min = float(truth.sigma[rank - 1]) ** (3 if of_gram else 1)
        spread = 4 * width * truth.top * (smallest if of_gram else 1.0)
        slack = (vectors * size_min + spread) / denominator**2
        slack += 64 * max(truth.matrix.shape) * EPS * truth.top**power / denominator**2
        return wanted, relative * wanted, right, (slack / size if size else 1.0) + 4 * relative

    return truth_of


def r_well(case: Matrices) -> None:
    """R_well of a matrix."""
    _regularizer(case, regularizers.r_well, _well_truth(False))


def r_ill(case: Matrices) -> None:
    """R_ill of a matrix."""
    _regularizer(case, regularizers.r_ill, _ill_truth(False))


def gram_r_well(case: Matrices) -> None:
    """R_well of K = x^T x, the fused operator."""
    _regularizer(case, regularizers.gram_r_well, _well_truth(True))


def gram_r_ill(case: Matrices) -> None:
    """R_ill of K = x^T x, the fused operator."""
    _regularizer(case, regularizers.gram_r_ill, _ill_truth(True))


# --- everything else that is an operator ----------------------------------------------------------


def streaming(case: Matrices) -> None:
    """Rows in blocks give what all rows together give."""
    flat = case.a.detach().reshape(-1, *case.a.shape[-2:])
    with route(case.compiled):
        for matrix in flat:
            cut = 1 + matrix.shape[0] // 3
            found = ops.StreamedGram(list(matrix.split(cut)), **case.options).extremes
            one = Matrices(matrix, case.rank, case.rank_rtol, case.cluster_rtol, case.compiled)
            (truth,) = truths(one)
            # The R factor and its decomposition: two backward errors.
            rank = truth.rank()
            if truth.top == 0 or rank is None or not 1e-150 < truth.top < 1e150:
                continue
            wanted = truth.top**2
            bound = (truth.top + 4 * truth.delta) ** 2 - wanted
            _close("lambda_max", float(found.lambda_max), wanted, bound, torch.float64)
            if int(found.rank) != rank:
                if np.any(np.abs(truth.sigma - case.rank_rtol * truth.top) <= 32 * truth.delta):
                    continue
                raise AssertionError(f"rank: got {int(found.rank)}, expected {rank}")


def tracker(case: Matrices) -> None:
    """A trajectory through the matrix: every step is what the matrix alone gives."""
    side = min(case.a.shape[-2:])
    flat = case.a.detach()[..., :side, :side].double().reshape(-1, side, side)
    generator = torch.Generator().manual_seed(side)
    with route(case.compiled):
        for matrix in flat[:1]:
            scale = float(matrix.abs().max())
            if not 1e-290 < scale < 1e290:
                continue
            follow = ops.SpectrumTracker()
            h = 0.5 * matrix + 0.5 * matrix.mT
            for _ in range(4):
                got = follow(h)
                values = np.linalg.eigvalsh(h.numpy() / scale)
                bound = VALUE_UNITS * side * EPS * float(np.abs(values).max())
                for place, wanted in ((0, values[-1]), (1, values[0])):
                    _close(f"eigenvalue {place}", float(got[place]) / scale, wanted, bound, h.dtype)
                noise = torch.randn(side, side, generator=generator, dtype=h.dtype)
                h = h + 1e-3 * scale * (noise + noise.mT)


def precondition(case: Matrices) -> None:
    """G K^-1 for gradients that come from the data, against the singular value decomposition."""
    flat = case.a.detach().reshape(-1, *case.a.shape[-2:])
    for matrix in flat:
        scale = float(matrix.abs().max())
        if not 1e-30 < scale < 1e30:
            continue
        x = matrix.double() / scale
        generator = torch.Generator().manual_seed(x.shape[0])
        gradient = torch.randn(3, x.shape[0], generator=generator, dtype=torch.float64) @ x
        for ridge in (1e-2, 1e-6):
            with route(case.compiled):
                layer = ops.Preconditioner.from_features(x, ridge=ridge)
                got = layer.apply(gradient)
            wanted = reference.preconditioned_gradient(gradient.numpy(), x.numpy(), ridge=ridge)
            kappa = 1.0 / ridge * max(x.shape)
            size = float(np.linalg.norm(wanted))
            error = float(np.linalg.norm(got.numpy() - wanted))
            if not error <= 1e2 * max(x.shape) * EPS * kappa * (size + 1e-300):
                raise AssertionError(f"ridge {ridge}: off by {error / size:.3g}")


def resolvents(case: Matrices) -> None:
    """Traces and gradient of the thin Gram matrix, ridges far below and far above its norm."""
    side = min(case.a.shape[-2:])
    flat = case.a.detach().double().reshape(-1, *case.a.shape[-2:])
    for matrix in flat:
        scale = float(matrix.abs().max())
        if not 1e-100 < scale < 1e100:
            continue
        x = matrix / scale if matrix.shape[0] >= matrix.shape[1] else matrix.mT / scale
        a = (x.mT @ x).requires_grad_()
        generator = torch.Generator().manual_seed(side)
        shifts = 10.0 ** torch.arange(-4, 5, 2, dtype=torch.float64)
        vectors = torch.randn(side, 2, generator=generator, dtype=torch.float64)
        with route(case.compiled):
            found = ops.resolvent_traces(a, shifts, vectors)
            (grad,) = torch.autograd.grad(sum(y.sum() for y in found), a)
        numbers = a.detach().numpy(), shifts.numpy(), vectors.numpy()
        truth = reference.resolvent_traces(*numbers)
        weights = [np.ones(y.shape) for y in found]
        size = float(np.linalg.norm(numbers[0], 2))
        for index, shift in enumerate(numbers[1]):
            kappa = (size + shift) / shift
            bound = VALUE_UNITS * side * EPS * kappa
            for name in ("first", "second"):
                got = float(getattr(found, name)[index].detach())
                wanted = float(getattr(truth, name)[index])
                _close(f"{name} at {shift}", got, wanted, bound * side, torch.float64)
            for got, wanted in zip(
                found.energies[index].tolist(), truth.energies[index], strict=True
            ):
                slack = bound * abs(wanted) + bound / shift**2
                _close(f"energy at {shift}", got, float(wanted), slack, torch.float64)
        right = reference.resolvent_traces_gradient(*numbers, *weights).a
        least = float(numbers[1][0])
        relative = VALUE_UNITS * side * EPS * (size + least) / least
        _close_gradient("resolvents", grad, right, 10.0 * relative)


def khatri_rao(case: Matrices) -> None:
    """Samples of one token and of as many tokens as a matrix has rows, and the gradients."""
    flat = case.a.detach().double().reshape(-1, *case.a.shape[-2:])
    scale = float(flat.abs().max()) if flat.numel() else 0.0
    if not 1e-60 < scale < 1e60:
        return
    tokens = flat / scale
    for a in (tokens, tokens[:, :, None, :].flatten(0, 1)):
        generator = torch.Generator().manual_seed(len(a))
        g = torch.randn(*a.shape[:-1], 3, generator=generator, dtype=torch.float64)
        weights = torch.randn(len(a), len(a), generator=generator, dtype=torch.float64)
        leaves = [a.clone().requires_grad_(), g.requires_grad_()]
        with route(case.compiled):
            found = ops.khatri_rao_gram(*leaves, bias=True)
            grads = torch.autograd.grad(found, leaves, weights)
        numbers = a.numpy(), g.detach().numpy()
        truth = reference.khatri_rao_gram(*numbers, bias=True)
        size, terms = float(np.abs(truth).max()), a[0].numel() + g[0].numel()
        worst = float(np.abs(found.detach().numpy() - truth).max())
        if not worst <= VALUE_UNITS * terms * EPS * size:
            raise AssertionError(f"K: off by {worst / size:.3g}")
        right = reference.khatri_rao_gram_gradient(*numbers, weights.numpy(), bias=True)
        for got, wanted in zip(grads, right, strict=True):
            _close_gradient("K", got, wanted, VALUE_UNITS * terms * len(a) * EPS)


def moments(case: Matrices) -> None:
    """The second-moment merge of two copies, and its gradients, at ridges down to 1e-8."""
    flat = case.a.detach().double().reshape(-1, *case.a.shape[-2:])
    for number, matrix in enumerate(flat):
        scale = float(matrix.abs().max())
        if not 1e-100 < scale < 1e100:
            continue
        rows, d = matrix / scale, matrix.shape[1]
        generator = torch.Generator().manual_seed(d)
        weights = list(torch.randn(3, 2, d, generator=generator, dtype=torch.float64))
        grams = [part.mT @ part for part in (rows[::2], rows[1::2], rows)]
        for value in (*weights, *grams):
            value.requires_grad_()
        (base, *copies), hardness = weights, torch.tensor([0.5, 2.0], dtype=torch.float64)
        # Absolute, as in the reference: a relative one moves with the moments.
        size = float((0.5 * grams[0] + 2.0 * grams[1] + grams[2]).detach().diagonal().mean())
        ridge = (1e-8, 1e-4, 1.0)[number % 3] * size
        with route(case.compiled):
            factor = ops.MomentFactor.from_moments(
                grams[:2],
                regularization=grams[2],
                hardness=hardness,
                ridge=ridge,
                relative=False,
            )
            (merged,) = ops.merge_moments([base], [[copy] for copy in copies], factor)
            found = torch.autograd.grad(merged.sum(), [*weights, *grams])
        numbers = [value.detach().numpy() for value in (*weights, *grams)]
        given = numbers[0], numbers[1:3], numbers[3:5]
        options = {
            "regularization": numbers[5],
            "hardness": hardness.numpy(),
            "ridge": factor.ridge,
        }
        wanted = reference.merge_moments(*given, **options)
        kappa = float(np.linalg.cond(factor.s.detach().numpy()))
        bound = 1e2 * d * EPS * kappa * float(np.linalg.norm(numbers[0]) + 1.0)
        error = float(np.linalg.norm(merged.detach().numpy() - wanted))
        if not error <= bound:
            raise AssertionError(f"merged: off by {error:.3g} > {bound:.3g}")
        right = reference.merge_moments_gradient(np.ones_like(wanted), *given, **options)
        # Those of moments hold S^-1 twice.
        scales = [1.0] * 3 + [kappa / max(float(np.linalg.norm(numbers[5])), factor.ridge)] * 3
        expected = [right.base, *right.copies, *right.moments, right.regularization]
        for index, (got, truth, grown) in enumerate(zip(found, expected, scales, strict=True)):
            if bound * grown > VAGUE:
                continue
            error = float(np.linalg.norm(got.numpy() - truth))
            if not error <= bound * grown:
                raise AssertionError(f"gradient {index}: off by {error:.3g} > {bound * grown:.3g}")


def merge(problem: Any, compiled: bool) -> None:
    """The merge and the gradient of its weights against the null-space reference."""
    factor = ops.RegularizationFactor.from_embeddings(problem.c_reg, ridge=problem.ridge)
    base = [w.detach().clone().requires_grad_() for w in problem.base]
    with route(compiled):
        found = ops.merge_kv(
            base,
            problem.concepts,
            problem.embeddings,
            factor,
            values=problem.values,
            hardness=problem.hardness,
        )
        grads = torch.autograd.grad([w.sum() for w in found], base)

    def numbers(parts: Any) -> Any:
        return None if parts is None else [p.detach().double().numpy() for p in parts]

    concepts = problem.concepts and [numbers(layers) for layers in problem.concepts]
    arguments: dict[str, Any] = {
        "values": numbers(problem.values),
        "ridge": problem.ridge,
        "inverse_hardness": problem.inverse_hardness.numpy(),
    }
    c_reg = problem.c_reg.double().numpy()
    rows = numbers(problem.embeddings)
    wanted = reference.merge_layers(numbers(base), concepts, rows, c_reg, **arguments)
    sigma = np.linalg.svd(c_reg, compute_uv=False)
    with np.errstate(divide="ignore"):
        kappa = min(float((sigma[0] / sigma[-1]) ** 2), 1.0 / max(problem.ridge, 1e-300)) + 1
    stacked = np.linalg.svd(np.concatenate(rows), compute_uv=False)
    counted = stacked[stacked > 1e-9 * stacked[0]] if stacked.size else np.ones(1)
    kappa_c = float(counted[0] / counted[-1]) if counted.size else 1.0
    single = problem.base[0].dtype != torch.float64
    rounding = 1e-3 if single else 1e3 * EPS * kappa * kappa_c
    for layer, (got, right) in enumerate(zip(found, wanted, strict=True)):
        size = float(np.linalg.norm(right)) + float(problem.base[layer].double().norm())
        error = float(np.linalg.norm(got.detach().double().numpy() - right))
        if not error <= rounding * size + 1e-12:
            raise AssertionError(f"layer {layer}: off by {error / size:.3g} > {rounding:.3g}")
        if not bool(grads[layer].isfinite().all()):
            raise AssertionError(f"layer {layer}: gradient not finite")
    if problem.repeats or problem.concepts is None or single:
        return
    right_grads = reference.merge_layers_gradient(
        [np.ones_like(w) for w in wanted], numbers(base), concepts, rows, c_reg, **arguments
    )
    for layer, (got, right) in enumerate(zip(grads, right_grads.base, strict=True)):
        error = float(np.linalg.norm(got.numpy() - right))
        size = float(np.linalg.norm(right)) + np.sqrt(right.size)
        if not error <= 1e2 * rounding * size:
            raise AssertionError(f"gradient of layer {layer}: off by {error / size:.3g}")


SPECTRAL: dict[str, Callable[[Matrices], None]] = {
    "extremal_singular_values": singular,
    "gram_extremes": gram,
    "symmetric_extremes": symmetric,
    "condition_number": condition,
    "r_well": r_well,
    "r_ill": r_ill,
    "gram_r_well": gram_r_well,
    "gram_r_ill": gram_r_ill,
    "StreamedGram": streaming,
    "SpectrumTracker": tracker,
    "Preconditioner": precondition,
    "resolvent_traces": resolvents,
    "khatri_rao_gram": khatri_rao,
    "merge_moments": moments,
}
OPERATORS = (*SPECTRAL, "merge_kv")


def fuzz(operator: str, cases: int, start: int) -> Count:
    """So many random cases of one operator; the seed repeats them."""
    count = Count()
    configured = settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=False,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )

    def judge(check: Callable[[], None], case: Any) -> None:
        try:
            check()
        except Exception as error:  # whatever it is, it is a loss
            words = f"{type(error).__name__}: {error}"
            count.lose(f"{words[:600]} | {case!r:.1500}")
        else:
            count.survived()

    if operator == "merge_kv":
        dtypes = st.sampled_from([torch.float64, torch.float64, torch.float32])
        problems = dtypes.flatmap(
            lambda dtype: st.one_of(
                strategies.merge_problems(weight_dtype=dtype, max_exponent=8.0),
                strategies.merge_problems_with_answer(),
            )
        )

        @seed(start)
        @configured
        @given(problems, st.booleans())
        def run(problem: Any, compiled: bool) -> None:
            judge(lambda: merge(problem, compiled), problem)

    else:

        @seed(start)
        @configured
        @given(matrices())
        def run(case: Matrices) -> None:
            judge(lambda: SPECTRAL[operator](case), case)

    run()
    return count
