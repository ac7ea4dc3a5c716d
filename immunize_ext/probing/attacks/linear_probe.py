"""The linear-probe attack: a frozen extractor, a new head, and a budget of steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from immunize_ext.probing.attacks.losses import LossName, ProbeLoss, probe_loss
from immunize_ext.probing.attacks.registry import ATTACKERS, Attacker
from immunize_ext.probing.data.task import Task
from immunize_ext.quantities import Slowdown, slowdown, steps_to_threshold

# Iterates evaluated in one matrix product.
_CHUNK = 1024


# A loss this small relative to that of the head 0 counts as solved (R^2 = 0.9999). Below it, what
# is left on test samples is rounding, or directions that the training part does not have at all,
# where the solution of least norm depends on theta: neither says how fast anyone learns.
SOLVED = 1e-4


Part = Literal["train", "test"]


@dataclass(frozen=True)
class AttackCurve:
    """What an attacker gets, before the first step and after each one.

    Attributes:
        attacker: Name of the probe.
        train_loss: Mean squared residual (or mean logistic loss) on the training part, shape
            ``(steps + 1,)``, float64, on the CPU as are the next two.
        test_loss: The same on the test part.
        test_accuracy: Share of test samples with the right sign, shape ``(steps + 1,)``; ``None``
            for a regression task.
        weights: The head after the last step, shape ``(q,)``.
        loss_name: ``"squared"`` or ``"logistic"``.
        learning_rate: The learning rate that was kept; ``None`` for an attacker without one.
    """

    attacker: str
    train_loss: Tensor
    test_loss: Tensor
    test_accuracy: Tensor | None
    weights: Tensor
    loss_name: LossName = "squared"
    learning_rate: float | None = None

    @property
    def steps(self) -> int:
        """Number of steps taken."""
        return int(self.train_loss.shape[0]) - 1

    def loss(self, part: Part) -> Tensor:
        """Loss on one part, shape ``(steps + 1,)``."""
        return self.train_loss if part == "train" else self.test_loss

    def steps_to(self, threshold: float, part: Part = "test") -> int | None:
        """First step with a loss of at most ``threshold``, or ``None``."""
        return steps_to_threshold(self.loss(part), threshold)


def checked_attacker(
    function: str, name: str, loss: str, task: Task, learning_rates: Sequence[float] | None
) -> tuple[Attacker, ProbeLoss, tuple[float, ...]]:
    """Look up an attacker, its loss and its learning rates, checked against each other.

    Args:
        function: Who asks; stands in the error.
        name: Name of the attacker.
        loss: Name of the loss.
        task: What it is to learn.
        learning_rates: Rates to try instead of its own grid.

    Returns:
        The attacker, the loss and the rates; no rates for an attacker without a learning rate.

    Raises:
        ValueError: If one of them is unknown or they do not fit together.

    Example:
        >>> x = torch.eye(2, dtype=torch.float64)
        >>> task = Task("toy", x, x[0], x, x[0])
        >>> checked_attacker("attack", "momentum", "squared", task, [0.5])[2]
        (0.5,)
    """
    if name not in ATTACKERS:
        raise ValueError(
            f"{function}: attacker must be one of {', '.join(ATTACKERS)}, got {name!r}"
        )
    attacker, chosen = ATTACKERS[name], probe_loss(function, loss)
    if not attacker.knows(loss):
        raise ValueError(
            f"{function}: attacker must be able to minimise the {loss} loss, got {name!r}; "
            'use loss="squared" or another attacker'
        )
    if loss == "logistic" and not task.is_classification:
        raise ValueError(
            f"{function}: loss must be 'squared' for a regression task, got 'logistic'; "
            "the logistic loss needs targets -1 and +1"
        )
    if learning_rates is None:
        return attacker, chosen, attacker.learning_rates
    rates = tuple(float(rate) for rate in learning_rates)
    if attacker.tuned is None or not rates or not all(0.0 < r < math.inf for r in rates):
        raise ValueError(
            f"{function}: learning_rates must be positive numbers for an attacker that has a "
            f"learning rate, got {rates} for {name!r}; leave them out for the usual grid"
        )
    return attacker, chosen, rates


def _features(task: Task, theta: Tensor | None) -> tuple[Tensor, Tensor]:
    parts = task.x_train.to(torch.float64), task.x_test.to(torch.float64)
    if theta is None:
        return parts
    if theta.dim() != 2 or theta.shape[0] != task.num_features:
        raise ValueError(
            f"attack: theta must have shape ({task.num_features}, q) to multiply the task's "
            f"inputs, got {tuple(theta.shape)}"
        )
    theta = theta.detach().to(torch.float64)
    return parts[0] @ theta, parts[1] @ theta


def _evaluate(
    iterates: Iterator[Tensor],
    task: Task,
    features: tuple[Tensor, Tensor],
    loss: ProbeLoss,
    columns: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Losses and accuracy ``(steps, columns)`` and last weights for chunks of iterates."""
    z_train, z_test = features
    y_train, y_test = task.y_train.to(torch.float64), task.y_test.to(torch.float64)
    while chunk := list(islice(iterates, max(1, _CHUNK // columns))):
        weights = torch.stack(chunk, dim=1).flatten(1)  # (q, steps * columns)
        predicted = z_test @ weights
        shape = len(chunk), columns
        yield (
            loss.report(z_train @ weights, y_train).reshape(shape),
            loss.report(predicted, y_test).reshape(shape),
            (predicted * y_test[:, None] > 0).to(torch.float64).mean(0).reshape(shape),
            chunk[-1],
        )


def sweep(
    task: Task,
    theta: Tensor | None,
    name: str,
    loss: ProbeLoss,
    rates: tuple[float, ...],
    budget: int,
    stop_at: float | None,
) -> list[AttackCurve]:
    """Run an attacker with each learning rate, all at once.

    Args:
        task: What the attacker wants to learn.
        theta: The extractor; the inputs themselves if ``None``.
        name: Name of the attacker.
        loss: What the head minimises.
        rates: Learning rates; none for an attacker without.
        budget: Number of steps.
        stop_at: Stop soon after the test loss with some rate is at most this.

    Returns:
        One curve per learning rate, or the one curve of an attacker without.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> x = torch.eye(2, dtype=torch.float64)
        >>> task = Task("toy", x, x[0], x, x[0])
        >>> curves = sweep(task, None, "momentum", probe_loss("", "squared"), (0.5, 1.0), 3, None)
        >>> [float(curve.test_loss[1]) for curve in curves]
        [0.125, 0.0]
    """
    features = _features(task, theta)
    runs = ATTACKERS[name].run(features[0], task.y_train.to(torch.float64), loss, rates)
    columns = max(1, len(rates))
    train, test, accuracy = [], [], []
    weights = features[0].new_zeros(features[0].shape[1], columns)
    for losses in _evaluate(islice(runs, budget + 1), task, features, loss, columns):
        train.append(losses[0])
        test.append(losses[1])
        accuracy.append(losses[2])
        weights = losses[3]
        if stop_at is not None and bool((losses[1] <= stop_at).any()):
            break
    parts = [torch.cat(part).cpu() for part in (train, test, accuracy)]
    return [
        AttackCurve(
            attacker=name,
            train_loss=parts[0][:, column],
            test_loss=parts[1][:, column],
            test_accuracy=parts[2][:, column] if task.is_classification else None,
            weights=weights[:, column],
            loss_name=loss.name,
            learning_rate=rates[column] if rates else None,
        )
        for column in range(columns)
    ]


def _lowest(curve: AttackCurve) -> float:
    """Lowest test loss of a curve; the NaN of a learning rate that diverged does not count."""
    return float(curve.test_loss.nan_to_num(nan=math.inf).min())


def _best(curves: list[AttackCurve], target: float | None) -> AttackCurve:
    """The curve that reaches the target first, or has the lowest test loss if none does."""

    def rank(curve: AttackCurve) -> tuple[float, float]:
        steps = None if target is None else curve.steps_to(target)
        return math.inf if steps is None else float(steps), _lowest(curve)

    return min(curves, key=rank)


def attack(
    task: Task,
    theta: Tensor | None = None,
    *,
    attacker: str = "gradient_descent",
    budget: int = 1000,
    stop_at: float | None = None,
    loss: LossName = "squared",
    learning_rates: Sequence[float] | None = None,
) -> AttackCurve:
    """Train a linear head on frozen features ``x @ theta`` and record how well it does.

    Args:
        task: What the attacker wants to learn.
        theta: The extractor, shape ``(p, q)``; the inputs themselves when omitted.
        attacker: Name of an attacker in :data:`immunize_ext.probing.attacks.ATTACKERS`.
        budget: Number of steps, at least 1.
        stop_at: Stop early, at the latest 1024 steps after the test loss first is at most this.
        loss: What the head minimises, ``"squared"`` or, for targets -1 and +1, ``"logistic"``.
        learning_rates: Learning rates to try, for an attacker that has one; its own grid when
            omitted. The curve is that of the rate that reaches ``stop_at`` first or else has the
            lowest test loss: an attacker who tunes as well as anyone could.

    Returns:
        Losses and accuracy over the steps.

    Raises:
        ValueError: If the attacker is unknown or cannot minimise the loss, the loss does not suit
            the task, the budget is below 1, or shapes do not fit.

    Note:
        Deterministic; float64 whatever the dtype of the task. A float32 solver that stops short on
        ill-conditioned features would look like protection and be none.

    Example:
        >>> x = torch.eye(4, dtype=torch.float64)
        >>> y = torch.ones(4, dtype=torch.float64)
        >>> curve = attack(Task("ones", x, y, x, y), budget=2)
        >>> curve.test_loss.tolist(), curve.steps_to(0.5)
        ([1.0, 0.0, 0.0], 1)
    """
    if budget < 1:
        raise ValueError(f"attack: budget must be at least 1 step, got {budget}")
    _, chosen, rates = checked_attacker("attack", attacker, loss, task, learning_rates)
    return _best(sweep(task, theta, attacker, chosen, rates, budget, stop_at), stop_at)


@dataclass(frozen=True)
class AttackComparison:
    """One attacker on one task, without and with immunization.

    Attributes:
        attacker: Name of the probe.
        task: Name of the task.
        target: The test loss that has to be reached.
        base_steps: Steps needed without immunization.
        steps: Steps needed with it, ``None`` if the budget ran out.
        slowdown: Their ratio.
        base: Curve without immunization.
        immunized: Curve with it.
    """

    attacker: str
    task: str
    target: float
    base_steps: int
    steps: int | None
    slowdown: Slowdown
    base: AttackCurve
    immunized: AttackCurve


def compare_attack(
    task: Task,
    theta: Tensor,
    theta0: Tensor | None = None,
    *,
    attacker: str = "gradient_descent",
    tolerance: float = 0.1,
    base_budget: int = 2000,
    limit: float = 128.0,
    stop_early: bool = True,
    loss: LossName = "squared",
    learning_rates: Sequence[float] | None = None,
) -> AttackComparison:
    """Measure how many times more steps an attacker needs, judged on the task's test part.

    The target is what the same attacker gets without immunization: ``1 + tolerance`` times its
    lowest test loss within ``base_budget`` steps, but no less than 1e-4 of the loss of the head 0.
    With immunization it is given ``limit`` times the steps that this took.

    Args:
        task: What the attacker wants to learn.
        theta: The immunized extractor, shape ``(p, q)``.
        theta0: The extractor before; the identity when omitted.
        attacker: Name of an attacker in :data:`immunize_ext.probing.attacks.ATTACKERS`.
        tolerance: How close to the lowest test loss counts as reached.
        base_budget: Steps without immunization.
        limit: Largest slow-down looked for; beyond it the result is a lower bound.
        stop_early: Whether the attack with immunization ends once the target is reached; its curve
            is then shorter.
        loss: As for :func:`attack`.
        learning_rates: As for :func:`attack`. The same rates are tried without and with
            immunization, and each time the one that reaches the target first counts.

    Returns:
        The comparison; ``str(result.slowdown)`` is ``"3.5x"`` or ``">128x"``.

    Raises:
        ValueError: If an argument is out of range or shapes do not fit.

    Note:
        Deterministic; computed in float64. Where the lowest test loss is that of an early stop, as
        under the logistic loss on separable data, theta changes the path to it: a slow-down that
        ran out of budget may then mean that the target is never met, however long the attack.

    Example:
        >>> x = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
        >>> y = torch.tensor([1.0, -1.0], dtype=torch.float64)
        >>> theta = torch.diag(torch.tensor([1.0, 0.5], dtype=torch.float64))
        >>> str(compare_attack(Task("toy", x, y, x, y), theta, base_budget=10).slowdown)
        '0.10x'
    """
    if not tolerance >= 0.0 or not limit >= 1.0:
        raise ValueError(
            f"compare_attack: tolerance must be at least 0 and limit at least 1, got {tolerance} "
            f"and {limit}"
        )
    if base_budget < 1:
        raise ValueError(f"compare_attack: base_budget must be at least 1 step, got {base_budget}")
    _, chosen, rates = checked_attacker("compare_attack", attacker, loss, task, learning_rates)
    without = sweep(task, theta0, attacker, chosen, rates, base_budget, None)
    solved = SOLVED * float(without[0].test_loss[0])
    target = max((1.0 + tolerance) * min(_lowest(curve) for curve in without), solved)
    base = _best(without, target)
    base_steps = base.steps_to(target)
    assert base_steps is not None  # the minimum itself is within the tolerance
    budget = max(1, round(limit * max(base_steps, 1)))
    stop_at = target if stop_early else None
    immunized = _best(sweep(task, theta, attacker, chosen, rates, budget, stop_at), target)
    steps = immunized.steps_to(target)
    return AttackComparison(
        attacker=attacker,
        task=task.name,
        target=target,
        base_steps=base_steps,
        steps=steps,
        slowdown=slowdown(steps, base_steps, budget),
        base=base,
        immunized=immunized,
    )


class BudgetOutcome(NamedTuple):
    """One attacker at one budget.

    Attributes:
        steps: The budget.
        loss_without: Test loss without immunization.
        loss_with: Test loss with it.
        accuracy_without: Test accuracy without; ``None`` for a regression task.
        accuracy_with: The same with immunization.
    """

    steps: int
    loss_without: float
    loss_with: float
    accuracy_without: float | None
    accuracy_with: float | None


def _outcome(curves: list[AttackCurve], step: int) -> tuple[float, float | None]:
    losses = torch.stack([curve.test_loss[step] for curve in curves]).nan_to_num(nan=math.inf)
    chosen = curves[int(losses.argmin())]
    accuracy = None if chosen.test_accuracy is None else float(chosen.test_accuracy[step])
    return float(losses.min()), accuracy


def attack_at_budgets(
    task: Task,
    theta: Tensor,
    theta0: Tensor | None = None,
    *,
    budgets: Sequence[int] = (1, 3, 10, 30, 100, 300, 1000),
    attacker: str = "gradient_descent",
    loss: LossName = "squared",
    learning_rates: Sequence[float] | None = None,
) -> list[BudgetOutcome]:
    """Measure what an attacker gets for a budget of steps, judged on the task's test part.

    A learning rate is tuned anew for every budget, without and with immunization over the same
    grid: the one with the lowest test loss at that step.

    Args:
        task: What the attacker wants to learn.
        theta: The immunized extractor, shape ``(p, q)``.
        theta0: The extractor before; the identity when omitted.
        budgets: Numbers of steps, each at least 1.
        attacker: Name of an attacker in :data:`immunize_ext.probing.attacks.ATTACKERS`.
        loss: As for :func:`immunize_ext.probing.attacks.attack`.
        learning_rates: As for :func:`immunize_ext.probing.attacks.attack`.

    Returns:
        One outcome per budget, in ascending order.

    Raises:
        ValueError: If a budget is below 1 or none is given, or as
            :func:`immunize_ext.probing.attacks.attack`.

    Note:
        Deterministic; computed in float64.

    Example:
        >>> x = torch.eye(2, dtype=torch.float64)
        >>> y = torch.ones(2, dtype=torch.float64)
        >>> theta = torch.diag(torch.tensor([1.0, 0.5], dtype=torch.float64))
        >>> outcome = attack_at_budgets(Task("ones", x, y, x, y), theta, budgets=[1])[0]
        >>> outcome.loss_without, outcome.loss_with
        (0.0, 0.28125)
    """
    if not budgets or min(budgets) < 1:
        raise ValueError(
            f"attack_at_budgets: budgets must be numbers of at least 1 step, got {list(budgets)}"
        )
    _, chosen, rates = checked_attacker("attack_at_budgets", attacker, loss, task, learning_rates)
    last = max(budgets)
    without, immunized = (
        sweep(task, extractor, attacker, chosen, rates, last, None) for extractor in (theta0, theta)
    )
    found = []
    for steps in sorted(set(budgets)):
        before, after = _outcome(without, steps), _outcome(immunized, steps)
        found.append(BudgetOutcome(steps, before[0], after[0], before[1], after[1]))
    return found
