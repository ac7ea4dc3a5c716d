r"""Steps of optimizers as functions, and their vector-Jacobian products.

A step maps parameters x, a gradient g and a state s (momenta) to new ones. Going backwards through
many of them needs, for cotangents of the new x and s, those of the old x, s and of g; where g is
the gradient of a loss at x, its cotangent is then sent through the Hessian. For Adam, with
step count t, :math:`\hat m = m / (1 - \beta_1^t)`, :math:`\hat v = v / (1 - \beta_2^t)`,

.. math::
    m' = \beta_1 m + (1 - \beta_1) g, \quad v' = \beta_2 v + (1 - \beta_2) g^2, \quad
    x' = (1 - \alpha\lambda) x - \alpha \hat m' / d, \quad d = \sqrt{\hat v'} + \epsilon,

cotangents :math:`\bar x', \bar m', \bar v'` come with what x' sends to the momenta,

.. math::
    \bar m'_+ = \bar m' - \frac{\alpha}{1 - \beta_1^t} \frac{\bar x'}{d}, \qquad
    \bar v'_+ = \bar v' + \frac{\alpha}{1 - \beta_2^t} \frac{\hat m' \bar x'}{2 d^2 \sqrt{\hat v'}},

and go on as

.. math::
    \bar g = (1 - \beta_1) \bar m'_+ + 2 (1 - \beta_2) g \bar v'_+, \quad
    \bar m = \beta_1 \bar m'_+, \quad \bar v = \beta_2 \bar v'_+, \quad
    \bar x = (1 - \alpha\lambda) \bar x'.

Where v' = 0 all gradients so far are 0, and so is the second term of :math:`\bar v'_+` in every
product that it enters: it is left out there, where a chain rule that divides gives NaN.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from immunize_ext.bilevel.trees import Parameters, axpy, scaled

State: TypeAlias = tuple[Parameters, ...]
"""Momenta of an optimizer, each by the names of the parameters."""


class Step(NamedTuple):
    """Parameters and momenta after a step, or their cotangents before it.

    Attributes:
        parameters: x.
        state: The momenta.
    """

    parameters: Parameters
    state: State


class Pullback(NamedTuple):
    """Cotangents before a step.

    Attributes:
        parameters: Of x, without what goes through the gradient.
        gradient: Of g.
        state: Of the momenta.
    """

    parameters: Parameters
    gradient: Parameters
    state: State


class InnerOptimizer(ABC):
    """An optimizer as a function that can be gone back through.

    Attributes:
        rate: Step size alpha.
        uses_gradient: Whether :meth:`pull_back` looks at the gradient and the state; a step that is
            linear in both does not.
    """

    rate: float
    uses_gradient: bool

    @abstractmethod
    def start(self, parameters: Mapping[str, Tensor]) -> State:
        """Momenta before the first step."""

    @abstractmethod
    def step(
        self,
        parameters: Mapping[str, Tensor],
        gradient: Mapping[str, Tensor],
        state: State,
        count: int,
    ) -> Step:
        """One step, out of place.

        Args:
            parameters: x.
            gradient: g.
            state: The momenta.
            count: Which step this is, from 1.
        """

    @abstractmethod
    def pull_back(
        self,
        cotangents: Step,
        *,
        gradient: Mapping[str, Tensor],
        state: State,
        count: int,
    ) -> Pullback:
        """Cotangents from after a step to before it.

        Args:
            cotangents: Of x' and the new momenta.
            gradient: g; an empty table will do where ``uses_gradient`` is false.
            state: The new momenta; an empty tuple will do there.
            count: Which step it was, from 1.
        """


@dataclass(frozen=True)
class SGD(InnerOptimizer):
    r"""Gradient descent, with heavy-ball momentum if asked for.

    .. math:: u' = \mu u + g, \qquad x' = x - \alpha u'

    Linear in everything, so going back needs neither gradient nor momentum.

    Attributes:
        rate: alpha.
        momentum: mu, 0 to 1.

    Source:
        ``torch.optim.SGD``.

    Example:
        >>> x, g = {"x": torch.tensor([1.0])}, {"x": torch.tensor([2.0])}
        >>> SGD(0.25).step(x, g, (), 1).parameters
        {'x': tensor([0.5000])}
    """

    rate: float
    momentum: float = 0.0
    uses_gradient = False

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        _check_rate("SGD", self.rate)
        _check_share("SGD", "momentum", self.momentum)

    def start(self, parameters: Mapping[str, Tensor]) -> State:
        """No momentum yet."""
        return (_zeros(parameters),) if self.momentum else ()

    def step(
        self,
        parameters: Mapping[str, Tensor],
        gradient: Mapping[str, Tensor],
        state: State,
        count: int,
    ) -> Step:
        """One step."""
        if self.momentum:
            gradient = axpy(self.momentum, state[0], gradient)
            state = (dict(gradient),)
        moved = {name: x - self.rate * gradient[name] for name, x in parameters.items()}
        return Step(moved, state)

    def pull_back(
        self,
        cotangents: Step,
        *,
        gradient: Mapping[str, Tensor],
        state: State,
        count: int,
    ) -> Pullback:
        """Cotangents before a step."""
        x = cotangents.parameters
        if not self.momentum:
            return Pullback(x, scaled(-self.rate, x), ())
        u = axpy(-self.rate, x, cotangents.state[0])
        return Pullback(x, u, (scaled(self.momentum, u),))


@dataclass(frozen=True)
class Adam(InnerOptimizer):
    r"""Adam, with decoupled weight decay if asked for.

    Attributes:
        rate: alpha.
        betas: beta_1 and beta_2.
        epsilon: epsilon.
        weight_decay: lambda of AdamW.

    Source:
        Kingma and Ba, ICLR 2015, Algorithm 1, in the order of operations of ``torch.optim.AdamW``.

    Example:
        >>> x, g = {"x": torch.tensor([1.0])}, {"x": torch.tensor([2.0])}
        >>> adam = Adam(0.25)
        >>> adam.step(x, g, adam.start(x), 1).parameters  # the first step is alpha long
        {'x': tensor([0.7500])}
    """

    rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    uses_gradient = True

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        _check_rate("Adam", self.rate)
        for beta in self.betas:
            _check_share("Adam", "betas", beta)
        if not (math.isfinite(self.epsilon) and self.epsilon > 0.0):
            raise ValueError(f"Adam: epsilon must be positive and finite, got {self.epsilon}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0.0):
            raise ValueError(
                f"Adam: weight_decay must be finite and at least 0, got {self.weight_decay}"
            )

    def start(self, parameters: Mapping[str, Tensor]) -> State:
        """Both momenta at zero."""
        return _zeros(parameters), _zeros(parameters)

    def step(
        self,
        parameters: Mapping[str, Tensor],
        gradient: Mapping[str, Tensor],
        state: State,
        count: int,
    ) -> Step:
        """One step."""
        beta1, beta2 = self.betas
        first = {n: torch.lerp(m, gradient[n], 1.0 - beta1) for n, m in state[0].items()}
        second = {
            n: (v * beta2).addcmul_(gradient[n], gradient[n], value=1.0 - beta2)
            for n, v in state[1].items()
        }
        size, root = self.rate / (1.0 - beta1**count), math.sqrt(1.0 - beta2**count)
        moved = {}
        for name, x in parameters.items():
            divisor = second[name].sqrt().div_(root).add_(self.epsilon)
            shrunk = x * (1.0 - self.rate * self.weight_decay) if self.weight_decay else x
            moved[name] = torch.addcdiv(shrunk, first[name], divisor, value=-size)
        return Step(moved, (first, second))

    def pull_back(
        self,
        cotangents: Step,
        *,
        gradient: Mapping[str, Tensor],
        state: State,
        count: int,
    ) -> Pullback:
        """Cotangents before a step."""
        of_gradient, of_first, of_second = {}, {}, {}
        x = cotangents.parameters
        for name, x_bar in x.items():
            of_gradient[name], of_first[name], of_second[name] = adam_step_vjp(
                x_bar,
                cotangents.state[0][name],
                cotangents.state[1][name],
                gradient[name],
                state[0][name],
                state[1][name],
                rate=self.rate,
                betas=self.betas,
                epsilon=self.epsilon,
                count=count,
            )
        if self.weight_decay:
            x = scaled(1.0 - self.rate * self.weight_decay, x)
        return Pullback(x, of_gradient, (of_first, of_second))


def adam_step_vjp(
    x_bar: Tensor,
    m_bar: Tensor,
    v_bar: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Cotangents of gradient and momenta before a step of Adam; derivation above.

    Args:
        x_bar: Cotangent of x', any shape.
        m_bar: Of m', the same shape.
        v_bar: Of v'.
        gradient: g of the step.
        m: m', the first momentum after the step.
        v: v', the second.
        rate: alpha.
        betas: beta_1 and beta_2.
        epsilon: epsilon.
        count: t, from 1.

    Returns:
        Cotangents of g, m and v. That of x is the one of x', less weight decay.

    Note:
        Elementwise; two temporaries, and the three results. Where v' = 0 the derivative is the
        limit, without NaN.

    Source:
        DERIVED, see the head of this module; checked against autograd of the step.

    Example:
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> m, v = 0.1 * one, 0.001 * one  # after a first gradient of 1
        >>> of_g, *_ = adam_step_vjp(one, 0 * one, 0 * one, one, m, v, rate=0.1, count=1)
        >>> abs(float(of_g)) < 1e-8  # a first step is alpha long, whatever the gradient
        True
    """
    beta1, beta2 = betas
    corrected1, corrected2 = 1.0 - beta1**count, 1.0 - beta2**count
    root = (v / corrected2).sqrt_()
    pulled = x_bar / (root + epsilon)  # x_bar / d
    first = torch.add(m_bar, pulled, alpha=-rate / corrected1)
    # m x_bar / (2 d^2 root): d is made of root again, which saves keeping it.
    pulled.mul_(m).div_(root + epsilon).div_(root)
    pulled.masked_fill_(root == 0.0, 0.0)
    second = torch.add(v_bar, pulled, alpha=rate / (2.0 * corrected1 * corrected2))
    of_gradient = (first * (1.0 - beta1)).addcmul_(gradient, second, value=2.0 * (1.0 - beta2))
    return of_gradient, first.mul_(beta1), second.mul_(beta2)


def _zeros(parameters: Mapping[str, Tensor]) -> Parameters:
    return {name: torch.zeros_like(value) for name, value in parameters.items()}


def _check_rate(function: str, rate: float) -> None:
    if not (math.isfinite(rate) and rate > 0.0):
        raise ValueError(f"{function}: rate must be positive and finite, got {rate}")


def _check_share(function: str, name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{function}: {name} must be 0 to 1, below 1, got {value}")
