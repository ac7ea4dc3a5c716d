r"""Products with the second derivative of a loss at a point, without the matrix.

Three operators with one face: built at a point, they give the gradient there and, for a direction
d, the product A d with

- the Hessian, by differentiating the gradient: :math:`H d = \nabla \langle \nabla L, d \rangle`;
- the Gauss-Newton matrix :math:`G = J^\top L''_{out} J` of a loss that is a convex function of a
  model's outputs, positive semidefinite whatever the model. The two vector-Jacobian products
  :math:`u \mapsto J^\top u`, differentiated by u in direction d, give J d: no forward mode is
  needed, so every module that differentiates twice will do;
- the Hessian by a central difference of gradients, which needs nothing but gradients: fused
  attention, gradient checkpointing and their memory.

The losses may depend on further tensors that are held while the parameters move; the mixed product
:math:`\nabla_{held} \langle \nabla L, d \rangle` comes with every product.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from immunize_ext.bilevel.trees import Loss, Parameters, axpy, norm

OperatorKind: TypeAlias = Literal["hessian", "gauss_newton", "secant"]
"""Which product stands for the second derivative."""


@dataclass(frozen=True)
class Composed:
    r"""A loss that shows what it is made of: a convex criterion of a model's outputs.

    Args:
        outputs: Outputs as a function of the parameters, any shape.
        criterion: The loss as a function of the outputs; its Hessian must be positive semidefinite.

    Example:
        >>> loss = Composed(lambda p: 3.0 * p["w"], lambda y: y.square().sum())
        >>> float(loss({"w": torch.ones(2)}))
        18.0
    """

    outputs: Callable[[Mapping[str, Tensor]], Tensor]
    criterion: Callable[[Tensor], Tensor]

    def __call__(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The loss."""
        return self.criterion(self.outputs(parameters))


class Product(NamedTuple):
    """One product of a second derivative with a direction.

    Attributes:
        moved: By the parameters.
        held: By what is held while they move.
    """

    moved: Parameters
    held: Parameters


class Curvature(ABC):
    """A second derivative at a point.

    Args:
        loss: The loss.
        at: The point, by name.
        held: What else the loss depends on, by other names.
        scale: Factor on the loss while gradients are computed; float16 loses those below 6e-8.
    """

    def __init__(
        self,
        loss: Loss,
        at: Mapping[str, Tensor],
        held: Mapping[str, Tensor] | None = None,
        *,
        scale: float = 1.0,
    ) -> None:
        self.scale = scale
        self.moved = {name: value.detach().requires_grad_() for name, value in at.items()}
        # What needs no gradient stays out of the graph.
        self.held = {
            name: value.detach().requires_grad_(value.requires_grad)
            for name, value in (held or {}).items()
        }
        with torch.enable_grad():
            self._build(loss)

    @abstractmethod
    def _build(self, loss: Loss) -> None:
        """Compute what all products share."""

    @property
    @abstractmethod
    def gradient(self) -> Parameters:
        """Gradient of the loss at the point, without a graph."""

    @abstractmethod
    def __call__(self, direction: Mapping[str, Tensor]) -> Product:
        """The product with a direction."""

    def _values(self) -> dict[str, Tensor]:
        return {**self.held, **self.moved}

    def _product(self, found: Sequence[Tensor | None]) -> Product:
        """Found by moved and by what of the held needs a gradient, zero where there is none."""
        wanted = {**self.moved, **self._differentiable()}
        filled = {
            name: torch.zeros_like(value) if part is None else part / self.scale
            for (name, value), part in zip(wanted.items(), found, strict=True)
        }
        return Product(
            {n: filled[n] for n in self.moved},
            {n: filled[n] for n in filled.keys() - self.moved.keys()},
        )

    def _differentiable(self) -> Parameters:
        return {name: value for name, value in self.held.items() if value.requires_grad}

    def _inputs(self) -> list[Tensor]:
        return [*self.moved.values(), *self._differentiable().values()]


def gradient(
    value: Tensor, inputs: Mapping[str, Tensor], *, create_graph: bool = False
) -> Parameters:
    """Gradient of a scalar by name; zero where an input has no part in it.

    Example:
        >>> x = torch.tensor([3.0], requires_grad=True)
        >>> gradient((x * x).sum(), {"x": x})
        {'x': tensor([6.])}
    """
    found = torch.autograd.grad(
        value, list(inputs.values()), create_graph=create_graph, allow_unused=True
    )
    return {
        name: torch.zeros_like(at) if part is None else part
        for (name, at), part in zip(inputs.items(), found, strict=True)
    }


class Hessian(Curvature):
    """Products with the Hessian: the gradient's graph is kept, each product is one pass over it.

    Args: those of :class:`Curvature`.

    Example:
        >>> at = {"x": torch.tensor([1.0, 2.0])}
        >>> Hessian(lambda p: (p["x"] ** 3).sum(), at)({"x": torch.ones(2)}).moved
        {'x': tensor([ 6., 12.])}
    """

    def _build(self, loss: Loss) -> None:
        value = loss(self._values()) * self.scale
        self._gradient = gradient(value, self.moved, create_graph=True)

    @property
    def gradient(self) -> Parameters:
        """Gradient of the loss at the point, without a graph."""
        return {name: part.detach() / self.scale for name, part in self._gradient.items()}

    def __call__(self, direction: Mapping[str, Tensor]) -> Product:
        """H d."""
        # The gradient of what enters linearly has no graph, and no second derivative.
        parts = {n: part for n, part in self._gradient.items() if part.requires_grad}
        inputs = self._inputs()
        if not parts:
            return self._product([None] * len(inputs))
        found = torch.autograd.grad(
            list(parts.values()),
            inputs,
            [direction[name].to(part) for name, part in parts.items()],
            retain_graph=True,
            allow_unused=True,
        )
        return self._product(found)


