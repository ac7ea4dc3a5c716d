"""The same attacker without and with immunization: slow-downs, and what a budget of steps buys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from immunize_ext.probing.attacks.linear_probe import LinearProbeAttack, Traces
from immunize_ext.probing.attacks.registry import find_attack
from immunize_ext.probing.data.task import Task, TaskLike
from immunize_ext.quantities import Slowdown, slowdown
from immunize_ext.seams import Attack, AttackCurve

# A loss this small relative to that of the head 0 counts as solved (R^2 = 0.9999). Below it, what
# is left on test samples is rounding, or directions that the training part does not have at all,
# where the solution of least norm depends on theta: neither says how fast anyone learns.
SOLVED = 1e-4


@dataclass(frozen=True)
class AttackComparison:
    """One attacker on one task, without and with immunization.

    Attributes:
        attacker: Name of the attack.
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


def _traces(
    attack: Attack[Any, Any],
    theta: Tensor | None,
    task: Task,
    steps: int,
    seed: int,
    stop_at: float | None = None,
) -> Traces:
    if isinstance(attack, LinearProbeAttack):
        return attack.trace(theta, task, steps=steps, seed=seed, stop_at=stop_at)
    return Traces.of(attack.run(theta, task, steps=steps, seed=seed))


def compare_attack(
    task: TaskLike,
    theta: Tensor,
    theta0: Tensor | None = None,
    *,
    attacker: Attack[Any, Any] | str = "gradient_descent",
    tolerance: float = 0.1,
    base_budget: int = 2000,
    limit: float = 128.0,
    stop_early: bool = True,
    seed: int = 0,
) -> AttackComparison:
    """Measure how many times more steps an attacker needs, judged on the task's test part.

    The target is what the same attacker gets without immunization: ``1 + tolerance`` times its
    lowest test loss within ``base_budget`` steps, but no less than 1e-4 of the loss of the head 0.
    With immunization it is given ``limit`` times the steps that this took. A learning rate is tuned
    each time: the one that reaches the target first counts.

    Args:
        task: What the attacker wants to learn.
        theta: The immunized extractor, shape ``(p, q)``.
        theta0: The extractor before; the identity when omitted.
        attacker: The attack, or the name of one of :data:`immunize_ext.probing.attacks.ATTACKS`.
        tolerance: How close to the lowest test loss counts as reached.
        base_budget: Steps without immunization.
        limit: Largest slow-down looked for; beyond it the result is a lower bound.
        stop_early: Whether the attack with immunization ends once the target is reached; its curve
            is then shorter.
        seed: Seed of an attacker that draws.

    Returns:
        The comparison; ``str(result.slowdown)`` is ``"3.5x"`` or ``">128x"``.

    Raises:
        ValueError: If an argument is out of range, shapes do not fit, or losses overflow.

    Note:
        Deterministic; computed in float64. Where the lowest test loss is that of an early stop, as
        under the logistic loss on separable data, theta changes the path to it: a slow-down that
        ran out of budget may then mean that the target is never met, however long the attack.

    Example:
        >>> import torch
        >>> x = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
        >>> y = torch.tensor([1.0, -1.0], dtype=torch.float64)
        >>> theta = torch.diag(torch.tensor([1.0, 0.5], dtype=torch.float64))
        >>> str(compare_attack(Task("toy", x, y, x, y), theta, base_budget=10).slowdown)
        '0.10x'
    """
    task = Task.of(task)
    budget = _Budget(tolerance, base_budget, limit, stop_early, seed)
    return _compare("compare_attack", attacker, (theta0, task), (theta, task), budget)


def compare_features(
    immunized: Task,
    base: Task,
    *,
    attacker: Attack[Any, Any] | str = "gradient_descent",
    tolerance: float = 0.1,
    base_budget: int = 2000,
    limit: float = 128.0,
    stop_early: bool = True,
    seed: int = 0,
) -> AttackComparison:
    """:func:`compare_attack` for two extractors of any kind, by the features they give.

    Args:
        immunized: Features of the immunized extractor, ``(n, q)``, with the targets.
        base: Features of the extractor before, ``(n, q')``, of the same samples in the same order.
        attacker: As for :func:`compare_attack`.
        tolerance: As for :func:`compare_attack`.
        base_budget: As for :func:`compare_attack`.
        limit: As for :func:`compare_attack`.
        stop_early: As for :func:`compare_attack`.
        seed: As for :func:`compare_attack`.

    Returns:
        The comparison, under the name of ``immunized``.

    Raises:
        ValueError: If the targets of the two differ, or as :func:`compare_attack`.

    Note:
        Deterministic; computed in float64.

    Example:
        >>> import torch
        >>> x = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
        >>> y = torch.tensor([1.0, -1.0], dtype=torch.float64)
        >>> base, immunized = Task("toy", x, y, x, y), Task("toy", x.tanh(), y, x.tanh(), y)
        >>> str(compare_features(immunized, base, base_budget=10).slowdown)
        '0.30x'
    """
    for part in ("train", "test"):
        one, other = (getattr(task, f"y_{part}") for task in (immunized, base))
        if not torch.equal(one.to(torch.float64), other.to(torch.float64)):
            raise ValueError(
                f"compare_features: base must have the targets y_{part} of immunized, got others; "
                "give features of the same samples in the same order"
            )
    budget = _Budget(tolerance, base_budget, limit, stop_early, seed)
    return _compare("compare_features", attacker, (None, base), (None, immunized), budget)


