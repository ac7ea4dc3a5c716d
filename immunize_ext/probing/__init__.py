"""Condition-number immunization: make one task slow to learn from features, keep another.

    from immunize_ext.probing import run
    found = run.run(run.RunSettings(method="closed-form"), "runs/kappa")
    print(found.summary())

``run`` holds what the command line does: ``run``, ``attack``, ``compare`` and ``sweep``, each with
its settings. The parts stand in ``data``, ``extractors``, ``metrics``, ``attacks``, ``immunizers``
and ``evaluation``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from immunize_ext._lazy import lazy

if TYPE_CHECKING:
    from immunize_ext.probing import (
        attacks,
        certificates,
        certification,
        data,
        deep_run,
        evaluation,
        extractors,
        immunizers,
        metrics,
        run,
    )
    from immunize_ext.probing.attacks import ATTACKS
    from immunize_ext.probing.data import Problem, Task
    from immunize_ext.probing.evaluation import Evaluation, evaluate
    from immunize_ext.probing.immunizers import METHODS, Immunized
    from immunize_ext.probing.run import AttackSettings, RunSettings, SweepSettings

_MODULES = (
    "attacks",
    "certificates",
    "certification",
    "data",
    "deep_run",
    "evaluation",
    "extractors",
    "immunizers",
    "metrics",
    "run",
)
# Imported when they are asked for: a page that is drawn from results needs no operators.
_PLACES = {
    "ATTACKS": "attacks",
    "METHODS": "immunizers",
    "AttackSettings": "run",
    "Evaluation": "evaluation",
    "Immunized": "immunizers",
    "Problem": "data",
    "RunSettings": "run",
    "SweepSettings": "run",
    "Task": "data",
    "evaluate": "evaluation",
    **{name: name for name in _MODULES},
}

__all__ = [
    "ATTACKS",
    "METHODS",
    "AttackSettings",
    "Evaluation",
    "Immunized",
    "Problem",
    "RunSettings",
    "SweepSettings",
    "Task",
    "attacks",
    "certificates",
    "certification",
    "data",
    "deep_run",
    "evaluate",
    "evaluation",
    "extractors",
    "immunizers",
    "metrics",
    "run",
]

__getattr__ = lazy(__name__, _PLACES)


def __dir__() -> list[str]:
    return __all__