class GaussNewton(Curvature):
    """Products with the Gauss-Newton matrix of a :class:`Composed` loss.

    Args: those of :class:`Curvature`.

    Raises:
        ValueError: If the loss does not show its outputs.

    Example:
        >>> loss = Composed(lambda p: p["x"] ** 2, lambda y: y.square().sum() / 2)
        >>> at = {"x": torch.tensor([1.0, 2.0])}
        >>> GaussNewton(loss, at)({"x": torch.ones(2)}).moved  # (2 x)^2, where H has 6 x^2
        {'x': tensor([ 4., 16.])}
    """

    def _build(self, loss: Loss) -> None:
        if not isinstance(loss, Composed):
            raise ValueError(
                "GaussNewton: loss must be Composed(outputs, criterion), got "
                f"{type(loss).__name__}; give it so, or use operator='hessian'"
            )
        self._outputs = loss.outputs(self._values())
        self._seed = torch.zeros_like(self._outputs, requires_grad=True)
        self._pulled = torch.autograd.grad(
            self._outputs,
            list(self.moved.values()),
            self._seed,
            create_graph=True,
            allow_unused=True,
        )
        point = self._outputs.detach().requires_grad_()
        (self._slope,) = torch.autograd.grad(loss.criterion(point), point, create_graph=True)
        self._point = point

    @property
    def gradient(self) -> Parameters:
        """Gradient of the loss at the point, without a graph."""
        return self._pull(self._slope.detach()).moved

    def __call__(self, direction: Mapping[str, Tensor]) -> Product:
        """G d."""
        pairs = [
            (part, direction[name].to(part))
            for name, part in zip(self.moved, self._pulled, strict=True)
            if part is not None
        ]
        (pushed,) = torch.autograd.grad(
            [part for part, _ in pairs], self._seed, [d for _, d in pairs], retain_graph=True
        )
        (curved,) = torch.autograd.grad(self._slope, self._point, pushed, retain_graph=True)
        return self._pull(curved)

    def _pull(self, cotangent: Tensor) -> Product:
        found = torch.autograd.grad(
            self._outputs,
            self._inputs(),
            cotangent * self.scale,
            retain_graph=True,
            allow_unused=True,
        )
        return self._product(found)


class Secant(Curvature):
    r"""Products with the Hessian from a central difference of two gradients.

    .. math:: H d \approx \frac{\nabla L(x + h d) - \nabla L(x - h d)}{2 h}, \qquad
              h = \epsilon^{1/3} (1 + \lVert x \rVert) / \lVert d \rVert

    Args: those of :class:`Curvature`.

    Note:
        The error is O(h^2) of truncation and eps |grad L| / h of rounding; h balances them. In
        float32 two to four digits are right.

    Source:
        Pearlmutter, Neural Computation 1994, discusses it; DARTS (ICLR 2019) uses it so.

    Example:
        >>> at = {"x": torch.tensor([1.0, 2.0], dtype=torch.float64)}
        >>> found = Secant(lambda p: (p["x"] ** 3).sum(), at)({"x": torch.ones(2)})
        >>> [round(value, 6) for value in found.moved["x"].tolist()]
        [6.0, 12.0]
    """

    def _build(self, loss: Loss) -> None:
        self._loss = loss

    @property
    def gradient(self) -> Parameters:
        """Gradient of the loss at the point, without a graph."""
        return self._slopes(self.moved).moved

    def __call__(self, direction: Mapping[str, Tensor]) -> Product:
        """H d, nearly."""
        length = norm(direction)
        if length == 0.0:
            return self._product([None] * len(self._inputs()))
        dtype = next(iter(self.moved.values())).dtype
        h = torch.finfo(dtype).eps ** (1.0 / 3.0) * (1.0 + norm(self.moved)) / length
        ahead = self._slopes(axpy(h, direction, self.moved))
        behind = self._slopes(axpy(-h, direction, self.moved))
        return Product(
            *(
                {name: (value - before[name]) / (2.0 * h) for name, value in after.items()}
                for after, before in zip(ahead, behind, strict=True)
            )
        )

    def _slopes(self, at: Mapping[str, Tensor]) -> Product:
        here = {name: value.detach().requires_grad_() for name, value in at.items()}
        with torch.enable_grad():
            value = self._loss({**self.held, **here}) * self.scale
        found = gradient(value, {**here, **self._differentiable()})
        return self._product(list(found.values()))


OPERATORS: dict[str, type[Curvature]] = {
    "hessian": Hessian,
    "gauss_newton": GaussNewton,
    "secant": Secant,
}
"""By name."""

assert set(OPERATORS) == set(get_args(OperatorKind))
