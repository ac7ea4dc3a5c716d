"""The linear-probe attack: a frozen extractor, a new head, and a budget of steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from immunize_ext.attacks.probes import PROBES, Probe
from immunize_ext.data.task import Task
from immunize_ext.metrics.convergence import Slowdown, slowdown, steps_to_threshold

# Iterates evaluated in one matrix product.
_CHUNK = 1024

Part = Literal["train", "test"]


@dataclass(frozen=True)
class AttackCurve:
    """What an attacker gets, before the first step and after each one.

    Attributes:
        attacker: Name of the probe.
        train_loss: Mean squared residual on the training part, shape ``(steps + 1,)``, float64, on
            the CPU as are the next two.
        test_loss: The same on the test part.
        test_accuracy: Share of test samples with the right sign, shape ``(steps + 1,)``; ``None``
            for a regression task.
        weights: The head after the last step, shape ``(q,)``.
    """

    attacker: str
    train_loss: Tensor
    test_loss: Tensor
    test_accuracy: Tensor | None
    weights: Tensor

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


def _probe(function: str, attacker: str) -> Probe:
    if attacker not in PROBES:
        raise ValueError(
            f"{function}: attacker must be one of {', '.join(PROBES)}, got {attacker!r}"
        )
    return PROBES[attacker]


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
    iterates: Iterator[Tensor], task: Task, features: tuple[Tensor, Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Losses, accuracy and last weights for chunks of iterates."""
    z_train, z_test = features
    y_train, y_test = task.y_train.to(torch.float64), task.y_test.to(torch.float64)
    while chunk := list(islice(iterates, _CHUNK)):
        weights = torch.stack(chunk, dim=1)  # (q, steps)
        predicted = z_test @ weights
        yield (
            (z_train @ weights - y_train[:, None]).square().mean(0),
            (predicted - y_test[:, None]).square().mean(0),
            (predicted * y_test[:, None] > 0).to(torch.float64).mean(0),
            chunk[-1],
        )


def attack(
    task: Task,
    theta: Tensor | None = None,
    *,
    attacker: str = "gradient_descent",
    budget: int = 1000,
    stop_at: float | None = None,
) -> AttackCurve:
    """Train a linear head on frozen features ``x @ theta`` and record how well it does.

    Args:
        task: What the attacker wants to learn.
        theta: The extractor, shape ``(p, q)``; the inputs themselves when omitted.
        attacker: Name of a probe in :data:`immunize_ext.attacks.PROBES`.
        budget: Number of steps, at least 1.
        stop_at: Stop early, at the latest 1024 steps after the test loss first is at most this.

    Returns:
        Losses and accuracy over the steps.

    Raises:
        ValueError: If the attacker is unknown, the budget below 1 or shapes do not fit.

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
    features = _features(task, theta)
    iterates = _probe("attack", attacker)(features[0], task.y_train.to(torch.float64))
    train, test, accuracy = [], [], []
    weights = features[0].new_zeros(features[0].shape[1])
    for losses in _evaluate(islice(iterates, budget + 1), task, features):
        train.append(losses[0])
        test.append(losses[1])
        accuracy.append(losses[2])
        weights = losses[3]
        if stop_at is not None and bool((losses[1] <= stop_at).any()):
            break
    return AttackCurve(
        attacker=attacker,
        train_loss=torch.cat(train).cpu(),
        test_loss=torch.cat(test).cpu(),
        test_accuracy=torch.cat(accuracy).cpu() if task.is_classification else None,
        weights=weights,
    )


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
) -> AttackComparison:
    """Measure how many times more steps an attacker needs, judged on the task's test part.

    The target is what the same attacker gets without immunization: ``1 + tolerance`` times its
    lowest test loss within ``base_budget`` steps. With immunization it is given ``limit`` times the
    steps that this took.

    Args:
        task: What the attacker wants to learn.
        theta: The immunized extractor, shape ``(p, q)``.
        theta0: The extractor before; the identity when omitted.
        attacker: Name of a probe in :data:`immunize_ext.attacks.PROBES`.
        tolerance: How close to the lowest test loss counts as reached.
        base_budget: Steps without immunization.
        limit: Largest slow-down looked for; beyond it the result is a lower bound.
        stop_early: Whether the attack with immunization ends once the target is reached; its curve
            is then shorter.

    Returns:
        The comparison; ``str(result.slowdown)`` is ``"3.5x"`` or ``">128x"``.

    Raises:
        ValueError: If an argument is out of range or shapes do not fit.
    """
    if not tolerance >= 0.0 or not limit >= 1.0:
        raise ValueError(
            f"compare_attack: tolerance must be at least 0 and limit at least 1, got {tolerance} "
            f"and {limit}"
        )
    base = attack(task, theta0, attacker=attacker, budget=base_budget)
    target = (1.0 + tolerance) * float(base.test_loss.min())
    base_steps = base.steps_to(target)
    assert base_steps is not None  # the minimum itself is within the tolerance
    budget = max(1, round(limit * max(base_steps, 1)))
    stop_at = target if stop_early else None
    immunized = attack(task, theta, attacker=attacker, budget=budget, stop_at=stop_at)
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
