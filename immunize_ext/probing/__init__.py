"""Condition-number immunization: make one task slow to learn from features, keep another.

    from immunize_ext.probing import run
    found = run.run(run.RunSettings(method="closed-form"), "runs/kappa")
    print(found.summary())

``run`` holds what the command line does: ``run``, ``attack``, ``compare`` and ``sweep``, each with
its settings. The parts stand in ``data``, ``extractors``, ``metrics``, ``attacks``, ``immunizers``
and ``evaluation``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from immunize_ext.probing.attacks import ATTACKS
    from immunize_ext.probing.data import Problem, Task
    from immunize_ext.probing.evaluation import Evaluation, evaluate
    from immunize_ext.probing.immunizers import METHODS, Immunized
    from immunize_ext.probing.run import AttackSettings, RunSettings, SweepSettings

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
    "evaluate",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(f"immunize_ext.probing.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
