"""What a linear probe minimises: the squared or the logistic loss of its scores.

A probe w on features Z has scores s = Z w and minimises f(w) = sum_i l(s_i, y_i). Everything that
an optimizer needs is a function of the scores:

    squared     l = (s - y)^2 / 2,         l' = s - y,                     l'' = 1
    logistic    l = log(1 + e^{-y s}),     l' = -y / (1 + e^{y s}),        l'' = q (1 - q) <= 1/4,
                                                                           q = 1 / (1 + e^{-s}).

With an output for each of k classes W is (p, k), a sample has k scores s and a row y of targets,
positive at its class c (``data.classes``); the squared loss adds up over outputs, the logistic one
is the softmax cross-entropy, with p = softmax(s):

    logistic    l = log sum_j e^{s_j} - s_c,   l' = p - e_c,   l'' = diag(p) - p p^T <= 1/2.

All outputs are one head: an inner product adds up over them, and a step has one size.

So the gradient of f is Z^T l', its Hessian Z^T diag(l'') Z, and lambda_max(Z^T Z) sup l'' bounds
the Hessian. The Hessian of the squared loss is the one whose condition number immunization moves;
that of the logistic loss depends on w and lies below a quarter of it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from immunize_ext.probing.data.classes import mean_residual

LossName = Literal["squared", "logistic"]


# Scores that move further than this have no effect left on the logistic loss in float64.
_SATURATED = 1e3


# Scores that move by less than this share of the fastest one do not move at all.
_NO_MOVE = 1e-12


_NEWTON_STEPS = 60


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products of all entries."""
    return a.flatten() @ b.flatten()


class ProbeLoss(ABC):
    """A convex loss of scores; scores and targets may have one more dimension, of the outputs.

    Attributes:
        name: Name of the loss.
        curvature: sup l'', so that ``curvature * lambda_max(Z^T Z)`` bounds the Hessian.
    """

    name: LossName
    curvature: float

    @abstractmethod
    def report(self, scores: Tensor, y: Tensor) -> Tensor:
        """Mean loss of m heads as curves show it, ``(n, m)`` and ``(n,)`` to ``(m,)``."""

    @abstractmethod
    def slope(self, scores: Tensor, y: Tensor) -> Tensor:
        """Derivative l' at each score: vectors ``(n,)``, or scores ``(n, m)`` with y ``(n, 1)``."""

    @abstractmethod
    def total(self, scores: Tensor, y: Tensor) -> Tensor:
        """The objective f = sum l of a vector of scores, a scalar."""

    @abstractmethod
    def exact_step(self, scores: Tensor, image: Tensor, y: Tensor) -> Tensor:
        """The t >= 0 that minimises f along a descent direction whose scores are ``image``."""


class SquaredLoss(ProbeLoss):
    """Squared residuals; curves show their mean, without the factor 1/2.

    Example:
        >>> loss, y = SquaredLoss(), torch.tensor([1.0, -1.0])
        >>> loss.report(torch.zeros(2, 1), y).tolist(), loss.slope(torch.zeros(2), y).tolist()
        ([1.0], [-1.0, 1.0])
    """

    name: LossName = "squared"
    curvature = 1.0

    def report(self, scores: Tensor, y: Tensor) -> Tensor:
        """Mean squared residual per column."""
        return mean_residual(scores, y)

    def slope(self, scores: Tensor, y: Tensor) -> Tensor:
        """Residuals."""
        return scores - y

    def total(self, scores: Tensor, y: Tensor) -> Tensor:
        """Half the sum of squared residuals."""
        return (scores - y).square().sum() / 2.0

    def exact_step(self, scores: Tensor, image: Tensor, y: Tensor) -> Tensor:
        """-(residual . image) / |image|^2; 0 where the direction moves no score."""
        curvature = dot(image, image)
        return torch.where(curvature > 0, -dot(scores - y, image) / curvature, 0.0)


