"""Every linear-probe attacker by name. A new one is a dataclass and the line that registers it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from immunize_ext.probing.attacks import probes, tuned
from immunize_ext.probing.attacks.linear_probe import LinearProbeAttack
from immunize_ext.probing.attacks.losses import LossName, ProbeLoss
from immunize_ext.seams import Attack
from immunize_ext.settings import Registry

ATTACKS: Registry[Attack[Any, Any]] = Registry("attack", key="name", plugins="immunize_ext.probing")

AttackName: TypeAlias = Literal[
    "gradient_descent",
    "line_search",
    "conjugate_gradients",
    "whitened",
    "closed_form_ridge",
    "standardised",
    "nesterov",
    "nystrom_cg",
    "kernel",
    "lbfgs",
    "momentum",
    "sgd_momentum",
    "adam",
    "adam_cosine",
    "shampoo",
    "adagrad",
]
"""Names of the attackers of the package; those that others register are texts as well."""


# What every report shows, in its order.
STANDARD = (
    "gradient_descent",
    "line_search",
    "conjugate_gradients",
    "whitened",
    "closed_form_ridge",
)


def label_of(attack: Attack[Any, Any]) -> str:
    """What reports call an attack: its label, or its name in words.

    Example:
        >>> label_of(ATTACKS["adam"])
        'Adam'
    """
    return str(getattr(attack, "label", attack.name.replace("_", " ").capitalize()))


def knows(attack: Attack[Any, Any], loss: str) -> bool:
    """Whether an attack can minimise the loss of that name.

    Example:
        >>> knows(ATTACKS["closed_form_ridge"], "logistic"), knows(ATTACKS["adam"], "logistic")
        (False, True)
    """
    return loss in getattr(attack, "losses", ("squared",))


@dataclass(frozen=True)
class _Untuned(LinearProbeAttack):
    """An attacker without a learning rate."""

    def iterates(self, z: Tensor, y: Tensor, loss: ProbeLoss, seed: int = 0) -> Iterator[Tensor]:
        """As in the base class, one column."""
        for w in self.heads(z, y, loss):
            yield w[:, None]

    @abstractmethod
    def heads(self, z: Tensor, y: Tensor, loss: ProbeLoss) -> Iterator[Tensor]:
        """Weights ``(q,)``, or ``(q, k)`` for k outputs, after 0, 1, 2, ... steps."""


@ATTACKS.register
@dataclass(frozen=True)
class GradientDescent(_Untuned):
    """Gradient descent with the constant step 1/L."""

    name: ClassVar[str] = "gradient_descent"
    label: ClassVar[str] = "Gradient descent"

    def heads(self, z: Tensor, y: Tensor, loss: ProbeLoss) -> Iterator[Tensor]:
        """The special form for the squared loss, else the general one."""
        return (
            probes.gradient_descent(z, y) if loss.name == "squared" else probes.descent(z, y, loss)
        )


@ATTACKS.register
@dataclass(frozen=True)
class LineSearch(_Untuned):
    """Gradient descent with exact line search."""

    name: ClassVar[str] = "line_search"
    label: ClassVar[str] = "Gradient descent with line search"

    def heads(self, z: Tensor, y: Tensor, loss: ProbeLoss) -> Iterator[Tensor]:
        """The special form for the squared loss, else the general one."""
        return (
            probes.line_search_descent(z, y)
            if loss.name == "squared"
            else probes.line_search(z, y, loss)
        )


@ATTACKS.register
@dataclass(frozen=True)
class ConjugateGradients(_Untuned):
    """Conjugate gradients."""

    name: ClassVar[str] = "conjugate_gradients"
    label: ClassVar[str] = "Conjugate gradients"

    def heads(self, z: Tensor, y: Tensor, loss: ProbeLoss) -> Iterator[Tensor]:
        """The special form for the squared loss, else the general one."""
        return (
            probes.conjugate_gradients(z, y)
            if loss.name == "squared"
            else probes.nonlinear_conjugate_gradients(z, y, loss)
        )


@ATTACKS.register
@dataclass(frozen=True)
class Whitened(_Untuned):
    """Gradient descent after whitening the features."""

    name: ClassVar[str] = "whitened"
    label: ClassVar[str] = "Whitens the features first"
    sees_theta: ClassVar[bool] = False

    def heads(self, z: Tensor, y: Tensor, loss: ProbeLoss) -> Iterator[Tensor]:
        """The special form for the squared loss, else the general one."""
        return (
            probes.whitened_descent(z, y)
            if loss.name == "squared"
            else probes.whitened_general(z, y, loss)
        )


@ATTACKS.register
@dataclass(frozen=True)
class ClosedFormRidge(_Untuned):
    """Ridge regression by a direct solve."""

    name: ClassVar[str] = "closed_form_ridge"
    label: ClassVar[str] = "Solves in closed form"
    losses: ClassVar[tuple[str, ...]] = ("squared",)
    sees_theta: ClassVar[bool] = False
    needs_samples: ClassVar[bool] = True

    def heads(self, z: Tensor, y: Tensor, loss: ProbeLoss) -> Iterator[Tensor]:
        """As in the base class."""
        return probes.closed_form_ridge(z, y)


@ATTACKS.register
@dataclass(frozen=True)
class Standardised(_Untuned):
    """Gradient descent after dividing each feature by its root mean square."""

    name: ClassVar[str] = "standardised"
    label: ClassVar[str] = "Standardises the features first"

    def heads(self, z: Tensor, y: Tensor, loss: ProbeLoss) -> Iterator[Tensor]:
        """As in the base class."""
        return probes.standardised_descent(z, y, loss)


@ATTACKS.register
@dataclass(frozen=True)
class Nesterov(_Untuned):
    """Nesterov's accelerated gradient."""

    name: ClassVar[str] = "nesterov"
    label: ClassVar[str] = "Nesterov's accelerated gradient"

    def heads(self, z: Tensor, y: Tensor, loss: ProbeLoss) -> Iterator[Tensor]:
        """As in the base class."""
        return probes.nesterov(z, y, loss)


