"""Everything that a report says about an immunized extractor, measured once.

Both tasks are attacked by every attacker and judged on their own test parts; the condition numbers
come from the training inputs, which is what an attacker's optimizer sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from immunize_ext.probing.attacks import (
    ATTACKERS,
    PROBES,
    AttackComparison,
    LossName,
    compare_attack,
)
from immunize_ext.probing.attacks.compress import NEED_SAMPLES, compressed, gram_rows
from immunize_ext.probing.data.task import Task
from immunize_ext.probing.immunizers.immunized import Immunized
from immunize_ext.probing.metrics import (
    AttackerSteps,
    WorstCase,
    ceiling_table,
    few_sample_error,
    grouped_linear_rir,
    leading_subspace_angles,
    line_search_norm_ratio,
    relative_degradation,
    spectral_slowdown,
    worst_case,
)
from immunize_ext.probing.metrics.hessian import with_ridge
from immunize_ext.probing.metrics.pencil import log_rir_ceiling
from immunize_ext.probing.metrics.rir import RelativeImmunizationRatio, relative_immunization_ratio
from immunize_ext.probing.plots import curves_of, log_spaced_steps, spectrum_of
from immunize_ext.storage import environment

Progress = Callable[[str, float], None]


ROLES = ("harmful", "primary")


# Attackers who solve for the best head at once or after whitening: theta cannot slow them.
UNAFFECTED = ("whitened", "closed_form_ridge")


# An accuracy that falls by less than this is "hardly changed" in the report.
ACCURACY_MARGIN = 0.02


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of one task's Hessian (with ridge) before and after, each descending ``(p,)``."""

    before: Tensor
    after: Tensor


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        immunized: What was evaluated.
        tasks: The tasks by role, ``"harmful"`` and ``"primary"``.
        comparisons: By role, then by attacker.
        spectra: By role.
        rir: By rank policy.
        log_ceiling: Log of the largest RIR that any theta could reach at this ridge.
        ceiling_growth: Factor by which that ceiling grows when the ridge falls tenfold.
        ridge: The relative ridge of the condition numbers.
    """

    immunized: Immunized
    tasks: dict[str, Task]
    comparisons: dict[str, dict[str, AttackComparison]]
    spectra: dict[str, Spectrum]
    rir: dict[str, RelativeImmunizationRatio]
    log_ceiling: float
    ceiling_growth: float
    ridge: float

    @property
    def share_of_ceiling(self) -> float:
        """RIR divided by its ceiling, policy ``"ridge"``."""
        return math.exp(min(self.rir["ridge"].log_rir - self.log_ceiling, 0.0))

    @property
    def has_accuracy(self) -> bool:
        """Whether both tasks tell two classes apart, so that an accuracy means something."""
        return all(task.is_classification for task in self.tasks.values()) and not any(
            _one_class(task) for task in self.tasks.values()
        )

    def accuracy_at(self, role: str, attacker: str, step: int) -> tuple[float, float] | None:
        """Test accuracy after a number of steps, without and with immunization."""
        comparison = self.comparisons[role][attacker]
        found = []
        for curve in (comparison.base, comparison.immunized):
            if curve.test_accuracy is None:
                return None
            found.append(float(curve.test_accuracy[min(step, curve.steps)]))
        return found[0], found[1]

    def warnings(self) -> list[str]:
        """What a reader has to know before quoting the numbers, one sentence each."""
        found = []
        ratio = self.rir["ridge"]
        if ratio.log_i < -1e-9 < 0.0 < ratio.log_rir:
            found.append(
                f"The harmful task's condition number went down ((i) = {ratio.i:.3g}) although RIR "
                f"is {ratio.rir:.3g}: RIR is high because the primary task got easier, not because "
                "the harmful one got harder."
            )
        for name in ("gradient_descent", "line_search"):
            cost = self.comparisons["primary"][name].slowdown
            if cost.censored or cost.ratio > 1.05:
                found.append(
                    f"The primary task is slowed as well ({cost} for "
                    f"{ATTACKER_NAMES[name].lower()}): a lower strength would avoid that."
                )
        for name in ("gradient_descent", "line_search"):
            gain = self.comparisons["harmful"][name].slowdown
            if not gain.censored and gain.ratio <= 1.05:
                found.append(
                    f"The harmful task is not slowed for {ATTACKER_NAMES[name].lower()} ({gain}): "
                    "on these tasks this protection does not work."
                )
        accuracy = self.accuracy_at("harmful", "gradient_descent", 100)
        if _one_class(self.tasks["harmful"]):
            accuracy = None
        if accuracy is not None and accuracy[0] - accuracy[1] < ACCURACY_MARGIN:
            found.append(
                f"After 100 steps the harmful task's test accuracy is {accuracy[1]:.1%} instead of "
                f"{accuracy[0]:.1%}: an attacker who only needs the right sign is hardly slowed."
            )
        for role in ROLES:
            if _one_class(self.tasks[role]):
                found.append(
                    f"The {role} task has one class: its attackers learn a constant from images of "
                    "one kind, which says little about learning to tell classes apart."
                )
            n, p = self.tasks[role].x_train.shape
            if n < p:
                found.append(
                    f"The {role} task has fewer training samples ({n}) than features ({p}): its "
                    "condition number depends on the ridge."
                )
            if self.tasks[role].x_train.dtype != torch.float64 and (
                ratio.log_kappa_harmful > math.log(1e7)
            ):
                found.append(
                    "kappa of the harmful task is above 1e7: a float32 solver stops short there, "
                    "which is an artefact and not protection."
                )
                break
        for role, comparisons in self.comparisons.items():
            for name, comparison in comparisons.items():
                edges = edge_rates(name)
                for curve in (comparison.base, comparison.immunized):
                    if curve.learning_rate in edges:
                        found.append(
                            f"{ATTACKERS[name].label} on the {role} task does best at "
                            f"{curve.learning_rate:g}, the end of the learning rates tried: it may "
                            "be faster still beyond."
                        )
                        break
        if self.ceiling_growth > 10.0:
            found.append(
                f"The ceiling of RIR grows {self.ceiling_growth:.3g} times when the ridge falls "
                f"tenfold: quote it only together with the ridge {self.ridge:g}."
            )
        return found

    def results(self) -> dict[str, Any]:
        """Everything that has no curve, ready for ``results.json``."""
        ratio = self.rir["ridge"]
        return {
            "schema": 2,
            "method": self.immunized.method,
            "tasks": {
                role: {
                    "name": task.name,
                    "train_samples": task.x_train.shape[0],
                    "test_samples": task.x_test.shape[0],
                    "features": task.num_features,
                }
                for role, task in self.tasks.items()
            },
            "rir": {policy: value.rir for policy, value in self.rir.items()},
            "ridge": self.ridge,
            "ceiling": _finite_exp(self.log_ceiling),
            "share_of_ceiling": self.share_of_ceiling,
            "i": ratio.i,
            "ii": ratio.ii,
            "condition_numbers": {
                policy: {
                    "i": value.i,
                    "ii": value.ii,
                    "log_rir": value.log_rir,
                    "log_kappa_harmful": [value.log_kappa_harmful_base, value.log_kappa_harmful],
                    "log_kappa_primary": [value.log_kappa_primary_base, value.log_kappa_primary],
                    "rank_harmful": [value.rank_harmful_base, value.rank_harmful],
                    "rank_primary": [value.rank_primary_base, value.rank_primary],
                }
                for policy, value in self.rir.items()
            },
            "slowdown": {
                role: {name: c.slowdown.ratio for name, c in comparisons.items()}
                for role, comparisons in self.comparisons.items()
            },
            "slowdown_is_lower_bound": {
                role: {name: c.slowdown.censored for name, c in comparisons.items()}
                for role, comparisons in self.comparisons.items()
            },
            "attacks": {
                role: {
                    name: _attack_facts(c) | {"curves": curves_of(c, accuracy=self.has_accuracy)}
                    for name, c in comparisons.items()
                }
                for role, comparisons in self.comparisons.items()
            },
            "attackers": attackers_in_words(self.comparisons["harmful"]),
            "spectra": {role: spectrum_of(s.before, s.after) for role, s in self.spectra.items()},
            "ceiling_growth": self.ceiling_growth,
            "warnings": self.warnings(),
            "config": self.immunized.config,
            "environment": environment(self.immunized.theta.device),
        }

    def metrics(self) -> list[dict[str, Any]]:
        """The history and the curves as rows for ``metrics.jsonl``."""
        rows: list[dict[str, Any]] = [
            {"kind": "immunize", **record} for record in self.immunized.history
        ]
        for role, comparisons in self.comparisons.items():
            for name, comparison in comparisons.items():
                for immunized, curve in enumerate((comparison.base, comparison.immunized)):
                    for step in log_spaced_steps(curve.steps, 60):
                        row = {
                            "kind": "attack",
                            "role": role,
                            "attacker": name,
                            "immunized": bool(immunized),
                            "step": step,
                            "train_loss": float(curve.train_loss[step]),
                            "test_loss": float(curve.test_loss[step]),
                        }
                        if curve.test_accuracy is not None:
                            row["test_accuracy"] = float(curve.test_accuracy[step])
                        rows.append(row)
        return rows


ATTACKER_NAMES = {
    "gradient_descent": "Gradient descent",
    "line_search": "Gradient descent with line search",
    "conjugate_gradients": "Conjugate gradients",
    "whitened": "Whitens the features first",
    "closed_form_ridge": "Solves in closed form",
}


def edge_rates(attacker: str) -> tuple[float, ...]:
    """Ends of an attacker's grid of learning rates behind which a better one might lie.

    The largest rates of the two with momentum are where gradient descent stops being stable, so
    nothing lies beyond them.

    Example:
        >>> edge_rates("adam"), edge_rates("momentum"), edge_rates("lbfgs")
        ((0.0001, 3.0), (0.03,), ())
    """
    rates = ATTACKERS[attacker].learning_rates
    if not rates:
        return ()
    return rates[:1] if attacker in ("momentum", "sgd_momentum") else (rates[0], rates[-1])


def attackers_in_words(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What reports have to know of attackers by name: label, and whether theta can slow them."""
    return {
        name: {"label": found.label, "sees_theta": found.sees_theta}
        for name, found in ATTACKERS.items()
        if name in set(names)
    }


