"""Every linear-probe attacker by name, with the losses it knows and the learning rates it tries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from immunize_ext.probing.attacks import probes as general
from immunize_ext.probing.attacks import tuned
from immunize_ext.probing.attacks.losses import ProbeLoss
from immunize_ext.probing.attacks.probes import PROBES, GeneralProbe, Probe
from immunize_ext.probing.attacks.tuned import TunedProbe


@dataclass(frozen=True)
class Attacker:
    """One way to train a linear head.

    Attributes:
        label: What reports call it.
        squared: Its form for the squared loss alone, where there is one.
        general: Its form for any loss; it takes over where ``squared`` is missing or does not fit.
        tuned: Its form with learning rates.
        learning_rates: The grid that the harness tries; empty without a learning rate.
        sees_theta: Whether an invertible theta can change its curve at all.

    Example:
        >>> ATTACKERS["adam"].label, ATTACKERS["adam"].learning_rates[:3]
        ('Adam', (0.0001, 0.0003, 0.001))
        >>> ATTACKERS["closed_form_ridge"].knows("logistic"), ATTACKERS["nesterov"].learning_rates
        (False, ())
    """

    label: str
    squared: Probe | None = None
    general: GeneralProbe | None = None
    tuned: TunedProbe | None = None
    learning_rates: tuple[float, ...] = ()
    sees_theta: bool = True

    def knows(self, loss: str) -> bool:
        """Whether it can minimise the loss of that name."""
        return loss == "squared" or self.general is not None or self.tuned is not None

    def run(
        self, z: Tensor, y: Tensor, loss: ProbeLoss, learning_rates: Sequence[float]
    ) -> Iterator[Tensor]:
        """Weights ``(q, k)`` after each step, one column per learning rate; one without any."""
        if self.tuned is not None:
            rates = z.new_tensor(tuple(learning_rates))
            yield from self.tuned(z, y, loss, rates)
            return
        if self.squared is not None and loss.name == "squared":
            iterates = self.squared(z, y)
        else:
            assert self.general is not None  # knows() has been asked
            iterates = self.general(z, y, loss)
        for w in iterates:
            yield w[:, None]


_HALF_DECADES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)


# The probes that reports run stand first and in their order.
ATTACKERS: dict[str, Attacker] = {
    "gradient_descent": Attacker("Gradient descent", PROBES["gradient_descent"], general.descent),
    "line_search": Attacker(
        "Gradient descent with line search", PROBES["line_search"], general.line_search
    ),
    "conjugate_gradients": Attacker(
        "Conjugate gradients",
        PROBES["conjugate_gradients"],
        general.nonlinear_conjugate_gradients,
    ),
    "whitened": Attacker(
        "Whitens the features first",
        PROBES["whitened"],
        general.whitened_general,
        sees_theta=False,
    ),
    "closed_form_ridge": Attacker(
        "Solves in closed form", PROBES["closed_form_ridge"], sees_theta=False
    ),
    "standardised": Attacker(
        "Standardises the features first", general=general.standardised_descent
    ),
    "nesterov": Attacker("Nesterov's accelerated gradient", general=general.nesterov),
    "lbfgs": Attacker("L-BFGS", general=general.lbfgs),
    "momentum": Attacker(
        "Gradient descent with momentum 0.9",
        tuned=tuned.momentum,
        learning_rates=(0.03, 0.1, 0.3, 1.0, 2.0, 3.0, 3.6),
    ),
    "sgd_momentum": Attacker(
        "SGD with momentum 0.9",
        tuned=tuned.sgd_momentum,
        learning_rates=(1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0),
    ),
    "adam": Attacker("Adam", tuned=tuned.adam, learning_rates=_HALF_DECADES),
    "adagrad": Attacker("Adagrad", tuned=tuned.adagrad, learning_rates=(*_HALF_DECADES[2:], 10.0)),
}
