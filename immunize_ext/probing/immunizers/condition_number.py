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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from immunize_ext.errors import NumericalWarning
from immunize_ext.ops.precondition import Preconditioner, precondition_gradient
from immunize_ext.ops.regularizers import gram_r_ill, gram_r_well, r_ill, r_well
from immunize_ext.ops.spectrum import gram_extremes
from immunize_ext.probing.data.task import Task
from immunize_ext.probing.immunizers.corridor import check_corridor, project_to_corridor
from immunize_ext.probing.immunizers.immunized import Immunized
from immunize_ext.probing.immunizers.loop import plain_settings
from immunize_ext.probing.immunizers.step_bounds import ill_step_bound, well_step_bound
from immunize_ext.probing.metrics.hessian import with_ridge

Callback = Callable[[int, int, dict[str, float]], None]


# Shares of the proven bounds that "clip" keeps to. R_ill's is below one half, where theta would
# become singular.
WELL_CLIP = 0.9


ILL_CLIP = 0.25


@dataclass(frozen=True)
class ConditionNumberImmunizer:
    """Algorithm 1 with its step sizes balanced and bounded.

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
        ridge: Ridge on each K, relative to its largest eigenvalue.
        unsafe_step: What to do with a step beyond its proven bound (module ``step_bounds``):
            ``"clip"`` it, ``"warn"`` once or ``"raise"``.
        keep: ``"last"`` iterate, or ``"best"``: the one with the largest kappa_H among those whose
            kappa_P is at most that of the start.
        seed: Seed of the primary head omega.
        corridor: The least and the largest kappa_P, held exactly at the start and after each step
            (module ``corridor``); ``None`` leaves kappa_P free.

    Example:
        >>> from immunize_ext.probing.data import digits_task
        >>> immunizer = ConditionNumberImmunizer(steps=20)
        >>> immunized = immunizer.fit(digits_task((3,), (8,)), digits_task((4,), (9,)))
        >>> len(immunized.history), immunized.history[-1]["log_rir"] > 0
        (21, True)
    """

    steps: int = 200
    learning_rate: float = 5e-3
    lambda_well: float | None = None
    lambda_ill: float | None = None
    first_change: float = 0.1
    ill_share: float = 0.3
    optimizer: Literal["gd", "adam"] = "gd"
    preconditioner: Literal["implicit", "explicit", "none"] = "implicit"
    ridge: float = 1e-2
    unsafe_step: Literal["clip", "warn", "raise"] = "clip"
    keep: Literal["last", "best"] = "best"
    seed: int = 0
    corridor: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"{_NAME}: steps must be at least 1, got {self.steps}")
        positive = {
            "learning_rate": self.learning_rate,
            "lambda_well": self.lambda_well,
            "lambda_ill": self.lambda_ill,
            "first_change": self.first_change,
            "ill_share": self.ill_share,
        }
        for name, value in positive.items():
            # A lambda of 0 leaves its regularizer out.
            if value is not None and not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"{_NAME}: {name} must be finite and not negative, got {value}")
        choices = {
            "optimizer": ("gd", "adam"),
            "preconditioner": ("implicit", "explicit", "none"),
            "unsafe_step": ("clip", "warn", "raise"),
            "keep": ("last", "best"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{_NAME}: {name} must be one of {', '.join(allowed)}, "
                    f"got {getattr(self, name)!r}"
                )
        check_corridor(_NAME, self.corridor)

    def fit(
        self,
        primary: Task,
        harmful: Task,
        theta0: Tensor | None = None,
        *,
        callback: Callback | None = None,
    ) -> Immunized:
        """Immunize against ``harmful`` while keeping ``primary``.

        Args:
            primary: The task to keep; its training part is used.
            harmful: The task to make hard; its training inputs alone are used.
            theta0: Where to start, shape ``(p, p)``; the identity when omitted.
            callback: Called after each step with the step, the number of steps and its record.

        Returns:
            The immunized extractor. ``history`` has a record for the start and for each step:
            ``step``, ``log_kappa_primary``, ``log_kappa_harmful``, ``log_rir`` (against theta0),
            ``r_well``, ``r_ill``, ``loss``, and of the step that led there, after clipping,
            ``well_step_over_bound`` and ``ill_step_over_bound`` (0 at the start, NaN without a
            bound).

        Raises:
            ValueError: If the tasks have different numbers of features, a step is beyond its bound
                with ``unsafe_step="raise"``, or theta stops being finite.
            NotPositiveDefiniteError: If K is singular at this ridge and ``preconditioner`` is
                ``"explicit"``.

        Warns:
            NumericalWarning: If a step is beyond its bound with ``unsafe_step="warn"``.

        Note:
            Deterministic given ``seed``; computed in float64; torch's global random state is
            neither read nor changed.
        """
        p = primary.num_features
        if harmful.num_features != p:
            raise ValueError(
                f"{_NAME}.fit: harmful must have the {p} features of primary, got "
                f"{harmful.num_features}; preprocess both tasks alike"
            )
        x_primary, x_harmful, y = (
            t.to(torch.float64) for t in (primary.x_train, harmful.x_train, primary.y_train)
        )
        start = torch.eye(p, dtype=torch.float64, device=y.device) if theta0 is None else theta0
        theta = start.detach().to(torch.float64).clone()
        generator = torch.Generator().manual_seed(self.seed)
        head = torch.randn(p, dtype=torch.float64, generator=generator) / math.sqrt(p)
        omega = head.to(y.device).requires_grad_()

        well = _Term(with_ridge(x_primary, self.ridge), "well", self.preconditioner)
        ill = _Term(with_ridge(x_harmful, self.ridge), "ill", self.preconditioner)
        if self.corridor is not None:
            theta = project_to_corridor(theta, well.rows, self.corridor)
        theta.requires_grad_()
        optimizer: torch.optim.Optimizer
        if self.optimizer == "adam":
            optimizer = torch.optim.Adam([theta, omega], lr=self.learning_rate)
        else:
            optimizer = torch.optim.SGD([theta, omega], lr=self.learning_rate)

        lambdas = self.lambda_well, self.lambda_ill
        recorder = _Recorder(well, ill)
        best, best_harmful = theta.detach().clone(), -math.inf
        history: list[dict[str, float]] = []
        ratios = dict.fromkeys(_RATIOS, 0.0)
        warned = False
        for step in range(self.steps + 1):
            well_value, well_grad = well.value_and_gradient(theta)
            ill_value, ill_grad = ill.value_and_gradient(theta)
            residual = x_primary @ theta @ omega - y
            loss = residual.square().mean()
            record = recorder.record(step, theta, well_value, ill_value, float(loss.detach()))
            record.update(ratios)
            history.append(record)
            if callback is not None and step > 0:
                callback(step, self.steps, record)
            if record["log_kappa_primary"] <= history[0]["log_kappa_primary"] and (
                record["log_kappa_harmful"] > best_harmful
            ):
                best, best_harmful = theta.detach().clone(), record["log_kappa_harmful"]
            if step == self.steps:
                break
            if step == 0:
                lambdas = self._balance(theta, well_grad, ill_grad)
            weights, ratios = self._bounded(lambdas, well, ill, theta, step)
            if self.unsafe_step == "warn" and not warned and max(ratios.values()) > 1.0:
                warned = True
                warnings.warn(self._unsafe(step, lambdas, ratios), NumericalWarning, stacklevel=2)
            optimizer.zero_grad()
            loss.backward()
            assert theta.grad is not None
            theta.grad += weights[0] * well_grad + weights[1] * ill_grad
            optimizer.step()
            if not bool(torch.isfinite(theta).all()):
                raise ValueError(
                    f"{_NAME}.fit: step sizes must keep theta finite, got NaN or infinity at step "
                    f"{step + 1} of {self.steps}; lower first_change, ill_share or learning_rate"
                )
            if self.corridor is not None:
                with torch.no_grad():
                    theta.copy_(project_to_corridor(theta.detach(), well.rows, self.corridor))
        config = {
            **plain_settings(asdict(self)),
            "lambda_well": lambdas[0],
            "lambda_ill": lambdas[1],
        }
        return Immunized(
            "condition_number",
            best if self.keep == "best" else theta.detach(),
            start.detach().to(torch.float64),
            config,
            history,
        )

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
        lambdas: tuple[float | None, float | None],
        well: _Term,
        ill: _Term,
        theta: Tensor,
        step: int,
    ) -> tuple[tuple[float, float], dict[str, float]]:
        """Weights of the two regularizers for one step, and the steps in units of their bounds."""
        weights = [0.0 if value is None else value for value in lambdas]
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

    def _unsafe(
        self, step: int, lambdas: tuple[float | None, float | None], ratios: dict[str, float]
    ) -> str:
        """Say which step is too long and what the longest safe one is."""
        name, ratio = max(ratios.items(), key=lambda item: item[1])
        index = 0 if name.startswith("well") else 1
        argument = ("lambda_well", "lambda_ill")[index]
        value = lambdas[index] or 0.0
        return (
            f"{_NAME}.fit: {argument} must be below {value / ratio:.3g} at step {step} for kappa "
            f"to move the right way (learning rate {self.learning_rate:g}), got {value:.3g}; "
            'lower it, or use unsafe_step="clip"'
        )


_NAME = ConditionNumberImmunizer.__name__


_RATIOS = "well_step_over_bound", "ill_step_over_bound"


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


class _Recorder:
    """Builds the records of the history."""

    def __init__(self, well: _Term, ill: _Term) -> None:
        self._terms = well, ill
        self._base: tuple[float, float] | None = None

    def record(
        self, step: int, theta: Tensor, well_value: float, ill_value: float, loss: float
    ) -> dict[str, float]:
        primary, harmful = (
            float(extremes.lambda_max.log() - extremes.lambda_min.log())
            for extremes in (gram_extremes(term.rows @ theta.detach()) for term in self._terms)
        )
        if self._base is None:
            self._base = primary, harmful
        return {
            "step": float(step),
            "log_kappa_primary": primary,
            "log_kappa_harmful": harmful,
            "log_rir": (harmful - self._base[1]) - (primary - self._base[0]),
            "r_well": well_value,
            "r_ill": ill_value,
            "loss": loss,
        }
