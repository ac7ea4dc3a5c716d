"""A linear-probe attack: a frozen extractor, a new head, and a budget of steps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from immunize_ext.probing.attacks.losses import LOSSES, LossName, ProbeLoss, loss_for
from immunize_ext.probing.data.classes import share_answered, through
from immunize_ext.probing.data.scale import unit_scale
from immunize_ext.probing.data.task import Task, TaskLike
from immunize_ext.seams import AttackCurve, Progress
from immunize_ext.settings import plain

# Iterates evaluated in one matrix product.
_CHUNK = 1024


class Traces(NamedTuple):
    """What an attacker gets before the first step and after each one, a column a learning rate.

    Attributes:
        attack: Name of the attack.
        target: Name of the task.
        train_loss: Loss on the training part, shape ``(steps + 1, k)``, float64, on the CPU.
        test_loss: The same on the test part.
        test_accuracy: Share of test samples answered rightly; ``None`` for a regression task.
        config: All that is needed to run the attack again.
        rates: The learning rate of each column; empty for an attacker without one.
    """

    attack: str
    target: str
    train_loss: Tensor
    test_loss: Tensor
    test_accuracy: Tensor | None
    config: dict[str, object]
    rates: tuple[float, ...] = ()

    @classmethod
    def of(cls, curve: AttackCurve) -> Traces:
        """The one column of an attack that gave a curve."""
        tested = torch.tensor(curve.score("test_loss"), dtype=torch.float64)[:, None]
        trained, accuracy = (
            None
            if name not in curve.scores
            else torch.tensor(curve.score(name), dtype=torch.float64)[:, None]
            for name in ("train_loss", "test_accuracy")
        )
        trained = tested if trained is None else trained
        return cls(curve.attack, curve.target, trained, tested, accuracy, curve.config)

    @property
    def lowest(self) -> list[float]:
        """Lowest test loss of each column; the NaN of a rate that diverged does not count."""
        least: list[float] = self.test_loss.nan_to_num(nan=math.inf).amin(0).tolist()
        return least

    def steps_to(self, threshold: float) -> list[int | None]:
        """First step of each column with a test loss of at most a threshold."""
        reached = self.test_loss <= threshold
        first = reached.to(torch.uint8).argmax(0).tolist()
        return [
            step if there else None
            for step, there in zip(first, reached.any(0).tolist(), strict=True)
        ]

    def best(self, target: float | None) -> int:
        """The column that reaches a target first, or has the lowest test loss if none does.

        Of several that reach it in the same step, the one that is lowest there: how long a curve
        goes on after the target decides nothing.
        """
        steps: list[int | None] = [None] * self.test_loss.shape[1]
        if target is not None:
            steps = self.steps_to(target)
        lowest = self.lowest
        return min(
            range(len(lowest)),
            key=lambda i: self._rank(steps[i], i, lowest[i]),
        )

    def _rank(self, step: int | None, column: int, lowest: float) -> tuple[float, float, float]:
        if step is None:
            return math.inf, lowest, lowest
        return step, float(self.test_loss[step, column]), lowest

    def curve(self, column: int) -> AttackCurve:
        """One column as a curve that is judged at every step."""
        scores = {"train_loss": self.train_loss, "test_loss": self.test_loss}
        if self.test_accuracy is not None:
            scores["test_accuracy"] = self.test_accuracy
        config = dict(self.config)
        if self.rates:
            config["learning_rate"] = self.rates[column]
        return AttackCurve(
            attack=self.attack,
            target=self.target,
            steps=list(range(len(self.test_loss))),
            scores={name: values[:, column].tolist() for name, values in scores.items()},
            config=config,
        )


@dataclass(frozen=True)
class LinearProbeAttack(ABC):
    """An attacker who trains a linear head on frozen features: settings, and the iterates.

    Attributes:
        name: Its name, unique among attacks.
        label: What reports call it.
        losses: The losses that it can minimise.
        sees_theta: Whether an invertible theta can change its curve at all.
        needs_samples: Whether it draws samples or counts them, so that the Gram matrix of the
            features does not tell it all.
        loss: What the head minimises: ``"squared"`` or, for classes, ``"logistic"``: beyond two
            classes the softmax cross-entropy.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    losses: ClassVar[tuple[str, ...]] = ("squared", "logistic")
    sees_theta: ClassVar[bool] = True
    needs_samples: ClassVar[bool] = False

    loss: LossName = "squared"

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(
                f"{self.name}: loss must be one of {', '.join(LOSSES)}, got {self.loss!r}"
            )
        if self.loss not in self.losses:
            raise ValueError(
                f"{self.name}: loss must be one that it can minimise, {', '.join(self.losses)}, "
                f"got {self.loss!r}; choose another attack"
            )

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates that are tried side by side; none for an attacker without one."""
        return ()

    @property
    def edge_rates(self) -> tuple[float, ...]:
        """Ends of the learning rates tried behind which a better one might lie."""
        return ()

    def lifted(self, features: tuple[Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor]:
        """What the head is trained on: the features, or functions of them.

        Args:
            features: Of the training and of the test part, shapes ``(n, q)`` and ``(m, q)``.
            seed: Seed of draws, for an attacker that draws.
        """
        return features

    @abstractmethod
    def iterates(self, z: Tensor, y: Tensor, loss: ProbeLoss, seed: int = 0) -> Iterator[Tensor]:
        """Weights after 0, 1, 2, ... steps, without end.

        Args:
            z: Features, shape ``(n, q)``.
            y: Targets, shape ``(n,)``; ``(n, k)`` for k outputs.
            loss: What to minimise.
            seed: Seed of draws, for an attacker that draws.

        Yields:
            Weights, shape ``(q, m)``, or ``(q, m, k)`` for k outputs: a column for each of
            :attr:`rates`, one without any.
        """

    def run(
        self,
        model: Tensor | None,
        target: TaskLike,
        *,
        steps: int,
        seed: int = 0,
        stop_at: float | None = None,
        progress: Progress | None = None,
    ) -> AttackCurve:
        """Train a linear head on frozen features ``x @ theta`` and record how well it does.

        Args:
            model: The extractor theta, shape ``(p, q)``; the inputs themselves when ``None``.
            target: What the attacker wants to learn.
            steps: Number of steps, at least 1.
            seed: Seed of draws, for an attacker that draws.
            stop_at: Stop early, at the latest 1024 steps after the test loss first is at most this.
            progress: Called with what was done and the share done so far.

        Returns:
            ``train_loss``, ``test_loss`` and, for a classification task, ``test_accuracy`` before
            the first step and after each. With learning rates, the curve of the one that reaches
            ``stop_at`` first or else has the lowest test loss: an attacker who tunes as well as
            anyone could.

        Raises:
            ValueError: If the loss does not suit the task, ``steps`` is below 1, or shapes do not
                fit.

        Note:
            Deterministic; float64 whatever the dtype of the task. A float32 solver that stops short
            on ill-conditioned features would look like protection and be none.

        Example:
            >>> from immunize_ext.probing.attacks import ATTACKS
            >>> x = torch.eye(4, dtype=torch.float64)
            >>> task = Task("ones", x, x.sum(0), x, x.sum(0))
            >>> curve = ATTACKS["gradient_descent"].run(None, task, steps=2)
            >>> curve.score("test_loss"), curve.steps_to("test_loss", 0.5, below=True)
            ([1.0, 0.0, 0.0], 1)
        """
        target = Task.of(target)
        traces = self.trace(model, target, steps=steps, seed=seed, stop_at=stop_at)
        if progress is not None:
            progress(f"attacking {target.name}: {self.label.lower()}", 1.0)
        return traces.curve(traces.best(stop_at))

    def trace(
        self,
        model: Tensor | None,
        target: TaskLike,
        *,
        steps: int,
        seed: int = 0,
        stop_at: float | None = None,
    ) -> Traces:
        """Run with every learning rate at once; arguments and errors as :meth:`run`."""
        target = Task.of(target)
        if steps < 1:
            raise ValueError(f"{self.name}: steps must be at least 1, got {steps}")
        if self.loss == "logistic" and not target.is_classification:
            raise ValueError(
                f"{self.name}: loss must be 'squared' for a regression task, got 'logistic'; the "
                "logistic loss needs classes"
            )
        features = self.lifted(_features(self.name, target, model), seed)
        loss, columns = loss_for(self.loss, target.y_train), max(1, len(self.rates))
        runs = self.iterates(features[0], target.y_train.to(torch.float64), loss, seed)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for losses in _evaluate(islice(runs, steps + 1), target, features, loss, columns):
            parts.append(losses)
            if stop_at is not None and bool((losses[1] <= stop_at).any()):
                break
        train, test, accuracy = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
        return Traces(
            self.name,
            target.name,
            train,
            test,
            accuracy if target.is_classification else None,
            {**plain(self), "steps": steps, "seed": seed},
            self.rates,
        )


def _features(name: str, task: Task, theta: Tensor | None) -> tuple[Tensor, Tensor]:
    parts = [task.x_train.to(torch.float64), task.x_test.to(torch.float64)]
    if theta is not None:
        parts = [x @ _fitting(name, task, theta) for x in parts]
    if not all(bool(torch.isfinite(part).all()) for part in parts):
        raise ValueError(
            f"{name}: features x @ theta must be finite, got an overflow; scale theta down"
        )
    # No attacker sees the scale of its features, but squares of 1e200 overflow.
    scale = unit_scale(parts[0])
    return parts[0] * scale, parts[1] * scale


def _fitting(name: str, task: Task, theta: Tensor) -> Tensor:
    if theta.dim() != 2 or theta.shape[0] != task.num_features:
        raise ValueError(
            f"{name}: theta must have shape ({task.num_features}, q) to multiply the task's "
            f"inputs, got {tuple(theta.shape)}"
        )
    return theta.detach().to(torch.float64)


def _evaluate(
    iterates: Iterator[Tensor],
    task: Task,
    features: tuple[Tensor, Tensor],
    loss: ProbeLoss,
    columns: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Losses and accuracy ``(steps, columns)`` for chunks of iterates."""
    z_train, z_test = features
    y_train, y_test = task.y_train.to(torch.float64), task.y_test.to(torch.float64)
    outputs = y_train.shape[1:]
    while chunk := list(islice(iterates, max(1, _CHUNK // (columns * math.prod(outputs))))):
        weights = torch.stack(chunk, dim=1).flatten(1, 2)  # (q, steps * columns, *outputs)
        predicted = through(z_test, weights)
        shape = len(chunk), columns
        yield (
            loss.report(through(z_train, weights), y_train).reshape(shape),
            loss.report(predicted, y_test).reshape(shape),
            share_answered(predicted, y_test).reshape(shape),
        )
