r"""Adaptation by K optimizer steps, and four ways to differentiate what it ends at.

Steps :math:`\theta_{k+1} = \theta_k - \alpha g_k(\theta_k)` lead from theta to
:math:`\theta' = \theta_K`. A loss F of theta' has the hypergradient

.. math:: \nabla_\theta F = (I - \alpha H_0) (I - \alpha H_1) \cdots (I - \alpha H_{K-1})\, v,
          \qquad v = \nabla F(\theta'),

with :math:`H_k` the Hessian of step k's loss at :math:`\theta_k`. Autograd that records the steps
(``create_graph``) keeps K graphs of a gradient for it. The product can as well be taken from the
right by one Hessian-vector product a factor, :math:`v_k = v_{k+1} - \alpha H_k v_{k+1}`, with the
graph of one gradient at a time and K copies of what moves: often a small part of a model. Adam and
momentum fit in by the vector-Jacobian products of their steps (:mod:`optimizers
<immunize_ext.bilevel.optimizers>`).

Where adaptation is thought to end at a minimum near theta instead,
:math:`\theta' = \arg\min_\phi L(\phi) + |\phi - \theta|^2 / 2 \gamma`, the hypergradient is
:math:`(I + \gamma H)^{-1} v` whatever the way there (iMAML), by Neumann's series or conjugate
gradients.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from immunize_ext.bilevel.curvature import OPERATORS, Curvature, OperatorKind, gradient
from immunize_ext.bilevel.optimizers import InnerOptimizer, State, Step
from immunize_ext.bilevel.solvers import conjugate_gradients, neumann
from immunize_ext.bilevel.trees import Loss, Parameters, axpy, norm, scaled

HypergradientKind: TypeAlias = Literal["first_order", "unrolled", "truncated", "implicit"]
"""How adaptation is differentiated through."""

Solver: TypeAlias = Literal["neumann", "cg"]
"""How an implicit hypergradient is solved for."""


@dataclass(frozen=True)
class Hypergradient:
    r"""How the result of an adaptation is differentiated by where it started.

    Attributes:
        kind: ``"first_order"``: the product of factors is the identity; ``"unrolled"``: all of
            them; ``"truncated"``: the last ``steps`` of them; ``"implicit"``:
            :math:`(I + \gamma A)^{-1}` at the end.
        steps: Products with a second derivative at most: the factors that ``"truncated"`` keeps,
            the terms of Neumann's series, the iterations of conjugate gradients.
        solver: Of ``"implicit"``.
        operator: A: the Hessian, the Gauss-Newton matrix of a
            :class:`~immunize_ext.bilevel.Composed` loss, or differences of gradients.
        gamma: Of ``"implicit"``: how far adaptation may go; alpha times the number of steps when
            ``None``.
        tolerance: Relative residual at which conjugate gradients stop.

    Source:
        iMAML (NeurIPS 2019) for ``"implicit"``; Shaban et al. (AISTATS 2019) for ``"truncated"``.

    Example:
        >>> Hypergradient("implicit", operator="gauss_newton").solver
        'cg'
    """

    kind: HypergradientKind = "first_order"
    steps: int = 3
    solver: Solver = "cg"
    operator: OperatorKind = "hessian"
    gamma: float | None = None
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        for name, kind in (
            ("kind", HypergradientKind),
            ("solver", Solver),
            ("operator", OperatorKind),
        ):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"Hypergradient: {name} must be one of {', '.join(get_args(kind))}, got "
                    f"{getattr(self, name)!r}"
                )
        if self.steps < 1:
            raise ValueError(f"Hypergradient: steps must be at least 1, got {self.steps}")
        for name in ("gamma", "tolerance"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0.0):
                raise ValueError(f"Hypergradient: {name} must be positive and finite, got {value}")

    @property
    def differentiates_twice(self) -> bool:
        """Whether gradients are differentiated, which fused attention does not allow."""
        return self.kind != "first_order" and self.operator != "secant"


class Sweep(NamedTuple):
    r"""What one backward pass through an adaptation did.

    Attributes:
        products: Products with a second derivative.
        seconds: Time.
        contraction: :math:`|\nabla_\theta F| / |v|`: how much of the signal is left where the
            adaptation started.
        residual: Of the solver, see :class:`~immunize_ext.bilevel.Solution`; 0 where nothing is
            solved.
    """

    products: int
    seconds: float
    contraction: float
    residual: float


class Adapted(NamedTuple):
    """An adaptation.

    Attributes:
        parameters: theta', a function of theta and of what is held.
        losses: Losses met on the way.
        sweeps: One for each backward pass through theta', as they come; none of first order.
    """

    parameters: Parameters
    losses: list[float]
    sweeps: list[Sweep]


def adapt(
    parameters: Mapping[str, Tensor],
    losses: Sequence[Loss],
    optimizer: InnerOptimizer,
    hypergradient: Hypergradient | None = None,
    *,
    held: Mapping[str, Tensor] | None = None,
    scale: float = 1.0,
) -> Adapted:
    r"""Optimizer steps from theta, one on each loss, that can be differentiated through.

    With ``"implicit"`` the steps descend on loss + |phi - theta|^2 / (2 gamma).

    Args:
        parameters: theta, which may require gradients; all of them move.
        losses: One a step: functions of the parameters, and of what is held, by name. They are
            called again in the backward pass, so they have to bring along what they need
            (autocast, fixed noise), and must depend on nothing else that requires gradients.
        optimizer: Takes the steps.
        hypergradient: How theta' is differentiated; to first order when ``None``.
        held: What the losses depend on beside the parameters, by other names. Gradients reach it
            in all kinds but first order: learned losses, base weights under an adapter.
        scale: Factor on losses while their gradients are computed, for float16.

    Returns:
        theta', as new tensors that know their derivative, and what was met.

    Raises:
        NegativeCurvatureError: In the backward pass, by conjugate gradients on an indefinite
            matrix.
        ValueError: If an operator needs a :class:`~immunize_ext.bilevel.Composed` loss.

    Note:
        Deterministic if the losses are. Differentiable once. The backward pass keeps K copies of
        the parameters (three times as many with Adam) and one graph of a gradient.

    Source:
        Maclaurin et al. (ICML 2015) and Franceschi et al. (ICML 2017) for the reverse sweep.

    Example:
        >>> from immunize_ext.bilevel import SGD
        >>> theta = {"x": torch.tensor([2.0], requires_grad=True)}
        >>> loss = lambda p: 1.5 * p["x"].square().sum()  # H = 3
        >>> found = adapt(theta, [loss] * 2, SGD(0.1), Hypergradient("unrolled"))
        >>> found.parameters["x"].sum().backward()
        >>> theta["x"].grad  # (1 - 0.1 * 3)^2
        tensor([0.4900])
    """
    held = dict(held or {})
    shared = held.keys() & parameters.keys()
    if shared:
        raise ValueError(
            f"adapt: held must have other names than parameters, got {min(shared)!r} in both"
        )
    plan = _Plan(
        tuple(parameters),
        tuple(held),
        tuple(losses),
        optimizer,
        hypergradient or Hypergradient(),
        scale,
    )
    met: list[float] = []
    sweeps: list[Sweep] = []
    found = _Adaptation.apply(plan, met, sweeps, *parameters.values(), *held.values())
    return Adapted(dict(zip(plan.moved, found, strict=True)), met, sweeps)


class _Plan(NamedTuple):
    """What an adaptation is, apart from its tensors."""

    moved: tuple[str, ...]
    held: tuple[str, ...]
    losses: tuple[Loss, ...]
    optimizer: InnerOptimizer
    hypergradient: Hypergradient
    scale: float

    @property
    def gamma(self) -> float:
        """Of an implicit hypergradient."""
        chosen = self.hypergradient.gamma
        return self.optimizer.rate * max(len(self.losses), 1) if chosen is None else chosen

    def tables(self, tensors: Sequence[Tensor]) -> tuple[Parameters, Parameters]:
        """Parameters and what is held, from the arguments of the function."""
        count = len(self.moved)
        return (
            dict(zip(self.moved, tensors[:count], strict=True)),
            dict(zip(self.held, tensors[count:], strict=True)),
        )

    def kept(self) -> range:
        """The steps whose derivative is taken."""
        steps, kind = len(self.losses), self.hypergradient.kind
        count = {"unrolled": steps, "truncated": min(self.hypergradient.steps, steps)}
        return range(steps - count.get(kind, 0), steps)

    def curvature(self, step: int, at: Parameters, held: Parameters) -> Curvature:
        """The second derivative of a step's loss."""
        operator = OPERATORS[self.hypergradient.operator]
        return operator(self.losses[step], at, held, scale=self.scale)


