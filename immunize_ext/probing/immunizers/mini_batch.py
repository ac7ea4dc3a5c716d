"""Algorithm 1 on mini-batches, with K^{-1} through the preconditioned-gradient layer.

    H_P = theta^T K_P theta,  K_P = B_P^T B_P of the batch at hand (H_H alike)
    grad = grad_theta L + lambda_P K_P^{-1} grad_theta R_well(H_P)
                        + lambda_H K_H^{-1} grad_theta R_ill(H_H)

and one step of Adam or SGD on theta and the head. Where batches are smaller than the number of
features, H has the rank of the batch, and K^{-1} needs a ridge: of the batch by the Woodbury
identity, or of the full data by one Cholesky factor that is kept. Samples that do not fill a batch
are left out of an epoch: Gram matrices are not normalised, and R_ill of a few left-over rows would
be many times too large. This is how the papers train;
full-data K (``ConditionNumberImmunizer``) sees all directions in every step, and knows its step
bounds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from immunize_ext.ops.precondition import Preconditioner, precondition_gradient
from immunize_ext.ops.regularizers import gram_r_ill, gram_r_well
from immunize_ext.probing.data.problem import Problem
from immunize_ext.probing.data.task import Task
from immunize_ext.probing.immunizers.loop import (
    Advance,
    Descent,
    IterativeImmunizer,
    batch_indices,
    check_settings,
)
from immunize_ext.probing.immunizers.registry import METHODS

_NAME = "MiniBatchImmunizer"


@METHODS.register
@dataclass(frozen=True)
class MiniBatchImmunizer(IterativeImmunizer):
    """Algorithm 1 of the paper, on mini-batches.

    ``history`` has a record for the start, every ``record_every`` steps and the end, with, of the
    batch at hand, ``loss``, ``r_well`` and ``r_ill``. ``Problem.head`` goes from features
    ``(n, p)`` to ``(n,)`` or ``(n, 1)``; a copy is trained along, in float64. The smaller training
    part is gone through more often.

    Attributes:
        epochs: Passes over the larger training part.
        batch_size: Samples of each task in a step; what does not fill a batch is left out.
        learning_rate: For theta and the head.
        optimizer: ``"adam"``, as the released code trains linear extractors, or ``"sgd"``.
        momentum: Nesterov momentum of ``"sgd"``; 0 for none.
        loss: Of the primary task: ``"squared"``, or ``"logistic"`` for labels of -1 and +1.
        lambda_well: lambda_P, or ``None`` to give R_well the gradient norm of the primary loss in
            the first step.
        lambda_ill: lambda_H, or ``None`` to give R_ill the gradient norm of R_well there.
        preconditioner: Whose K^{-1}: ``"batch"``, ``"full"`` data, or ``"none"``.
        precondition_ridge: Ridge on that K, in units of its mean diagonal.
        record_every: Steps between two records of the history, which look at all data.
        seed: Seed of the batches and of the head omega.

    Raises:
        ValueError: If a setting is out of range; on fitting, if shapes or labels do not fit or
            theta stops being finite.
        EqualSingularValuesError: On fitting, if all eigenvalues of a batch's H_H are equal.

    Source:
        Zheng et al., ICML 2025, Algorithm 1, on the batches of the released code.

    Example:
        >>> from immunize_ext.probing.data import digits_task
        >>> problem = Problem.of(digits_task((3,), (8,)), digits_task((4,), (9,)))
        >>> immunized = MiniBatchImmunizer(epochs=3).fit(None, problem)
        >>> immunized.method, immunized.history[-1]["log_rir"] > 0
        ('mini-batch', True)
    """

    method: ClassVar[str] = "mini-batch"
    sees_scale: ClassVar[bool] = True
    knob: ClassVar[str | None] = "epochs"
    grid: ClassVar[tuple[float, ...]] = (3.0, 10.0, 30.0, 100.0)

    epochs: int = 100
    batch_size: int = 64
    learning_rate: float = 5e-3
    optimizer: Literal["adam", "sgd"] = "adam"
    momentum: float = 0.0
    loss: Literal["squared", "logistic"] = "squared"
    lambda_well: float | None = None
    lambda_ill: float | None = None
    preconditioner: Literal["batch", "full", "none"] = "batch"
    precondition_ridge: float = 1e-2
    record_every: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(
            _NAME,
            {
                "epochs": self.epochs,
                "batch_size": self.batch_size,
                "learning_rate": self.learning_rate,
                "precondition_ridge": self.precondition_ridge,
                "record_every": self.record_every,
            },
            {
                "preconditioner": ("batch", "full", "none"),
                "optimizer": ("adam", "sgd"),
                "loss": ("squared", "logistic"),
            },
            {
                "preconditioner": self.preconditioner,
                "optimizer": self.optimizer,
                "loss": self.loss,
            },
        )
        if self.batch_size < 2:
            raise ValueError(
                f"{_NAME}: batch_size must be at least 2, since one sample has one singular value, "
                f"got {self.batch_size}"
            )
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(
                f"{_NAME}: momentum must be at least 0 and below 1, got {self.momentum}"
            )
        for name in ("lambda_well", "lambda_ill"):
            value = getattr(self, name)
            # A lambda of 0 leaves its regularizer out.
            if value is not None and not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"{_NAME}: {name} must be finite and not negative, got {value}")

    @property
    def label(self) -> str:
        """The method with the size of its batches."""
        return f"mini-batch, batches of {self.batch_size}"

    def begin(self, descent: Descent, problem: Problem[Task]) -> tuple[int, Advance]:
        """Balance the regularizers on the first batch."""
        primary, harmful = problem.primary, problem.only_harm(_NAME)
        if self.loss == "logistic" and not primary.is_classification:
            raise ValueError(
                f"{_NAME}.fit: primary must have labels of -1 and +1, or of more classes, for "
                "loss='logistic', got others; use loss='squared'"
            )
        x, y, x_harmful = (
            t.to(torch.float64) for t in (primary.x_train, primary.y_train, harmful.x_train)
        )
        theta = descent.theta.requires_grad_()
        p = theta.shape[0]
        generator = torch.Generator().manual_seed(self.seed)
        shape = (p, *y.shape[1:])
        omega = torch.randn(shape, dtype=torch.float64, generator=generator) / math.sqrt(p)
        trained = _linear_head(omega) if problem.head is None else copy.deepcopy(problem.head)
        trained = trained.to(device=y.device, dtype=torch.float64).requires_grad_(True)
        weights = list(trained.parameters())
        descent.optimizer = self._optimizer([theta, *weights])
        descent.tensors = {f"head.{name}": w for name, w in trained.named_parameters()}
        kept = None
        if self.preconditioner == "full":
            kept = [self._factor(rows) for rows in (x, x_harmful)]
        total = self.epochs * max(1, max(len(x), len(x_harmful)) // self.batch_size)

        def measured(step: int) -> tuple[Tensor, list[Tensor], list[float]]:
            chosen, chosen_harmful = (
                batch_indices(len(t), self.batch_size, step, seed=self.seed, role=role).to(t.device)
                for role, t in enumerate((x, x_harmful))
            )
            rows = x[chosen], x_harmful[chosen_harmful]
            loss = self._loss(trained(rows[0] @ theta), y[chosen])
            gradients, values = self._regularizers(theta, rows, kept)
            return loss, gradients, values

        loss, gradients, _ = measured(0)
        lambdas = self._balance(torch.autograd.grad(loss, theta)[0], gradients)
        descent.found = dict(zip(("lambda_well", "lambda_ill"), lambdas, strict=True))

        def advance(step: int) -> None:
            loss, gradients, values = measured(step)
            if step % self.record_every == 0 or step == total:
                descent.record(step, loss=float(loss.detach()), r_well=values[0], r_ill=values[1])
            if step == total:
                return
            grad_theta, *grad_weights = torch.autograd.grad(loss, [theta, *weights])
            theta.grad = grad_theta + lambdas[0] * gradients[0] + lambdas[1] * gradients[1]
            for weight, gradient in zip(weights, grad_weights, strict=True):
                weight.grad = gradient
            descent.move()

        return total, advance

    def _optimizer(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, lr=self.learning_rate)
        return torch.optim.SGD(
            parameters,
            lr=self.learning_rate,
            momentum=self.momentum,
            nesterov=self.momentum > 0.0,
        )

    def _loss(self, output: Tensor, labels: Tensor) -> Tensor:
        if output.numel() != labels.numel() or output.shape[0] != len(labels):
            shape = tuple(labels.shape)
            one = f" or ({len(labels)}, 1)" if labels.dim() == 1 else ""
            raise ValueError(
                f"{_NAME}.fit: head must yield {shape}{one} for a batch, got {tuple(output.shape)}"
            )
        output = output.reshape(labels.shape)
        if self.loss == "squared":
            return (output - labels).square().mean()
        if labels.dim() > 1:
            return functional.cross_entropy(output, labels.argmax(1))
        return functional.softplus(-labels * output).mean()

    def _factor(self, rows: Tensor) -> Preconditioner:
        return Preconditioner.from_features(rows, ridge=self.precondition_ridge)

    def _regularizers(
        self, theta: Tensor, rows: tuple[Tensor, Tensor], kept: list[Preconditioner] | None
    ) -> tuple[list[Tensor], list[float]]:
        """Preconditioned gradients and values of R_well of the first rows, R_ill of the second."""
        gradients, values = [], []
        functions: tuple[Callable[[Tensor], Tensor], ...] = (gram_r_well, gram_r_ill)
        for index, function in enumerate(functions):
            leaf = theta.detach().requires_grad_()
            extractor = leaf
            if self.preconditioner != "none":
                factor = self._factor(rows[index]) if kept is None else kept[index]
                # theta^T is what nn.Linear stores, (out, in); K^{-1} acts on its input side.
                extractor = precondition_gradient(leaf.mT, factor).mT
            value = function(rows[index] @ extractor)
            gradients.append(torch.autograd.grad(value, leaf)[0])
            values.append(float(value.detach()))
        return gradients, values

    def _balance(self, grad_loss: Tensor, gradients: list[Tensor]) -> tuple[float, float]:
        """Choose the lambdas that were left open by gradient norms of the first step."""
        sizes = [float(gradient.norm()) for gradient in (grad_loss, *gradients)]
        well, ill = self.lambda_well, self.lambda_ill
        if well is None:
            # All eigenvalues of H_P equal, or a perfect head: nothing to balance.
            well = sizes[0] / sizes[1] if sizes[1] > 0.0 else 0.0
        if ill is None:
            reference = well * sizes[1] if well > 0.0 else sizes[0]
            ill = reference / sizes[2] if sizes[2] > 0.0 else 0.0
        return well, ill


def _linear_head(omega: Tensor) -> nn.Module:
    """A head without bias that starts from omega."""
    # On the meta device, so that no random number is drawn for weights that are replaced.
    weight = omega.reshape(len(omega), -1).mT
    head = nn.Linear(weight.shape[1], len(weight), bias=False, device="meta", dtype=omega.dtype)
    head = head.to_empty(device=omega.device)
    with torch.no_grad():
        head.weight.copy_(weight)
    return head