class LogisticLoss(ProbeLoss):
    """Logistic loss of targets -1 and +1, in nats.

    Example:
        >>> loss, y = LogisticLoss(), torch.tensor([1.0, -1.0])
        >>> round(float(loss.report(torch.zeros(2, 1), y)), 6), loss.slope(torch.zeros(2), y)
        (0.693147, tensor([-0.5000,  0.5000]))
    """

    name: LossName = "logistic"
    curvature = 0.25

    def report(self, scores: Tensor, y: Tensor) -> Tensor:
        """Mean logistic loss per column."""
        return softplus(-y[:, None] * scores).mean(0)

    def slope(self, scores: Tensor, y: Tensor) -> Tensor:
        """-y / (1 + e^{y s})."""
        return -y * torch.sigmoid(-y * scores)

    def each(self, scores: Tensor, y: Tensor) -> Tensor:
        """Loss of each sample, ``(n,)``."""
        return softplus(-y * scores)

    def bend(self, scores: Tensor, image: Tensor) -> float:
        """Second derivative of f along a direction whose scores are ``image``."""
        return float((torch.sigmoid(scores) * torch.sigmoid(-scores)) @ image.square())

    def moves(self, image: Tensor, y: Tensor) -> Tensor:
        """Sizes of what decides a sample's loss, along a direction."""
        return image.abs()

    def total(self, scores: Tensor, y: Tensor) -> Tensor:
        """Sum of logistic losses."""
        return self.each(scores, y).sum()

    def exact_step(self, scores: Tensor, image: Tensor, y: Tensor) -> Tensor:
        """Root of the derivative along the line, by Newton's method inside a bracket.

        Where the loss falls for ever (separable data) the step ends where what is left of it is
        rounding. A sample whose score hardly moves is what that has to wait for.
        """
        moves = self.moves(image, y)
        reach = float(moves.max())

        def derivative(t: float) -> float:
            return float(dot(self.slope(scores + t * image, y), image))

        start = derivative(0.0)
        if not start < 0.0 or reach == 0.0:
            return scores.new_zeros(())
        negligible = torch.finfo(scores.dtype).eps * float(self.total(scores, y))
        # l'' <= 1/4 keeps the derivative negative up to here.
        low = -start / (self.curvature * float(dot(image, image)))
        high = 2.0 * low
        # Images this small are rounding errors of the direction.
        slowest = float(moves.where(moves > _NO_MOVE * reach, reach).min())
        last = max(low, _SATURATED / slowest)
        while derivative(high) < 0.0:
            # Further along, no loss falls below 0, and those on the other side only grow.
            moved = scores + high * image
            falling = (self.slope(moved, y) * image).reshape(len(y), -1).sum(1) < 0.0
            left = float(self.each(moved, y)[falling].sum())
            if left <= negligible or high >= last:
                return scores.new_tensor(high)
            low, high = high, 2.0 * high
        t = low
        for _ in range(_NEWTON_STEPS):
            moved = scores + t * image
            value = float(dot(self.slope(moved, y), image))
            low, high = (t, high) if value < 0.0 else (low, t)
            # f is convex: it lies no further above its minimum than this.
            if abs(value) * (high - low) <= negligible:
                break
            second = self.bend(moved, image)
            newton = t - value / second if second > 0.0 else math.inf
            following = newton if low < newton < high else (low + high) / 2.0
            if following == t:
                break
            t = following
        return scores.new_tensor(t)


class SoftmaxLoss(LogisticLoss):
    """Softmax cross-entropy of targets with a column for each class, in nats.

    Example:
        >>> loss, y = SoftmaxLoss(), torch.tensor([[1.0, -0.5, -0.5]])
        >>> loss.slope(torch.zeros(1, 3), y)
        tensor([[-0.6667,  0.3333,  0.3333]])
    """

    curvature = 0.5

    def report(self, scores: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy of each head."""
        return self.each(scores, y[:, None]).mean(0)

    def slope(self, scores: Tensor, y: Tensor) -> Tensor:
        """Softmax of the scores, less 1 at the class."""
        return scores.softmax(-1) - (y > 0).to(scores.dtype)

    def each(self, scores: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of each sample, from the score of its class on: no digit cancels."""
        own = scores.where(y > 0, 0.0).sum(-1, keepdim=True)
        others = (scores - own).masked_fill(y > 0, -math.inf)
        return softplus(others.logsumexp(-1))

    def bend(self, scores: Tensor, image: Tensor) -> float:
        """Sum of variances of the image under the softmax."""
        p = scores.softmax(-1)
        centred = image - (p * image).sum(-1, keepdim=True)
        return float((p * centred.square()).sum())

    def moves(self, image: Tensor, y: Tensor) -> Tensor:
        """Sizes of score differences between the class and the others."""
        own = image.where(y > 0, 0.0).sum(-1, keepdim=True)
        return (image - own).abs().masked_fill(y > 0, 0.0).flatten()


_SOFTMAX = SoftmaxLoss()

LOSSES: dict[str, ProbeLoss] = {"squared": SquaredLoss(), "logistic": LogisticLoss()}


def loss_for(name: str, y: Tensor) -> ProbeLoss:
    """The loss of a name for targets of one output or of several."""
    return _SOFTMAX if name == "logistic" and y.dim() > 1 else LOSSES[name]


def probe_loss(function: str, name: str) -> ProbeLoss:
    """The loss of a name.

    Args:
        function: Who asks; stands in the error.
        name: ``"squared"`` or ``"logistic"``.

    Returns:
        The loss.

    Raises:
        ValueError: If there is no loss of that name.

    Example:
        >>> probe_loss("attack", "logistic").curvature
        0.25
    """
    if name not in LOSSES:
        raise ValueError(f"{function}: loss must be one of {', '.join(LOSSES)}, got {name!r}")
    return LOSSES[name]
