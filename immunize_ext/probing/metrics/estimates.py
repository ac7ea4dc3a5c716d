r"""Condition numbers of a population from few samples, and what their errors do to RIR.

With S = X^T X / n of n samples in place of Sigma = E x x^T, the extremes of the spectrum move
apart: for Sigma = I they lie near (1 +- sqrt(p/n))^2, so that log kappa is too large by
4 artanh sqrt(p/n), whatever the number of groups that one averages. What is estimated here is kappa
of Sigma, by

- ``plain``: of S itself, over its numerical rank;
- ``ridge``: of S + r lambda_max(S) I;
- ``ledoit_wolf``: of the convex combination of S and its mean eigenvalue that loses least;
- ``nonlinear``: with eigenvalue l_i replaced by what minimises the Frobenius loss (below);
- ``spiked``: isolated extremes inverted as spikes beside a bulk of one level;
- ``matched``: of the flattest spectrum whose samples could have the eigenvalues that were seen.

The formulas, with gamma = p/n:

*Nonlinear.* d_i = l_i / ((pi gamma l_i f(l_i))^2 + (1 - gamma - pi gamma l_i h(l_i))^2), where f
is the density of the l_j smoothed by the Epanechnikov kernel k(x) = 3/(4 sqrt 5) (1 - x^2/5)_+ with
bandwidths n^(-1/3) l_j, and h its Hilbert transform, entry by entry
-3x/(10 pi) + 3/(4 sqrt 5 pi) (1 - x^2/5) log|(sqrt 5 - x)/(sqrt 5 + x)|. These are estimates of
u_i^T Sigma u_i along *sample* eigenvectors u_i, which no direction makes smaller than lambda_min:
kappa of them is too small by construction. The loss they minimise is not the one that is asked for.

*Spiked.* Beside a bulk of level 1, a population eigenvalue l shows as x = l (1 + gamma/(l - 1)), so
l = (x + 1 - gamma +- sqrt((x + 1 - gamma)^2 - 4 x)) / 2, with plus above the bulk's upper edge
(1 + sqrt gamma)^2 and minus below its lower one. The level is that of the median.

*Matched.* With t the wanted eigenvalues and W a Wishart draw of n degrees of freedom,
m(t) = E log eig(diag(t)^(1/2) W diag(t)^(1/2) / n) is what samples show: log t <- log t + (log l -
m(t)) is a fixed-point iteration for m(t) = log l. It begins at the flattest spectrum, all values
equal, and ends as soon as what is left is as small as samples scatter (the discrepancy principle):
to fit noise would spread the spectrum again. Mean and scatter are those of a few draws, which stay
the same. Kurtosis, and dependence between samples, are not in the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from immunize_ext.ops.streaming import StreamedGram
from immunize_ext.settings import hint

EstimatorName: TypeAlias = Literal[
    "plain", "ridge", "ledoit_wolf", "nonlinear", "spiked", "matched"
]
"""Names of the estimators; a function of a :class:`SampleSpectrum` is one as well."""

_RIDGE = 1e-2
# Draws, most iterations, and how many standard deviations may be left: a little more than one.
_DRAWS, _ITERATIONS, _SCATTER = 8, 12, 1.5


class SampleSpectrum(NamedTuple):
    """What samples show of E x x^T; all that an estimator of its eigenvalues gets.

    Attributes:
        values: Positive eigenvalues l of S = x^T x / n, ascending, shape ``(r,)``, float64.
        samples: n.
        features: p.
        fourth: Mean of ``|x_i|^4`` over the samples.
    """

    values: Tensor
    samples: int
    features: int
    fourth: float

    @classmethod
    def of(cls, x: Tensor | Iterable[Tensor]) -> SampleSpectrum:
        """Of features, shape ``(n, p)``, or of row blocks of them that can be iterated twice.

        Blocks go through a QR factorisation one after the other
        (:class:`~immunize_ext.ops.StreamedGram`): nothing is squared, and memory is that of one.
        """
        blocks = [x] if isinstance(x, Tensor) else x
        streamed = StreamedGram(blocks)
        rank, n = int(streamed.extremes.rank), streamed.rows
        if rank == 0:
            raise ValueError("SampleSpectrum.of: x must have a row that is not zero, got none")
        sigma = torch.linalg.svdvals(streamed.factor)[:rank]
        squares = (block.detach().to(torch.float64).square().sum(-1) for block in blocks)
        fourth = math.fsum(float(lengths.square().sum()) for lengths in squares) / n
        values = (sigma / math.sqrt(n)).square().flip(0)
        return cls(values, n, streamed.factor.shape[1], fourth)

    @property
    def support(self) -> int:
        """Dimension of what the samples lie in; p where they are too few to tell."""
        rank = len(self.values)
        return rank if rank < self.samples else self.features

    def padded(self) -> Tensor:
        """All p eigenvalues, those that are 0 in front."""
        return torch.cat([self.values.new_zeros(self.features - len(self.values)), self.values])


Estimator: TypeAlias = Callable[[SampleSpectrum], Tensor]


def _plain(sample: SampleSpectrum) -> Tensor:
    return sample.values


def _ridge(sample: SampleSpectrum) -> Tensor:
    return sample.padded() + _RIDGE * sample.values[-1]


def _ledoit_wolf(sample: SampleSpectrum) -> Tensor:
    # Sigma-hat = (1 - s) S + s mu I, s = min(1, b^2 / d^2), d^2 = |S - mu I|^2 and
    # b^2 = sum_i |x_i x_i^T - S|^2 / n^2 = (mean |x_i|^4 - |S|^2) / n.
    values = sample.padded()
    mean = values.mean()
    distance = (values - mean).square().sum()
    noise = (sample.fourth - values.square().sum()) / sample.samples
    share = float((noise / distance).clamp(0.0, 1.0)) if float(distance) > 0.0 else 1.0
    return (1.0 - share) * values + share * mean


def _nonlinear(sample: SampleSpectrum) -> Tensor:
    values, n, p = sample.values, sample.samples, sample.support
    gamma, width = p / n, n ** (-1.0 / 3.0)
    scales = width * values
    x = (values[:, None] - values) / scales
    density = (0.75 / math.sqrt(5.0) * (1.0 - x.square() / 5.0).clamp(min=0.0) / scales).mean(1)
    edge = math.sqrt(5.0)
    ratio = ((edge - x) / (edge + x)).abs().log()
    # At the ends of the kernel the factor in front is 0, and so is the limit.
    bump = torch.where(x.abs() == edge, 0.0, (1.0 - x.square() / 5.0) * ratio)
    hilbert = ((-0.3 * x + 0.75 / edge * bump) / (math.pi * scales)).mean(1)
    if p <= n:
        real = 1.0 - gamma - math.pi * gamma * values * hilbert
        return values / ((math.pi * gamma * values * density).square() + real.square())
    # Below p samples, p - n eigenvalues are 0; they get one value, from the transform at 0.
    inside = 0.3 / width**2 + 0.75 / (edge * width) * (1.0 - 0.2 / width**2) * math.log(
        (1.0 + edge * width) / abs(1.0 - edge * width)
    )
    at_zero = inside / math.pi * float((1.0 / values).mean())
    zero = 1.0 / (math.pi * (p - n) / n * at_zero)
    found = 1.0 / (math.pi**2 * values * (density.square() + hilbert.square()))
    return torch.cat([found.new_full((p - n,), zero), found])


def _marchenko_pastur_median(gamma: float) -> float:
    """Median of the eigenvalues that noise of level 1 shows; gamma at most 1."""
    low, high = (1.0 - math.sqrt(gamma)) ** 2, (1.0 + math.sqrt(gamma)) ** 2
    # x = centre - radius cos(angle) takes the square roots at both ends out of the density.
    angles = (torch.arange(4000, dtype=torch.float64) + 0.5) * (math.pi / 4000)
    x = (low + high) / 2.0 - (high - low) / 2.0 * angles.cos()
    mass = (angles.sin().square() / x).cumsum(0)
    return float(x[int(torch.searchsorted(mass, mass[-1] / 2.0))])


def _spiked(sample: SampleSpectrum) -> Tensor:
    gamma = sample.support / sample.samples
    _require_samples(sample, "spiked")
    level = float(sample.values.median()) / _marchenko_pastur_median(gamma)
    x = sample.values / level
    root = ((x + 1.0 - gamma).square() - 4.0 * x).clamp(min=0.0).sqrt()
    # The ends of a bulk scatter by n^(-2/3) (Tracy and Widom); what stands out stands out by more.
    rows, columns = math.sqrt(sample.samples), math.sqrt(sample.support)
    upper, lower = (
        (rows + sign * columns) ** 2
        + 2.0 * sign * (rows + sign * columns) * (1.0 / columns + sign / rows) ** (1.0 / 3.0)
        for sign in (1.0, -1.0)
    )
    above, below = x > upper / sample.samples, x < lower / sample.samples
    spikes = (x + 1.0 - gamma + torch.where(above, root, -root)) / 2.0
    return level * torch.where(above | below, spikes, 1.0)


def _matched(sample: SampleSpectrum) -> Tensor:
    _require_samples(sample, "matched")
    n, p = sample.samples, len(sample.values)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [
            torch.linalg.qr(torch.randn(n, p, dtype=torch.float64, generator=generator), mode="r").R
            for _ in range(_DRAWS)
        ]
    ).to(sample.values.device)
    seen = sample.values.log()
    found = sample.values.mean().log().expand_as(seen)
    for _ in range(_ITERATIONS):
        sigma = torch.linalg.svdvals(draws * (found / 2.0).exp()).flip(-1)
        shown = 2.0 * sigma.log() - math.log(n)
        left = seen - shown.mean(0)
        # Squares in units of their variance, that of the mean of the draws included.
        scatter = shown.var(0) * (1.0 + 1.0 / _DRAWS)
        whole = left.square().mean() / scatter.mean()
        ends = left[[0, -1]].square().amax() / scatter[[0, -1]].mean()
        if float(torch.maximum(whole, ends)) <= _SCATTER**2:
            break
        found = (found + left).sort().values
    return found.exp()


def _require_samples(sample: SampleSpectrum, name: str) -> None:
    if sample.samples <= sample.support:
        raise ValueError(
            f"estimated_kappa: x must have more samples than features for estimator {name!r}, got "
            f"{sample.samples} and {sample.support}; below that nothing tells what is not seen"
        )


_ESTIMATORS: dict[EstimatorName, Estimator] = {
    "plain": _plain,
    "ridge": _ridge,
    "ledoit_wolf": _ledoit_wolf,
    "nonlinear": _nonlinear,
    "spiked": _spiked,
    "matched": _matched,
}


class EstimatedKappa(NamedTuple):
    """A condition number of E x x^T, estimated.

    Attributes:
        values: Estimated eigenvalues, ascending, float64.
    """

    values: Tensor

    @property
    def log_kappa(self) -> float:
        """Log of the condition number."""
        return float(self.values[-1].log() - self.values[0].log())

    @property
    def kappa(self) -> float:
        """The condition number; infinite where it overflows."""
        return math.exp(self.log_kappa) if self.log_kappa < 709.0 else math.inf


def estimated_kappa(
    x: Tensor | Iterable[Tensor], estimator: EstimatorName | Estimator = "matched"
) -> EstimatedKappa:
    """Condition number of E x x^T from samples x.

    Args:
        x: Features, shape ``(n, p)``, float32 or float64; or row blocks of them that can be
            iterated twice, such as a loader.
        estimator: Which (module docstring), or a function from a :class:`SampleSpectrum` to
            estimated eigenvalues.

    Returns:
        The estimated eigenvalues, and kappa of them.

    Raises:
        ValueError: If the estimator is unknown, ``x`` is not finite or 0, or there are too few
            samples for the estimator.

    Note:
        Deterministic; computed in float64; not differentiable. ``plain`` on blocks is exact: that
        of all rows together.

    Source:
        Ledoit and Wolf, J. Multivariate Analysis 88 (2004); Ledoit and Wolf, Annals of Statistics
        48 (2020), section 4.7; Baik and Silverstein, J. Multivariate Analysis 97 (2006); Johnstone,
        Annals of Statistics 29 (2001); Gourieroux, Monfort and Renault, J. Applied Econometrics 8
        (1993); Morozov, Soviet Math. Doklady 7 (1966).

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.randn(500, 100, dtype=torch.float64, generator=generator)
        >>> names = ("plain", "ledoit_wolf", "matched")
        >>> [round(estimated_kappa(x, name).kappa, 1) for name in names]
        [6.6, 1.0, 1.0]
    """
    if not callable(estimator):
        if estimator not in _ESTIMATORS:
            raise ValueError(
                f"estimated_kappa: estimator must be one of {', '.join(_ESTIMATORS)} or a "
                f"function, got {estimator!r}{hint(estimator, _ESTIMATORS)}"
            )
        estimator = _ESTIMATORS[estimator]
    return EstimatedKappa(estimator(SampleSpectrum.of(x)).sort().values)


class EstimatedRatio(NamedTuple):
    """RIR from estimated condition numbers, as logarithms.

    Attributes:
        log_i: Log of (i), the harmful task's part.
        log_ii: Log of (ii), the primary task's part.
    """

    log_i: float
    log_ii: float

    @property
    def log_rir(self) -> float:
        """Log of RIR."""
        return self.log_i - self.log_ii


def estimated_rir(
    primary: Tensor,
    harmful: Tensor,
    *,
    primary_base: Tensor | float,
    harmful_base: Tensor | float,
    estimator: EstimatorName | Estimator = "matched",
) -> EstimatedRatio:
    """RIR of the population from features of few samples.

    The model before, theta_0, is one for all candidates theta. Its condition numbers can be found
    once from all data, and then stand here as numbers: what is left is the error of theta's own.

    Args:
        primary: Features of the primary task under theta, shape ``(n, p)``.
        harmful: Features of the harmful task under theta, shape ``(m, p)``.
        primary_base: Features of the same samples under theta_0; or log kappa of theta_0 itself,
            from all data (``estimated_kappa(loader, "plain").log_kappa``).
        harmful_base: The same for the harmful task.
        estimator: As for :func:`estimated_kappa`.

    Returns:
        Both parts.

    Raises:
        ValueError: As :func:`estimated_kappa`.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x, h = (torch.randn(300, 20, dtype=torch.float64, generator=generator) for _ in "ab")
        >>> scales = torch.linspace(1.0, 10.0, 20, dtype=torch.float64)
        >>> ratio = estimated_rir(x, h * scales, primary_base=0.0, harmful_base=0.0)
        >>> round(ratio.log_rir, 1), round(math.log(100.0), 1)
        (4.6, 4.6)
    """

    def log_kappa(x: Tensor | float) -> float:
        return estimated_kappa(x, estimator).log_kappa if isinstance(x, Tensor) else float(x)

    return EstimatedRatio(
        log_kappa(harmful) - log_kappa(harmful_base),
        log_kappa(primary) - log_kappa(primary_base),
    )


class ControlledMean(NamedTuple):
    """A mean over groups with a control variate.

    Attributes:
        mean: The estimate.
        beta: Share of the control's error that was taken off.
        sd: Standard deviation over groups of what the mean was taken of.
    """

    mean: float
    beta: float
    sd: float


def control_variate(
    values: Tensor, control: Tensor, exact: float, *, beta: float | None = None
) -> ControlledMean:
    r"""Mean of values over groups, less what a control with a known value got wrong there.

    .. math:: \bar v - \beta\, (\bar c - c), \qquad
              \beta = \operatorname{Cov}(v, c) / \operatorname{Var}(c)

    With v = log kappa(theta) and c = log kappa(theta_0) of the same samples and c known from all
    data, beta 1 keeps the paired difference, beta 0 ignores the samples' word on theta_0, and
    the regression over groups has the least spread. It takes noise away that both share; of a bias
    it takes beta times the control's.

    Args:
        values: v by group, shape ``(g,)``.
        control: c by group, shape ``(g,)``.
        exact: The control's known value.
        beta: The coefficient; by regression over the groups when omitted, which needs three.

    Returns:
        The estimate, beta and the spread over groups.

    Raises:
        ValueError: If shapes differ or there are too few groups.

    Source:
        Glasserman, Monte Carlo Methods in Financial Engineering, section 4.1.

    Example:
        >>> noise = torch.tensor([0.3, -0.1, 0.4, 0.0], dtype=torch.float64)
        >>> found = control_variate(5.0 + 2.0 * noise, 1.0 + noise, 1.0)
        >>> round(found.mean, 9), round(found.beta, 9), round(found.sd, 9)
        (5.0, 2.0, 0.0)
    """
    least = 3 if beta is None else 1
    if values.dim() != 1 or values.shape != control.shape or len(values) < least:
        raise ValueError(
            f"control_variate: values and control must have one shape (g,) with g at least "
            f"{least}, got {tuple(values.shape)} and {tuple(control.shape)}; give beta where "
            "there are few"
        )
    v, c = values.to(torch.float64), control.to(torch.float64)
    if beta is None:
        centred = c - c.mean()
        square = float(centred.square().sum())
        beta = float(centred @ v) / square if square > 0.0 else 0.0
    left = v - beta * (c - exact)
    spread = float(left.std()) if len(left) > 1 else 0.0
    return ControlledMean(float(left.mean()), beta, spread)


def kappa_slope(h: Tensor, v: Tensor) -> Tensor:
    r"""What a step along an estimated eigenvector does to the log of the true condition number.

    .. math:: \frac{d}{d\eta} \log \kappa\big(e^{-\eta v v^\top} H e^{-\eta v v^\top}\big)\Big|_0
              = 2 \big( (u_{\min}^\top v)^2 - (u_{\max}^\top v)^2 \big)

    So theta exp(-eta v v^T) raises kappa if and only if v leans more to the true bottom than to the
    true top. For d lambda_i = u_i^T dH u_i with dH = -(v v^T H + H v v^T) is
    -2 lambda_i (u_i^T v)^2. No gap beside the bottom is asked for: a v that minimises v^T S v has
    v^T H v <= lambda_min(S) + |S - H|, and (u_max^T v)^2 <= v^T H v / lambda_max; a small error
    against lambda_max is enough.

    Args:
        h: The true H, symmetric positive definite with simple extremes, shape ``(*, p, p)``.
        v: Unit vector, shape ``(*, p)``.

    Returns:
        The derivative, between -2 and 2, shape ``(*,)``; half of it is the share of the full step.

    Note:
        Deterministic; not for use where derivatives are wanted.

    Example:
        >>> h = torch.diag(torch.tensor([1.0, 2.0, 9.0], dtype=torch.float64))
        >>> v = torch.tensor([0.8, 0.6, 0.0], dtype=torch.float64)
        >>> round(float(kappa_slope(h, v)), 3), round(float(kappa_slope(h, v.flip(0))), 3)
        (1.28, -1.28)
    """
    vectors = torch.linalg.eigh(h).eigenvectors
    inner = (vectors[..., [0, -1]] * v[..., None]).sum(-2).square()
    return 2.0 * (inner[..., 0] - inner[..., 1])


def ky_fan_log_kappa(features: Tensor, count: int = 1) -> Tensor:
    r"""Log of the mean of the largest eigenvalues of F^T F over the mean of the smallest.

    .. math:: \log \frac{\lambda_1 + \dots + \lambda_m}{\lambda_{p-m+1} + \dots + \lambda_p}

    Where an extreme has near neighbours, its vector is whatever noise made of theirs, and a step
    along it reaches one of them; sums of m extremes (Ky Fan) have the projector onto all of them as
    their derivative, which noise moves only by the gap beside the m. At most log kappa.

    Args:
        features: F, shape ``(*, n, p)``, n at least p, floating point.
        count: m, at most p; 1 is log kappa.

    Returns:
        Shape ``(*,)``; differentiable where the m-th eigenvalues differ from the next.

    Raises:
        ValueError: If ``count`` is out of range or n is below p.

    Source:
        Fan, Proc. National Academy of Sciences 35 (1949).

    Example:
        >>> x = torch.diag(torch.tensor([3.0, 2.0, 1.0, 1.0], dtype=torch.float64))
        >>> [round(float(ky_fan_log_kappa(x, m).exp()), 6) for m in (1, 2)]
        [9.0, 6.5]
    """
    n, p = features.shape[-2:]
    if not 1 <= count <= p or n < p:
        raise ValueError(
            f"ky_fan_log_kappa: count must be from 1 to the {p} features, and samples at least as "
            f"many as those, got {count} and {n}"
        )
    squares = torch.linalg.svdvals(features).square()
    top, bottom = squares[..., :count].sum(-1), squares[..., p - count :].sum(-1)
    return top.log() - bottom.log()