class _Budget(NamedTuple):
    """The settings that comparisons have in common."""

    tolerance: float
    base_budget: int
    limit: float
    stop_early: bool
    seed: int


def _compare(
    function: str,
    attacker: Attack[Any, Any] | str,
    base: tuple[Tensor | None, Task],
    immunized: tuple[Tensor | None, Task],
    given: _Budget,
) -> AttackComparison:
    """An attacker on features ``x @ theta`` of one task, and of another."""
    tolerance, base_budget, limit, stop_early, seed = given
    if not tolerance >= 0.0 or not limit >= 1.0:
        raise ValueError(
            f"{function}: tolerance must be at least 0 and limit at least 1, got {tolerance} "
            f"and {limit}"
        )
    if base_budget < 1:
        raise ValueError(f"{function}: base_budget must be at least 1 step, got {base_budget}")
    attack = find_attack(function, attacker) if isinstance(attacker, str) else attacker
    without = _traces(attack, *base, base_budget, seed)
    _check_finite(without, "without")
    target = max((1.0 + tolerance) * min(without.lowest), SOLVED * float(without.test_loss[0, 0]))
    chosen = without.best(target)
    base_steps = without.steps_to(target)[chosen]
    assert base_steps is not None  # the minimum itself is within the tolerance
    budget = max(1, round(limit * max(base_steps, 1)))
    found = _traces(attack, *immunized, budget, seed, target if stop_early else None)
    _check_finite(found, "with")
    column = found.best(target)
    steps = found.steps_to(target)[column]
    return AttackComparison(
        attacker=attack.name,
        task=immunized[1].name,
        target=target,
        base_steps=base_steps,
        steps=steps,
        slowdown=slowdown(steps, base_steps, budget),
        base=without.curve(chosen),
        immunized=found.curve(column),
    )


def _check_finite(traces: Traces, side: str) -> None:
    """Refuse an attack whose losses overflow with every learning rate: that is no protection."""
    if not bool(torch.isfinite(traces.test_loss).all(0).any()):
        raise ValueError(
            f"compare_attack: {traces.attack} must keep its losses finite {side} immunization, got "
            "NaN or infinity with every learning rate; scale the features or theta"
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


def _outcome(traces: Traces, step: int) -> tuple[float, float | None]:
    losses = traces.test_loss[step].nan_to_num(nan=math.inf)
    best = int(losses.argmin())
    accuracy = None if traces.test_accuracy is None else float(traces.test_accuracy[step, best])
    return float(losses[best]), accuracy


def attack_at_budgets(
    task: TaskLike,
    theta: Tensor,
    theta0: Tensor | None = None,
    *,
    budgets: Sequence[int] = (1, 3, 10, 30, 100, 300, 1000),
    attacker: Attack[Any, Any] | str = "gradient_descent",
    seed: int = 0,
) -> list[BudgetOutcome]:
    """Measure what an attacker gets for a budget of steps, judged on the task's test part.

    A learning rate is tuned anew for every budget, without and with immunization over the same
    grid: the one with the lowest test loss at that step.

    Args:
        task: What the attacker wants to learn.
        theta: The immunized extractor, shape ``(p, q)``.
        theta0: The extractor before; the identity when omitted.
        budgets: Numbers of steps, each at least 1.
        attacker: As for :func:`compare_attack`.
        seed: Seed of an attacker that draws.

    Returns:
        One outcome per budget, in ascending order.

    Raises:
        ValueError: If a budget is below 1 or none is given, or as :func:`compare_attack`.

    Note:
        Deterministic; computed in float64.

    Example:
        >>> import torch
        >>> x = torch.eye(2, dtype=torch.float64)
        >>> y = torch.ones(2, dtype=torch.float64)
        >>> theta = torch.diag(torch.tensor([1.0, 0.5], dtype=torch.float64))
        >>> outcome = attack_at_budgets(Task("ones", x, y, x, y), theta, budgets=[1])[0]
        >>> outcome.loss_without, outcome.loss_with
        (0.0, 0.28125)
    """
    task = Task.of(task)
    if not budgets or min(budgets) < 1:
        raise ValueError(
            f"attack_at_budgets: budgets must be numbers of at least 1 step, got {list(budgets)}"
        )
    attack = find_attack("attack_at_budgets", attacker) if isinstance(attacker, str) else attacker
    without, immunized = (
        _traces(attack, extractor, task, max(budgets), seed) for extractor in (theta0, theta)
    )
    found = []
    for steps in sorted(set(budgets)):
        before, after = _outcome(without, steps), _outcome(immunized, steps)
        found.append(BudgetOutcome(steps, before[0], after[0], before[1], after[1]))
    return found
