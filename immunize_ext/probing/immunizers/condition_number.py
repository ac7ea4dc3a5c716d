"""Condition-number immunization of a linear extractor (Algorithm 1), on full-data Gram matrices.

    omega <- omega - eta grad_omega L(omega, theta)
    theta <- theta - eta grad_theta L(omega, theta)
                   - eta lambda_P K_P^{-1} grad_theta R_well(theta^T K_P theta)
                   - eta lambda_H K_H^{-1} grad_theta R_ill(theta^T K_H theta)

("Model Immunization from a Condition Number Perspective", eq 11 and Algorithm 1; L is the mean
squared residual of the primary task.) The harmful task gives its inputs alone.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from immunize_ext.errors import EqualSingularValuesError, NumericalWarning
from immunize_ext.ops.precondition import Preconditioner, precondition_gradient
from immunize_ext.ops.regularizers import gram_r_ill, gram_r_well, r_ill, r_well
from immunize_ext.probing.data.problem import Problem
from immunize_ext.probing.data.task import Task
from immunize_ext.probing.immunizers.closed_form import equal_curvature
from immunize_ext.probing.immunizers.loop import (
    Advance,
    Descent,
    IterativeImmunizer,
    check_settings,
)
from immunize_ext.probing.immunizers.registry import METHODS
from immunize_ext.probing.immunizers.step_bounds import ill_step_bound, well_step_bound

# Shares of the proven bounds that "clip" keeps to. R_ill's is below one half, where theta would
# become singular.
WELL_CLIP = 0.9


ILL_CLIP = 0.25


_NAME = "ConditionNumberImmunizer"


_RATIOS = "well_step_over_bound", "ill_step_over_bound"


@METHODS.register
@dataclass(frozen=True)
class ConditionNumberImmunizer(IterativeImmunizer):
    """Algorithm 1 of the paper, on full data, with its step sizes balanced and bounded.

    ``history`` has besides, for each record, ``r_well``, ``r_ill``, ``loss``, and of the step that
    led there, after clipping, ``well_step_over_bound`` and ``ill_step_over_bound`` (0 at the start,
    NaN without a bound).

    Attributes:
        steps: Number T of updates.
        learning_rate: eta.
        lambda_well: lambda_P, or ``None`` to set it so that the first update by R_well alone
            changes theta by ``first_change`` of its norm.
        lambda_ill: lambda_H, or ``None`` to set it so that the first update by R_ill alone is
            ``ill_share`` times that of R_well.
        first_change: See ``lambda_well``; 0.1 to 0.5 works, above 1 diverges.
        ill_share: See ``lambda_ill``; 0.3 to 3 works.
        optimizer: ``"gd"``, or ``"adam"``, for which no step bound is known.
        preconditioner: How K^{-1} is applied. ``"implicit"``: K^{-1} grad R = 2 theta dR/dH, with
            no inverse. ``"explicit"``: an identity layer whose backward solves with a Cholesky
            factor of K, as the papers do it; same numbers. ``"none"``: plain gradients.
        unsafe_step: What to do with a step beyond its proven bound (module ``step_bounds``):
            ``"clip"`` it, ``"warn"`` once or ``"raise"``.
        keep: ``"last"`` iterate, or ``"best"``: the one with the largest kappa_H among those whose
            kappa_P is at most that of the start.
        rotate: Whether what is handed back is rotated so that coordinates of the harmful Hessian
            have the same curvature, which Adam, Adagrad and standardising cannot undo. No condition
            number and no step of gradient descent depends on it.
        seed: Seed of the primary head omega.

    Raises:
        ValueError: If a setting is out of range; on fitting, if a step is beyond its bound with
            ``unsafe_step="raise"`` or theta stops being finite.
        NotPositiveDefiniteError: On fitting, if K is singular at this ridge and ``preconditioner``
            is ``"explicit"``.

    Warns:
        NumericalWarning: On fitting, if a step is beyond its bound with ``unsafe_step="warn"``, or
            no iterate is better than the start, so that ``keep="best"`` hands back theta_0.

    Example:
        >>> from immunize_ext.probing.data import digits_task
        >>> problem = Problem.of(digits_task((3,), (8,)), digits_task((4,), (9,)))
        >>> immunized = ConditionNumberImmunizer(steps=20).fit(None, problem)
        >>> len(immunized.history), immunized.history[-1]["log_rir"] > 0
        (21, True)
    """

    method: ClassVar[str] = "condition-number"
    sees_scale: ClassVar[bool] = True
    knob: ClassVar[str | None] = "ill_share"
    grid: ClassVar[tuple[float, ...]] = (0.1, 0.3, 1.0, 3.0)

    steps: int = 200
    learning_rate: float = 5e-3
    lambda_well: float | None = None
    lambda_ill: float | None = None
    first_change: float = 0.1
    ill_share: float = 0.3
    optimizer: Literal["gd", "adam"] = "gd"
    preconditioner: Literal["implicit", "explicit", "none"] = "implicit"
    unsafe_step: Literal["clip", "warn", "raise"] = "clip"
    keep: Literal["last", "best"] = "best"
    rotate: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(
            _NAME,
            {"steps": self.steps, "learning_rate": self.learning_rate},
            {
                "optimizer": ("gd", "adam"),
                "preconditioner": ("implicit", "explicit", "none"),
                "unsafe_step": ("clip", "warn", "raise"),
                "keep": ("last", "best"),
            },
            {
                "optimizer": self.optimizer,
                "preconditioner": self.preconditioner,
                "unsafe_step": self.unsafe_step,
                "keep": self.keep,
            },
        )
        for name in ("lambda_well", "lambda_ill", "first_change", "ill_share"):
            value = getattr(self, name)
            # A lambda of 0 leaves its regularizer out.
            if value is not None and not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"{_NAME}: {name} must be finite and not negative, got {value}")

    def begin(self, descent: Descent, problem: Problem[Task]) -> tuple[int, Advance]:
        """Balance the two regularizers at the start."""
        x, y = (t.to(torch.float64) for t in (problem.primary.x_train, problem.primary.y_train))
        p = problem.primary.num_features
        generator = torch.Generator().manual_seed(self.seed)
        shape = (p, *y.shape[1:])
        head = torch.randn(shape, dtype=torch.float64, generator=generator) / math.sqrt(p)
        omega = head.to(y.device).requires_grad_()
        theta = descent.theta.requires_grad_()
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.SGD
        descent.optimizer = kind([theta, omega], lr=self.learning_rate)
        descent.tensors = {"omega": omega, "best": theta.detach().clone()}
        descent.marks = {"best": -math.inf, "best_step": 0.0, "warned": 0.0}
        descent.marks |= dict.fromkeys(_RATIOS, 0.0)
        well = _Term(descent.primary, "well", self.preconditioner)
        ill = _Term(descent.harmful, "ill", self.preconditioner)
        lambdas = self._balance(
            theta, well.value_and_gradient(theta)[1], ill.value_and_gradient(theta)[1]
        )
        descent.found = dict(zip(("lambda_well", "lambda_ill"), lambdas, strict=True))

        def advance(step: int) -> None:
            try:
                well_value, well_grad = well.value_and_gradient(theta)
                ill_value, ill_grad = ill.value_and_gradient(theta)
            except EqualSingularValuesError as error:
                if step == 0:
                    raise
                # A theta that ran away gives features with one direction left.
                raise EqualSingularValuesError(
                    f"{_NAME}.fit: step sizes must keep theta finite, at step {step}: {error}; "
                    "lower the step size"
                ) from error
            loss = (x @ theta @ omega - y).square().mean()
            record = descent.record(
                step,
                r_well=well_value,
                r_ill=ill_value,
                loss=float(loss.detach()),
                **{name: descent.marks[name] for name in _RATIOS},
            )
            self._keep_if_best(descent, record)
            if step == self.steps:
                return
            weights, ratios = self._bounded(lambdas, well, ill, theta, step)
            descent.marks |= ratios
            unsafe = self.unsafe_step == "warn" and max(ratios.values()) > 1.0
            if unsafe and not descent.marks["warned"]:
                descent.marks["warned"] = 1.0
                text = self._unsafe(step, lambdas, ratios)
                warnings.warn(text, NumericalWarning, stacklevel=3)
            assert descent.optimizer is not None  # made above
            descent.optimizer.zero_grad()
            loss.backward()
            assert theta.grad is not None
            theta.grad += weights[0] * well_grad + weights[1] * ill_grad
            descent.move()

        return self.steps, advance

    def _keep_if_best(self, descent: Descent, record: dict[str, float]) -> None:
        first = descent.history[0]["log_kappa_primary"]
        kappa = record["log_kappa_harmful"]
        if record["log_kappa_primary"] <= first and kappa > descent.marks["best"]:
            descent.tensors["best"].copy_(descent.theta.detach())
            descent.marks |= {"best": kappa, "best_step": record["step"]}

    def kept(self, descent: Descent) -> Tensor:
        """The last iterate, or the best one, in coordinates of equal curvature."""
        if self.keep == "last":
            return self._rotated(descent, descent.theta.detach())
        if descent.marks["best_step"] == 0.0:
            warnings.warn(
                f"{_NAME}.fit: some step must raise kappa_H and leave kappa_P no larger than at "
                "the start, got none: the extractor is the one it started from; lower "
                'first_change or ill_share, or use keep="last"',
                NumericalWarning,
                stacklevel=3,
            )
            return descent.tensors["best"]
        return self._rotated(descent, descent.tensors["best"])

    def _rotated(self, descent: Descent, theta: Tensor) -> Tensor:
        return theta @ equal_curvature(descent.harmful @ theta) if self.rotate else theta

    def _balance(self, theta: Tensor, well_grad: Tensor, ill_grad: Tensor) -> tuple[float, float]:
        """Choose the lambdas that were left open by the norms of the first two updates."""
        norms = [float(g.norm()) * self.learning_rate for g in (well_grad, ill_grad)]
        change = self.first_change * float(theta.detach().norm())
        chosen = (self.lambda_well, self.lambda_ill)
        shares = (1.0, self.ill_share)
        return (
            _balanced(chosen[0], shares[0] * change, norms[0]),
            _balanced(chosen[1], shares[1] * change, norms[1]),
        )

    def _bounded(
        self,
        lambdas: tuple[float, float],
        well: _Term,
        ill: _Term,
        theta: Tensor,
        step: int,
    ) -> tuple[tuple[float, float], dict[str, float]]:
        """Weights of the two regularizers for one step, and the steps in units of their bounds."""
        weights = list(lambdas)
        if self.optimizer == "adam" or self.preconditioner == "none":
            return (weights[0], weights[1]), dict.fromkeys(_RATIOS, math.nan)
        detached = theta.detach()
        bounds = [well_step_bound(well.rows @ detached), ill_step_bound(ill.rows @ detached)]
        if self.unsafe_step == "clip":
            for i, share in enumerate((WELL_CLIP, ILL_CLIP)):
                weights[i] = min(weights[i], share * bounds[i] / self.learning_rate)
        ratios = {
            name: self.learning_rate * weight / bound if bound > 0.0 else math.inf
            for name, weight, bound in zip(_RATIOS, weights, bounds, strict=True)
        }
        if self.unsafe_step == "raise" and max(ratios.values()) > 1.0:
            raise ValueError(self._unsafe(step, lambdas, ratios))
        return (weights[0], weights[1]), ratios

    def _unsafe(self, step: int, lambdas: tuple[float, float], ratios: dict[str, float]) -> str:
        """Say which step is too long and what the longest safe one is."""
        name, ratio = max(ratios.items(), key=lambda item: item[1])
        index = 0 if name.startswith("well") else 1
        argument = ("lambda_well", "lambda_ill")[index]
        value = lambdas[index]
        return (
            f"{_NAME}.fit: {argument} must be below {value / ratio:.3g} at step {step} for kappa "
            f"to move the right way (learning rate {self.learning_rate:g}), got {value:.3g}; "
            'lower it, or use unsafe_step="clip"'
        )


@METHODS.register
@dataclass(frozen=True)
class PlainConditionNumberImmunizer(ConditionNumberImmunizer):
    """Algorithm 1 without K^-1."""

    method: ClassVar[str] = "condition-number-plain"
    sees_scale: ClassVar[bool] = True

    preconditioner: Literal["implicit", "explicit", "none"] = "none"


def _balanced(given: float | None, change: float, norm: float) -> float:
    if given is not None:
        return given
    # A gradient of 0 (all eigenvalues of H_P equal) leaves nothing to balance.
    return change / norm if norm > 0.0 else 0.0


class _Term:
    """One regularizer of H = theta^T K theta with its preconditioned gradient."""

    def __init__(self, rows: Tensor, kind: Literal["well", "ill"], preconditioner: str) -> None:
        self.rows = rows
        self._preconditioner = preconditioner
        self._of_features = gram_r_well if kind == "well" else gram_r_ill
        self._of_matrix = r_well if kind == "well" else r_ill
        self._factor = (
            Preconditioner.from_features(rows, ridge=0.0) if preconditioner == "explicit" else None
        )

    def value_and_gradient(self, theta: Tensor) -> tuple[float, Tensor]:
        """Value and K^{-1} grad_theta, or grad_theta without a preconditioner."""
        if self._preconditioner == "implicit":
            # K^{-1} grad_theta R = K^{-1} (2 K theta G) = 2 theta G, G = dR/dH symmetric.
            detached = theta.detach()
            features = self.rows @ detached
            hessian = (features.mT @ features).requires_grad_()
            value = self._of_matrix(hessian)
            (outer,) = torch.autograd.grad(value, hessian)
            return float(value.detach()), detached @ (outer + outer.mT)
        leaf = theta.detach().requires_grad_()
        extractor = leaf
        if self._factor is not None:
            # theta^T is what nn.Linear stores, (out, in); K^{-1} acts on its input side.
            extractor = precondition_gradient(leaf.mT, self._factor).mT
        value = self._of_features(self.rows @ extractor)
        (gradient,) = torch.autograd.grad(value, leaf)
        return float(value.detach()), gradient
