"""The further measurements of a condition-number run: what a specialist asks next.

Everything here comes from ``immunize_ext.metrics``; this module calls it with one set of settings
and turns it into plain values.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from immunize_ext.attacks import ATTACKERS
from immunize_ext.metrics import (
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
from immunize_ext.report._compress import compressed, gram_rows
from immunize_ext.report.evaluation import ROLES, Evaluation

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
