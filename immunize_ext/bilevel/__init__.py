"""Differentiation through adaptation: K optimizer steps of any torch model, and what they end at.

A model enters as a loss of its parameters by name (``torch.func.functional_call``). Nothing here
knows what is trained.
"""

from __future__ import annotations

from immunize_ext.bilevel.curvature import (
    Composed,
    Curvature,
    GaussNewton,
    Hessian,
    OperatorKind,
    Product,
    Secant,
    gradient,
)
from immunize_ext.bilevel.first_order import displacement_norm
from immunize_ext.bilevel.hypergradient import (
    Adapted,
    Hypergradient,
    HypergradientKind,
    Solver,
    Sweep,
    adapt,
)
from immunize_ext.bilevel.optimizers import SGD, Adam, InnerOptimizer, adam_step_vjp
from immunize_ext.bilevel.solvers import Solution, conjugate_gradients, neumann, operator_norm
from immunize_ext.bilevel.trees import Loss, Parameters, axpy, dot, norm, scaled

__all__ = [
    "SGD",
    "Adam",
    "Adapted",
    "Composed",
    "Curvature",
    "GaussNewton",
    "Hessian",
    "Hypergradient",
    "HypergradientKind",
    "InnerOptimizer",
    "Loss",
    "OperatorKind",
    "Parameters",
    "Product",
    "Secant",
    "Solution",
    "Solver",
    "Sweep",
    "adam_step_vjp",
    "adapt",
    "axpy",
    "conjugate_gradients",
    "displacement_norm",
    "dot",
    "gradient",
    "neumann",
    "norm",
    "operator_norm",
    "scaled",
]