class _Passed(NamedTuple):
    """A step on the way: where it was taken, and the momenta after it."""

    point: Parameters
    state: State


class _Adaptation(torch.autograd.Function):
    """theta and what is held to theta'; the backward pass is the sweep."""

    @staticmethod
    def forward(
        ctx: Any, plan: _Plan, met: list[float], sweeps: list[Sweep], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        theta, held = plan.tables([tensor.detach() for tensor in tensors])
        implicit, kept = plan.hypergradient.kind == "implicit", plan.kept()
        current, passed = theta, {}
        state = plan.optimizer.start(theta)
        for step, loss in enumerate(plan.losses):
            here = {name: value.detach().requires_grad_() for name, value in current.items()}
            with torch.enable_grad():
                value = loss({**held, **here})
                found = gradient(value * plan.scale, here)
            if plan.scale != 1.0:
                found = scaled(1.0 / plan.scale, found)
            if implicit:
                away = axpy(-1.0, theta, current)
                found = axpy(1.0 / plan.gamma, away, found)
            met.append(float(value.detach()))
            # The first point is theta, which is kept as an input: changed in place, it is noticed.
            point = current if step else {}
            current, state = plan.optimizer.step(current, found, state, step + 1)
            if step in kept:
                passed[step] = _Passed(point, state if plan.optimizer.uses_gradient else ())
        ctx.plan, ctx.sweeps, ctx.passed = plan, sweeps, passed
        ctx.end = {name: value.clone() for name, value in current.items()} if implicit else {}
        ctx.save_for_backward(*tensors)
        # Without a step theta' is theta, and an input must not be returned as it is.
        return tuple(value if plan.losses else value.clone() for value in current.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        plan: _Plan = ctx.plan
        tensors: tuple[Tensor, ...] = ctx.saved_tensors
        theta, held = plan.tables(tensors)
        # detach() below would forget which of the held need a gradient.
        held = {
            name: value.detach().requires_grad_(needed)
            for (name, value), needed in zip(
                held.items(), ctx.needs_input_grad[3 + len(theta) :], strict=True
            )
        }
        v = {
            name: torch.zeros_like(value) if part is None else part
            for (name, value), part in zip(theta.items(), cotangents, strict=True)
        }
        if plan.hypergradient.kind == "first_order" or not plan.losses:
            return (None, None, None, *v.values(), *[None] * len(held))
        started = time.perf_counter()
        length = norm(v)
        if plan.hypergradient.kind == "implicit":
            found, of_held, products, residual = _solved(plan, ctx.end, held, v)
        else:
            found, of_held = _swept(plan, ctx.passed, theta, held, v)
            products, residual = len(plan.kept()), 0.0
        contraction = norm(found) / length if length > 0.0 else 0.0
        seconds = time.perf_counter() - started
        ctx.sweeps.append(Sweep(products, seconds, contraction, residual))
        return (None, None, None, *found.values(), *(of_held.get(name) for name in plan.held))


def _swept(
    plan: _Plan, passed: Mapping[int, _Passed], theta: Parameters, held: Parameters, v: Parameters
) -> tuple[Parameters, Parameters]:
    """Through the steps that are kept, from the last to the first."""
    optimizer = plan.optimizer
    cotangents = Step(v, optimizer.start(v))
    of_held: Parameters = {}
    for step in reversed(plan.kept()):
        point, state = passed[step].point or theta, passed[step].state
        curvature = plan.curvature(step, point, held)
        before = optimizer.pull_back(
            cotangents,
            gradient=curvature.gradient if optimizer.uses_gradient else {},
            state=state,
            count=step + 1,
        )
        product = curvature(before.gradient)
        del curvature  # or two graphs stand side by side while the next is built
        cotangents = Step(axpy(1.0, product.moved, before.parameters), before.state)
        of_held = axpy(1.0, of_held, product.held) if of_held else product.held
    return cotangents.parameters, of_held


def _solved(
    plan: _Plan, end: Parameters, held: Parameters, v: Parameters
) -> tuple[Parameters, Parameters, int, float]:
    r"""(I + gamma A) x = v at the end; with what is held, :math:`-\gamma \nabla_{held} A x`."""
    settings, gamma = plan.hypergradient, plan.gamma
    curvature = plan.curvature(len(plan.losses) - 1, end, held)

    def apply(direction: Parameters) -> Parameters:
        return curvature(direction).moved

    if settings.solver == "neumann":
        x, products, residual = neumann(apply, v, gamma=gamma, terms=settings.steps)
    else:
        x, products, residual = conjugate_gradients(
            apply, v, gamma=gamma, steps=settings.steps, tolerance=settings.tolerance
        )
    if not any(value.requires_grad for value in held.values()):
        return x, {}, products, residual
    return x, scaled(-gamma, curvature(x).held), products + 1, residual