@ATTACKS.register
@dataclass(frozen=True)
class NystromConjugateGradients(_Untuned):
    """Conjugate gradients after a low-rank preconditioner has evened the leading directions out.

    It pays for lambda_{r+1} / lambda_p in place of kappa.

    Attributes:
        rank: r, directions that the preconditioner takes away.
    """

    name: ClassVar[str] = "nystrom_cg"
    label: ClassVar[str] = "Conjugate gradients, low-rank preconditioner"

    rank: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 0:
            raise ValueError(f"{self.name}: rank must not be negative, got {self.rank}")

    def heads(self, z: Tensor, y: Tensor, loss: ProbeLoss) -> Iterator[Tensor]:
        """Those of conjugate gradients on the preconditioned features."""
        back = probes.low_rank_preconditioner(z, self.rank)
        run = ConjugateGradients(loss=self.loss).heads(z @ back, y, loss)
        return (back @ w for w in run)


@ATTACKS.register
@dataclass(frozen=True)
class KernelProbe(_Untuned):
    """A probe that is not linear: conjugate gradients on Gaussian kernels around training samples.

    The width is the median distance between them. What a lock takes away from linear probes is
    still in there.

    Attributes:
        centres: Training samples that are centres; all where there are fewer.
    """

    name: ClassVar[str] = "kernel"
    label: ClassVar[str] = "Gaussian kernel probe"
    needs_samples: ClassVar[bool] = True

    centres: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.centres < 1:
            raise ValueError(f"{self.name}: centres must be at least 1, got {self.centres}")

    def lifted(self, features: tuple[Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor]:
        """One kernel for every centre."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(features[0]), generator=generator)[: self.centres]
        centres = features[0][chosen.to(features[0].device)]
        apart = torch.cdist(centres, centres).square()
        apart = apart[apart > 0]
        width = apart.median() if len(apart) else torch.ones_like(features[0][0, 0])
        train, test = (torch.exp(-2.0 * torch.cdist(z, centres).square() / width) for z in features)
        return train, test

    def heads(self, z: Tensor, y: Tensor, loss: ProbeLoss) -> Iterator[Tensor]:
        """Those of conjugate gradients."""
        return ConjugateGradients(loss=self.loss).heads(z, y, loss)


@ATTACKS.register
@dataclass(frozen=True)
class Lbfgs(_Untuned):
    """L-BFGS with ten pairs of memory."""

    name: ClassVar[str] = "lbfgs"
    label: ClassVar[str] = "L-BFGS"

    def heads(self, z: Tensor, y: Tensor, loss: ProbeLoss) -> Iterator[Tensor]:
        """As in the base class."""
        return probes.lbfgs(z, y, loss)


_HALF_DECADES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True)
class TunedAttack(LinearProbeAttack):
    """An attacker with a learning rate, tuned over a grid.

    Attributes:
        learning_rates: The rates tried; the one that is best for the attacker counts.
    """

    # The largest rates with momentum are where descent stops being stable: nothing lies beyond.
    open_above: ClassVar[bool] = True

    learning_rates: tuple[float, ...] = _HALF_DECADES

    def __post_init__(self) -> None:
        super().__post_init__()
        rates = self.learning_rates
        if not rates or not all(0.0 < rate < math.inf for rate in rates):
            raise ValueError(
                f"{self.name}: learning_rates must be positive numbers, at least one, got {rates}"
            )

    @property
    def rates(self) -> tuple[float, ...]:
        """The rates tried."""
        return self.learning_rates

    @property
    def edge_rates(self) -> tuple[float, ...]:
        """The ends of the grid, the upper one only where descent may be stable beyond it.

        Example:
            >>> ATTACKS["adam"].edge_rates, ATTACKS["momentum"].edge_rates
            ((0.0001, 3.0), (0.03,))
        """
        ends = (min(self.learning_rates), max(self.learning_rates))
        return ends if self.open_above else ends[:1]


@ATTACKS.register
@dataclass(frozen=True)
class Momentum(TunedAttack):
    """Full-batch gradient descent with momentum.

    Attributes:
        learning_rates: Rates in units of 1/L; stable below 3.8 at the usual momentum.
        momentum: How much of the last step is kept.
    """

    name: ClassVar[str] = "momentum"
    label: ClassVar[str] = "Gradient descent with momentum 0.9"
    open_above: ClassVar[bool] = False

    learning_rates: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 2.0, 3.0, 3.6)
    momentum: float = 0.9

    def iterates(self, z: Tensor, y: Tensor, loss: ProbeLoss, seed: int = 0) -> Iterator[Tensor]:
        """As in the base class."""
        return tuned.momentum(z, y, loss, z.new_tensor(self.rates), self.momentum)


@ATTACKS.register
@dataclass(frozen=True)
class SgdMomentum(TunedAttack):
    """SGD with momentum; one batch is one step.

    Attributes:
        learning_rates: Rates in units of 1/L.
        momentum: How much of the last step is kept.
        batch_size: Samples in a step.
    """

    name: ClassVar[str] = "sgd_momentum"
    label: ClassVar[str] = "SGD with momentum 0.9"
    needs_samples: ClassVar[bool] = True
    open_above: ClassVar[bool] = False

    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
    momentum: float = 0.9
    batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise ValueError(f"{self.name}: batch_size must be at least 1, got {self.batch_size}")

    def iterates(self, z: Tensor, y: Tensor, loss: ProbeLoss, seed: int = 0) -> Iterator[Tensor]:
        """As in the base class."""
        rates = z.new_tensor(self.rates)
        return tuned.sgd_momentum(z, y, loss, rates, self.momentum, self.batch_size, seed)


@ATTACKS.register
@dataclass(frozen=True)
class Adam(TunedAttack):
    """Adam on features scaled to root mean square 1."""

    name: ClassVar[str] = "adam"
    label: ClassVar[str] = "Adam"

    def iterates(self, z: Tensor, y: Tensor, loss: ProbeLoss, seed: int = 0) -> Iterator[Tensor]:
        """As in the base class."""
        return tuned.adam(z, y, loss, z.new_tensor(self.rates))


@ATTACKS.register
@dataclass(frozen=True)
class AdamCosine(TunedAttack):
    """Adam with warm-up and a cosine schedule; the horizon is tuned with the rate.

    Attributes:
        learning_rates: Peak rates tried.
        horizons: Numbers of steps of the schedule that are tried with each of them.
    """

    name: ClassVar[str] = "adam_cosine"
    label: ClassVar[str] = "Adam, warm-up and cosine"

    learning_rates: tuple[float, ...] = _HALF_DECADES[2:]
    horizons: tuple[int, ...] = (10, 30, 100, 300, 1000, 3000, 10000)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.horizons or min(self.horizons) < 1:
            raise ValueError(
                f"{self.name}: horizons must be numbers of at least 1 step, got {self.horizons}"
            )

    @property
    def rates(self) -> tuple[float, ...]:
        """Every rate once for every horizon."""
        return self.learning_rates * len(self.horizons)

    def iterates(self, z: Tensor, y: Tensor, loss: ProbeLoss, seed: int = 0) -> Iterator[Tensor]:
        """As in the base class."""
        horizons = z.new_tensor(self.horizons).repeat_interleave(len(self.learning_rates))
        return tuned.adam(z, y, loss, z.new_tensor(self.rates), horizons)


@ATTACKS.register
@dataclass(frozen=True)
class Shampoo(TunedAttack):
    """Shampoo on features scaled to root mean square 1."""

    name: ClassVar[str] = "shampoo"
    label: ClassVar[str] = "Shampoo"

    learning_rates: tuple[float, ...] = (1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)

    def iterates(self, z: Tensor, y: Tensor, loss: ProbeLoss, seed: int = 0) -> Iterator[Tensor]:
        """As in the base class."""
        return tuned.shampoo(z, y, loss, z.new_tensor(self.rates))


@ATTACKS.register
@dataclass(frozen=True)
class Adagrad(TunedAttack):
    """Adagrad on features scaled to root mean square 1."""

    name: ClassVar[str] = "adagrad"
    label: ClassVar[str] = "Adagrad"

    learning_rates: tuple[float, ...] = (*_HALF_DECADES[2:], 10.0)

    def iterates(self, z: Tensor, y: Tensor, loss: ProbeLoss, seed: int = 0) -> Iterator[Tensor]:
        """As in the base class."""
        return tuned.adagrad(z, y, loss, z.new_tensor(self.rates))


def find_attack(function: str, name: str, loss: LossName = "squared") -> Attack[Any, Any]:
    """The attack of a name with its usual settings, minimising a loss.

    Raises:
        ValueError: If there is none, or it cannot minimise the loss.
    """
    return ATTACKS.build(name, {}, function, loss=loss)
