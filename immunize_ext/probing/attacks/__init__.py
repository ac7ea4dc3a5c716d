"""Attackers with their optimizers: who the protection holds against, and who it does not.

An attack is a frozen dataclass of settings with ``run(theta, task, steps=...) -> AttackCurve``;
:data:`ATTACKS` holds them by name. Whatever is registered there has its flags, its row in results
and its row in reports.
"""

from __future__ import annotations

from immunize_ext.probing.attacks.fine_tuning import FineTuned, FineTuningAttack, TrainedPart
from immunize_ext.probing.attacks.harm_choice import HarmChoice, choose_harm
from immunize_ext.probing.attacks.linear_probe import LinearProbeAttack, Traces
from immunize_ext.probing.attacks.losses import LossName
from immunize_ext.probing.attacks.registry import (
    ATTACKS,
    STANDARD,
    AttackName,
    TunedAttack,
    knows,
    label_of,
)
from immunize_ext.probing.attacks.slowdowns import (
    AttackComparison,
    BudgetOutcome,
    attack_at_budgets,
    compare_attack,
    compare_features,
)
from immunize_ext.seams import AttackCurve

__all__ = [
    "ATTACKS",
    "STANDARD",
    "AttackComparison",
    "AttackCurve",
    "AttackName",
    "BudgetOutcome",
    "FineTuned",
    "FineTuningAttack",
    "HarmChoice",
    "LinearProbeAttack",
    "LossName",
    "Traces",
    "TrainedPart",
    "TunedAttack",
    "attack_at_budgets",
    "choose_harm",
    "compare_attack",
    "compare_features",
    "knows",
    "label_of",
]