def _one_class(task: Task) -> bool:
    return bool((task.y_train == task.y_train[0]).all())


def _finite_exp(value: float) -> float:
    return math.exp(value) if value < 709.0 else math.inf


def _attack_facts(comparison: AttackComparison) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "target_test_loss": comparison.target,
        "steps_without": comparison.base_steps,
        "steps_with": comparison.steps,
        "budget_with": comparison.immunized.steps,
        "lowest_test_loss_without": float(comparison.base.test_loss.min()),
        "lowest_test_loss_with": float(comparison.immunized.test_loss.min()),
    }
    for key, curve in (("without", comparison.base), ("with", comparison.immunized)):
        if curve.learning_rate is not None:
            facts[f"learning_rate_{key}"] = curve.learning_rate
        if curve.test_accuracy is not None:
            facts[f"final_test_accuracy_{key}"] = float(curve.test_accuracy[-1])
    return facts


def evaluate(
    immunized: Immunized,
    primary: Task,
    harmful: Task,
    *,
    ridge: float = 1e-2,
    tolerance: float = 0.1,
    base_budget: int = 2000,
    limit: float = 128.0,
    attackers: Sequence[str] = (),
    loss: LossName = "squared",
    stop_early: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Attack both tasks, without and with immunization, and take the metrics.

    Args:
        immunized: The immunized extractor.
        primary: The task that was to be kept.
        harmful: The task that was to be made hard. Its labels are used here and only here.
        ridge: Relative ridge of the condition numbers.
        tolerance: How close to the lowest test loss counts as reached.
        base_budget: Steps of an attacker without immunization.
        limit: Largest slow-down looked for.
        attackers: Names in :data:`immunize_ext.probing.attacks.ATTACKERS` to try beside those that every
            report shows.
        loss: What attackers minimise, ``"squared"`` or, for targets -1 and +1, ``"logistic"``. One
            who cannot minimise it is left out.
        stop_early: Whether an attack with immunization ends soon after it got there.
        progress: Called with what was done and the share done so far.

    Returns:
        All measurements.

    Raises:
        ValueError: If shapes do not fit or an argument is out of range.

    Note:
        Deterministic; computed in float64.
    """
    tasks = {"harmful": harmful, "primary": primary}
    unknown = sorted({*attackers} - {*ATTACKERS})
    if unknown:
        raise ValueError(
            f"evaluate: attackers must be among {', '.join(ATTACKERS)}, got {', '.join(unknown)}"
        )
    chosen = [
        name
        for name in ATTACKERS
        if (name in PROBES or name in attackers) and ATTACKERS[name].knows(loss)
    ]
    total = len(chosen) * len(ROLES)
    # Losses other than the squared one need every sample.
    short = {role: compressed(task) if loss == "squared" else task for role, task in tasks.items()}
    comparisons: dict[str, dict[str, AttackComparison]] = {role: {} for role in ROLES}
    for index, (attacker, role) in enumerate((a, r) for a in chosen for r in ROLES):
        comparisons[role][attacker] = compare_attack(
            tasks[role] if attacker in NEED_SAMPLES else short[role],
            immunized.theta,
            immunized.theta0,
            attacker=attacker,
            tolerance=tolerance,
            base_budget=base_budget,
            limit=limit,
            stop_early=stop_early,
            loss=loss,
        )
        if progress is not None:
            name = ATTACKERS[attacker].label.lower()
            progress(f"attacking the {role} task: {name}", (index + 1) / total)
    rows_by_role = {role: gram_rows(task.x_train) for role, task in tasks.items()}
    inputs = rows_by_role["primary"], rows_by_role["harmful"]
    log_ceiling = log_rir_ceiling(*inputs, ridge=ridge)
    spectra = {}
    for role in ROLES:
        rows = with_ridge(rows_by_role[role].to(torch.float64), ridge)
        before, after = (
            torch.linalg.svdvals(rows @ theta.to(torch.float64)).square().cpu()
            for theta in (immunized.theta0, immunized.theta)
        )
        spectra[role] = Spectrum(before, after)
    return Evaluation(
        immunized=immunized,
        tasks=tasks,
        comparisons=comparisons,
        spectra=spectra,
        rir={
            policy: relative_immunization_ratio(
                *inputs, immunized.theta, immunized.theta0, policy=policy, ridge=ridge
            )
            for policy in ("ridge", "rank_aware", "official")
        },
        log_ceiling=log_ceiling,
        ceiling_growth=_finite_exp(log_rir_ceiling(*inputs, ridge=ridge / 10.0) - log_ceiling),
        ridge=ridge,
    )


# Steps at which the norm ratio under exact line search is quoted.
NORM_RATIO_STEPS = (1, 3, 10, 30, 100)


GROUPS = 20


GROUP_SIZE = 100


FEW_SAMPLES = 50


SUBSPACE = 5


def kappa_details(evaluation: Evaluation, *, seed: int = 0) -> dict[str, Any]:
    """Take the measurements beside RIR and the attacks.

    Args:
        evaluation: A finished evaluation of a linear extractor.
        seed: Seed of random groups and few-sample draws.

    Returns:
        Plain values: ``ceiling_table``, ``subspace_angles``, ``norm_ratio``,
        ``spectral_slowdown``, ``worst_case``, ``rfd``, ``few_samples`` and ``grouped_rir``.

    Note:
        Deterministic given ``seed``.
    """
    theta, theta0 = evaluation.immunized.theta, evaluation.immunized.theta0
    tasks = evaluation.tasks
    short = {role: compressed(task) for role, task in tasks.items()}
    rows = {role: gram_rows(task.x_train) for role, task in tasks.items()}
    return {
        "ceiling_table": [
            row._asdict() for row in ceiling_table(rows["primary"], rows["harmful"], theta, theta0)
        ],
        "subspace_angles": _angles(evaluation),
        "norm_ratio": {
            role: {
                key: _norm_ratio(task.x_train.to(torch.float64), task.y_train, extractor)
                for key, extractor in (("without", theta0), ("with", theta))
            }
            for role, task in short.items()
        },
        "spectral_slowdown": {
            role: {
                name: spectral_slowdown(
                    task.x_train,
                    task.y_train,
                    theta,
                    theta0,
                    attacker=name,
                ).ratio
                for name in ("gradient_descent", "conjugate_gradients")
            }
            for role, task in short.items()
        },
        "worst_case": {role: _worst(evaluation, role) for role in ROLES},
        "rfd": {role: _degradation(evaluation, role) for role in ROLES},
        "few_samples": _few_samples(evaluation, seed),
        "grouped_rir": _grouped(evaluation, seed),
    }


def _angles(evaluation: Evaluation) -> dict[str, Any]:
    rows = {role: gram_rows(task.x_train) for role, task in evaluation.tasks.items()}
    count = min(SUBSPACE, *(min(x.shape) for x in rows.values()))
    found = leading_subspace_angles(
        rows["primary"],
        rows["harmful"],
        evaluation.immunized.theta,
        evaluation.immunized.theta0,
        count=count,
    )
    return {
        "count": count,
        "before_degrees": [math.degrees(float(angle)) for angle in found.before],
        "after_degrees": [math.degrees(float(angle)) for angle in found.after],
        "gap_before": found.gap_before,
        "gap_after": found.gap_after,
    }


def _norm_ratio(x: torch.Tensor, y: torch.Tensor, extractor: torch.Tensor) -> dict[str, float]:
    ratios = line_search_norm_ratio(
        x @ extractor.to(torch.float64), y.to(torch.float64), steps=max(NORM_RATIO_STEPS)
    )
    return {str(step): float(ratios[step]) for step in NORM_RATIO_STEPS}


def _worst(evaluation: Evaluation, role: str) -> dict[str, Any]:
    """The worst case over attackers whom theta can slow at all, and over all of them."""
    steps = {
        name: AttackerSteps(c.base_steps, c.steps, c.immunized.steps)
        for name, c in evaluation.comparisons[role].items()
    }
    seen = {name: value for name, value in steps.items() if ATTACKERS[name].sees_theta}
    return {
        "iterative_attackers": _case(worst_case(seen)),
        "all_attackers": _case(worst_case(steps)),
    }


def _case(case: WorstCase) -> dict[str, Any]:
    return {
        "least_slowed": case.least_slowed,
        "least_slowdown": case.least_slowdown.ratio,
        "fastest_without": case.fastest_base,
        "fastest_with": case.fastest,
        "slowdown_of_a_free_choice": case.slowdown.ratio,
        "is_lower_bound": case.slowdown.censored,
    }


def _degradation(evaluation: Evaluation, role: str) -> dict[str, Any]:
    """RFD of gradient descent: of the test loss, and of the accuracy where there is one."""
    comparison = evaluation.comparisons[role]["gradient_descent"]
    last = min(comparison.base.steps, comparison.immunized.steps, 100)
    found: dict[str, Any] = {"steps": last}
    measures = {"test_loss": False}
    if evaluation.has_accuracy:
        measures["test_accuracy"] = True
    for field, higher in measures.items():
        curves = [
            getattr(curve, field)[1 : last + 1] for curve in (comparison.base, comparison.immunized)
        ]
        if not bool((curves[0] > 0).all()):
            continue  # no success at all at some step: the ratio is not defined
        degradation = relative_degradation(curves[0], curves[1], higher_is_better=higher)
        found[field] = degradation._asdict()
    return found


def _few_samples(evaluation: Evaluation, seed: int) -> dict[str, Any]:
    task = evaluation.tasks["primary"]
    samples = min(FEW_SAMPLES, task.x_train.shape[0])
    return {
        key: few_sample_error(task, theta, samples=samples, seed=seed)._asdict()
        for key, theta in (
            ("without", evaluation.immunized.theta0),
            ("with", evaluation.immunized.theta),
        )
    }


def _grouped(evaluation: Evaluation, seed: int) -> dict[str, Any]:
    primary, harmful = (evaluation.tasks[role].x_train for role in ("primary", "harmful"))
    size = min(GROUP_SIZE, primary.shape[0], harmful.shape[0])
    estimate = grouped_linear_rir(
        primary,
        harmful,
        evaluation.immunized.theta,
        evaluation.immunized.theta0,
        groups=GROUPS,
        group_size=size,
        ridge=evaluation.ridge,
        seed=seed,
    )
    return {
        "groups": GROUPS,
        "group_size": size,
        "ridge": evaluation.ridge,
        "mean": estimate.mean_rir,
        "log_spread": estimate.log_spread,
        "full_data": estimate.full.rir,
        "log_bias": estimate.log_bias,
    }
